"""What is kept while rows are routed to low-rank changes, when it is made anew, and how rows are laid out."""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import deltune
from deltune.methods.reparameterized.grouped_low_rank import GroupedLowRank
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.sites.grouped import blocks_for, in_blocks
from deltune.sites.routed_rows import Blocks, RoutedRows
from tests.methods.common import output
from tests.switching.routed import batch_of, each_alone, many, routed

# -- what is kept ----------------------------------------------------------------------------------------------


def with_sgd(tuned: deltune.Tuned, batch: dict[str, Tensor], **options: Any) -> None:
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.05, **options)
    tuned.model(**batch).logits.square().sum().backward()
    output(tuned.model, batch)  # while gradients wait
    optimizer.step()
    optimizer.zero_grad()


def halve(tuned: deltune.Tuned) -> None:
    with torch.no_grad():
        for parameter in tuned.trainable_parameters():
            parameter.mul_(0.5)


def replace(tuned: deltune.Tuned) -> None:
    for parameter in tuned.trainable_parameters():
        parameter.data = 0.5 * parameter.data


def reload(tuned: deltune.Tuned) -> None:
    tuned.model.load_state_dict(
        {key: 0.5 * value if ".deltune." in f".{key}" else value for key, value in tuned.model.state_dict().items()}
    )


def rescale(tuned: deltune.Tuned) -> None:
    for attachment in tuned.attachments.values():
        for form in attachment.forms.values():
            assert isinstance(form, LowRank)
            form.scale = 0.5 * form.scale


def replace_twice(tuned: deltune.Tuned) -> None:
    """The second time memory of the first values is free to be taken again."""
    for _ in range(2):
        replace(tuned)


def exchange(tuned: deltune.Tuned) -> None:
    for attachment in tuned.attachments.values():
        for form in attachment.forms.values():
            form.A = torch.nn.Parameter(0.5 * form.A.detach())


