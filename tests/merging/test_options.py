"""Heads, wrong options, different starts, and what is said of a merge."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import deltune
from deltune.errors import StateError
from deltune.merging import STRATEGIES, merge_deltas
from tests.merging.common import batch_of, head_of, largest_difference, several, stored_of, with_initial
from tests.methods.common import build, output, train

TASK = {"task": "text-classification", "options": {"label_names": ["no", "yes", "perhaps"]}}
OTHER_TASK = {"task": "text-classification", "options": {"label_names": ["red", "green", "blue"]}}
WIDE = "pfeiffer-adapter(width=16, standard_deviation=0.3)"


def test_heads_are_left_out_by_default_and_that_is_said() -> None:
    tuned = several("lora(rank=2)", names="ab")
    tuned.attachments["a"].task = TASK
    with tuned.disabled():
        own = {key: value.clone() for key, value in tuned.model.classifier.state_dict().items()}
    merged = merge_deltas(tuned, ["a", "b"], "m")
    assert head_of(tuned, "m") == {}
    assert tuned.attachments["m"].task is None
    assert all(torch.equal(value, own[key]) for key, value in tuned.model.classifier.state_dict().items())
    assert merged.left_out_heads
    assert "Task heads are left out: choose one of them with heads" in str(merged)


def test_the_head_of_one_delta() -> None:
    tuned = several("lora(rank=2)", names="ab")
    tuned.attachments["a"].task, tuned.attachments["b"].task = TASK, OTHER_TASK
    merged = merge_deltas(tuned, ["a", "b"], "m", strategy="ties", heads="b")
    expected = head_of(tuned, "b")
    found = head_of(tuned, "m")
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    assert tuned.attachments["m"].task == OTHER_TASK
    assert "Its task head is that of b" in str(merged)
    with pytest.raises(StateError, match=r"heads cannot be 'bb'.* Did you mean 'b'\?"):
        merge_deltas(tuned, ["a", "b"], "n", heads="bb")


def test_the_average_head_where_labels_agree() -> None:
    tuned = several("lora(rank=2)", names="ab")
    for name in "ab":
        tuned.attachments[name].task = TASK
    one, other = head_of(tuned, "a"), head_of(tuned, "b")
    merge_deltas(tuned, ["a", "b"], "m", weights=[3, 1], heads="average")
    for key, value in head_of(tuned, "m").items():
        assert torch.allclose(value, 0.75 * one[key] + 0.25 * other[key], atol=1e-7)
    assert tuned.attachments["m"].task == TASK
    tuned.attachments["b"].task = OTHER_TASK
    with pytest.raises(StateError, match="labels are no, yes, perhaps and red, green, blue"):
        merge_deltas(tuned, ["a", "b"], "n", heads="average")
    tuned.attachments["b"].task = TASK
    with pytest.raises(StateError, match="add up to zero, so that heads have no average"):
        merge_deltas(tuned, ["a", "b"], "n", weights=[1, -1], heads="average")


def test_full_fine_tuning_keeps_the_models_own_head_where_none_is_chosen() -> None:
    tuned = several("full", names="ab")
    with tuned.disabled():
        own = {key: value.clone() for key, value in tuned.model.classifier.state_dict().items()}
    merge_deltas(tuned, ["a", "b"], "m")
    assert all(torch.equal(value, own[key]) for key, value in tuned.model.classifier.state_dict().items())
    merge_deltas(tuned, ["a", "b"], "n", heads="a")
    expected = head_of(tuned, "a")
    assert all(torch.equal(value, expected[key]) for key, value in head_of(tuned, "n").items())


def test_language_models_keep_a_task_that_all_have() -> None:
    tuned = several("lora(rank=2)", names="ab", architecture="llama-gqa", head="language")
    task = {"task": "instruction-tuning", "options": {}}
    for name in "ab":
        tuned.attachments[name].task = task
    merged = merge_deltas(tuned, ["a", "b"], "m")
    assert tuned.attachments["m"].task == task
    assert not merged.left_out_heads
    with pytest.raises(StateError, match="has no task head"):
        merge_deltas(tuned, ["a", "b"], "n", heads="a")
    with pytest.raises(StateError, match="None of the deltas has a task head"):
        merge_deltas(tuned, ["a", "b"], "n", heads="average")


def test_options_that_make_no_sense_are_refused_and_nothing_changes() -> None:
    tuned = several("lora(rank=2)", names="ab")
    cases: list[tuple[dict[str, object], str]] = [
        ({"strategy": "tie"}, "There is no strategy 'tie'. Did you mean 'ties'"),
        ({"density": 0.3}, "density is for the strategies ties and dare-ties, not for linear"),
        ({"strategy": "ties", "density": 0.0}, "density is the share"),
        ({"strategy": "ties", "drop": 0.5}, "drop is for the strategies dare and dare-ties, not for ties"),
        ({"strategy": "dare", "drop": 1.0}, "probability to drop"),
        ({"seed": 3}, "linear draws nothing"),
        ({"strategy": "concatenate", "rank": 3}, "concatenate is exact, and has no rank"),
        ({"rank": 0}, "at least 1, not 0"),
        ({"weights": [1.0]}, "2 deltas but 1 weights"),
        ({"weights": [1.0, float("nan")]}, "must be finite"),
        ({"missing": "zeros"}, "missing cannot be 'zeros'. Did you mean 'zero'"),
        ({"initial": "a"}, "needs no initial values"),
        ({"initial": "c"}, "Nothing is attached under the name 'c'"),
    ]
    before = tuned.active
    for given, words in cases:
        with pytest.raises(StateError, match=words):
            merge_deltas(tuned, ["a", "b"], "m", **given)  # type: ignore[arg-type]
    with pytest.raises(StateError, match="'a' is named twice"):
        merge_deltas(tuned, ["a", "a"], "m")
    with pytest.raises(StateError, match="name one delta at least"):
        merge_deltas(tuned, [], "m")
    with pytest.raises(StateError, match=r"under the name 'aa'.* Did you mean 'a'"):
        merge_deltas(tuned, ["aa", "b"], "m")
    with pytest.raises(StateError, match="'a' is taken"):
        merge_deltas(tuned, ["a", "b"], "a")
    assert tuned.active == before
    assert list(tuned.attachments) == ["a", "b"]
    tuned.merge()
    with pytest.raises(StateError, match="while merged"):
        merge_deltas(tuned, ["a", "b"], "m")


def test_initial_values_of_other_shapes_are_refused_by_name() -> None:
    tuned = several("sequential-adapter(width=4)", names="ab")
    with_initial(tuned, "sequential-adapter(width=5)")
    with pytest.raises(StateError, match=r"encoder\.0\.attention\.down\.weight is \(4, 32\) in 'a' .* in 'initial'"):
        merge_deltas(tuned, ["a", "b"], "m", strategy="ties", initial="initial")


def test_deltas_that_started_apart_are_warned_of() -> None:
    for strategy, initial in (("linear", None), ("ties", "initial")):
        tuned = with_initial(several(WIDE, names="ab", same_start=False), WIDE)
        with pytest.warns(UserWarning, match="does not resemble .* other random values"):
            merge_deltas(tuned, ["a", "b"], "m", strategy=strategy, initial=initial)
        tuned = with_initial(several(WIDE, names="ab"), WIDE)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            merge_deltas(tuned, ["a", "b"], "m", strategy=strategy, initial=initial)


def test_factors_of_different_draws_are_nothing_to_warn_of() -> None:
    tuned = several("lora(rank=8)", names="ab", same_start=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merge_deltas(tuned, ["a", "b"], "m")


def test_what_is_kept_frozen_must_be_the_same() -> None:
    """The trained part stands on it."""
    tuned = several("adapter-fusion(adapters='pfeiffer-adapter(width=4), pfeiffer-adapter(width=3)')", names="ab")
    merge_deltas(tuned, ["a", "b"], "m")
    key, form = next(iter(tuned.attachments["b"].forms.items()))
    form.get_buffer("adapters.0.down.weight").add_(1)
    with pytest.raises(StateError, match=rf"{key}\.adapters\.0\.down\.weight is not trained, and has other values"):
        merge_deltas(tuned, ["a", "b"], "n")


def test_beside_a_quantised_model() -> None:
    model = build("llama-gqa")
    deltune.quantize(model)
    tuned = deltune.attach(model, "lora(rank=2)", "a")
    train(tuned, batch_of("llama-gqa", "language"))
    tuned.attach("lora(rank=2)", "b")
    train(tuned, batch_of("llama-gqa", "language", seed=1))
    merge_deltas(tuned, ["a", "b"], "m", weights=[1, 1])
    found = output(tuned.model, batch_of("llama-gqa", "language", seed=2))
    tuned.activate("a", "b")
    assert (output(tuned.model, batch_of("llama-gqa", "language", seed=2)) - found).abs().max() < 1e-5
    with pytest.raises(StateError, match="is quantised, so that its entries cannot be changed one by one"):
        merge_deltas(tuned, ["a", "b"], "n", strategy="ties")
    merge_deltas(tuned, ["a", "b"], "n", strategy="ties", rank=8)


def test_a_merged_delta_is_saved_and_loaded_like_any_other(tmp_path: Path) -> None:
    for number, given in enumerate([{"strategy": "ties"}, {"strategy": "dare", "rank": 3}, {"strategy": "svd"}]):
        tuned = several("lora(rank=2)", names="ab")
        merge_deltas(tuned, ["a", "b"], "m", heads="a", **given)  # type: ignore[arg-type]
        expected = output(tuned.model, batch_of(seed=9))
        tuned.save(tmp_path / str(number))
        loaded = deltune.load(build("bert"), tmp_path / str(number))
        assert torch.equal(output(loaded.model, batch_of(seed=9)), expected)
        assert largest_difference(stored_of(loaded, "m"), stored_of(tuned, "m")) == 0


def test_every_strategy_is_said_in_words() -> None:
    tuned = several("lora(rank=2)", names="ab")
    for strategy in STRATEGIES:
        merged = merge_deltas(tuned, ["a", "b"], f"by-{strategy}", strategy=strategy)
        assert f"({strategy}) into by-{strategy}: {merged.method}." in str(merged)


def test_a_head_of_another_size_is_left_out_when_loading(tmp_path: Path) -> None:
    tuned = several("lora(rank=2)", "full", names="ab")
    for name in "ab":
        tuned.save(tmp_path / name, name)
    model = build("bert", "classification")
    model.classifier = torch.nn.Linear(32, 7)
    own = model.classifier.weight.detach().clone()
    for name in "ab":
        loaded = deltune.load(model, tmp_path / name, head=False)
        assert head_of(loaded, name) == {}
        assert torch.equal(model.classifier.weight, own)
        shared = {key: value for key, value in stored_of(tuned, name).items() if not key.startswith("classifier")}
        mine = stored_of(loaded, name)
        assert all(np.array_equal(mine[key], value) for key, value in shared.items())


@pytest.mark.parametrize(
    "method", ["lora(rank=2)", "lora(rank=2, weight_decomposed=true)", "bitfit", "fish-mask(ratio=0.2)"]
)
def test_deltas_follow_a_model_that_was_changed_meanwhile(method: str) -> None:
    """Those that are not live are off the model while it is moved or cast."""
    tuned = several(method, names="ab")
    merge_deltas(tuned, ["a", "b"], "before", strategy="ties", heads="average")
    expected = output(tuned.model, batch_of(seed=9))
    tuned.activate("b")
    tuned.model.double()
    merge_deltas(tuned, ["a", "b"], "after", strategy="ties", heads="average")
    found = output(tuned.model, batch_of(seed=9))
    assert found.dtype == torch.float64
    assert all(value.dtype == torch.float64 for value in head_of(tuned, "a").values())
    assert (found - expected).abs().max() < 1e-4


@pytest.mark.parametrize("state", ["stacked", "routed"])
def test_a_merge_that_fails_leaves_what_was_live(state: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = several("pfeiffer-adapter(width=4)", names="ab", head="base")

    def broken(*_: object) -> None:
        raise StateError("no space left")

    monkeypatch.setattr("deltune.merging.merge.fill", broken)
    tuned.activate("a", "b", stacked=True, frozen="a")
    if state != "stacked":
        tuned.route(["a", None, "b"])
    before = copy.copy(tuned.control.live), tuned.control.route, tuned.control.stacked, tuned.control.frozen
    with pytest.raises(StateError, match="no space left"):
        merge_deltas(tuned, ["a", "b"], "m")
    assert (tuned.control.live, tuned.control.route, tuned.control.stacked, tuned.control.frozen) == before
    assert list(tuned.attachments) == ["a", "b"]
    # and what the route has hidden comes back
    tuned.route(None)
    assert (tuned.control.live, tuned.control.stacked) == ({"a": 1.0, "b": 1.0}, True)
    assert tuned.control.frozen == {"a"}
