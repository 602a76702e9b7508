"""Several attachments at once: stacked, averaged, frozen beside what trains.

Numbers are those of the fact sheet on composition; rows that are routed and several tasks in one pass have tests of
their own (``test_routing``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import StateError
from deltune.training import ReferenceModel
from tests.methods.common import build, loss_of, output, relative_error
from tests.zoo import ARCHITECTURES

#: Behind sublayers, behind residual sums (before a norm, or behind the layer), behind layers.
STACKED = [
    "sequential-adapter(width=4, train_norms=false)",
    "pfeiffer-adapter(width=4)",
    "residual-adapter(width=4)",
]
MODELS = ["bert", "llama-gqa", "t5"]


def two(name: str, first: str, second: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """Both attached, with values that change something."""
    tuned = deltune.attach(build(name, **options), first, name="a", train_head=False)
    tuned.attach(second, name="b", train_head=False)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for attachment in tuned.attachments.values():
            for _, value in attachment.parameters():
                value.add_(0.3 * torch.randn(value.shape, generator=generator).to(value))
    head = "language" if ARCHITECTURES[name].generates else "classification"
    return tuned, ARCHITECTURES[name].batch(head=head)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [*STACKED, "lora(rank=2) + pfeiffer-adapter(width=4) + pfeiffer-adapter(width=3)"])
def test_invariant_01_a_stack_of_one_is_the_adapter(method: str, name: str) -> None:
    tuned, batch = two(name, method, method)
    tuned.activate("a")
    alone = output(tuned.model, batch)
    tuned.activate("a", stacked=True)
    assert torch.equal(output(tuned.model, batch), alone)
    tuned.route(["a"] * len(batch["input_ids"]))
    assert relative_error(output(tuned.model, batch), alone) < 1e-5
    tuned.route(None)
    with tuned.one_pass("a") if name != "t5" else tuned.routed(["a"]):
        assert relative_error(output(tuned.model, batch), alone) < 1e-5


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", STACKED)
def test_invariant_02_a_stack(method: str, name: str) -> None:
    """On top of an adapter that changes nothing it is the other alone; the order counts; it is no sum."""
    tuned, batch = two(name, method, method)
    results = {}
    for names in (("a", "b"), ("b", "a")):
        tuned.activate(*names, stacked=True)
        results[names] = output(tuned.model, batch)
    assert relative_error(results["a", "b"], results["b", "a"]) > 1e-3
    tuned.activate("a", "b")
    assert relative_error(output(tuned.model, batch), results["a", "b"]) > 1e-3
    tuned.activate("a")
    alone = output(tuned.model, batch)
    with torch.no_grad():
        for form in tuned.attachments["b"].forms.values():
            form.up.weight.zero_()
            form.up.bias.zero_()
    tuned.activate("a", "b", stacked=True)
    assert torch.equal(output(tuned.model, batch), alone)
    tuned.activate("b", "a", stacked=True)
    assert torch.equal(output(tuned.model, batch), alone)


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_a_stack_of_sequential_adapters_is_one_function_after_the_other(name: str) -> None:
    """h <- h + A(h), then h <- h + B(h), by hooks of the test's own on a bare model."""
    tuned, batch = two(name, STACKED[0], STACKED[0], dtype=torch.float64)
    tuned.activate("a", "b", stacked=True)
    reference = build(name, dtype=torch.float64)
    for part in deltune.anatomy_of(reference):
        if part.role not in ("attention", "ffn"):
            continue
        forms = [tuned.attachments[other].forms[part.key] for other in "ab"]

        def after(module: Any, args: Any, result: Any, forms: Any = forms) -> Any:
            h = result if isinstance(result, Tensor) else result[0]
            for form in forms:
                narrow = torch.nn.functional.gelu(h @ form.down.weight.T + form.down.bias, approximate="tanh")
                h = h + narrow @ form.up.weight.T + form.up.bias
            return h if isinstance(result, Tensor) else (h, *result[1:])

        reference.get_submodule(part.result or part.module).register_forward_hook(after)
    with torch.no_grad():
        expected = output(reference, batch)
    # LLaMA's norms are float32 whatever the model is
    assert relative_error(output(tuned.model, batch), expected) < (1e-12 if name == "bert" else 1e-6)


@pytest.mark.parametrize("method", ["lora(rank=2)", "parallel-adapter(width=4, dropout=0)", *STACKED])
def test_invariant_03_an_average(method: str) -> None:
    tuned, batch = two("bert", method, method, dtype=torch.float64)
    tuned.activate("a")
    alone = output(tuned.model, batch)
    for key, form in tuned.attachments["b"].forms.items():
        form.load_state_dict(tuned.attachments["a"].forms[key].state_dict())
    tuned.activate("a", "b", weights=(0.5, 0.5))
    assert relative_error(output(tuned.model, batch), alone) < 1e-12
    tuned.activate("a", "b", weights=(1.0, 0.0))
    assert relative_error(output(tuned.model, batch), alone) < 1e-12


def test_other_changes_are_added_in_a_stack() -> None:
    text = "lora(rank=2) + prefix-tuning(length=2, reparameterize=false) + parallel-adapter(width=3, dropout=0)"
    tuned, batch = two("bert", text, text)
    tuned.activate("a", "b")
    added = output(tuned.model, batch)
    tuned.activate("a", "b", stacked=True)
    assert torch.equal(output(tuned.model, batch), added)


