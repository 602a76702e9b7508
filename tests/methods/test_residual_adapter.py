"""Residual adapters, against their fact sheet.

Invariant 8 and the embeddings in 4 concern new tokens of the vocabulary, which are outside of the method (its page says
so): no embedding is trained, and 7 tests that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import TargetError
from deltune.methods.additive.bottleneck import Bottleneck
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

SMALL = "residual-adapter(width=4, standard_deviation=0.3)"
#: Normalised after the sum, and before the sublayer; with the layers of every stack.
LAYERS = {
    "bert": {"encoder": "bert.encoder.layer"},
    "bart": {"encoder": "model.encoder.layers", "decoder": "model.decoder.layers"},
    "gpt2": {"decoder": "transformer.h"},
    "llama-gqa": {"decoder": "model.layers"},
    "t5": {"encoder": "encoder.block", "decoder": "decoder.block"},
}


def forms_of(tuned: deltune.Tuned) -> dict[str, Bottleneck]:
    return {key: form for key, _, form in tuned.attachments["default"].sites}  # type: ignore[misc]


def change(form: Bottleneck, x: Tensor) -> Tensor:
    """W_up relu(W_down LN(x) + b_down) + b_up."""
    assert form.norm is not None
    centred = x - x.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    narrow = (normed * form.norm.weight + form.norm.bias) @ form.down.weight.T + form.down.bias
    return narrow.clamp(min=0) @ form.up.weight.T + form.up.bias


def layers_of(model: Any, name: str) -> dict[str, Any]:
    """The layers by the keys of their forms."""
    return {
        f"{stack}.{index}.layer": layer
        for stack, path in LAYERS[name].items()
        for index, layer in enumerate(model.get_submodule(path))
    }


@pytest.mark.parametrize("name", LAYERS)
def test_invariant_01_its_change_is_its_formula(name: str) -> None:
    """Every layer of a bare model, wrapped by the formula, gives the same model, within 1e-12 in float64."""
    tuned = deltune.attach(build(name, dtype=torch.float64), SMALL, train_head=False)
    batch = ARCHITECTURES[name].batch(head="classification" if name == "bert" else "language")
    train(tuned, batch)
    bare, forms = build(name, dtype=torch.float64), forms_of(tuned)
    layers = layers_of(bare, name)
    assert layers.keys() == forms.keys()
    differences = []
    for key, layer in layers.items():

        def forward(*args: Any, own: Any = layer.forward, form: Bottleneck = forms[key], **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            stream = result if isinstance(result, Tensor) else result[0]
            delta = change(form, stream)
            differences.append((form(stream) - delta).abs().max())
            return stream + delta if isinstance(result, Tensor) else (stream + delta, *result[1:])

        layer.forward = forward
    expected = output(bare, batch)
    assert relative_error(output(tuned.model, batch), expected) < 1e-12
    assert len(differences) == len(layers)
    assert max(differences) < 1e-12
    assert relative_error(expected, output(build(name, dtype=torch.float64), batch)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", LAYERS)
def test_invariant_02_zero_weights_upwards_are_the_frozen_model(name: str, dtype: torch.dtype) -> None:
    tuned, batch = attached(name, SMALL, dtype=dtype)
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert not torch.equal(output(tuned.model, batch), before)
    with torch.no_grad():
        for form in forms_of(tuned).values():
            form.up.weight.zero_()
            form.up.bias.zero_()
    assert torch.equal(output(tuned.model, batch), before)


def test_invariant_03_disabled_is_the_frozen_model() -> None:
    tuned, batch = attached("gpt2", SMALL)
    train(tuned, batch)
    bare = output(build("gpt2"), batch)
    assert not torch.equal(output(tuned.model, batch), bare)
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), bare)
    tuned.activate()
    assert torch.equal(output(tuned.model, batch), bare)


def test_invariant_04_published_counts() -> None:
    for width, of_bert, of_llama in (
        (10, 212_088, 397_740),
        (100, 1_872_048, 3_510_840),
        (300, 5_560_848, 10_428_840),
    ):
        assert (
            BERT_BASE.count(f"residual-adapter(width={width})") == of_bert == 12 * (2 * 768 * width + width + 3 * 768)
        )
        assert LLAMA.count(f"residual-adapter(width={width})") == of_llama
    assert BERT_BASE.count("residual-adapter") == 1_872_048
    assert sum(BERT_BASE.count(f"residual-adapter(width={m})") for m in (300, 100, 100, 300, 10)) == 15_077_880


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_invariant_05_one_behind_each_layer(name: str) -> None:
    """It reads what the layer, of the bare model, hands on, and what the layer hands on has the change in it."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.heads[0])
    anatomy = deltune.anatomy_of(model)
    batch = architecture.batch(head=architecture.heads[0])
    handed: dict[str, list[Tensor]] = {}
    read: dict[str, list[Tensor]] = {}

    def note(where: dict[str, list[Tensor]], key: str, value: Any) -> None:
        where.setdefault(key, []).append(value if isinstance(value, Tensor) else value[0])

    # put on before ours, so that they see the bare layer's output
    for part in anatomy.of("layer"):
        model.get_submodule(part.module).register_forward_hook(
            lambda module, args, output, key=part.key: note(handed, key, output)
        )
    tuned = deltune.attach(model, SMALL)
    forms = forms_of(tuned)
    assert list(forms) == [part.key for part in anatomy.of("layer")]
    for key, form in forms.items():
        form.register_forward_pre_hook(lambda module, args, key=key: note(read, key, args[0]))
    after: dict[str, list[Tensor]] = {}
    for part in anatomy.of("layer"):
        model.get_submodule(part.module).register_forward_hook(
            lambda module, args, output, key=part.key: note(after, key, output)
        )
    with torch.no_grad():
        model(**batch)
    assert read.keys() == handed.keys()
    assert read
    for key in read:
        repeats = anatomy.stacks[key.split(".")[0]].repeats
        assert len(read[key]) == repeats
        for mine, theirs, result in zip(read[key], handed[key], after[key], strict=True):
            assert torch.equal(mine, theirs)
            torch.testing.assert_close(result, theirs + change(forms[key], theirs).detach())


