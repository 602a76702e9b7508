"""Gated sums and presets: gated changes name by name, the others of the same sum as changes of matrices."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

import deltune
from deltune.errors import StateError
from deltune.merging import merge_deltas
from deltune.methods.reparameterized.low_rank import LowRank
from tests.merging import reference
from tests.merging.common import batch_of, largest_difference, several, stored_of, with_initial
from tests.merging.reference import Vector
from tests.methods.common import build, output

UNIPELT = "unipelt(length=3, reparameterize=false, width=4, rank=2{})"
#: All of it has gates.
GATED = [
    UNIPELT.format(""),
    UNIPELT.format(", gates=central"),
    UNIPELT.format(", separate_gates=true"),
    "unipelt(length=3, reparameterize=false, width=4, variant=ap)",
    "gated(lora(rank=2))",
    "gated(lora(rank=2), gate=scalar)",
    "gated(lora(rank=2), pfeiffer-adapter(width=4), gate=central)",
    "gated(lora(rank=2)) + pfeiffer-adapter(width=4)",
    "gated(ia3(inputs=none), prefix-tuning(length=3, reparameterize=false))",
    "mam(length=3, width=4, reparameterize=false)",
]
#: Each with matrices that no gate multiplies.
MIXED = [
    UNIPELT.format(", gates=none"),
    "gated(lora(rank=2), pfeiffer-adapter(width=4)) + lora(rank=3, targets=ffn.up)",
    UNIPELT.format(", gates=central") + " + lora(rank=3, targets=ffn.up)",
    UNIPELT.format(", gates=none") + " + prefix-tuning(length=2, reparameterize=false)",
]
WEIGHTS = [0.25, 0.75]


def split(tuned: deltune.Tuned, name: str) -> tuple[Vector, Vector]:
    """Changes of matrices without a gate, by site; all other stored tensors, by part, counted through, and site."""
    attachment = tuned.attachments[name]
    matrices: Vector = {}
    others: Vector = {}
    parts: dict[str, int] = {}
    stored = stored_of(tuned, name)
    for key, site, form in attachment.sites:
        path = re.match(r"[\d.]*", key)
        assert path is not None
        part = parts.setdefault(path.group(), len(parts))
        if isinstance(form, LowRank) and not form.gated_by:
            A, B = (factor.detach().double().numpy() for factor in form.factors())
            matrices[site.key] = form.scale * B @ A
        else:
            own = [item for item in stored if item.startswith(f"{key}.") and "." not in item.removeprefix(f"{key}.")]
            own += [f"{key}.{item}" for item, _ in form.named_parameters()]
            others.update({f"{part} {site.key} {item.removeprefix(key)}": stored[item] for item in own})
    return matrices, others


@pytest.mark.parametrize("method", GATED)
@pytest.mark.parametrize("strategy", ["linear", "ties"])
def test_gated_changes_are_merged_name_by_name(method: str, strategy: str) -> None:
    tuned = with_initial(several(method, names="ab", dtype=torch.float64), method)
    vectors = [stored_of(tuned, name) for name in "ab"]
    if strategy == "linear":
        merged = merge_deltas(tuned, ["a", "b"], "m", weights=WEIGHTS)
        expected = reference.linear(vectors, WEIGHTS)
    else:
        with pytest.raises(StateError, match=r"merged as a change from its initial value, .* Give initial="):
            merge_deltas(tuned, ["a", "b"], "m", strategy="ties")
        merged = merge_deltas(tuned, ["a", "b"], "m", strategy="ties", density=0.4, initial="initial")
        start = stored_of(tuned, "initial")
        change = reference.ties([{key: value - start[key] for key, value in vector.items()} for vector in vectors], 0.4)
        expected = {key: start[key] + value for key, value in change.items()}
    assert largest_difference(stored_of(tuned, "m"), expected) < 1e-12
    assert tuned.attachments["m"].method == tuned.attachments["a"].method.stored(tuned.attachments["a"].forms)
    assert merged.space == "parameters"


@pytest.mark.parametrize("method", MIXED)
def test_other_changes_of_the_sum_are_changes_of_matrices(method: str, tmp_path: Path) -> None:
    tuned = several(method, names="ab", dtype=torch.float64)
    matrices, others = zip(*(split(tuned, name) for name in "ab"), strict=True)
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=WEIGHTS, heads="a")
    assert merged.space == "both"
    found, kept = split(tuned, "m")
    assert largest_difference(found, reference.linear(list(matrices), WEIGHTS)) < 1e-12
    assert largest_difference(kept, reference.linear(list(others), WEIGHTS)) < 1e-12
    expected = output(tuned.model, batch_of(seed=9))
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert", dtype=torch.float64), tmp_path)
    assert torch.equal(output(loaded.model, batch_of(seed=9)), expected)


@pytest.mark.parametrize("method", [*GATED, *MIXED])
def test_the_average_of_a_delta_and_itself_is_that_delta(method: str, tmp_path: Path) -> None:
    tuned = several(method, names="a")
    expected = output(tuned.model, batch_of(seed=9))
    tuned.save(tmp_path)
    deltune.load(tuned, tmp_path, name="b")
    merge_deltas(tuned, ["a", "b"], "m", heads="a")
    assert (output(tuned.model, batch_of(seed=9)) - expected).abs().max() < 1e-5


def test_a_preset_is_the_sum_that_it_stands_for() -> None:
    whole = "prefix-tuning(length=3, reparameterize=false, width=800) + parallel-adapter(width=4, scale=4, dropout=0.1)"
    tuned = several("mam(length=3, width=4, reparameterize=false)", whole, names="ab", dtype=torch.float64)
    merge_deltas(tuned, ["a", "b"], "m")
    expected = reference.linear([stored_of(tuned, name) for name in "ab"], [0.5, 0.5])
    assert largest_difference(stored_of(tuned, "m"), expected) < 1e-12


@pytest.mark.parametrize(
    ("one", "other", "words"),
    [
        ("gated(lora(rank=2))", "gated(lora(rank=2), pooling=all)", "pooling is auto in one and all in the other"),
        (UNIPELT.format(""), UNIPELT.format(", pooling=all"), "pooling is auto in one and all in the other"),
        (
            "gated(lora(rank=2), pfeiffer-adapter(width=4), gate=central) + bitfit",
            "gated(lora(rank=2, alpha=4), pfeiffer-adapter(width=4), gate=central) + bitfit",
            r"alpha of lora is \S+ in one and 4.0 in the other",
        ),
        (UNIPELT.format(""), UNIPELT.format(", gates=central"), "means something else in"),
        (UNIPELT.format(""), UNIPELT.format(", gates=none"), "means something else in"),
        ("gated(lora(rank=2))", "gated(lora(rank=3))", r"A is \(2, 32\) .* and \(3, 32\) in 'b'"),
        ("gated(lora(rank=2))", "lora(rank=2)", "'a' is gated.*, and 'b' is lora"),
    ],
)
def test_gated_sums_that_mean_other_things_are_refused(one: str, other: str, words: str) -> None:
    tuned = several(one, other, names="ab")
    with pytest.raises(StateError, match=re.compile(words, re.DOTALL)):
        merge_deltas(tuned, ["a", "b"], "m")


def test_dropout_inside_of_gated_sums_may_differ() -> None:
    tuned = several("gated(lora(rank=2))", "gated(lora(rank=2, dropout=0.1))", names="ab", dtype=torch.float64)
    merge_deltas(tuned, ["a", "b"], "m")
    expected = reference.linear([stored_of(tuned, name) for name in "ab"], [0.5, 0.5])
    assert largest_difference(stored_of(tuned, "m"), expected) < 1e-12


def test_what_has_a_gate_has_no_rank_and_the_rest_of_the_sum_has() -> None:
    tuned = several("gated(lora(rank=2)) + pfeiffer-adapter(width=4)", names="ab")
    for given in ({"rank": 2}, {"strategy": "svd"}, {"strategy": "concatenate"}):
        with pytest.raises(StateError, match="A rank is one of changed matrices"):
            merge_deltas(tuned, ["a", "b"], "m", **given)  # type: ignore[arg-type]
    mixed = several(MIXED[1], names="ab", dtype=torch.float64)
    exact = reference.linear([split(mixed, name)[0] for name in "ab"], [0.5, 0.5])
    merge_deltas(mixed, ["a", "b"], "m", rank=4)
    for key, value in split(mixed, "m")[0].items():
        left, values, right = np.linalg.svd(exact[key])
        assert np.abs(value - (left[:, :4] * values[:4]) @ right[:4]).max() < 1e-10
