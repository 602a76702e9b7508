"""Pfeiffer adapters, against the invariants of the sheet ``sequential_adapter`` that concern their placement.

Of the rest, 4 is law 3, 10 law 7 and 11 law 2 (``tests/laws``); 5, 9 and 12 are of the module, which all adapters
share (``test_bottleneck``, ``test_sequential_adapter``); 8 does not concern them: their norms stay frozen.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltune
from deltune.backbone import describe
from deltune.errors import TargetError
from deltune.methods.additive.bottleneck import Bottleneck
from deltune.sites import LayerSite, NormedSumSite
from tests.methods.common import attached, build, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

#: Normalised after the sum, and before the sublayer.
POST, PRE = ["bert", "bart", "distilbert", "albert", "deberta-v2"], ["gpt2", "llama-gqa", "t5", "gemma2"]
SMALL = "pfeiffer-adapter(width=4, standard_deviation=0.3)"


def forms_of(tuned: deltune.Tuned) -> dict[str, Bottleneck]:
    return {key: form for key, _, form in tuned.attachments["default"].sites}  # type: ignore[misc]


def change(form: Bottleneck, x: Tensor) -> Tensor:
    """W_up relu(W_down x + b_down) + b_up."""
    return F.linear(F.linear(x, form.down.weight, form.down.bias).clamp(min=0), form.up.weight, form.up.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POST + PRE)
def test_invariant_01_zero_weights_upwards_are_the_frozen_model(name: str, dtype: torch.dtype) -> None:
    tuned, batch = attached(name, SMALL, dtype=dtype)
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert not torch.equal(output(tuned.model, batch), before)
    with torch.no_grad():
        for form in forms_of(tuned).values():
            form.up.weight.zero_()
            form.up.bias.zero_()
    assert torch.equal(output(tuned.model, batch), before)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_invariant_02_near_the_identity_at_the_start(name: str) -> None:
    tuned, batch = attached(name, "pfeiffer-adapter(width=8, standard_deviation=0.01)", head="base")
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert 0 < (output(tuned.model, batch) - before).abs().max() < 5e-2


def test_invariant_03_published_counts() -> None:
    assert BERT_BASE.count("pfeiffer-adapter") == BERT_BASE.count("pfeiffer-adapter(width=48)") == 894_528
    assert BERT_BASE.count("pfeiffer-adapter(width=d/2)") == 7_091_712
    assert BERT_BASE.summary("pfeiffer-adapter", head=True).parameters == 894_528 + 1_538
    assert LLAMA.count("pfeiffer-adapter") == 1_262_520
    assert LLAMA.count("pfeiffer-adapter(width=d/2)") == 9_979_200


def test_invariant_06_where_norms_follow_the_sum_it_reads_and_is_normalised() -> None:
    """BERT, written out: z = LN2(a + f), y = LN2(a + f + B(z))."""
    tuned, batch = attached("bert", SMALL, head="base", dtype=torch.float64)
    train(tuned, batch)
    model, forms = tuned.model, forms_of(tuned)
    assert list(forms) == [f"encoder.{layer}.ffn" for layer in range(3)]
    read: dict[str, Tensor] = {}
    handles = [
        form.register_forward_pre_hook(lambda module, args, key=key: read.update({key: args[0]}))  # type: ignore[misc]
        for key, form in forms.items()
    ]
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        for index, layer in enumerate(model.encoder.layer):
            x = hidden[index]
            a = layer.attention.output.LayerNorm(x + layer.attention.output.dense(layer.attention.self(x)[0]))
            f = layer.output.dense(layer.intermediate(a))
            norm = layer.output.LayerNorm
            facts = (norm.weight.shape, norm.weight, norm.bias, norm.eps)
            z = F.layer_norm(f + a, *facts)
            form = forms[f"encoder.{index}.ffn"]
            assert (read[f"encoder.{index}.ffn"] - z).abs().max() < 1e-12
            assert relative_error(hidden[index + 1], F.layer_norm(a + f + change(form, z), *facts)) < 1e-12
            # not the adapter that reads the sublayer's own result (7)
            assert relative_error(hidden[index + 1], F.layer_norm(a + f + change(form, f), *facts)) > 1e-3


@pytest.mark.parametrize(
    ("name", "stacks"),
    [
        ("gpt2", {"decoder": "transformer.h"}),
        ("llama-gqa", {"decoder": "model.layers"}),
        ("t5", {"encoder": "encoder.block", "decoder": "decoder.block"}),
    ],
)
def test_invariant_06_where_norms_come_first_it_reads_the_sum(name: str, stacks: dict[str, str]) -> None:
    """y = s + f + B(s + f), where s + f is what the bare layer makes of its input."""
    tuned, batch = attached(name, SMALL, dtype=torch.float64)
    train(tuned, batch)
    bare, forms = build(name, dtype=torch.float64), forms_of(tuned)
    layers = {
        f"{stack}.{index}.ffn": layer
        for stack, path in stacks.items()
        for index, layer in enumerate(bare.get_submodule(path))
    }
    assert layers.keys() == forms.keys()
    for key, layer in layers.items():

        def forward(*args: Any, own: Any = layer.forward, form: Bottleneck = forms[key], **kwargs: Any) -> Any:
            result = own(*args, **kwargs)
            if isinstance(result, Tensor):
                return result + change(form, result)
            return result[0] + change(form, result[0]), *result[1:]

        layer.forward = forward
    assert relative_error(output(tuned.model, batch), output(bare, batch)) < 1e-12


@pytest.mark.parametrize("name", POST)
def test_invariant_07_the_norm_is_evaluated_twice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With zero weights it yet returns LN2(a + f): 1."""
    tuned, batch = attached(name, "pfeiffer-adapter(width=2, initialization=kaiming, targets='ffn layers=0')")
    sites = [site for _, site, _ in tuned.attachments["default"].sites]
    assert all(isinstance(site, NormedSumSite) for site in sites)
    calls: list[int] = []
    for site in sites:
        norm = tuned.model.get_submodule(site.norm)  # type: ignore[union-attr]
        own = norm.forward
        monkeypatch.setattr(norm, "forward", lambda x, own=own: calls.append(1) or own(x))  # type: ignore[func-returns-value]
    with_adapter = output(tuned.model, batch)
    twice = len(calls)
    calls.clear()
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), with_adapter)
    assert twice == 2 * len(calls) > 0


