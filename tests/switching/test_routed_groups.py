"""Routed rows of many low-rank changes: few kernels, however many changes, and each row as if alone."""

from __future__ import annotations

import copy
import pickle
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deltune
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.methods.reparameterized.stacked_low_rank import StackedLowRank
from deltune.sites.routed_rows import Blocks, RoutedRows
from deltune.sites.stacked import blocks_for, in_blocks
from tests.laws.test_composition import MODELS, SETTINGS
from tests.methods.common import build, output
from tests.zoo import ARCHITECTURES

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class Kernels(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.count[name] for name in PRODUCTS)


def many(methods: list[str], name: str = "bert", dtype: torch.dtype = torch.float32, **options: Any) -> deltune.Tuned:
    """Attachments ``a0``, ``a1``, ... of these methods with random values."""
    model = build(name, MODELS[name], dtype=dtype, **options)
    tuned = deltune.attach(model, methods[0], "a0", train_head=False)
    for number, method in enumerate(methods[1:], 1):
        tuned.attach(method, f"a{number}", train_head=False)
    for number, attachment in enumerate(tuned.attachments.values()):
        generator = torch.Generator().manual_seed(number)
        for _, parameter in attachment.form_parameters():
            with torch.no_grad():
                parameter.normal_(std=0.2, generator=generator)
    return tuned


def batch_of(name: str, rows: int, length: int = 7) -> dict[str, Tensor]:
    return ARCHITECTURES[name].batch(batch_size=rows, length=length, head=MODELS[name])  # type: ignore[arg-type]


