"""Spans of tags: how they are read, and how those of predictions are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError, TrainingError
from deltune.tasks import TokenTagging
from deltune.tasks._spans import Span, needless_begin, spans_of, stray_inside, to_bio
from tests.tasks.tagged import NAMES, logits_of

TAGS = st.lists(st.sampled_from(["O", "B-a", "I-a", "B-b-c", "I-b-c"]), max_size=12)


def defined_spans(tags: list[str]) -> set[Span]:
    """Every range of words that meets the definition of a span, found by trying all."""

    def begins(place: int) -> bool:
        letter, kind = tags[place][0], tags[place][2:]
        continues = place > 0 and tags[place - 1] != "O" and tags[place - 1][2:] == kind
        return letter == "B" or (letter == "I" and not continues)

    return {
        Span(tags[start][2:], start, end)
        for start in range(len(tags))
        for end in range(start + 1, len(tags) + 1)
        if begins(start)
        and all(tag == f"I-{tags[start][2:]}" for tag in tags[start + 1 : end])
        and (end == len(tags) or tags[end] != f"I-{tags[start][2:]}")
    }


@settings(max_examples=300)
@given(TAGS)
def test_spans_are_those_of_the_definition(tags: list[str]) -> None:
    spans = spans_of(tags)
    assert set(spans) == defined_spans(tags)
    assert spans == sorted(spans, key=lambda span: span.start)
    written = to_bio(tags)
    assert spans_of(written) == spans
    assert stray_inside(written) is None
    assert (stray_inside(tags) is None) == (written == tags)


@given(TAGS)
def test_iob1_needs_no_b_but_behind_a_span_of_the_type(tags: list[str]) -> None:
    rewritten = list(tags)
    for place in range(len(tags)):
        if tags[place][0] == "B":
            shorter = [*tags[:place], f"I{tags[place][1:]}", *tags[place + 1 :]]
            if spans_of(shorter) == spans_of(tags):
                assert needless_begin(tags) is not None
                rewritten[place] = shorter[place]
    assert needless_begin(rewritten) is None


def test_tags_without_a_type_are_spans_of_one() -> None:
    assert spans_of(["B", "I", "B", "O", "I"]) == [Span("_", 0, 2), Span("_", 2, 3), Span("_", 4, 5)]


def measured(true: list[list[str]], predicted: list[list[str]], names: tuple[str, ...]) -> dict[str, float]:
    task = TokenTagging(label_names=names, max_length=16)
    labels = torch.full((len(true), 12), -100)
    for number, row in enumerate(true):
        labels[number, : len(row)] = torch.tensor([names.index(tag) for tag in row])
    return task.metrics(task.reduce_logits(logits_of(predicted, names, 12), labels))


def test_metrics_by_hand() -> None:
    pytest.importorskip("seqeval")
    true = [["B-per", "I-per", "O", "B-place"], ["O", "B-per", "O"]]
    # right: the first person; wrong: a place that is too long, a type; missed: the last person
    predicted = [["B-per", "I-per", "B-place", "I-place"], ["B-place", "O", "O"]]
    scores = measured(true, predicted, NAMES)
    assert scores["precision"] == pytest.approx(1 / 3)
    assert scores["recall"] == pytest.approx(1 / 3)
    assert scores["f1"] == pytest.approx(1 / 3)
    assert scores["accuracy"] == pytest.approx(3 / 7)
    right, wrong = np.log(np.exp(5) + 4) - 5, np.log(np.exp(5) + 4)
    assert scores["loss"] == pytest.approx((3 * right + 4 * wrong) / 7)
    assert set(scores) == {"loss", "f1", "precision", "recall", "accuracy"}
    assert TokenTagging.metric in scores


def test_no_predicted_span_gives_zero_without_a_warning(recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("seqeval")
    scores = measured([["B-per", "O"]], [["O", "O"]], NAMES)
    assert (scores["f1"], scores["precision"], scores["recall"], scores["accuracy"]) == (0, 0, 0, 0.5)
    assert measured([["O"]], [["O"]], NAMES)["f1"] == 0
    assert not [item for item in recwarn if "seqeval" in str(item.filename)]


ROW_PAIRS = st.lists(
    st.integers(1, 10).flatmap(
        lambda length: st.tuples(
            *(st.lists(st.sampled_from(NAMES), min_size=length, max_size=length) for _ in range(2))
        )
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=200)
@given(ROW_PAIRS)
def test_f1_is_that_of_seqeval_and_of_the_definition(pairs: list[tuple[list[str], list[str]]]) -> None:
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    true, predicted = [list(row) for row, _ in pairs], [list(row) for _, row in pairs]
    found = measured(true, predicted, NAMES)
    sets = [
        [{(row, *span) for row, tags in enumerate(side) for span in defined_spans(tags)}] for side in (true, predicted)
    ]
    (truth,), (guess,) = sets
    right = len(truth & guess)
    assert found["precision"] == pytest.approx(right / len(guess) if guess else 0)
    assert found["recall"] == pytest.approx(right / len(truth) if truth else 0)
    assert found["f1"] == pytest.approx(2 * right / (len(truth) + len(guess)) if right else 0)
    for tags in (*true, *predicted):
        entities = seqeval.get_entities(tags)
        assert {Span(kind, start, last + 1) for kind, start, last in entities} == set(spans_of(tags))


def test_batches_reduce_to_one_shape_and_only_words_count() -> None:
    task = TokenTagging(label_names=NAMES)
    labels = torch.tensor([[-100, 1, -100, 0], [-100, -100, -100, 2]])
    logits = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    reduced = task.reduce_logits((logits, None), labels)
    assert reduced.shape == (2, 512, 3)
    assert reduced[0, :2, 0].tolist() == [1, 0]
    assert reduced[0, :2, 1].tolist() == logits[0, [1, 3]].argmax(-1).tolist()
    expected = -logits[0, [1, 3]].log_softmax(-1)[[0, 1], [1, 0]]
    torch.testing.assert_close(reduced[0, :2, 2], expected)
    assert (reduced[0, 2:] == -100).all()
    assert (reduced[1, 1:] == -100).all()
    pad = torch.nn.functional.pad
    for side in ((2, 0), (0, 2)):
        assert task.reduce_logits(pad(logits, (0, 0, *side)), pad(labels, side, value=-100)).equal(reduced)


def test_outputs_that_do_not_fit_are_refused() -> None:
    task = TokenTagging(label_names=NAMES, max_length=2)
    with pytest.raises(TrainingError, match=r"shape \[1, 3, 5\] do not belong to labels of shape \[1, 2\]"):
        task.reduce_logits(torch.zeros(1, 3, 5), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(TrainingError, match="more than the 2 words"):
        task.reduce_logits(torch.zeros(1, 3, 5), torch.zeros(1, 3, dtype=torch.long))
    pytest.importorskip("seqeval")
    with pytest.raises(DataError, match=r"where \[rows, words, 3\] is expected"):
        task.metrics(np.zeros((2, 5)))
    with pytest.raises(DataError, match="No word has a tag"):
        task.metrics(np.full((2, 5, 3), -100.0))
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        task.metrics(task.reduce_logits(torch.full((1, 1, 5), torch.nan), torch.zeros(1, 1, dtype=torch.long)))
