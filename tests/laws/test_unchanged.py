"""Laws 1, 2 and 3: unchanged at the start, bit-identical when off, and only the trainable part moves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import deltune
from deltune.methods import parse
from tests.laws.cases import CHANGED, METHODS, UNCHANGED, Case, cases, named, take_steps


def hooks_of(model: torch.nn.Module) -> dict[str, int]:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_load_state_dict_post_hooks")
    return {
        f"{name}.{kind}": len(vars(module)[kind])
        for name, module in model.named_modules()
        for kind in kinds
        if len(vars(module)[kind])
    }


def picture_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything about a model that must be as before: classes, keys, bits, hooks, configuration, flags."""
    return {
        "classes": {name: type(module).__qualname__ for name, module in model.named_modules()},
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "hooks": hooks_of(model),
        "config": copy.deepcopy(model.config.to_dict()),
        "configs": {name: id(vars(module).get("config")) for name, module in model.named_modules()},
        "implementation": model.config._attn_implementation,
        "requires_grad": {name: value.requires_grad for name, value in model.named_parameters()},
        "attributes": {name: sorted(vars(module)) for name, module in model.named_modules()},
        "ignored": copy.copy(model._keys_to_ignore_on_save),
    }


def assert_same_picture(one: dict[str, Any], other: dict[str, Any], but: tuple[str, ...] = ()) -> None:
    assert one["state"].keys() == other["state"].keys()
    for key, value in one["state"].items():
        assert torch.equal(value, other["state"][key]), key
    for kind in one.keys() - {"state", *but}:
        assert one[kind] == other[kind], kind


@pytest.mark.parametrize("case", cases(UNCHANGED))
def test_freshly_attached_changes_nothing(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    before = case.output(model, batch)
    case.attach(model)
    assert torch.equal(case.output(model, batch), before)


@pytest.mark.parametrize("case", cases(named("sequential-adapter", because="the law is of adapters")))
def test_adapter_that_is_zero_upwards_changes_nothing(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    before = case.output(model, batch)
    deltune.attach(model, "sequential-adapter(width=4, initialization=kaiming)")
    assert torch.equal(case.output(model, batch), before)


@pytest.mark.parametrize("case", cases(CHANGED))
def test_other_methods_act_from_the_start(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    before = case.output(model, batch)
    case.attach(model)
    assert (case.output(model, batch) - before).abs().max() > 1e-3


@pytest.mark.parametrize("case", cases())
def test_disabled_and_detached_are_the_bare_model(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    before, picture = case.output(model, batch), picture_of(model)
    tuned = case.attach(model)
    take_steps(tuned, case, batch)
    trained = case.output(model, batch)
    assert not torch.equal(trained, before)
    with tuned.disabled():
        assert torch.equal(case.output(model, batch), before)
        assert_same_picture(picture_of(model), picture, but=("requires_grad", "attributes"))
    assert torch.equal(case.output(model, batch), trained)
    assert tuned.detach() is model
    assert torch.equal(case.output(model, batch), before)
    assert_same_picture(picture_of(model), picture)


@pytest.mark.parametrize("case", cases())
def test_only_the_trainable_part_moves(case: Case) -> None:
    model = case.build()
    # the independent reference for methods that select: which parameters get a gradient in the bare model
    bare = case.build()
    bare.requires_grad_(True)
    gets_gradient = set()
    for seed in range(3):
        case.loss(bare, case.batch(seed=seed)).backward()
    for name, parameter in bare.named_parameters(remove_duplicate=False):
        if parameter.grad is not None and parameter.grad.abs().max() > 1e-7:
            gets_gradient.add(name)

    tuned = case.attach(model)
    trainable = dict(tuned.named_trainable_parameters())
    start = {name: value.detach().clone() for name, value in trainable.items()}
    attachment = tuned.attachments["default"]
    selected = {name for name, _ in attachment.selection}
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
    moved: set[str] = set()
    for seed in range(3):
        optimizer.zero_grad()
        case.loss(model, case.batch(seed=seed)).backward()
        moved |= {name for name, value in trainable.items() if value.grad is not None and value.grad.abs().max() > 0}
        frozen_with_gradient = [
            name for name, value in model.named_parameters() if not value.requires_grad and value.grad is not None
        ]
        assert not frozen_with_gradient
        optimizer.step()
    for name in trainable.keys() - moved:
        assert name in selected, f"{name} never gets a gradient"
        added = name not in dict(bare.named_parameters(remove_duplicate=False))
        # queries are compared with all keys alike, so a bias of keys has no gradient without rotation
        assert added or name not in gets_gradient, f"{name} gets a gradient in the bare model only"
    for name in moved - selected:
        assert not torch.equal(start[name], trainable[name]), name

    fresh = case.build().state_dict()
    with tuned.disabled():
        for key, value in model.state_dict().items():
            assert torch.equal(value, fresh[key]), key


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_what_the_registry_needs(name: str) -> None:
    method = parse(METHODS[name])
    assert name == method.name or name.startswith(f"{method.name}-")  # a variant
    assert parse(method.to_dict()) == method
    assert parse(str(method)) == method


def test_a_model_that_is_a_sequence_itself() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3))
    x = torch.randn(2, 4)
    before = model(x)
    tuned = deltune.attach(model, "lora(rank=2, targets='0 2')")
    assert torch.equal(model(x), before)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=1.0)
    model(x).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model(x), before)
    assert torch.equal(tuned.detach()(x), before)