@pytest.mark.parametrize("stacked", [False, True])
def test_what_is_frozen_acts_and_does_not_train(stacked: bool) -> None:
    tuned, batch = two("bert", STACKED[1], STACKED[1])
    tuned.activate("a", "b", stacked=stacked)
    together = output(tuned.model, batch)
    tuned.activate("a", "b", stacked=stacked, frozen=["a"])
    assert torch.equal(output(tuned.model, batch), together)
    assert tuned.active == ("a", "b")
    assert tuned.trained == ("b",)
    before = {
        name: [value.clone() for _, value in attachment.parameters()] for name, attachment in tuned.attachments.items()
    }
    own = {id(value) for _, value in tuned.attachments["b"].parameters()}
    assert {id(value) for value in tuned.trainable_parameters()} == own
    assert {id(value) for value in tuned.model.parameters() if value.requires_grad} == own
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=0.1, weight_decay=0.1)
    tuned.bind(optimizer)
    loss_of(tuned.model.train(), batch).backward()
    optimizer.step()
    after = {name: [value for _, value in attachment.parameters()] for name, attachment in tuned.attachments.items()}
    assert all(torch.equal(one, other) for one, other in zip(before["a"], after["a"], strict=True))
    assert not any(torch.equal(one, other) for one, other in zip(before["b"], after["b"], strict=True))
    assert tuned.attachments["a"].steps == 0
    assert tuned.attachments["b"].steps == 1


def test_being_frozen_and_stacked_outlives_what_is_temporary_and_ends_with_the_next_choice() -> None:
    tuned, batch = two("bert", STACKED[1], STACKED[1])
    tuned.activate("a", "b", stacked=True, frozen="a")
    together = output(tuned.model, batch)
    with tuned.disabled():
        assert tuned.trained == ()
    with tuned.routed(["a", None, "b"]):
        assert tuned.trained == ("a", "b")
    tuned.drop_layers_at_random(0)
    tuned.drop_layers_at_random(None)
    assert tuned.trained == ("b",)
    assert torch.equal(output(tuned.model, batch), together)
    tuned.attach("lora(rank=2)", name="c", train_head=False)
    assert tuned.trained == ("c",)
    tuned.activate("a", "b", stacked=True, frozen=("a",))
    tuned.detach("a")
    assert tuned.trained == tuned.active == ("b",)
    with pytest.raises(StateError, match=r"'a' cannot be frozen.*: b"):
        tuned.activate("b", frozen=["a"])
    tuned.activate("b")
    tuned.detach()
    assert not tuned.active


def test_what_acts_for_a_while_leaves_stack_and_route_as_they_were() -> None:
    tuned, batch = two("bert", STACKED[1], STACKED[1])
    tuned.activate("a", "b", stacked=True, frozen=["a"])
    together = output(tuned.model, batch)
    with tuned.activated("b"):
        assert tuned.trained == ("b",)
        assert not torch.equal(output(tuned.model, batch), together)
    assert torch.equal(output(tuned.model, batch), together)
    assert tuned.trained == ("b",)
    reference = ReferenceModel(tuned, "a")
    with torch.no_grad():
        other = reference(**batch).logits
    assert not torch.equal(other, together)
    assert torch.equal(output(tuned.model, batch), together)
    assert tuned.trained == ("b",)
    tuned.route(["a", None, "b"])
    routed = output(tuned.model, batch)
    with tuned.activated("a"):
        pass
    assert torch.equal(output(tuned.model, batch), routed)
    tuned.route(None)
    assert torch.equal(output(tuned.model, batch), together)


def test_what_trains_on_top_is_what_is_saved_and_summed_up(tmp_path: Path) -> None:
    tuned, _ = two("bert", STACKED[1], "pfeiffer-adapter(width=3)")
    tuned.activate("a", "b", stacked=True, frozen=["a"])
    alone = tuned.summary("b").parameters
    assert tuned.summary().parameters == alone != tuned.summary("a").parameters
    tuned.save(tmp_path)
    assert deltune.load(build("bert"), tmp_path).active == ("b",)


def test_inference_mode_under_a_route_leaves_training_possible() -> None:
    tuned, batch = two("bert", "lora(rank=2)", "lora(rank=2, weight_decomposed=true)")
    tuned.route(["a", "b", None])
    with torch.inference_mode():
        tuned.model(**batch)
    loss_of(tuned.model, batch).backward()
    assert all(value.grad is not None for value in tuned.trainable_parameters())


def test_an_attachment_that_cannot_be_put_on_leaves_everything_as_it_was() -> None:
    model = build("bert")
    bare = set(vars(model)), [name for name, _ in model.named_modules()]
    batch = ARCHITECTURES["bert"].batch()
    before = output(model, batch)
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StateError, match="attention implementation"):
        deltune.attach(model, "prefix-tuning(length=2)")
    model.config._attn_implementation_internal = "sdpa"
    assert (set(vars(model)), [name for name, _ in model.named_modules()]) == bare
    assert all(parameter.requires_grad for parameter in model.parameters())
    tuned = deltune.attach(model, "lora(rank=2)", name="a")
    model.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(StateError, match="attention implementation"):
        tuned.attach("prefix-tuning(length=2)", name="b")
    model.config._attn_implementation_internal = "sdpa"
    assert tuned.active == ("a",)
    assert list(tuned.attachments) == ["a"]
    tuned.detach()
    assert torch.equal(output(model, batch), before)


def test_a_merged_stack_comes_apart_as_it_was() -> None:
    tuned, batch = two("bert", "lora(rank=2)", "lora(rank=3, targets=ffn.up)")
    tuned.activate("a", "b", stacked=True, frozen=["b"])
    together = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), together) < 1e-4
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), together)
    assert tuned.trained == ("a",)
