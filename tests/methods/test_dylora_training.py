"""DyLoRA in training: the ranks of the steps, and what a step changes. Numbers are those of the sheet's invariants."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from tests.methods.common import attached, loss_of, output, relative_error
from tests.methods.test_dylora import ALL, fill, forms_of, split, toy, toy_batches

# -- the ranks of the steps ------------------------------------------------------------------------------------


def test_6_one_rank_for_each_step_and_all_sites() -> None:
    tuned, batch = attached("bert", f"dylora(rank=4, {ALL})")
    method = tuned.attachments["default"].method
    assert isinstance(method, deltune.DyLoRA)
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
    tuned.bind(optimizer)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        # two micro-batches, an evaluation in between
        loss_of(tuned.model, batch).backward()
        ranks = {form.active for form in forms_of(tuned).values()}
        tuned.model.eval()
        output(tuned.model, batch)
        assert {form.active for form in forms_of(tuned).values()} == {4}
        tuned.model.train()
        loss_of(tuned.model, batch).backward()
        assert {form.active for form in forms_of(tuned).values()} == ranks
        seen.append(*ranks)
        optimizer.step()
    assert seen == [method.step_rank(step) for step in range(1, 13)]
    assert len(set(seen)) > 1


@pytest.mark.parametrize("seed", [0, 5])
def test_6_uniform_law(seed: int) -> None:
    method = deltune.DyLoRA(rank=8, rank_seed=seed)
    draws, share = 10_000, 1 / 8
    counts = Counter(method.step_rank(step) for step in range(1, draws + 1))
    assert set(counts) == set(range(1, 9))
    for rank, count in counts.items():
        assert abs(count - draws * share) < 3 * (draws * share * (1 - share)) ** 0.5, rank
    # one step says nothing of the next
    pairs = Counter((method.step_rank(step), method.step_rank(step + 1)) for step in range(1, draws + 1))
    assert len(pairs) == 64
    assert max(pairs.values()) < 1.6 * draws / 64
    assert [method.step_rank(step) for step in range(50)] != [
        deltune.DyLoRA(rank=8, rank_seed=seed + 1).step_rank(step) for step in range(50)
    ]


@pytest.mark.parametrize("probability", [0.2, 0.5])
def test_6_geometric_law(probability: float) -> None:
    method = deltune.DyLoRA(rank=5, distribution="geometric", probability=probability)
    draws = 10_000
    counts = Counter(method.step_rank(step) for step in range(1, draws + 1))
    weights = [probability * (1 - probability) ** index for index in range(5)]
    assert set(counts) <= set(range(1, 6))
    for rank, weight in enumerate(weights, 1):
        share = weight / sum(weights)
        assert abs(counts[rank] - draws * share) < 3 * (draws * share * (1 - share)) ** 0.5, rank


# -- what a step leaves alone ----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    "adamw-foreach": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "foreach": True}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    "adam": (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.1, "amsgrad": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9}),
}


def moments(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    state = optimizer.state.get(parameter, {})
    return {name: value for name, value in state.items() if getattr(value, "shape", None) == parameter.shape}


@pytest.mark.parametrize("update", ["frozen", "nested"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_9_other_components_do_not_move(kind: str, update: str) -> None:
    tuned, form = toy(f"rank=4, update={update}")
    fill(tuned)
    tuned.model.train()
    optimizer_class, options = OPTIMIZERS[kind]
    optimizer = optimizer_class(tuned.trainable_parameters(), **options)  # type: ignore[call-arg]
    tuned.bind(optimizer)
    moved = set()
    for x, target in toy_batches(20):
        rank = form.active
        trained = range(rank) if update == "nested" else (rank - 1,)
        before = {
            (name, key): split(value, name)
            for name, parameter in (("A", form.A), ("B", form.B))
            for key, value in {"": parameter, **moments(optimizer, parameter)}.items()
        }
        optimizer.zero_grad()
        (tuned.model(x) - target).square().mean().backward()
        optimizer.step()
        for name, parameter in (("A", form.A), ("B", form.B)):
            for key, value in {"": parameter, **moments(optimizer, parameter)}.items():
                for index, component in enumerate(split(value, name)):
                    old = before[name, key][index] if (name, key) in before else torch.zeros_like(component)
                    if index not in trained:
                        assert torch.equal(component, old), (name, key, index)
                    elif not key:
                        assert not torch.equal(component, old), (name, index)
                        moved.add(index)
    assert moved == {0, 1, 2, 3}


def by_hand(steps: int, strict: bool, decay: float = 0.1, rate: float = 1e-2) -> tuple[Tensor, Tensor, list[int]]:
    """AdamW written out for one matrix, with a mask on what a frozen step may change; or with none."""
    tuned, form = toy("rank=4, alpha=6")
    fill(tuned)
    method = tuned.attachments["default"].method
    assert isinstance(method, deltune.DyLoRA)
    frozen = tuned.model.map.weight.detach()  # type: ignore[union-attr, operator]
    values = [form.A.detach().clone(), form.B.detach().clone()]
    first, second = ([torch.zeros_like(value) for value in values] for _ in range(2))
    ranks = []
    for step, (x, target) in enumerate(toy_batches(steps), 1):
        rank = method.step_rank(step)
        ranks.append(rank)
        A, B = values
        y = x @ frozen.T + 6 / rank * (x @ A[:rank].T) @ B[:, :rank].T
        slope = 2 * (y - target) / y.numel() * 6 / rank
        masks = [torch.zeros_like(value, dtype=torch.bool) for value in values]
        masks[0][rank - 1] = True
        masks[1][:, rank - 1] = True
        dense = [B.T @ slope.T @ x, slope.T @ (x @ A.T)]
        for value, gradient, mask, m, v in zip(values, dense, masks, first, second, strict=True):
            gradient = gradient * mask
            new_m, new_v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
            update = (new_m / (1 - 0.9**step)) / ((new_v / (1 - 0.999**step)).sqrt() + 1e-8)
            new = value * (1 - rate * decay) - rate * update
            where = mask if strict else torch.ones_like(mask)
            for old, changed in ((m, new_m), (v, new_v), (value, new)):
                old.copy_(torch.where(where, changed, old))
    return values[0], values[1], ranks


@pytest.mark.parametrize("leak", [False, True])
def test_9_training_equals_adamw_by_hand(leak: bool) -> None:
    tuned, form = toy(f"rank=4, alpha=6, leak={leak}, update=frozen")
    fill(tuned)
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tuned.bind(optimizer)
    for x, target in toy_batches(20):
        optimizer.zero_grad()
        (tuned.model(x) - target).square().mean().backward()
        optimizer.step()
    A, B, ranks = by_hand(20, strict=not leak)
    assert set(ranks) == {1, 2, 3, 4}
    assert relative_error(form.A.detach(), A) < 1e-5
    assert relative_error(form.B.detach(), B) < 1e-5
    other = by_hand(20, strict=leak)[0]
    assert relative_error(form.A.detach(), other) > 1e-3


def test_9_the_leak_is_that_of_the_authors_code() -> None:
    """A component that was trained once goes on by its momentum; one that never was shrinks by the decay."""
    tuned, form = toy("rank=4, leak=true, update=frozen")
    fill(tuned)
    tuned.model.train()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    method = tuned.attachments["default"].method
    for rank, (x, target) in zip((4, 1, 1, 1), toy_batches(4), strict=True):
        form.draw(0, rank)
        before = form.A.detach().clone()
        optimizer.zero_grad()
        (tuned.model(x) - target).square().mean().backward()
        method.before_step({"map": form}, 1, optimizer)
        optimizer.step()
        method.after_step({"map": form}, 1, optimizer)
        moved = (form.A.detach() - before).abs()
        assert torch.allclose(form.A[1:3], before[1:3] * (1 - 1e-3), rtol=1e-6)
    assert float(moved[3].max()) > 1e-3
    assert 0 < float(moved[1].max()) < 1e-3


def test_in_evaluation_mode_and_unbound_the_whole_trains() -> None:
    """The ranks are drawn for training; a step taken in evaluation mode is that of a LoRA of the chosen rank."""
    for bound in (True, False):
        tuned, form = toy()
        fill(tuned)
        optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
        if bound:
            tuned.bind(optimizer)
        tuned.model.train(not bound)
        before = form.A.detach().clone()
        ((x, target),) = toy_batches(1)
        (tuned.model(x) - target).square().mean().backward()
        optimizer.step()
        assert (before != form.A).any(1).all()


def test_every_rank_learns() -> None:
    """Cut to one or two components, it is far better than a LoRA of the full rank that is cut afterwards."""
    torch.manual_seed(3)
    target = torch.nn.init.orthogonal_(torch.empty(12, 12)) @ torch.diag(torch.tensor([3.0, 2, 1.5, 1] + [0.0] * 8))
    target = target @ torch.nn.init.orthogonal_(torch.empty(12, 12))
    losses: dict[str, dict[int, float]] = {}
    for name, options in (("lora", "leak=true"), ("frozen", "update=frozen"), ("nested", "update=nested")):
        tuned, form = toy(f"rank=4, {options}".rstrip(", "), size=12)
        torch.manual_seed(5)
        nn.init.normal_(form.A, std=0.3)
        optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.02, weight_decay=0.0)
        if name != "lora":
            tuned.bind(optimizer)
        tuned.model.train()
        goal = tuned.model.map.weight.detach() + target  # type: ignore[union-attr, operator]
        for x, _ in toy_batches(600, 12):
            optimizer.zero_grad()
            (tuned.model(x) - x @ goal.T).square().mean().backward()
            optimizer.step()
        tuned.model.eval()
        losses[name] = {}
        for rank in (1, 2, 4):
            tuned.set_rank(rank)
            losses[name][rank] = float((form.weight_delta() - target).square().sum())
    total = float(target.square().sum())
    assert losses["lora"][4] < 0.01 * total
    for name in ("frozen", "nested"):
        assert losses[name][1] < losses["lora"][1]
        assert losses[name][2] < losses["lora"][2]
        assert losses[name][1] < total
        assert losses[name][4] < losses[name][2] < losses[name][1]