def each_alone(tuned: deltune.Tuned, batch: dict[str, Tensor], route: list[str | None]) -> Tensor:
    """Every row of the batch as its attachment gives it where it is active for all."""
    results: dict[str | None, Tensor] = {}
    with tuned.disabled():
        results[None] = output(tuned.model, batch)
    for name in dict.fromkeys(name for name in route if name is not None):
        tuned.activate(name)
        results[name] = output(tuned.model, batch)
    times = len(results[None]) // len(route)
    return torch.stack([results[route[row // times]][row] for row in range(len(results[None]))])


def routed(tuned: deltune.Tuned, batch: dict[str, Tensor], route: list[str | None]) -> Tensor:
    with tuned.routed(route):
        return output(tuned.model, batch)


# -- few kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
@pytest.mark.parametrize("rank", [2, 12])
def test_a_pass_has_as_many_kernels_for_two_attachments_as_for_eight(name: str, rank: int) -> None:
    batch = batch_of(name, 8)
    tuned = many([f"lora(rank={rank})"] * 8, name)
    counts = []
    for used in (2, 4, 8):
        with tuned.routed([f"a{row % used}" for row in range(8)]):
            output(tuned.model, batch)  # indices and stacks are made
            with Kernels() as kernels:
                output(tuned.model, batch)
        counts.append(kernels)
    with tuned.disabled(), Kernels() as bare:
        output(tuned.model, batch)
    sites = len(tuned.attachments["a0"].forms)
    assert counts[0].products == counts[1].products == counts[2].products == bare.products + 2 * sites
    # two attachments for eight rows are gathered, or rows moved to them; eight for eight rows need neither
    assert counts[0].count.total() == counts[1].count.total() >= counts[2].count.total()


@pytest.mark.parametrize("ranks", [(3, 3), (3, 4)])
def test_training_has_as_many_products_for_two_attachments_as_for_eight(ranks: tuple[int, int]) -> None:
    batch = batch_of("bert", 8)
    tuned = many([f"lora(rank={ranks[number % 2]})" for number in range(8)])
    counts = []
    for used in (2, 8):
        with tuned.routed([f"a{row % used}" for row in range(8)]), Kernels() as kernels:
            tuned.model(**batch).logits.sum().backward()
        counts.append(kernels.products)
    assert counts[0] == counts[1]


def test_rows_of_other_methods_do_not_keep_low_rank_changes_apart() -> None:
    batch = batch_of("bert", 8)
    tuned = many(["lora(rank=2)"] * 6 + ["prefix-tuning(length=2)", "pfeiffer-adapter(width=3)"])
    counts = []
    for used in (2, 6):
        route = [f"a{row % used}" for row in range(6)] + ["a6", "a7"]
        with tuned.routed(route):
            output(tuned.model, batch)
            with Kernels() as kernels:
                output(tuned.model, batch)
        counts.append(kernels.products)
    assert counts[0] == counts[1]


def test_ranks_up_to_the_same_power_of_two_share_their_products() -> None:
    """Others do not: little ones would be computed as large ones."""
    batch = batch_of("bert", 4)
    with Kernels() as bare:
        output(build("bert", MODELS["bert"]), batch)
    # the last four are four changes that are computed each by itself
    for ranks, expected in (((5, 6, 7, 8), 2), ((16, 16, 2, 2), 4), ((1, 2, 4, 8), 8)):
        tuned = many([f"lora(rank={rank}, targets='attention.query layers=0')" for rank in ranks])
        with tuned.routed(["a0", "a1", "a2", "a3"]), Kernels() as kernels:
            output(tuned.model, batch)
        assert kernels.products - bare.products == expected, ranks


# -- each row as if alone ------------------------------------------------------------------------------------

#: A row of a batch of another size is summed in another order; 2**-8 for each of some roundings of bfloat16.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06}


@st.composite
def low_ranks(draw: st.DrawFn) -> str:
    return (
        f"lora(rank={draw(st.sampled_from([1, 2, 3, 7, 16]))}, alpha={draw(st.sampled_from([1, 4, 10]))}, "
        f"targets='{draw(st.sampled_from(['attention.query', 'attention.*', 'ffn.*', 'attention.* ffn.*']))}')"
    )


@pytest.mark.parametrize("name", MODELS)
@settings(SETTINGS, max_examples=12)
@given(data=st.data())
def test_every_row_equals_itself_alone(name: str, data: st.DataObject) -> None:
    methods = data.draw(st.lists(low_ranks(), min_size=2, max_size=5))
    dtype = data.draw(st.sampled_from(list(TOLERANCES)))
    names = [*(f"a{number}" for number in range(len(methods))), None]
    route = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=9))
    times = data.draw(st.sampled_from([1, 1, 2, 3]))
    tuned = many(methods, name, dtype)
    batch = batch_of(name, times * len(route), data.draw(st.sampled_from([2, 7])))
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * float(expected.abs().max().clamp(min=1))


MIXED = [
    "lora(rank=2, targets='attention.* ffn.*')",
    "pfeiffer-adapter(width=3, standard_deviation=0.3)",
    "prefix-tuning(length=2, reparameterize=false)",
    "lora(rank=3)",
    "lora(rank=2, weight_decomposed=true)",
    "parallel-adapter(width=3, dropout=0)",
    "lora(rank=2, initialization=pissa)",
    "lora(rank=2) + prefix-tuning(length=3, reparameterize=false)",
    "adalora(initial_rank=3, target_rank=2)",
    "krona",
]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
@pytest.mark.parametrize("times", [1, 2])
def test_rows_of_different_methods_in_one_batch(name: str, times: int) -> None:
    tuned = many(MIXED, name)
    route = ["a3", "a1", None, "a0", "a2", "a7", "a4", "a0", "a5", "a6", "a8", "a9"]
    batch = batch_of(name, times * len(route))
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    bare = each_alone(tuned, batch, [None])
    for row in range(len(found)):
        assert torch.allclose(found[row], expected[row], atol=1e-5 * float(expected.abs().max())), row
        assert torch.equal(expected[row], bare[row]) == (route[row // times] is None)
    assert torch.equal(found[2 * times], bare[2 * times]) or torch.allclose(
        found[2 * times], bare[2 * times], atol=1e-5
    )


def test_two_low_rank_changes_of_one_attachment_at_one_matrix() -> None:
    tuned = many(["lora(rank=2) + lora(rank=3)", "lora(rank=2)", "lora(rank=3) + lora(rank=4)"])
    route = ["a0", "a2", "a1", None, "a0"]
    batch = batch_of("bert", 5)
    assert torch.allclose(routed(tuned, batch, route), each_alone(tuned, batch, route), atol=1e-5)


def test_changes_kept_in_float32_beside_a_bfloat16_model_and_under_autocast() -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3)"], dtype=torch.bfloat16)
    for attachment in tuned.attachments.values():
        for form in attachment.forms.values():
            form.float()
    batch, route = batch_of("bert", 3), ["a1", "a0", "a1"]
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= TOLERANCES[torch.bfloat16] * float(expected.abs().max())
    tuned = many(["lora(rank=2)", "lora(rank=3)"])
    with torch.autocast("cpu", torch.bfloat16):
        expected = each_alone(tuned, batch, route)
        found = routed(tuned, batch, route)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCES[torch.bfloat16] * float(expected.abs().max())


def test_dropped_layers_and_modes_are_followed_under_one_route() -> None:
    tuned = many(["lora(rank=2, dropout=0.5)", "lora(rank=2)", "lora(rank=2, dropout=0.5)"])
    batch, route = batch_of("bert", 3), ["a0", "a1", "a2"]
    whole = each_alone(tuned, batch, route)
    tuned.drop_layers(1)
    upper = each_alone(tuned, batch, route)
    tuned.drop_layers(0)
    tuned.route(route)
    assert torch.allclose(output(tuned.model, batch), whole, atol=1e-5)
    tuned.drop_layers(1)
    assert torch.allclose(output(tuned.model, batch), upper, atol=1e-5)
    tuned.drop_layers(0)
    tuned.model.train()
    one, other = output(tuned.model, batch), output(tuned.model, batch)
    assert torch.allclose(one[1], whole[1], atol=1e-5)  # its change has no dropout
    assert torch.equal(one[1], other[1])
    for row in (0, 2):
        assert (one[row] - other[row]).abs().max() > 1e-4
    tuned.model.eval()
    assert torch.allclose(output(tuned.model, batch), whole, atol=1e-5)


def test_dropout_begins_and_ends_with_the_mode_where_all_forms_have_it() -> None:
    tuned = many(["lora(rank=2, dropout=0.5)"] * 3)
    batch = batch_of("bert", 3)
    tuned.route(["a0", "a1", "a2"])
    still = output(tuned.model, batch)
    tuned.model.train()
    assert (output(tuned.model, batch) - still).abs().max() > 1e-4
    tuned.model.eval()
    assert torch.equal(output(tuned.model, batch), still)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "t5"])
def test_generation_equals_each_row_alone(name: str, beams: int) -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3)", "lora(rank=2)"], name)
    architecture = ARCHITECTURES[name]
    prompt = architecture.prompt(batch_of(name, 5))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    route = ["a2", "a0", None, "a1", "a0"]
    expected = []
    for row, item in enumerate(route):
        tuned.activate(*([item] if item else []))
        expected.append(tuned.model.generate(**prompt, **options)[row])
    tuned.activate("a0")
    first = tuned.model.generate(**prompt, **options)
    with tuned.routed(route):
        found = tuned.model.generate(**prompt, **options)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, first)


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("route", [["a0", "a1", "a2", "a0"], ["a0", "a0", "a1", None], ["a2", "a2", "a1", "a1"]])
def test_gradients_are_those_of_each_row_alone(name: str, route: list[str | None]) -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3, alpha=3)", "lora(rank=9)"], name)
    batch = batch_of(name, 8)
    direction = torch.randn(output(tuned.model, batch).shape, generator=torch.Generator().manual_seed(1))
    expected: dict[str, Tensor] = {}
    for item in dict.fromkeys(one for one in route if one is not None):
        tuned.activate(item)
        tuned.model.zero_grad()
        rows = [row for row in range(8) if route[row // 2] == item]
        (tuned.model(**batch).logits * direction)[rows].sum().backward()
        for key, value in tuned.attachments[item].parameters():
            assert value.grad is not None
            expected[f"{item}.{key}"] = value.grad.clone()
            value.grad = None
    tuned.route(route)
    (tuned.model(**batch).logits * direction).sum().backward()
    found = {
        f"{item}.{key}": value.grad
        for item, attachment in tuned.attachments.items()
        for key, value in attachment.parameters()
        if value.grad is not None
    }
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max().clamp(min=1e-2), key


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


def exchange(tuned: deltune.Tuned) -> None:
    for attachment in tuned.attachments.values():
        for form in attachment.forms.values():
            form.A = torch.nn.Parameter(0.5 * form.A.detach())


CHANGES: dict[str, Callable[[deltune.Tuned], None]] = {
    "in place": halve,
    "new data": replace,
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
    return [stack for tap in vars(model)["_deltune_handle"]._taps.values() for stack in tap._together._kept.values()]


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
    stacked = StackedLowRank.of(factors, scales, 0.0, dtype)
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
