"""BitFit, against its fact sheet.

Every numbered invariant that the sheet asks for is here. The pooler's bias, which the authors' code adds to every
subset (46,848 in 2), is left out by design; the baselines of random parameters are no methods.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import MethodError, TargetError
from tests.methods.common import attached, bits, build, loss_of, output, train
from tests.methods.sizes import BERT_BASE, BERT_LARGE, LLAMA, ROBERTA_BASE
from tests.zoo import ARCHITECTURES

SUBSET = "bitfit(targets=attention.query,ffn.up)"


def test_1_the_trained_names_of_bert() -> None:
    names = {row.site for row in BERT_BASE.summary("bitfit", head=True).rows}
    attention = ("self.query", "self.key", "self.value", "output.dense", "output.LayerNorm")
    block = [f"attention.{name}" for name in attention] + ["intermediate.dense", "output.dense", "output.LayerNorm"]
    expected = {f"bert.encoder.layer.{index}.{module}.bias" for index in range(12) for module in block}
    expected |= {"bert.embeddings.LayerNorm.bias", "bert.pooler.dense.bias", "classifier.weight", "classifier.bias"}
    assert names == expected
    assert BERT_BASE.count("bitfit") == 102_912
    assert BERT_BASE.summary("bitfit", head=True).head_parameters == 1_538
    assert BERT_BASE.count("bitfit(targets=attention.*,ffn.*)") == 83_712 - 768  # without the pooler
    assert BERT_LARGE.count("bitfit") == 272_384
    assert ROBERTA_BASE.count("bitfit") == 102_144


def test_2_the_smaller_variant() -> None:
    names = [row.site for row in BERT_BASE.summary(SUBSET).rows]
    assert len(names) == 24
    assert all(re.search(r"(self\.query|intermediate\.dense)\.bias$", name) for name in names)
    assert BERT_BASE.count(SUBSET) == 46_080
    assert BERT_LARGE.count(SUBSET) == 123_904 - 1_024  # without the pooler


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "qwen2", "bart", "vit", "electra"])
def test_3_and_4_vectors_only_and_no_weight_of_a_norm(name: str) -> None:
    tuned, _ = attached(name, "bitfit", "classification" if name == "vit" else None)
    head = tuned.attachments["default"].head_names
    names = {key: value for key, value in tuned.named_trainable_parameters() if key not in head}
    assert all(value.dim() == 1 and key.endswith(".bias") for key, value in names.items())
    norms = [part.module for part in tuned.anatomy.of("norm")]
    biased = [module for module in norms if "bias" in dict(tuned.model.get_submodule(module).named_parameters())]
    assert {f"{module}.bias" for module in biased} <= names.keys()
    assert not {f"{module}.weight" for module in norms} & names.keys()


def test_matrices_that_are_called_bias_are_none() -> None:
    """T5's table of relative positions, DeBERTa's."""
    for name in ("t5", "deberta-v2"):
        tuned, _ = attached(name, "bitfit(missing=add)")
        assert not any("relative" in key or "rel_" in key for key, _ in tuned.named_trainable_parameters())


def test_a_target_without_biases_is_refused_although_others_have_some() -> None:
    with pytest.raises(MethodError, match=r"ffn\.up has no bias in this qwen2.*missing=add"):
        attached("qwen2", SUBSET)
    tuned, _ = attached("qwen2", "bitfit(targets=attention.query,ffn.up,missing=add)")
    assert {key.split(".")[-2] for key, _ in tuned.named_trainable_parameters()} == {"q_proj", "up_proj"}
    # a glob need not find some everywhere
    tuned, _ = attached("qwen2", "bitfit(targets=attention.*)")
    assert {key.split(".")[-2] for key, _ in tuned.named_trainable_parameters()} == {"q_proj", "k_proj", "v_proj"}


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
def test_5_step_0_is_exactly_the_frozen_model(name: str) -> None:
    tuned, batch = attached(name, "bitfit")
    assert torch.equal(output(tuned.model, batch), output(build(name), batch))


@pytest.mark.parametrize(("name", "rotary"), [("bert", False), ("qwen2", True)])
def test_6_the_bias_of_keys_has_a_gradient_with_rotation_only(name: str, rotary: bool) -> None:
    tuned, batch = attached(name, "bitfit", dtype=torch.float64)
    loss_of(tuned.model, batch).backward()
    gradients = {key: float(value.grad.abs().max()) for key, value in tuned.named_trainable_parameters()}
    keys = {key: value for key, value in gradients.items() if re.search(r"\.(key|k_proj)\.bias$", key)}
    assert len(keys) == 3
    for key, value in keys.items():
        queries = gradients[key.replace("key", "query").replace("k_proj", "q_proj")]
        assert (value > 1e-3 * queries) if rotary else (value < 1e-6 * queries), key


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_7_weights_keep_their_bits_under_decay(name: str) -> None:
    model = build(name)
    before = bits(model)
    tuned = deltune.attach(model, "bitfit")
    batch = ARCHITECTURES[name].batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    trained = {key for key, _ in tuned.named_trainable_parameters()}
    for key, value in model.state_dict().items():
        if key not in trained:
            assert torch.equal(value, before[key]), key
    assert not all(torch.equal(model.state_dict()[key], before[key]) for key in trained)


@pytest.mark.parametrize("name", ["llama-gqa", "t5", "phi3", "modernbert"])
def test_8_added_biases_of_zeros_change_nothing(name: str) -> None:
    model = build(name)
    keys = model.state_dict().keys()
    batch = ARCHITECTURES[name].batch(head="classification" if name == "modernbert" else "language")
    before = output(model, batch)
    tuned = deltune.attach(model, "bitfit(missing=add)")
    assert torch.equal(output(model, batch), before)
    train(tuned, batch)
    assert not torch.equal(output(model, batch), before)
    tuned.detach()
    assert torch.equal(output(model, batch), before)
    assert model.state_dict().keys() == keys


def test_8_published_count() -> None:
    assert LLAMA.count("bitfit(missing=add)") == 155_520


def test_9_the_file_and_the_base_are_the_tuned_model(tmp_path: Path) -> None:
    tuned, batch = attached("bert", "bitfit")
    train(tuned, batch)
    tuned.save(tmp_path)
    stored = load_file(tmp_path / "delta.safetensors")
    plain = build("bert")
    missing, unexpected = plain.load_state_dict(stored, strict=False)
    assert not unexpected
    assert len(missing) + len(stored) == len(plain.state_dict())
    # put together by hand, and by us
    assert torch.equal(output(plain, batch), output(tuned.model, batch))
    assert torch.equal(output(deltune.load(build("bert"), tmp_path).model, batch), output(tuned.model, batch))


@pytest.mark.parametrize("name", ["bert", "gpt2", "qwen2"])
def test_10_gradients_are_those_of_the_whole_model(name: str) -> None:
    tuned, batch = attached(name, "bitfit")
    loss_of(tuned.model, batch).backward()
    whole = build(name)
    loss_of(whole, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert torch.allclose(value.grad, whole.get_parameter(key).grad, atol=1e-6), key  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llama-gqa", "t5", "mistral"])
def test_11_a_model_without_biases_is_refused(name: str) -> None:
    with pytest.raises(MethodError, match=r"missing=add"):
        deltune.attach(build(name), "bitfit")


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_rows_of_a_fused_bias_are_not_selected_alone(name: str) -> None:
    """Queries, keys and values share one vector: taking it whole would train more than was asked for."""
    with pytest.raises(TargetError, match=r"attention\.key, attention\.value"):
        deltune.attach(build(name), "bitfit(targets=attention.query)")
    tuned = deltune.attach(build(name), "bitfit(targets=attention.query,attention.key,attention.value)")
    assert tuned.summary().parameters == 3 * 96


def test_sublayers_as_a_whole_have_no_bias() -> None:
    with pytest.raises(TargetError, match=r"ffn\.up"):
        deltune.attach(build("bert"), "bitfit(targets=ffn)")
