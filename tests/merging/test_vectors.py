"""Arithmetic on task vectors, against loops over single numbers, and the invariants of trimming, election, dropping."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltune.errors import StateError
from deltune.merging import dare, ties, trim, weighted_sum
from tests.merging import reference
from tests.merging.reference import Vector

SHAPES = {"attention": (2, 3), "bias": (4,), "ffn": (2, 2)}
SIZE = sum(int(np.prod(shape)) for shape in SHAPES.values())
#: Multiples of a quarter: sums of some of them are exact, so that equal stays equal in any order.
numbers = st.integers(-12, 12).map(lambda number: number / 4)
vectors = st.lists(numbers, min_size=SIZE, max_size=SIZE)
densities = st.sampled_from([0.05, 0.2, 0.3, 0.5, 0.9, 1.0])


def tensors(values: list[float], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    found = reference.shaped(values, {key: np.zeros(shape) for key, shape in SHAPES.items()})
    return {key: torch.tensor(value, dtype=dtype) for key, value in found.items()}


def arrays(vector: dict[str, Tensor]) -> Vector:
    return {key: vector[key].double().numpy() for key in vector}


def random_vectors(count: int = 3, seed: int = 0, shape: tuple[int, ...] = (40, 50)) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {"a": torch.randn(shape, generator=generator), "b": torch.randn(30, generator=generator)} for _ in range(count)
    ]


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@given(many=st.lists(vectors, min_size=1, max_size=4), weights=st.lists(numbers, min_size=4, max_size=4))
@settings(deadline=None, max_examples=40)
def test_weighted_sum_is_that_of_numbers(many: list[list[float]], weights: list[float]) -> None:
    given_vectors = [tensors(values) for values in many]
    found = weighted_sum(given_vectors, weights[: len(many)])
    expected = reference.linear([arrays(vector) for vector in given_vectors], weights[: len(many)])
    for key, value in found.items():
        assert value.dtype == torch.float32
        assert value.numpy() == pytest.approx(expected[key], abs=1e-6)


@given(
    many=st.lists(vectors, min_size=1, max_size=4), density=densities, factors=st.lists(numbers, min_size=4, max_size=4)
)
@settings(deadline=None, max_examples=40)
def test_ties_is_that_of_numbers(many: list[list[float]], density: float, factors: list[float]) -> None:
    given_vectors = [tensors(values) for values in many]
    weights = [abs(factor) + 0.25 for factor in factors[: len(many)]]
    for chosen in (None, weights):
        found = ties(given_vectors, density, chosen)
        expected = reference.ties([arrays(vector) for vector in given_vectors], density, chosen)
        for key, value in found.items():
            assert value.numpy() == pytest.approx(expected[key], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_computed_in_float32_at_least(dtype: torch.dtype) -> None:
    many = [{key: value.to(dtype) for key, value in vector.items()} for vector in random_vectors()]
    wide = torch.promote_types(dtype, torch.float32)
    found = {
        "sum": weighted_sum(many, [0.3, 0.3, 0.3]),
        "ties": ties(many, 0.4),
        "dare": dare(many[0], 0.5),
        "trim": trim(many[0], 0.5),
    }
    assert all(value.dtype == wide for vector in found.values() for value in vector.values())
    expected = {
        "sum": reference.linear([arrays(vector) for vector in many], [0.3, 0.3, 0.3]),
        "ties": reference.ties([arrays(vector) for vector in many], 0.4),
    }
    for name, values in expected.items():
        for key, value in found[name].items():
            assert np.abs(value.double().numpy() - values[key]).max() < (1e-12 if wide == torch.float64 else 1e-6)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.3, 0.77, 1.0])
def test_invariant_10_trimming_keeps_the_share(density: float) -> None:
    (vector,) = random_vectors(1)
    found = trim(vector, density)
    count = sum(value.numel() for value in vector.values())
    left = sum(int((value != 0).sum()) for value in found.values())
    # the entry at the bound stays too, as in the authors' code
    assert left == min(count, int(density * count) + 1)
    smallest = min(float(value[value != 0].abs().min()) for value in found.values())
    dropped = [vector[key][found[key] == 0].abs() for key in vector]
    assert all(float(value.max()) < smallest for value in dropped if len(value))


def test_invariant_10_entries_that_tie_with_the_bound_are_kept() -> None:
    vector = {"a": torch.tensor([1.0, -2.0, 2.0, 2.0, 3.0, 0.5, 0.0, 0.0])}
    # the bound has the rank 8 - 2 = 6 of 0 0 .5 1 2 2 2 3
    assert trim(vector, 0.25)["a"].tolist() == [0, -2, 2, 2, 3, 0, 0, 0]


@given(many=st.lists(vectors, min_size=2, max_size=4), density=densities)
@settings(deadline=None, max_examples=40)
def test_invariant_10_every_merged_entry_has_the_elected_sign(many: list[list[float]], density: float) -> None:
    given_vectors = [tensors(values) for values in many]
    trimmed = [trim(vector, density) for vector in given_vectors]
    mass = {key: sum(vector[key] for vector in trimmed) for key in SHAPES}
    majority = np.sign(sum(float(value.sign().sum()) for value in mass.values()))
    for key, value in ties(given_vectors, density).items():
        signs = mass[key].sign()
        elected = torch.where(signs == 0, torch.tensor(float(majority)), signs)
        assert bool((value.sign()[value != 0] == torch.where(elected > 0, 1.0, -1.0)[value != 0]).all())


@given(values=vectors, density=densities, count=st.integers(1, 4))
@settings(deadline=None, max_examples=40)
def test_invariant_10_identical_vectors_give_the_trimmed_one(values: list[float], density: float, count: int) -> None:
    vector = tensors(values)
    assert equal(dict(ties([vector] * count, density)), dict(trim(vector, density)))


@given(many=st.lists(vectors, min_size=3, max_size=3), density=densities)
@settings(deadline=None, max_examples=40)
def test_invariant_10_permuting_tasks_changes_nothing(many: list[list[float]], density: float) -> None:
    first = dict(ties([tensors(values) for values in many], density))
    for order in itertools.permutations(many):
        assert equal(dict(ties([tensors(values) for values in order], density)), first)


def test_invariant_10_trimming_is_global_and_not_by_tensor() -> None:
    vector = {"large": 10 * torch.ones(8), "small": torch.linspace(0.1, 1, 8)}
    found = trim(vector, 0.4)
    assert int((found["large"] != 0).sum()) == 8
    assert int((found["small"] != 0).sum()) == 0


def test_a_sum_of_zero_takes_the_sign_of_most_entries() -> None:
    """peft takes the positive one there, whatever the others say."""
    one = {"a": torch.tensor([1.0, -1.0, -1.0, -2.0])}
    other = {"a": torch.tensor([-1.0, -3.0, -1.0, -2.0])}
    assert ties([one, other], 1.0)["a"].tolist() == [-1, -2, -1, -2]


@pytest.mark.parametrize("drop", [0.3, 0.9])
def test_invariant_11_the_expectation_is_the_vector(drop: float) -> None:
    vector = {"a": torch.tensor([1.0, -2.0, 0.5, 3.0, -0.25])}
    total = sum((dare(vector, drop, seed)["a"].double() for seed in range(2000)), torch.zeros(5).double())
    # of all entries together; one entry alone has a deviation of sqrt(p / (1 - p) / 2000) = 7 % at p = 0.9
    ratio = (total / 2000 / vector["a"].double()).mean()
    assert float(ratio) == pytest.approx(1, abs=0.05)
    single = (total / 2000 / vector["a"].double() - 1).abs().max()
    assert float(single) < 4 * (drop / (1 - drop) / 2000) ** 0.5


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9, 0.99])
def test_invariant_11_the_share_of_zeros(drop: float) -> None:
    (vector,) = random_vectors(1, shape=(300, 400))
    found = dare(vector, drop)["a"]
    assert float((found == 0).double().mean()) == pytest.approx(drop, abs=0.01)
    left = found != 0
    assert torch.equal(found[left], vector["a"][left] / (1 - drop))


def test_invariant_11_masks_are_reproducible_whatever_the_order() -> None:
    (vector,) = random_vectors(1)
    first = dict(dare(vector, 0.5, seed=3, name="sst2"))
    torch.manual_seed(17)
    backwards = {key: vector[key] for key in reversed(vector)}
    assert equal(dict(dare(backwards, 0.5, seed=3, name="sst2")), first)
    alone = dare({"b": vector["b"]}, 0.5, seed=3, name="sst2")
    assert torch.equal(alone["b"], first["b"])
    assert not torch.equal(dare(vector, 0.5, seed=4, name="sst2")["a"], first["a"])
    assert not torch.equal(dare(vector, 0.5, seed=3, name="trec")["a"], first["a"])
    state = torch.random.get_rng_state()
    _ = dare(vector, 0.5)["a"]
    assert torch.equal(torch.random.get_rng_state(), state)


def test_invariant_11_dropping_nothing_is_the_identity() -> None:
    (vector,) = random_vectors(1)
    assert equal(dict(dare(vector, 0.0)), vector)


def test_invariant_12_other_names_and_shapes_are_named() -> None:
    one, other = random_vectors(2)
    with pytest.raises(StateError, match=r"a is \(40, 50\) in the first vector and \(50, 40\) in vector 2"):
        _ = weighted_sum([one, {**other, "a": other["a"].T}], [1, 1])["a"]
    with pytest.raises(StateError, match="b is only in one of the first vector and vector 2"):
        ties([one, {"a": other["a"]}])
    with pytest.raises(StateError, match="2 vectors but 1 weights"):
        weighted_sum([one, other], [1.0])
    with pytest.raises(StateError, match="nothing to merge"):
        ties([])
    for density in (0.0, 1.5):
        with pytest.raises(StateError, match="density is the share"):
            trim(one, density)
    for drop in (-0.1, 1.0):
        with pytest.raises(StateError, match="probability to drop"):
            dare(one, drop)
