"""(IA)^3 is merged vector by vector, which sums its changes of matrices and biases; or with both of these."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import deltune
from deltune.backbone import anatomy_of
from deltune.errors import StateError
from deltune.merging import merge_deltas, negate
from deltune.merging.low_rank import lora_of
from deltune.methods import parse
from tests.merging import reference
from tests.merging.common import batch_of, changes_of, largest_difference, several, stored_of
from tests.methods.common import build, output

WEIGHTS = [0.5, 0.25, 1.5]


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "llama-gqa"])
def test_sums_of_vectors_are_sums_of_changes(architecture: str) -> None:
    head = "classification" if architecture == "bert" else "language"
    tuned = several("ia3", architecture=architecture, head=head, dtype=torch.float64)
    vectors = [changes_of(tuned, name) for name in "abc"]
    biases = [value for key, value in vectors[0].items() if key.endswith("bias")]
    assert (max((float(np.abs(value).max()) for value in biases), default=0.0) > 1e-3) == (architecture != "llama-gqa")
    merged = merge_deltas(tuned, ["a", "b", "c"], "m", weights=WEIGHTS, scale=0.8)
    assert merged.method == "ia3"
    assert largest_difference(changes_of(tuned, "m"), reference.linear(vectors, WEIGHTS, 0.8)) < 1e-12


def test_the_average_of_a_delta_and_itself_is_that_delta(tmp_path: Path) -> None:
    tuned = several("ia3", names="a")
    expected = output(tuned.model, batch_of(seed=9))
    tuned.save(tmp_path)
    deltune.load(tuned, tmp_path, name="b")
    merge_deltas(tuned, ["a", "b"], "m", heads="a")
    assert (output(tuned.model, batch_of(seed=9)) - expected).abs().max() < 1e-6


def test_other_strategies_act_on_vectors_and_need_no_initial_values() -> None:
    tuned = several("ia3", dtype=torch.float64)
    vectors = [{key: value - 1 for key, value in stored_of(tuned, name).items()} for name in "abc"]
    merge_deltas(tuned, ["a", "b", "c"], "ties", strategy="ties", density=0.3, weights=WEIGHTS, scale=0.8)
    change = reference.ties(vectors, 0.3, WEIGHTS, 0.8)
    assert largest_difference(stored_of(tuned, "ties"), {key: 1 + value for key, value in change.items()}) < 1e-12
    negate(tuned, "a", "not-a")
    assert largest_difference(stored_of(tuned, "not-a"), {key: 1 - value for key, value in vectors[0].items()}) < 1e-12
    with pytest.raises(StateError, match="needs no initial values"):
        merge_deltas(tuned, ["a", "b"], "m", initial="c")


def test_vectors_have_no_rank() -> None:
    tuned = several("ia3", names="ab")
    for given in ({"rank": 2}, {"strategy": "svd"}, {"strategy": "concatenate"}):
        with pytest.raises(StateError, match="A rank is one of changed matrices"):
            merge_deltas(tuned, ["a", "b"], "m", **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("architecture", ["bert", "gpt2"])
@pytest.mark.parametrize("method", ["ia3 + krona", "ia3 + fish-mask(ratio=0.2)", "ia3 + bitfit + krona"])
def test_as_changed_entries_biases_are_among_them(method: str, architecture: str) -> None:
    head = "classification" if architecture == "bert" else "language"
    tuned = several(method, names="ab", architecture=architecture, head=head, dtype=torch.float64)
    vectors = [exact_changes(tuned, name) for name in "ab"]
    names = {key for vector in vectors for key in vector}
    vectors = [{key: vector.get(key, np.zeros(shape_of(tuned, key))) for key in names} for vector in vectors]
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=[1, -2])
    assert merged.method.startswith("diff-pruning")
    assert merged.space == "changes"
    assert largest_difference(changes_of(tuned, "m", names), reference.linear(vectors, [1, -2])) < 1e-12


def exact_changes(tuned: deltune.Tuned, name: str) -> reference.Vector:
    """What the forms change, each by itself and added."""
    attachment = tuned.attachments[name]
    found: reference.Vector = {}

    def add(key: str, value: torch.Tensor, original: torch.Tensor) -> None:
        change = (value - original).detach().numpy()
        found[key] = found[key] + change if key in found else change

    with tuned.disabled():
        modules = dict(tuned.model.named_modules())
        for _, site, form in attachment.sites:
            for key, value in site.merge(form, modules).items():
                add(key, value, tuned.model.get_parameter(key))
        for key, value in attachment.selection:
            if key not in attachment.head_names:
                add(key, value, tuned.model.get_parameter(key))
    return found


def shape_of(tuned: deltune.Tuned, key: str) -> tuple[int, ...]:
    with tuned.disabled():
        return tuple(tuned.model.get_parameter(key).shape)


def test_beside_low_rank_changes_the_vectors_stay() -> None:
    tuned = several("ia3 + krona", names="ab", dtype=torch.float64)
    vectors = [exact_changes(tuned, name) for name in "ab"]
    merged = merge_deltas(tuned, ["a", "b"], "m", weights=[1, -2], rank=32)
    assert merged.method.startswith("ia3 + lora(rank=32")
    assert largest_difference(exact_changes(tuned, "m"), reference.linear(vectors, [1, -2])) < 1e-10


@pytest.mark.parametrize("other", ["lora(rank=2)", "ia3(targets=attention.query, inputs=none)", "bitfit"])
def test_with_a_delta_that_changes_weights_otherwise(other: str) -> None:
    tuned = several("ia3", other, names="ab", dtype=torch.float64)
    one, two = (changes_of(tuned, name) for name in "ab")
    with pytest.raises(StateError, match="missing='zero'"):
        merge_deltas(tuned, ["a", "b"], "m")
    merge_deltas(tuned, ["a", "b"], "m", weights=[1, -2], missing="zero")
    padded = [{key: own.get(key, np.zeros_like(value)) for key, value in {**one, **two}.items()} for own in (one, two)]
    assert largest_difference(changes_of(tuned, "m", set(padded[0])), reference.linear(padded, [1, -2])) < 1e-12


def test_a_low_rank_form_is_placed_where_targets_alone_do_not_reach() -> None:
    """Some methods select matrices with more than their targets."""
    model = build("bert")
    anatomy = anatomy_of(model)
    ranks = {"encoder.0.attention.key": 2, "encoder.0.ffn.down": 3}
    method, scales = lora_of(ranks, [parse("ia3"), parse("ia3")], model, anatomy)
    assert scales.keys() == ranks.keys()
    placed = {placement.key: placement.form.rank for placement in method.place(model, anatomy)}  # type: ignore[union-attr]
    assert placed == ranks
