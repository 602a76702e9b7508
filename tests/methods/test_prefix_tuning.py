"""Prefix tuning, against its fact sheet and against Hugging Face peft.

In tests/laws/test_prefix_reference.py: 3 (real keys and values), 8 (an invisible prefix), 9 (encoder states) and
10 (generation), over every architecture. Prefixes of real words and shifted positions: test_prefix_words.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deltune
from deltune.errors import StateError, TargetError
from deltune.methods.additive.prefix_forms import Prefix, PrefixTrunk, ReparameterizedPrefix
from tests.laws.gate_form import naive_attention, prefixes_of
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

SMALL, FLAT = "prefix-tuning(length=3, width=6)", "prefix-tuning(length=3, reparameterize=false)"


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_1_joining_equals_the_gate_form_in_float64(name: str, implementation: str) -> None:
    tuned, batch = attached(name, FLAT, dtype=torch.float64, attn_implementation=implementation)
    reference = build(name, dtype=torch.float64, attn_implementation="eager")
    with naive_attention(reference, prefixes_of(tuned)):
        expected = output(reference, batch)
    # T5's norm, and in some files the softmax, are float32 whatever the model is: equal up to their last bits
    assert relative_error(output(tuned.model, batch), expected) < (1e-6 if name == "t5" else 1e-12)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
def test_2_the_flat_prefix_is_the_networks_bit_for_bit(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, SMALL)
    train(tuned, batch)
    network = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name), tmp_path)
    assert str(loaded.attachments["default"].method).startswith("prefix-tuning(length=3, reparameterize=False")
    assert torch.equal(output(loaded.model, batch), network)


def test_2_the_network_is_its_formula() -> None:
    """[P_k, P_v] = W2 tanh(W1 P' + b1) + b2, keys first, then head by head."""
    trunk = PrefixTrunk(3, 10, 6, torch.float64)
    form = ReparameterizedPrefix(trunk, 2, 4, dtype=torch.float64)
    keys, values = form()
    hidden = torch.tanh(trunk.rows @ trunk.linear.weight.T + trunk.linear.bias)
    both = hidden @ form.linear.weight.T + form.linear.bias
    for head in range(2):
        assert torch.allclose(keys[head], both[:, 4 * head : 4 * head + 4], atol=1e-12)
        assert torch.allclose(values[head], both[:, 8 + 4 * head : 8 + 4 * head + 4], atol=1e-12)
    flat = form.stored()
    assert isinstance(flat, Prefix)
    assert torch.equal(flat()[0], keys)
    assert torch.equal(flat()[1], values)
    assert trunk.stored() is None


def attention_of_layer_0(name: str, tuned: deltune.Tuned, batch: dict[str, Tensor]) -> Tensor:
    path = {"bert": "bert.encoder.layer.0.attention.self", "gpt2": "transformer.h.0.attn"}[name]
    seen: list[Tensor] = []
    handle = tuned.model.get_submodule(path).register_forward_hook(lambda module, args, result: seen.append(result[1]))
    output(tuned.model, batch)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_4_and_5_the_prefix_rescales_attention_and_every_query_sees_it(name: str, padding: str) -> None:
    tuned, _ = attached(name, FLAT, attn_implementation="eager")
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    weights = attention_of_layer_0(name, tuned, batch)
    with tuned.disabled():
        frozen = attention_of_layer_0(name, tuned, batch)
    prefix, text = weights[..., :3], weights[..., 3:]
    # 5: visible to every query, the first included; padding stays hidden
    assert (prefix > 0).all()
    hidden = batch["attention_mask"] == 0
    assert hidden.any() == (padding == "right")
    assert not text.masked_select(hidden[:, None, None, :]).any()
    # 4: between tokens nothing changes but one factor for each query
    assert torch.allclose(text, (1 - prefix.sum(-1, keepdim=True)) * frozen, atol=1e-6)


def test_6_published_counts() -> None:
    flat = "prefix-tuning(length={}, reparameterize=false)"
    for length, expected in ((5, 92_160), (10, 184_320), (30, 552_960), (100, 1_843_200)):
        assert BERT_BASE.count(flat.format(length)) == expected
    for length, expected in ((5, 57_600), (10, 115_200), (30, 345_600), (100, 1_152_000)):
        assert LLAMA.count(flat.format(length)) == expected
    assert BERT_BASE.count("prefix-tuning(length=10, width=512)") == 9_857_024
    assert BERT_BASE.count("prefix-tuning(length=30, width=800)") == 15_402_272
    assert LLAMA.count("prefix-tuning(length=10, width=512)") == 6_210_944
    assert LLAMA.count("prefix-tuning(length=30, width=800)") == 9_706_400


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
def test_7_a_prefix_of_zeros_still_takes_its_share(name: str) -> None:
    tuned, batch = attached(name, FLAT)
    with torch.no_grad():
        for _, value in tuned.attachments["default"].parameters():
            if value.dim() == 3:
                value.zero_()
    changed = output(tuned.model, batch)
    with tuned.disabled():
        assert (changed - output(tuned.model, batch)).abs().max() > 1e-3


def test_11_the_backbone_stays_and_the_file_has_no_network(tmp_path: Path) -> None:
    model = build("llama-gqa")
    before = bits(model)
    batch = ARCHITECTURES["llama-gqa"].batch(head="language")
    tuned = deltune.attach(model, SMALL)
    train(tuned, batch)
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "delta.safetensors")
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"keys", "values"}
    assert {tuple(value.shape) for value in tensors.values()} == {(2, 3, 8)}  # K, not H
    assert sum(value.nbytes for value in tensors.values()) == 2 * 3 * 3 * 16 * 4  # 2 L P d_kv, 4 bytes each