def test_invariant_06_the_size_of_the_stream_does_not_matter() -> None:
    tuned, _ = attached("gpt2", SMALL, dtype=torch.float64)
    form = forms_of(tuned)["decoder.0.layer"]
    x = 300 * torch.randn(2, 5, 32, dtype=torch.float64)
    for factor in (0.5, 3.0, 1000.0):
        assert relative_error(form(factor * x), form(x)) < 1e-6
    assert relative_error(form(x + torch.randn_like(x) * 100), form(x)) > 1e-2


@pytest.mark.parametrize("name", LAYERS)
def test_invariant_07_gradients_reach_the_adapters_alone(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    loss_of(tuned.model, batch).backward()
    trainable = {id(value) for value in tuned.trainable_parameters()}
    for form in forms_of(tuned).values():
        names = {key for key, value in form.named_parameters() if value.grad is not None and value.grad.abs().max() > 0}
        assert names == {"norm.weight", "norm.bias", "down.weight", "down.bias", "up.weight", "up.bias"}
    assert all(value.grad is None for value in tuned.model.parameters() if id(value) not in trainable)


def test_invariant_09_tasks_of_different_widths_do_not_touch_each_other() -> None:
    model = build("gpt2")
    tuned = deltune.attach(model, "residual-adapter(width=10)", "first")
    tuned.attach("residual-adapter(width=3)", "second")
    others = {key: value.detach().clone() for key, value in tuned.attachments["second"].parameters()}
    tuned.activate("first")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, ARCHITECTURES["gpt2"].batch(head="language")).backward()
        assert all(value.grad is None for _, value in tuned.attachments["second"].parameters())
        optimizer.step()
    assert all(torch.equal(value, others[key]) for key, value in tuned.attachments["second"].parameters())
    assert all(value.grad is not None for _, value in tuned.attachments["first"].parameters())


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "bert"])
def test_invariant_10_near_the_identity_at_the_start(name: str) -> None:
    tuned, batch = attached(name, "residual-adapter(width=8)", head="base")
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert 0 < relative_error(output(tuned.model, batch), before) < 5e-2


def test_initial_values_are_those_of_the_authors() -> None:
    tuned, _ = attached("bert", "residual-adapter(width=200)")
    for form in forms_of(tuned).values():
        assert form.norm is not None
        assert torch.equal(form.norm.weight, torch.ones(32))
        assert not any(value.any() for value in (form.norm.bias, form.down.bias, form.up.bias))
        for linear in (form.down, form.up):
            assert float(linear.weight.detach().std()) == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_hidden_states_are_those_that_the_layers_hand_on(name: str) -> None:
    """What a model lists as its hidden states has the changes in it."""
    tuned, batch = attached(name, SMALL, head="base")
    states = "decoder_hidden_states" if name == "t5" else "hidden_states"
    with torch.no_grad():
        changed = getattr(tuned.model(**batch, output_hidden_states=True), states)
        with tuned.disabled():
            bare = getattr(tuned.model(**batch, output_hidden_states=True), states)
    assert len(changed) == len(bare)
    assert [torch.equal(one, other) for one, other in zip(changed, bare, strict=True)] == [True] + [False] * (
        len(bare) - 1
    )


def test_layers_can_be_chosen_and_modules_by_name() -> None:
    model = build("gpt2")
    tuned = deltune.attach(model, "residual-adapter(width=2, targets='layer layers=-1')")
    assert list(forms_of(tuned)) == ["decoder.2.layer"]
    tuned.attach("residual-adapter(width=2, targets=transformer.h.0)", "other")
    assert list(tuned.attachments["other"].forms) == ["transformer.h.0"]
    for wrong, message in (("ffn", "cannot act on the role 'ffn'"), ("transformer.wpe", "without a matrix")):
        with pytest.raises(TargetError, match=message):
            tuned.attach(f"residual-adapter(targets={wrong})", "wrong")