def test_norms_of_the_model_stay_frozen() -> None:
    tuned, _ = attached("bert", "pfeiffer-adapter")
    assert not tuned.attachments["default"].selected_names


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_has_one_in_each_layer(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.heads[0])
    anatomy = deltune.anatomy_of(model)
    sites = [site for _, site, _ in deltune.attach(model, SMALL).attachments["default"].sites]
    assert [site.key for site in sites] == [part.key for part in anatomy.of("ffn")]
    for site in sites:
        assert isinstance(site, NormedSumSite if site.part.norm_after else LayerSite)


def test_it_changes_with_a_weight_and_beside_other_adapters_as_if_alone() -> None:
    """At the sum before the last norm, the change of two is the weighted sum of each one's."""
    tuned, batch = attached(
        "bert", "pfeiffer-adapter(width=4, standard_deviation=0.3, targets='ffn layers=-1')", "base"
    )
    tuned.attach("pfeiffer-adapter(width=3, standard_deviation=0.3, targets='ffn layers=-1')", "other")
    norm = tuned.model.encoder.layer[-1].output.LayerNorm
    seen: list[Tensor] = []
    for names, weights in (((), ()), (("default",), (1,)), (("other",), (1,)), (("default", "other"), (0.5, -2))):
        tuned.activate(*names, weights=weights)
        own = norm.forward
        norm.forward = lambda x, own=own: (seen.append(x), own(x))[1]
        output(tuned.model, batch)
        del norm.forward
    bare, one, other, both = (seen[index] for index in (0, 2, 4, 6))  # with an adapter the norm runs twice
    assert torch.allclose(both, bare + 0.5 * (one - bare) - 2 * (other - bare), atol=1e-5)
    assert not torch.allclose(one, bare, atol=1e-3)


def test_behind_one_layer_a_residual_adapter_reads_the_same() -> None:
    """Where norms come first both act on the layer's output; neither reads the other's change."""
    model = build("gpt2", "base")
    batch = ARCHITECTURES["gpt2"].batch()
    torch.manual_seed(1)
    tuned = deltune.attach(model, "pfeiffer-adapter(width=4, standard_deviation=0.3, targets='ffn layers=-1')")
    tuned.attach("residual-adapter(width=4, standard_deviation=0.3, targets='layer layers=-1')", "other")
    seen: list[Tensor] = []
    model.ln_f.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    for names in ((), ("default",), ("other",), ("default", "other"), ("other", "default")):
        tuned.activate(*names)
        output(model, batch)
    bare, one, other, both, swapped = seen
    assert torch.allclose(both, one + other - bare, atol=1e-5)
    assert torch.allclose(swapped, both, atol=1e-5)


def test_attention_and_unknown_norms_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TargetError, match="cannot act on the role 'attention'"):
        deltune.attach(build("bert"), "pfeiffer-adapter(targets=attention)")
    monkeypatch.setattr(describe, "FAMILIES", ())
    with pytest.raises(TargetError, match=r"not known whether structure normalises .* sequential-adapter"):
        deltune.attach(build("llama-gqa"), "pfeiffer-adapter")


def test_the_bare_norm_is_left_alone() -> None:
    """The hook is on while live only, and a norm that nobody adapts is not evaluated twice."""
    tuned, _ = attached("bert", "pfeiffer-adapter(targets='ffn layers=1')")
    norms = [layer.output.LayerNorm for layer in tuned.model.bert.encoder.layer]
    assert [len(norm._forward_pre_hooks) for norm in norms] == [0, 1, 0]
    with tuned.disabled():
        assert not any(norm._forward_pre_hooks for norm in norms)
    assert all(isinstance(norm, nn.LayerNorm) for norm in norms)