def test_12_order_of_layers_keys_and_values_matters() -> None:
    tuned, batch = attached("gpt2", FLAT)
    forms = tuned.attachments["default"].forms
    before = output(tuned.model, batch)

    def swap(one: torch.nn.Parameter, other: torch.nn.Parameter) -> None:
        one.data, other.data = other.data, one.data

    first, last = forms["decoder.0.attention"], forms["decoder.2.attention"]
    for pair in ((first.keys, first.values), (first.keys, last.keys), (first.values, last.values)):
        swap(*pair)
        assert (output(tuned.model, batch) - before).abs().max() > 1e-3
        swap(*pair)
    assert torch.equal(output(tuned.model, batch), before)


def test_dropout_is_of_the_made_keys_and_values_in_training_alone() -> None:
    form = Prefix(2, 50, 8, dropout=0.5)
    assert torch.equal(form.eval()()[0], form.keys)
    keys, values = form.train()()
    for made, stored in ((keys, form.keys), (values, form.values)):
        kept = made != 0
        assert 0.35 < float(kept.float().mean()) < 0.65
        assert torch.allclose(made[kept], 2 * stored[kept])
    trunk = PrefixTrunk(3, 10, 6, torch.float32)
    network = ReparameterizedPrefix(trunk, 2, 4, dropout=0.5).train()
    expected = network.eval()()
    stored_form = network.train().stored()
    assert torch.equal(stored_form.keys, expected[0])  # exported without dropout, whatever the mode
    assert network.training


# -- faults of peers -----------------------------------------------------------------------------------------


def test_a_prefix_takes_no_position_of_the_text() -> None:
    """A peer shifts the text: a context as long as the table of positions then fails or loses tokens."""
    model = build("gpt2", n_positions=12)
    tuned = deltune.attach(model, FLAT)
    batch = ARCHITECTURES["gpt2"].batch(length=12)
    logits = output(model, batch)
    assert logits.shape[1] == 12
    explicit = output(model, {**batch, "position_ids": torch.arange(12).expand(3, -1)})
    assert torch.equal(logits, explicit)
    assert tuned.active == ("default",)


@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2"])
def test_a_prefix_acts_on_padded_and_unpadded_rows_alike(name: str, padding: str) -> None:
    """A peer's has no effect at all on a padded batch."""
    tuned, _ = attached(name, FLAT)
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert (value.grad.abs().amax((0, 2)) > 1e-6).all(), key
    changed = output(tuned.model, batch)
    with tuned.disabled():
        frozen = output(tuned.model, batch)
    real = ARCHITECTURES[name].real(batch)
    assert ((changed - frozen).abs().amax(-1)[real] > 1e-3).all()


def test_a_prefix_trains_under_gradient_checkpointing() -> None:
    """A peer stops with a size mismatch; a prefix in the cache would vanish in silence."""
    tuned, batch = attached("llama-gqa", FLAT)
    loss_of(tuned.model, batch).backward()
    plain = [value.grad.clone() for value in tuned.trainable_parameters()]
    tuned.model.train()
    tuned.model.gradient_checkpointing_enable()
    tuned.model.zero_grad()
    loss_of(tuned.model, batch).backward()
    for value, wanted in zip(tuned.trainable_parameters(), plain, strict=True):
        assert relative_error(value.grad, wanted) < 1e-5


def test_what_cannot_take_a_prefix_says_so() -> None:
    with pytest.raises(TargetError, match="attention interface"):
        deltune.attach(build("deberta-v2"), SMALL)
    model = build("bert")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StateError, match=r"flex_attention.*sdpa"):
        deltune.attach(model, SMALL)


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_equals_huggingface_peft_at_its_positions(name: str, padding: str) -> None:
    """Theirs lies in the cache and shifts the text by P; told the same positions, ours gives the same logits."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    tuned, _ = attached(name, FLAT)
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    real = batch["attention_mask"].bool()
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(name), config).eval()
    forms = list(tuned.attachments["default"].forms.values())
    slots = [tensor.permute(1, 0, 2) for form in forms for tensor in (form.keys, form.values)]
    table = theirs.prompt_encoder["default"].embedding.weight
    with torch.no_grad():
        table.copy_(torch.stack(slots, dim=1).flatten(1))
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0) + 3
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    with torch.no_grad():
        # peft drops position_ids, so that padded rows keep the padding's places
        expected = theirs(**inputs).logits
    if padding == "left":
        positions = torch.arange(3, 3 + real.shape[1]).expand_as(positions)
    ours = output(tuned.model, {**inputs, "position_ids": positions})
    assert relative_error(ours[real], expected[real]) < 1e-5
