"""Invariants 7, 8, 9 and 12 of the fact sheet on composition; 10 and 11 are in test_vectors, 1 to 6 elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import deltune
from deltune.errors import CheckpointError, StateError
from deltune.merging import analogy, merge_deltas, negate
from deltune.methods import parse
from tests.merging.common import batch_of, changes_of, head_of, largest_difference, several, stored_of, with_initial
from tests.merging.reference import Vector, linear
from tests.methods.common import bits, build, output, train

ADAPTER = "sequential-adapter(width=4)"
PREFIX = "prefix-tuning(length=3, reparameterize=false)"
#: A method of every kind: products, row norms, other products, sums, tensors of its own, the model's parameters.
METHODS = [
    "lora(rank=2)",
    "lora(rank=2, rank_stabilized=true)",
    "lora(rank=2, weight_decomposed=true)",
    "lora(rank=2, initialization=pissa)",
    "adalora(target_rank=2, initial_rank=3)",
    "krona",
    "lora(rank=2) + bitfit",
    "lora(rank=2) + prefix-tuning(length=3, reparameterize=false)",
    ADAPTER,
    PREFIX,
    "prompt-tuning(length=3)",
    "bitfit",
    "full",
    "fish-mask(ratio=0.2)",
    "threshold-mask(zeros_at_start=0.3)",
]
PRODUCTS = METHODS[:2] + METHODS[3:5]


def dense(tuned: deltune.Tuned, name: str) -> Vector:
    return changes_of(tuned, name)


@pytest.mark.parametrize("method", METHODS)
def test_invariant_07_weights_one_and_zero_give_that_delta(method: str) -> None:
    tuned = several(method, names="ab")
    batch = batch_of(seed=9)
    tuned.activate("a")
    expected = output(tuned.model, batch)
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=[1, 0], heads="a")
    assert tuned.active == ("m",)
    assert torch.equal(output(tuned.model, batch), expected)
    assert all(np.array_equal(value, stored_of(tuned, "a")[key]) for key, value in stored_of(tuned, "m").items())
    assert merged.weights == (1.0, 0.0)
    merge_deltas(tuned, ["b", "a"], "again", weights=[0, 1], heads="a")
    assert torch.equal(output(tuned.model, batch), expected)


@pytest.mark.parametrize("method", METHODS)
def test_invariant_07_merging_commutes_with_saving(method: str, tmp_path: Path) -> None:
    tuned = several(method, names="ab")
    for name in "ab":
        tuned.save(tmp_path / name, name)
    merge_deltas(tuned, ["a", "b"], "m", weights=[0.25, 0.75], heads="b")
    tuned.save(tmp_path / "m", "m")
    batch = batch_of(seed=9)
    expected = output(tuned.model, batch)

    loaded = deltune.load(build("bert"), tmp_path / "a")
    deltune.load(loaded, tmp_path / "b")
    merge_deltas(loaded, ["a", "b"], "m", weights=[0.25, 0.75], heads="b")
    assert torch.equal(output(loaded.model, batch), expected)
    assert stored_of(loaded, "m").keys() == stored_of(tuned, "m").keys()
    assert all(np.array_equal(value, stored_of(tuned, "m")[key]) for key, value in stored_of(loaded, "m").items())

    fresh = deltune.load(build("bert"), tmp_path / "m")
    assert torch.equal(output(fresh.model, batch), expected)


@pytest.mark.parametrize("method", METHODS)
def test_invariant_08_one_task_with_scale_one_is_that_task(method: str) -> None:
    tuned = several(method, names="a")
    batch = batch_of(seed=9)
    expected = output(tuned.model, batch)
    merge_deltas(tuned, ["a"], "m", weights=[1.0], scale=1.0, heads="a")
    assert torch.equal(output(tuned.model, batch), expected)
    assert tuned.attachments["m"].method == tuned.attachments["a"].method.stored(tuned.attachments["a"].forms)


@pytest.mark.parametrize("method", [item for item in METHODS if parse(item).mergeable])
def test_invariant_08_a_task_and_its_opposite_give_the_base_model(method: str) -> None:
    tuned = several(method, names="a", head="base")
    batch = batch_of(head="base", seed=9)
    with tuned.disabled():
        base = output(tuned.model, batch)
    negate(tuned, "a", "not-a")
    tuned_change, opposite = dense(tuned, "a"), dense(tuned, "not-a")
    none = {key: np.zeros_like(value) for key, value in {**tuned_change, **opposite}.items()}
    assert max(float(np.abs(value).max()) for value in tuned_change.values()) > 1e-4
    assert (
        largest_difference({**none, **tuned_change}, {key: -value for key, value in {**none, **opposite}.items()})
        < 1e-6
    )
    merge_deltas(tuned, ["a", "not-a"], "nothing", weights=[1, 1])
    assert max((float(np.abs(value).max()) for value in dense(tuned, "nothing").values()), default=0.0) < 1e-6
    assert (output(tuned.model, batch) - base).abs().max() < 1e-5


@pytest.mark.parametrize("method", [ADAPTER, PREFIX, "prompt-tuning(length=3)"])
def test_invariant_08_tensors_by_name_go_back_to_where_they_started(method: str) -> None:
    tuned = with_initial(several(method, names="a"), method)
    start, trained = stored_of(tuned, "initial"), stored_of(tuned, "a")
    negate(tuned, "a", "not-a", initial="initial")
    opposite = stored_of(tuned, "not-a")
    assert largest_difference(opposite, {key: 2 * start[key] - trained[key] for key in start}) < 1e-6
    merge_deltas(tuned, ["a", "not-a"], "nothing", weights=[1, 1], initial="initial")
    assert largest_difference(stored_of(tuned, "nothing"), start) < 1e-6
    assert largest_difference(trained, start) > 1e-3


def test_invariant_08_analogy_is_c_and_what_leads_from_a_to_b() -> None:
    tuned = several("lora(rank=2)", dtype=torch.float64)
    analogy(tuned, "a", "b", "c", "d")
    expected = linear([dense(tuned, name) for name in "abc"], [-1, 1, 1])
    assert largest_difference(dense(tuned, "d"), expected) < 1e-12
    adapters = several(ADAPTER, dtype=torch.float64)
    analogy(adapters, "a", "b", "c", "d")  # the weights add up to one: initial values cancel out
    expected = linear([stored_of(adapters, name) for name in "abc"], [-1, 1, 1])
    assert largest_difference(stored_of(adapters, "d"), expected) < 1e-12


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama-gqa", "t5"])
@pytest.mark.parametrize("method", PRODUCTS)
def test_invariant_09_concatenation_is_the_weighted_sum(method: str, architecture: str) -> None:
    tuned = several(method, architecture=architecture, head="language")
    weights = [0.7, -0.4, 1.1]
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", strategy="concatenate", weights=weights, scale=0.9)
    expected = linear([dense(tuned, name) for name in "abc"], weights, 0.9)
    assert largest_difference(dense(tuned, "m"), expected) < 1e-6
    assert merged.method.startswith("lora(")
    assert merged.discarded is None


@pytest.mark.parametrize("method", [*PRODUCTS, "krona", "lora(rank=2, weight_decomposed=true)", "fact(rank=2)"])
def test_invariant_09_svd_of_full_rank_is_the_weighted_sum(method: str) -> None:
    tuned = several(method)
    weights = [0.7, -0.4, 1.1]
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", strategy="svd", rank=64, weights=weights)
    expected = linear([dense(tuned, name) for name in "abc"], weights)
    assert largest_difference(dense(tuned, "m"), expected) < 2e-6
    assert merged.discarded is not None
    assert merged.discarded < 1e-5


@pytest.mark.parametrize("method", [*PRODUCTS, "krona", "lora(rank=2, weight_decomposed=true)"])
def test_invariant_09_svd_misses_the_other_singular_values(method: str) -> None:
    tuned = several(method, dtype=torch.float64)
    rank = 3
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", strategy="svd", rank=rank, weights=[1, 1, 1])
    expected, found = linear([dense(tuned, name) for name in "abc"], [1, 1, 1]), dense(tuned, "m")
    lost = whole = 0.0
    for key, value in expected.items():
        singular = np.linalg.svd(value, compute_uv=False)
        error = np.linalg.norm(found[key] - value)
        assert error == pytest.approx(np.sqrt((singular[rank:] ** 2).sum()), abs=1e-5)
        assert np.linalg.matrix_rank(found[key], tol=1e-9) <= rank
        lost, whole = lost + float((singular[rank:] ** 2).sum()), whole + float((singular**2).sum())
    assert merged.discarded == pytest.approx((lost / whole) ** 0.5, abs=1e-5)
    assert f"{merged.discarded:.2%} of the norm" in str(merged)


def test_invariant_12_other_shapes_are_refused_by_name() -> None:
    cases = [
        (ADAPTER, "sequential-adapter(width=5)", r"encoder\.0\.attention\.down\.weight is \(4, 32\) .* \(5, 32\)"),
        ("prompt-tuning(length=3)", "prompt-tuning(length=4)", r"encoder\.embeddings\.rows is \(3, 32\) .* \(4, 32\)"),
        (PREFIX, PREFIX.replace("3", "2"), r"encoder\.0\.attention\.keys is \(4, 3, 8\) .* \(4, 2, 8\)"),
        (ADAPTER, f"{ADAPTER[:-1]}, targets='ffn')", r"encoder\.0\.attention\.down\.bias, which 'b' .* does not"),
        (
            "lora(rank=2)",
            "lora(rank=2, targets=attention.query)",
            r"encoder\.0\.attention\.value, which 'b' .* does not",
        ),
        ("bitfit", "bitfit(targets=ffn.up)", r"embeddings\.LayerNorm\.bias, which 'b' .* missing='zero'"),
        ("bitfit", "full", r"'b' \(full\) changes bert\.\S+weight, which 'a' \(bitfit\) does not.* missing='zero'"),
        ("lora(rank=2)", PREFIX, r"'a' is lora\(rank=2\), and 'b' is prefix-tuning.*: encoder\.0\.attention"),
        ("lora(rank=2)", "lora(rank=2) + bitfit", r"'b' .* changes bert\.\S+bias, which 'a' .* missing='zero'"),
        (ADAPTER, f"{ADAPTER} + bitfit(targets=ffn.up)", r"'a' is sequential-adapter.*, and 'b' is seq.* \+ bitfit"),
        (ADAPTER, f"{ADAPTER[:-1]}, activation=relu)", r"attention\.down\.weight and all .* activation is \S+ in one"),
    ]
    for one, other, words in cases:
        tuned = several(one, other, names="ab")
        before = tuned.active
        for strategy in ("linear", "ties", "dare"):
            with pytest.raises(StateError, match=re.compile(words, re.DOTALL)):
                merge_deltas(tuned, ["a", "b"], "m", strategy=strategy)
        assert tuned.active == before
        assert "m" not in tuned.attachments


def test_invariant_12_ranks_are_no_shapes_of_a_change() -> None:
    """What LoRA changes has the shape of the matrix, so that ranks may differ; AdaLoRA's always do."""
    tuned = several("lora(rank=2)", "lora(rank=4, rank_stabilized=true)", names="ab", dtype=torch.float64)
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=[0.5, 2])
    assert merged.method == "lora(rank=6, alpha=6.0)"
    expected = linear([dense(tuned, "a"), dense(tuned, "b")], [0.5, 2])
    assert largest_difference(dense(tuned, "m"), expected) < 1e-12


def test_invariant_12_another_base_model_is_refused(tmp_path: Path) -> None:
    tuned = several("lora(rank=2)", names="a")
    tuned.save(tmp_path / "a")
    other = several("lora(rank=2)", names="b", seed=5)
    with pytest.raises(CheckpointError, match=r"another bert than the given one: \S+ has other values"):
        deltune.load(other, tmp_path / "a")


def test_the_other_deltas_and_the_model_stay_as_they_were() -> None:
    tuned = several("lora(rank=2)", "bitfit", names="ab")
    tuned.attach("lora(rank=2)", "c")
    train(tuned, batch_of(seed=4))
    with tuned.disabled():
        before = bits(tuned.model)
    kept = {name: stored_of(tuned, name) for name in "abc"}
    state = torch.random.get_rng_state()
    merge_deltas(tuned, ["a", "c"], "m", strategy="ties")
    assert torch.equal(torch.random.get_rng_state(), state)
    for name, values in kept.items():
        assert all(np.array_equal(value, values[key]) for key, value in stored_of(tuned, name).items())
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())
    assert head_of(tuned, "m") == {}
