"""Freezing of lower layers, against its fact sheet. Every numbered invariant is here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deltune
from deltune.errors import MethodError, TargetError
from tests.methods.common import attached, bits, build, loss_of, output, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_1_and_3_frozen_values_keep_their_bits_and_have_no_gradient(name: str) -> None:
    model = build(name)
    before = bits(model)
    tuned = deltune.attach(model, "freeze(layers=1)")
    trained = {key for key, _ in tuned.named_trainable_parameters()}
    batch = ARCHITECTURES[name].batch(head="classification" if name == "bert" else "language")
    # all of the model's parameters are given to the optimizer: a gradient of zeros would let them decay
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        assert {key for key, value in model.named_parameters() if value.grad is not None} <= trained
        optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in state.items() if key not in trained)
    assert not any(torch.equal(state[key], before[key]) for key in trained)


def test_2_published_counts() -> None:
    for layers, expected in ((1, 4_722_432), (2, 9_444_864), (4, 18_889_728)):
        assert BERT_BASE.count(f"freeze(layers={layers}, targets=ffn.*)") == expected
    for layers in (1, 2, 12):
        assert BERT_BASE.count(f"freeze(layers={layers})") == 7_087_872 * layers
    for layers, expected in ((2, 5_308_416), (4, 10_616_832)):
        # three matrices of a gated feed-forward layer, not two
        assert LLAMA.count(f"freeze(layers={layers}, targets=ffn.*)") == expected
        assert LLAMA.count(f"freeze(layers={layers})") == 3_540_096 * layers
    assert LLAMA.count("freeze(layers=1, targets=attention.*)") == 884_736
    assert BERT_BASE.summary("freeze(layers=2, targets=ffn.*)", head=True).parameters == 9_444_864 + 1_538


def test_2_the_names_are_those_asked_for() -> None:
    whole = {row.site for row in BERT_BASE.summary("freeze(layers=2)").rows}
    model = BERT_BASE.model()
    assert whole == {name for name, _ in model.named_parameters() if re.match(r"bert\.encoder\.layer\.1[01]\.", name)}
    some = {row.site for row in BERT_BASE.summary("freeze(layers=1, targets=ffn.*)").rows}
    layer = "bert.encoder.layer.11"
    assert some == {
        f"{layer}.{module}.{kind}" for module in ("intermediate.dense", "output.dense") for kind in ("weight", "bias")
    }


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5", "bart"])
def test_4_gradients_are_those_of_full_finetuning(name: str) -> None:
    tuned, batch = attached(name, "freeze(layers=1)")
    loss_of(tuned.model, batch).backward()
    whole = build(name)
    loss_of(whole, batch).backward()
    compared = 0
    for key, value in tuned.named_trainable_parameters():
        reference = whole.get_parameter(key).grad
        assert (value.grad is None) == (reference is None), key
        if value.grad is not None and reference is not None:
            assert torch.allclose(value.grad, reference, atol=1e-6), key
            compared += 1
    assert compared > 4


@pytest.mark.parametrize(("name", "layers"), [("bert", "bert.encoder.layer"), ("gpt2", "transformer.h")])
def test_5_no_graph_below_the_cut(name: str, layers: str) -> None:
    tuned, batch = attached(name, "freeze(layers=1)")
    seen: list[tuple[bool, bool]] = []

    def look(module: torch.nn.Module, args: tuple[Tensor, ...], result: Tensor | tuple[Tensor, ...]) -> None:
        hidden = result if isinstance(result, Tensor) else result[0]
        seen.append((args[0].requires_grad, hidden.requires_grad))

    for block in tuned.model.get_submodule(layers):
        block.register_forward_hook(look)
    loss_of(tuned.model, batch).backward()
    assert seen == [(False, False), (False, False), (False, True)]


def test_6_all_layers_are_full_finetuning_of_the_blocks_and_none_the_head() -> None:
    tuned, _ = attached("bert", "freeze(layers=3)")
    names = {key for key, _ in tuned.named_trainable_parameters()}
    expected = {name for name, _ in build("bert").named_parameters() if "layer." in name or "classifier" in name}
    assert names == expected
    tuned, batch = attached("bert", "freeze(layers=0)")
    assert {key for key, _ in tuned.named_trainable_parameters()} == {"classifier.weight", "classifier.bias"}
    before = output(tuned.model, batch)
    train(tuned, batch)
    assert not torch.equal(output(tuned.model, batch), before)
    with pytest.raises(MethodError, match="head"):
        deltune.attach(build("gpt2"), "freeze(layers=0)")
    with pytest.raises(MethodError, match="nothing"):
        deltune.attach(build("bert"), "freeze(layers=0)", train_head=False)


def test_7_feed_forward_to_all_weights_is_eight_to_twelve() -> None:
    def weights(targets: str) -> int:
        rows = BERT_BASE.summary(f"freeze(layers=1, targets='{targets}')").rows
        return sum(row.parameters for row in rows if row.site.endswith(".weight") and "LayerNorm" not in row.site)

    assert 12 * weights("ffn.*") == 8 * weights("layer")
    assert weights("ffn.*") == 2 * weights("attention.*")


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit"])
def test_8_step_0_is_exactly_the_base(name: str) -> None:
    tuned, batch = attached(name, "freeze(layers=1)")
    assert torch.equal(output(tuned.model, batch), output(build(name), batch))


def test_9_impossible_numbers_are_refused_and_layers_count_from_the_top() -> None:
    with pytest.raises(MethodError, match="at least 0"):
        deltune.Freeze(layers=-1)
    with pytest.raises(MethodError, match="3 layers"):
        deltune.attach(build("bert"), "freeze(layers=4)")
    tuned, _ = attached("bert", "freeze(layers=1)")
    numbers = {key.split(".")[3] for key, _ in tuned.named_trainable_parameters() if key.startswith("bert.encoder")}
    assert numbers == {"2"}


def test_10_the_file_holds_what_trained(tmp_path: Path) -> None:
    tuned, batch = attached("gpt2", "freeze(layers=1, targets=ffn.*)")
    train(tuned, batch)
    tuned.save(tmp_path)
    block = "transformer.h.2.mlp"
    assert load_file(tmp_path / "delta.safetensors").keys() == {
        f"{block}.{module}.{kind}" for module in ("c_fc", "c_proj") for kind in ("weight", "bias")
    }
    assert torch.equal(output(deltune.load(build("gpt2"), tmp_path).model, batch), output(tuned.model, batch))


@pytest.mark.parametrize("reentrant", [True, False])
def test_11_checkpointing_leaves_the_gradients(reentrant: bool) -> None:
    for name in ("bert", "vit"):
        tuned, batch = attached(name, "freeze(layers=1)")
        loss_of(tuned.model, batch).backward()
        plain = {key: value.grad for key, value in tuned.named_trainable_parameters()}
        tuned.model.train()
        tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tuned.model.zero_grad()
        loss_of(tuned.model, batch).backward()
        for key, value in tuned.named_trainable_parameters():
            assert torch.allclose(value.grad, plain[key], atol=1e-6), key  # type: ignore[arg-type]


# -- pitfalls ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sublayer", ["ffn", "attention"])
def test_sublayers_as_a_whole_are_refused(sublayer: str) -> None:
    """BERT's feed-forward sublayer is no module but its layer, of which everything would train."""
    with pytest.raises(TargetError, match=rf"{sublayer}\."):
        deltune.attach(build("bert"), f"freeze(layers=1, targets={sublayer})")


@pytest.mark.parametrize(("name", "target"), [("gpt2", "attention.query"), ("phi3", "ffn.up")])
def test_rows_of_a_fused_matrix_are_not_selected_alone(name: str, target: str) -> None:
    with pytest.raises(TargetError, match="other rows"):
        deltune.attach(build(name), f"freeze(layers=1, targets={target})")


def test_a_pattern_of_module_names_may_say_what_it_likes() -> None:
    tuned = deltune.attach(build("gpt2"), "freeze(layers=1, targets=*.attn.c_attn)")
    assert {key for key, _ in tuned.named_trainable_parameters()} == {
        "transformer.h.2.attn.c_attn.weight",
        "transformer.h.2.attn.c_attn.bias",
    }