CHANGES: dict[str, Callable[[deltune.Tuned], None]] = {
    "in place": halve,
    "new data": replace,
    "new data twice": replace_twice,
    "state_dict": reload,
    "scale": rescale,
    "new parameters": exchange,
    "training": lambda tuned: with_sgd(tuned, batch_of("bert", 3)),
    "fused training": lambda tuned: with_sgd(tuned, batch_of("bert", 3), fused=True),
    "foreach training": lambda tuned: with_sgd(tuned, batch_of("bert", 3), foreach=True),
    "double": lambda tuned: tuned.model.double() and halve(tuned),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_values_are_seen_by_the_next_call(change: str) -> None:
    tuned = many(["lora(rank=2)", "lora(rank=2)"])
    batch, route = batch_of("bert", 3), ["a0", "a1", "a0"]
    tuned.route(route)
    before = output(tuned.model, batch)
    assert torch.equal(output(tuned.model, batch), before)
    CHANGES[change](tuned)
    found = output(tuned.model, batch)
    assert (found - before).abs().max() > 1e-3
    tuned.route(None)
    assert torch.allclose(found, each_alone(tuned, batch, route), atol=1e-5)


def stacks_of(model: Any) -> list[Any]:
    taps = vars(model)["_deltune_handle"]._taps.values()
    return [stack for tap in taps for _, stack, _ in tap._together._kept.values()]


def test_stacks_are_kept_between_calls_and_end_with_the_route() -> None:
    tuned = many(["lora(rank=2)", "lora(rank=2)", "lora(rank=2)"])
    batch = batch_of("bert", 3)
    tuned.route(["a0", "a1", "a0"])
    output(tuned.model, batch)
    kept = stacks_of(tuned.model)
    assert len(kept) == len(tuned.attachments["a0"].forms)
    tuned.route(["a1", "a0", "a0"])  # the same forms for other rows
    output(tuned.model, batch)
    assert [id(one) for one in stacks_of(tuned.model)] == [id(one) for one in kept]
    assert tuned.active == ("a0", "a1")
    tuned.model(**batch)  # with gradients
    assert not stacks_of(tuned.model)
    output(tuned.model, batch)
    tuned.route(["a2", "a1", "a0"])
    assert not stacks_of(tuned.model)


def test_copies_and_pickles_hold_no_stacks_and_no_indices() -> None:
    tuned = many(["lora(rank=2)", "lora(rank=2)"])
    tuned.route(["a0", "a1", "a0"])
    batch = batch_of("bert", 3)
    assert tuned.control.routed.route == ("a0", "a1", "a0")
    fresh = len(pickle.dumps(tuned.model))
    expected = output(tuned.model, batch)
    assert stacks_of(tuned.model)
    assert tuned.control.routed._kept
    assert len(pickle.dumps(tuned.model)) == fresh
    for model in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        assert not stacks_of(model)
        assert not vars(model)["_deltune_handle"].control.routed._kept
        assert torch.equal(output(model, batch), expected)
        halve(vars(model)["_deltune_handle"])
        assert not torch.equal(output(model, batch), expected)
    assert torch.equal(output(tuned.model, batch), expected)


def test_threads_share_one_routed_model() -> None:
    tuned = many(["lora(rank=2)"] * 4)
    batch = batch_of("bert", 4)
    tuned.route(["a3", "a0", "a2", "a0"])
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(output(tuned.model, batch))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 6
    assert all(torch.equal(one, found[0]) for one in found)


def test_values_that_were_made_in_inference_mode() -> None:
    with torch.inference_mode():
        tuned = many(["lora(rank=2)", "lora(rank=2)"])
        batch, route = batch_of("bert", 3), ["a0", "a1", None]
        expected = each_alone(tuned, batch, route)
        assert torch.allclose(routed(tuned, batch, route), expected, atol=1e-5)


def test_a_routed_model_compiles_into_one_graph() -> None:
    """With rows that share products, one that has its own, and one of the bare model."""
    tuned = many(["lora(rank=2)", "lora(rank=2)", "lora(rank=9)"], "llama-gqa", num_hidden_layers=1)
    batch = batch_of("llama-gqa", 5)
    with tuned.routed(["a0", "a1", None, "a0", "a2"]):
        expected = output(tuned.model, batch)
        torch._dynamo.reset()
        with torch.no_grad():
            found = torch.compile(tuned.model, backend="eager", fullgraph=True)(**batch).logits
        torch._dynamo.reset()
    assert torch.allclose(found, expected, atol=1e-5)


# -- the parts -------------------------------------------------------------------------------------------------


class Doubled(LowRank):
    """Computes more than its factors say."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 2 * super().forward(x)
        return result

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        return output + weight * self(x)


def test_a_form_that_computes_otherwise_is_not_taken_for_a_low_rank_change() -> None:
    tuned = many(["lora(rank=2)", "lora(rank=2)"])
    for form in tuned.attachments["a1"].forms.values():
        form.__class__ = Doubled
    batch, route = batch_of("bert", 3), ["a0", "a1", "a1"]
    assert torch.allclose(routed(tuned, batch, route), each_alone(tuned, batch, route), atol=1e-5)


@settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None, max_examples=200)
@given(data=st.data())
def test_blocks_hold_every_row_of_their_attachments_once(data: st.DataObject) -> None:
    route = tuple(data.draw(st.lists(st.sampled_from(["a", "b", "c", None]), min_size=1, max_size=12)))
    times = data.draw(st.integers(1, 3))
    batch = times * len(route)
    names = tuple(data.draw(st.permutations(sorted({name for name in route if name is not None}))))
    if not names:
        return
    taken = [name for name in route for _ in range(times)]
    wanted = [row for row, name in enumerate(taken) if name is not None]
    device = torch.device("cpu")
    routed_rows = RoutedRows(route)
    for layout in (routed_rows.in_order, routed_rows.by_owner):
        blocks = layout(names, batch, device)
        rows = list(range(batch)) if blocks.rows is None else blocks.rows.tolist()
        owners = list(range(blocks.count)) if blocks.owners is None else blocks.owners.tolist()
        assert len(owners) == blocks.count
        assert len(rows) % blocks.count == 0
        length = len(rows) // blocks.count
        for place, row in enumerate(rows):
            assert taken[row] == names[owners[place // length]]
        kept = rows if blocks.kept is None else [rows[place] for place in blocks.kept.tolist()]
        assert sorted(kept) == wanted
        targets = list(range(batch)) if blocks.targets is None else blocks.targets.tolist()
        assert kept == targets
        assert layout(names, batch, device) is blocks  # worked out once
    for name in names:
        rows_of_name = routed_rows.rows(name, batch, device)
        found = list(range(batch)) if rows_of_name is None else rows_of_name.tolist()
        assert found == [row for row, other in enumerate(taken) if other == name]


def test_short_rows_move_to_high_ranks_and_low_ranks_come_to_long_rows() -> None:
    rows = RoutedRows(("a", "b") * 4)
    names = ("a", "b")

    def layout(length: int, rank: int) -> Blocks:
        return blocks_for(rows, names, torch.zeros(8, length, 5), rank)

    device = torch.device("cpu")
    assert layout(1, 16) is rows.by_owner(names, 8, device)
    assert layout(32, 16) is rows.in_order(names, 8, device)
    assert layout(32, 64) is rows.by_owner(names, 8, device)
    # what lies in order as it is needs no copy of either
    apart = RoutedRows(("a", "a", "b", "b"))
    assert blocks_for(apart, names, torch.zeros(8, 1, 5), 64) is apart.in_order(names, 8, device)
    assert apart.in_order(names, 8, device) == Blocks(2, None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_stacked_changes_equal_each_alone(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 6, 5), (1, 6, 5), (4, 6, 5)]
    factors = [
        (torch.randn(r, d_in, generator=generator), torch.randn(d_out, r, generator=generator))
        for r, d_in, d_out in shapes
    ]
    scales = [0.5, 2.0, 3.0]
    stacked = GroupedLowRank.of(factors, scales, 0.0, dtype)
    assert stacked.rank == 4
    x = torch.randn(3, 2, 6, generator=generator)
    y = torch.randn(3, 2, 5, generator=generator)
    expected = torch.stack([s * (x[i] @ A.T @ B.T) for i, ((A, B), s) in enumerate(zip(factors, scales, strict=True))])
    tolerance = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.5}[dtype]
    x, y = x.to(dtype), y.to(dtype)
    assert torch.allclose(stacked.change(x).float(), expected, atol=tolerance)
    assert torch.allclose(stacked.add_to(y, x).float(), y.float() + expected, atol=tolerance)
    gathered = stacked.gathered(torch.tensor([2, 0, 2]))
    assert torch.equal(gathered.factor_A, stacked.factor_A[[2, 0, 2]])
    assert torch.equal(gathered.factor_B, stacked.factor_B[[2, 0, 2]])
    assert (gathered.scale, gathered.rank) == (stacked.scale, stacked.rank)


def test_positions_lie_between_blocks_and_features() -> None:
    x = torch.arange(2 * 3 * 4 * 5.0).view(2 * 3, 4, 5)
    blocks = in_blocks(x, 2)
    assert blocks.shape == (2, 12, 5)
    assert torch.equal(blocks[1, 0], x[3, 0])
    assert in_blocks(torch.zeros(6, 5), 3).shape == (3, 2, 5)
