"""Every strategy on every kind of method: the naive reference's result, or a clear refusal."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import deltune
from deltune.errors import StateError
from deltune.merging import merge_deltas
from deltune.merging.vectors import dare
from tests.merging import reference
from tests.merging.common import batch_of, changes_of, largest_difference, several, stored_of, with_initial
from tests.merging.reference import Vector
from tests.methods.common import output

WEIGHTS = [0.5, 0.25, 1.5]
#: What changes weights, with the parameters of which all entries count in trimming.
WEIGHT_METHODS = [
    "lora(rank=2)",
    "lora(rank=2, rank_stabilized=true)",
    "lora(rank=2, weight_decomposed=true)",
    "krona",
    "lora(rank=2) + bitfit",
    "bitfit",
    "full",
]
OWN_TENSORS = ["sequential-adapter(width=4)", "prefix-tuning(length=3, reparameterize=false)"]
STRATEGIES = ["linear", "ties", "dare-ties"]


def expected(strategy: str, vectors: list[Vector]) -> Vector:
    if strategy == "linear":
        return reference.linear(vectors, WEIGHTS, 0.8)
    return reference.ties(vectors, 0.3 if strategy == "ties" else 1.0, WEIGHTS, 0.8)


def options(strategy: str) -> dict[str, float]:
    return {"ties": {"density": 0.3}, "dare-ties": {"drop": 0.0}}.get(strategy, {})


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", WEIGHT_METHODS)
def test_changes_of_weights(method: str, strategy: str) -> None:
    tuned = several(method, dtype=torch.float64)
    vectors = [changes_of(tuned, name) for name in "abc"]
    merged = merge_deltas(
        tuned, ["a", "b", "c"], "m", strategy=strategy, weights=WEIGHTS, scale=0.8, **options(strategy)
    )
    assert merged.space == "changes"
    assert merged.weights == pytest.approx([0.8 * weight for weight in WEIGHTS])
    names = set(vectors[0])
    assert largest_difference(changes_of(tuned, "m", names), expected(strategy, vectors)) < 1e-12
    # what it does in the model, and not only what it says
    with tuned.disabled():
        model = tuned.model
        copied = {key: value.clone() for key, value in model.state_dict().items()}
    found = output(tuned.model, batch_of(seed=9))
    tuned.merge()
    assert (output(tuned.model, batch_of(seed=9)) - found).abs().max() < 1e-10
    tuned.unmerge()
    with tuned.disabled():
        assert all(torch.equal(value, copied[key]) for key, value in tuned.model.state_dict().items())


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", OWN_TENSORS)
def test_tensors_by_name(method: str, strategy: str) -> None:
    tuned = with_initial(several(method, dtype=torch.float64), method)
    start = stored_of(tuned, "initial")
    vectors = [{key: value - start[key] for key, value in stored_of(tuned, name).items()} for name in "abc"]
    arguments = {"weights": WEIGHTS, "scale": 0.8, **options(strategy)}
    with pytest.raises(StateError, match=r"merged as a change from its initial value, .* Give initial="):
        merge_deltas(tuned, ["a", "b", "c"], "m", strategy=strategy, **arguments)
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", strategy=strategy, initial="initial", **arguments)
    assert merged.space in ("parameters", "both")
    change = expected(strategy, vectors)
    assert largest_difference(stored_of(tuned, "m"), {key: start[key] + change[key] for key in start}) < 1e-12


@pytest.mark.parametrize("method", ["lora(rank=2)", "krona", "bitfit", "full"])
def test_dare_drops_and_rescales_each_change(method: str) -> None:
    tuned = several(method, names="ab", dtype=torch.float64)
    vectors = [changes_of(tuned, name) for name in "ab"]
    merge_deltas(tuned, ["a", "b"], "m", strategy="dare", drop=0.75, seed=5, weights=[1, 0])
    first = changes_of(tuned, "m", set(vectors[0]))
    left = total = 0
    for key, value in first.items():
        kept = value != 0
        assert value[kept] == pytest.approx(4 * vectors[0][key][kept], abs=1e-12)
        left, total = left + int(kept.sum()), total + int((vectors[0][key] != 0).sum())
    # three deviations of a share of so many draws
    assert left / total == pytest.approx(0.25, abs=3 * (0.25 * 0.75 / total) ** 0.5 + 1e-3)
    merge_deltas(tuned, ["b", "a"], "other-order", strategy="dare", drop=0.75, seed=5, weights=[0, 1])
    assert largest_difference(changes_of(tuned, "other-order", set(vectors[0])), first) == 0


def test_dare_of_lora_drops_entries_of_the_product() -> None:
    tuned = several("lora(rank=2)", names="ab", dtype=torch.float64)
    key = "encoder.0.attention.query"
    name = "bert.encoder.layer.0.attention.self.query.weight"
    masked = [dare({key: torch.from_numpy(changes_of(tuned, item)[name])}, 0.5, 2, item)[key].numpy() for item in "ab"]
    merge_deltas(tuned, ["a", "b"], "m", strategy="dare", drop=0.5, seed=2, weights=[1, 1])
    assert np.abs(changes_of(tuned, "m")[name] - sum(masked)).max() < 1e-12


@pytest.mark.parametrize("strategy", ["ties", "dare", "dare-ties"])
@pytest.mark.parametrize("method", ["lora(rank=2)", "lora(rank=2) + bitfit", "krona"])
def test_compressed_to_a_rank(method: str, strategy: str) -> None:
    """The merged changes of matrices lose all but the greatest singular values; biases lose nothing."""
    tuned = several(method, dtype=torch.float64)
    given = {"strategy": strategy, "seed": 0}
    merge_deltas(tuned, ["a", "b", "c"], "exact", **given)
    whole = changes_of(tuned, "exact", set(changes_of(tuned, "a")))
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", rank=4, **given)
    assert merged.method.startswith("lora(rank=4")
    found = changes_of(tuned, "m", set(whole))
    for key, value in whole.items():
        if value.ndim == 1:
            assert np.abs(found[key] - value).max() < 1e-12
            continue
        left, values, right = np.linalg.svd(value)
        assert np.abs(found[key] - (left[:, :4] * values[:4]) @ right[:4]).max() < 1e-10


@pytest.mark.parametrize("strategy", ["svd", "concatenate"])
@pytest.mark.parametrize("method", [*OWN_TENSORS, "bitfit", "full", "fish-mask(ratio=0.2)"])
def test_a_rank_is_one_of_matrices(method: str, strategy: str) -> None:
    tuned = several(method, names="ab")
    with pytest.raises(StateError, match="A rank is one of changed matrices"):
        merge_deltas(tuned, ["a", "b"], "m", strategy=strategy)


def test_what_is_no_product_cannot_be_concatenated() -> None:
    for method in ("krona", "lora(rank=2, weight_decomposed=true)"):
        tuned = several(method, names="ab")
        with pytest.raises(StateError, match="no products of two thin matrices"):
            merge_deltas(tuned, ["a", "b"], "m", strategy="concatenate")
        with pytest.raises(
            StateError, match=r"encoder\.0\.attention\.query by .* has no rank of its own to keep: give"
        ):
            merge_deltas(tuned, ["a", "b"], "m", strategy="svd")


@pytest.mark.parametrize("architecture", ["gpt2", "llama-gqa", "t5", "vit", "gpt_neox"])
@pytest.mark.parametrize("strategy", ["linear", "ties"])
def test_fused_and_transposed_matrices(architecture: str, strategy: str) -> None:
    """Entries of changed rows lie where the model stores them."""
    head = "classification" if architecture == "vit" else "language"
    tuned = several("lora(rank=2)", names="ab", architecture=architecture, head=head, dtype=torch.float64)
    if strategy == "ties":
        given = {"strategy": "ties", "density": 1.0, "weights": [1, 1]}
        vectors = [changes_of(tuned, name) for name in "ab"]
        wanted = reference.ties(vectors, 1.0)
    else:
        given, wanted = {"weights": [1, -2]}, reference.linear([changes_of(tuned, name) for name in "ab"], [1, -2])
    merge_deltas(tuned, ["a", "b"], "m", **given)
    assert largest_difference(changes_of(tuned, "m", set(wanted)), wanted) < 1e-12


@pytest.mark.parametrize("method", ["lora(rank=2)", "krona", "bitfit", "sequential-adapter(width=4)"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_float32_and_kept(method: str, dtype: torch.dtype) -> None:
    tuned = several(method, names="ab", dtype=dtype)
    merge_deltas(tuned, ["a", "b"], "m", heads="average")
    assert all(value.dtype == dtype for _, value in tuned.attachments["m"].parameters())
    if method in ("bitfit", "sequential-adapter(width=4)"):
        vectors = [stored_of(tuned, name) for name in "ab"]
        for key, value in stored_of(tuned, "m").items():
            mean = torch.from_numpy((vectors[0][key] + vectors[1][key]) / 2).to(dtype).double().numpy()
            assert np.array_equal(value, mean), key
    else:
        wanted = reference.linear([exact_changes(tuned, name) for name in "ab"], [0.5, 0.5])
        found = exact_changes(tuned, "m")
        largest = max(float(np.abs(value).max()) for value in wanted.values())
        # a factor, or an entry, is rounded once
        assert largest_difference(found, wanted) < 2 * torch.finfo(dtype).eps * largest


def exact_changes(tuned: deltune.Tuned, name: str) -> Vector:
    """What forms of half precision change, in double: merging them into the model would round it."""
    found: Vector = {}
    attachment = tuned.attachments[name]
    with tuned.disabled():
        shapes = {key: value.shape for key, value in tuned.model.state_dict().items()}
    for key, site, form in attachment.sites:
        values = {name: value.detach().double() for name, value in form.named_parameters()}
        if key == "entries":
            start = 0
            for parameter, size in zip(site.names, site.sizes, strict=True):  # type: ignore[attr-defined]
                indices = form.get_buffer("indices")
                here = (indices >= start) & (indices < start + size)
                dense = torch.zeros(size, dtype=torch.float64)
                dense[indices[here] - start] = values["values"][here]
                if here.any():
                    found[parameter] = dense.view(shapes[parameter]).numpy()
                start += size
        elif hasattr(form, "rank"):
            found[f"{site.part.module}.weight"] = (form.scale * values["B"] @ values["A"]).numpy()
        else:
            found[f"{site.part.module}.weight"] = torch.kron(form.scale * values["A"], values["B"]).numpy()
    return found


def test_deltas_of_methods_that_change_weights_otherwise() -> None:
    tuned = several("lora(rank=2)", "krona", "full", dtype=torch.float64)
    vectors = [changes_of(tuned, name) for name in "abc"]
    merge_deltas(tuned, ["a", "b"], "low", rank=32, weights=[1, 1])
    assert largest_difference(changes_of(tuned, "low"), reference.linear(vectors[:2], [1, 1])) < 1e-10
    with pytest.raises(StateError, match="missing='zero'"):
        merge_deltas(tuned, ["a", "c"], "m", weights=[1, 1])
    with pytest.raises(StateError, match="as changed entries of its parameters, which have no rank"):
        merge_deltas(tuned, ["a", "c"], "m", rank=2, missing="zero")
    merge_deltas(tuned, ["a", "c"], "m", weights=[1, 1], missing="zero")
    padded = {key: vectors[0].get(key, np.zeros_like(value)) for key, value in vectors[2].items()}
    wanted = reference.linear([padded, vectors[2]], [1, 1])
    assert largest_difference(changes_of(tuned, "m", set(wanted)), wanted) < 1e-12
    # and a merged delta is one to merge further
    merge_deltas(tuned, ["m", "b"], "again", weights=[1, -1])
    padded = {key: vectors[1].get(key, np.zeros_like(value)) for key, value in wanted.items()}
    wanted = reference.linear([wanted, padded], [1, -1])
    assert largest_difference(changes_of(tuned, "again", set(wanted)), wanted) < 1e-12


def test_missing_places_count_as_zero_where_that_is_asked_for() -> None:
    tuned = several("lora(rank=2)", "lora(rank=2, targets='attention.value ffn.up layers=1:')", names="ab")
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=[2, 3], missing="zero")
    one, other = changes_of(tuned, "a"), changes_of(tuned, "b")
    shapes = {**one, **other}
    wanted = {
        key: 2 * one.get(key, np.zeros_like(value)) + 3 * other.get(key, np.zeros_like(value))
        for key, value in shapes.items()
    }
    assert largest_difference(changes_of(tuned, "m"), wanted) < 2e-6
    assert merged.method.startswith("lora(rank=")
    biases = several("bitfit", "bitfit(targets=ffn.up)", names="ab", dtype=torch.float64)
    merge_deltas(biases, ["a", "b"], "m", weights=[1, 1], missing="zero")
    one, other = changes_of(biases, "a"), changes_of(biases, "b")
    wanted = {key: value + other.get(key, 0) for key, value in one.items()}
    assert largest_difference(changes_of(biases, "m", set(wanted)), wanted) < 1e-12


def test_biases_that_were_added_are_merged_by_bitfit_and_refused_as_entries() -> None:
    tuned = several("bitfit(missing=add)", names="ab", architecture="llama-gqa", head="language", dtype=torch.float64)
    vectors = [stored_of(tuned, name) for name in "ab"]
    merge_deltas(tuned, ["a", "b"], "m", strategy="ties", density=0.5)
    assert largest_difference(stored_of(tuned, "m"), reference.ties(vectors, 0.5)) < 1e-12
    both = several("lora(rank=2) + bitfit(missing=add)", names="ab", architecture="llama-gqa", head="language")
    with pytest.raises(StateError, match=r"has added \S+bias, which the model does not have"):
        merge_deltas(both, ["a", "b"], "m", strategy="ties")
    merge_deltas(both, ["a", "b"], "m", strategy="ties", rank=4)


def test_sums_of_other_lengths_that_change_weights() -> None:
    tuned = several("lora(rank=2) + bitfit", "full", names="ab", dtype=torch.float64)
    one, other = (changes_of(tuned, name) for name in "ab")
    merge_deltas(tuned, ["a", "b"], "m", weights=[1, -2], missing="zero")
    padded = {key: one.get(key, np.zeros_like(value)) for key, value in other.items()}
    wanted = reference.linear([padded, other], [1, -2])
    assert largest_difference(changes_of(tuned, "m", set(wanted)), wanted) < 1e-12
