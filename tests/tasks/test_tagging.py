"""Token tagging: where labels stand, what the loss covers, and how spans are read and counted."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForTokenClassification,
    PreTrainedTokenizerFast,
)

import deltune
from deltune.errors import DataError, TrainingError
from deltune.tasks import TokenTagging, read_dataset, task_from_description
from deltune.tasks._spans import Span, label_set, needless_begin, spans_of, stray_inside, to_bio
from deltune.training import evaluate, predict
from tests.assets import shared_data
from tests.tasks.tiny import byte_tokenizer, word_tokenizer

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ann", "##a", "met", "bo", "##b", "in", "new", "york", "##er", "s", "x"]
NAMES = ("O", "B-per", "I-per", "B-place", "I-place")
ROWS = [
    {"words": ["Anna", "met", "Bob"], "tags": ["B-per", "O", "B-per"]},
    {"words": ["in", "New", "Yorker", "s", "x"], "tags": ["O", "B-place", "I-place", "O", "O"]},
]
DATA = Dataset.from_list(ROWS)


def piece_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it: lower case, control characters dropped."""
    vocabulary = {piece: place for place, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 64, **options})


def encoder(**options: Any) -> BertForTokenClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, num_labels=len(NAMES), **size, **options)
    return BertForTokenClassification(config).eval()


def tagged(words: Any, tags: Any) -> Dataset:
    return Dataset.from_dict({"words": words, "tags": tags})


# -- labels ---------------------------------------------------------------------------------------------


def test_labels_stand_at_the_first_token_of_each_word() -> None:
    task = TokenTagging.from_data(DATA)
    assert task.label_names == NAMES
    assert task.scheme == "BIO"
    encoded = task.encode(DATA, piece_tokenizer())
    tokens = [[PIECES[token] for token in ids] for ids in encoded["input_ids"]]
    assert tokens[0] == ["[CLS]", "ann", "##a", "met", "bo", "##b", "[SEP]"]
    assert tokens[1] == ["[CLS]", "in", "new", "york", "##er", "s", "x", "[SEP]"]
    assert encoded[0]["labels"] == [-100, 1, -100, 0, 1, -100, -100]
    assert encoded[1]["labels"] == [-100, 0, 3, 4, -100, 0, 0, -100]
    assert list(encoded["length"]) == [7, 8]
    batch = task.collator(piece_tokenizer())(list(encoded))
    assert batch["labels"][0].tolist() == [-100, 1, -100, 0, 1, -100, -100, -100]
    left = task.collator(piece_tokenizer(), padding_side="left")(list(encoded))
    assert left["labels"][0].tolist() == [-100, -100, 1, -100, 0, 1, -100, -100]


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.sampled_from(["Anna", "Yorker", "x", "Bob"]), min_size=1, max_size=9), min_size=1))
def test_there_is_one_label_for_each_word(rows: list[list[str]]) -> None:
    tags = [[NAMES[(place + len(row)) % 2 * 3] for place in range(len(row))] for row in rows]
    encoded = TokenTagging(label_names=NAMES).encode(tagged(rows, tags), piece_tokenizer())
    for words, row_tags, labels, ids in zip(rows, tags, encoded["labels"], encoded["input_ids"], strict=True):
        assert [NAMES[label] for label in labels if label != -100] == row_tags
        begun = ["".join(PIECES[token].removeprefix("##") for token in part) for part in _parts(ids, labels)]
        assert begun == [word.lower() for word in words]


def _parts(ids: list[int], labels: list[int]) -> list[list[int]]:
    """Token ids without the special ones, divided where a label stands."""
    parts: list[list[int]] = []
    for token, label in zip(ids[1:-1], labels[1:-1], strict=True):
        if label != -100:
            parts.append([])
        parts[-1].append(token)
    return parts


def test_byte_level_words_have_the_tokens_of_running_text() -> None:
    tokenizer = byte_tokenizer(merges=[("\u0120", "c"), ("\u0120c", "d")])
    task = TokenTagging(label_names=NAMES)
    (row,) = task.encode(tagged([["ab", "cd", "e"]], [["O", "B-per", "O"]]), tokenizer)
    assert row["input_ids"] == tokenizer("ab cd e")["input_ids"]
    assert row["labels"][:3] == [0, -100, 1]


def test_columns_are_found_and_may_be_text_or_positions() -> None:
    text = Dataset.from_dict({"tokens": ["Anna met  Bob"], "ner_tags": ["B-per O B-per"]})
    task = TokenTagging.from_data(text)
    assert (task.words, task.tags, task.label_names) == ("tokens", "ner_tags", ("O", "B-per", "I-per"))
    encoded = task.encode(text, piece_tokenizer())
    assert encoded[0]["labels"] == [-100, 1, -100, 0, 1, -100, -100]

    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=["B-b", "O", "B-a"]))})
    named = Dataset.from_dict({"tokens": [["x", "s"]], "ner_tags": [[0, 1]]}, features=features)
    task = TokenTagging.from_data(named)
    assert task.label_names == ("O", "B-b", "I-b")
    assert task.encode(named, piece_tokenizer())[0]["labels"] == [-100, 1, 0, -100]

    task = TokenTagging.from_data(tagged([["x", "s"]], [[0, 1]]), label_names=["O", "B-b"])
    assert task.encode(tagged([["x", "s"]], [[1, 0]]), piece_tokenizer())[0]["labels"] == [-100, 1, 0, -100]
    other = Dataset.from_dict({"w": [["x"]], "t": [["B"]]})
    assert TokenTagging.from_data(other, words="w", tags="t").label_names == ("O", "B", "I")


def test_labels_do_not_depend_on_the_order_of_rows() -> None:
    turned = Dataset.from_list(ROWS[::-1])
    assert TokenTagging.from_data(turned) == TokenTagging.from_data(DATA)
    assert label_set(["B-b", "I-a-c", "O", "B-a-c"]) == ("O", "B-a-c", "I-a-c", "B-b", "I-b")


# -- schemes --------------------------------------------------------------------------------------------


def test_iob1_is_found_and_learned_as_bio() -> None:
    data = tagged([["x", "x", "x", "s"], ["s", "x"]], [["I-per", "I-per", "B-per", "O"], ["O", "I-place"]])
    task = TokenTagging.from_data(data)
    assert task.scheme == "IOB1"
    labels = task.encode(data, piece_tokenizer())["labels"]
    assert [[NAMES[label] for label in row if label >= 0] for row in labels] == [
        ["B-per", "I-per", "B-per", "O"],
        ["O", "B-place"],
    ]


def test_tags_of_neither_scheme_are_refused_or_read_as_asked() -> None:
    data = tagged([["x", "x"], ["s", "x", "x"]], [["B-per", "O"], ["O", "I-per", "O"]])
    message = (
        r"Row 2, column 'tags': the tag of word 2 is 'I-per' behind 'O', but other spans begin with 'B-per'.*"
        r"neither BIO nor IOB1.*scheme='IOB1'"
    )
    with pytest.raises(DataError, match=message):
        TokenTagging.from_data(data)
    with pytest.raises(DataError, match=r"Row 2.*which the scheme BIO forbids"):
        TokenTagging.from_data(data, scheme="BIO")
    with pytest.raises(DataError, match=r"Row 2.*which the scheme BIO forbids"):
        TokenTagging(label_names=NAMES).encode(data, piece_tokenizer())
    labels = TokenTagging.from_data(data, scheme="IOB1").encode(data, piece_tokenizer())["labels"]
    assert labels[1] == [-100, 0, 1, 0, -100]


# -- wrong input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "tags", "message"),
    [
        ([["x"], ["x", "s"]], [["O"], ["O"]], r"Row 2 has 2 words and, in column 'tags', 1 tags. Give one tag"),
        ([[["x"]]], [["O"]], r"Row 1, column 'words': item 1 is itself a list, \['x'\]"),
        ([["x"]], [[["O"]]], r"Row 1, column 'tags': item 1 is itself a list"),
        ([["x"], []], [["O"], []], "Row 2 has no words in column 'words'"),
        ([["x"], None], [["O"], ["O"]], "Row 2 has no value in column 'words'"),
        ([["x", None]], [["O", "O"]], "Row 1, column 'words': item 2 has no value"),
        ([["x", " "]], [["O", "O"]], "Row 1, column 'words': word 2 is ' ', which is blank"),
        ([["x", ""]], [["O", "O"]], "word 2 is '', which is blank"),
        ([[1, 2]], [["O", "O"]], r"word 1 is 1 \(int\), where text is expected"),
        ([3], [["O"]], r"Row 1 holds 3 \(int\) in column 'words', where a list of words"),
        ([["x"]], [[None]], "Row 1, column 'tags': item 1 has no value"),
        ([["x"]], [[0.5]], r"word 1, 'x', is 0.5 \(float\), where text"),
        ([["x"]], [[1]], "is the number 1, and nothing says which tag that is"),
        ([["x"], ["s"]], [["B-per"], ["NOUN"]], r"Row 2, column 'tags': the tag of word 1, 's', is 'NOUN'.*speech"),
        ([["x"]], [["S-per"]], "is 'S-per'.*look like BIOES: convert"),
        ([["x"]], [["U-per"]], "is 'U-per'.*look like BILOU: convert"),
        ([["x"]], [["b-per"]], "is 'b-per'. Tags are O, B-type or I-type"),
        ([["x"]], [["B-"]], "is 'B-'. Tags are O"),
        ([["x"], ["s"]], [["O"], ["O"]], "All tags in column 'tags' are 'O'"),
    ],
)
def test_unusable_rows_are_refused(words: Any, tags: Any, message: str) -> None:
    with pytest.raises(DataError, match="(?s)" + message):
        TokenTagging.from_data(tagged(words, tags))


def test_unknown_tags_are_refused_with_the_nearest() -> None:
    task = TokenTagging(label_names=NAMES)
    data = tagged([["x"], ["s", "x"]], [["O"], ["O", "B-places"]])
    message = "Row 2, column 'tags': the tag of word 2 is 'B-places', which is not one.*Did you mean 'B-place'"
    with pytest.raises(DataError, match=message):
        task.encode(data, piece_tokenizer())
    with pytest.raises(DataError, match=r"is the number 9, which is out of range: there are 5 tags, 0 to 4"):
        task.encode(tagged([["x"]], [[9]]), piece_tokenizer())
    with pytest.raises(DataError, match="not one of the task's tags"):
        TokenTagging.from_data(data, label_names=NAMES)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "from_data"),
        ({"label_names": ("O", "NOUN")}, "must be a tuple of tags"),
        ({"label_names": ["O", "B"]}, "must be a tuple of tags"),
        ({"label_names": ("O", "B", "B")}, "repeat a tag"),
        ({"label_names": ("B-per", "I-per")}, "lack O"),
        ({"label_names": ("O", "I-per")}, "lack B-per"),
        ({"label_names": ("O",)}, "lack B-type"),
        ({"label_names": NAMES, "scheme": "IOB2"}, "scheme must be 'BIO' or 'IOB1', not 'IOB2'"),
        ({"label_names": NAMES, "words": ""}, "words must be the name of a data column"),
        ({"label_names": NAMES, "tags": None}, "must name data columns"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        TokenTagging(**options)


def test_missing_columns_and_unknown_options_are_named() -> None:
    with pytest.raises(DataError, match=r"reads the column 'tags'.*Columns present: words, labels"):
        TokenTagging.from_data(Dataset.from_dict({"words": [["x"]], "labels": [["O"]]}))
    with pytest.raises(DataError, match=r"no option 'word'. Did you mean 'words'"):
        TokenTagging.from_data(DATA, word="w")
    with pytest.raises(DataError, match="no rows"):
        TokenTagging.from_data(DATA.select([]))


def test_slow_tokenizers_are_refused() -> None:
    with pytest.raises(DataError, match=r"ByT5Tokenizer cannot say.*fast tokenizer"):
        TokenTagging(label_names=NAMES).encode(DATA, ByT5Tokenizer())


# -- words without tokens, and words that are cut ---------------------------------------------------------


def test_words_of_dropped_characters_are_read_as_unknown(caplog: pytest.LogCaptureFixture) -> None:
    data = tagged([["x"], ["Anna", "\u0007", "x"], ["\u200b"]], [["O"], ["B-per", "I-per", "O"], ["O"]])
    task = TokenTagging(label_names=NAMES)
    with caplog.at_level(logging.WARNING, "deltune"):
        encoded = task.encode(data, piece_tokenizer())
    assert [PIECES[token] for token in encoded[1]["input_ids"]] == ["[CLS]", "ann", "##a", "[UNK]", "x", "[SEP]"]
    assert encoded[1]["labels"] == [-100, 1, -100, 2, 0, -100]
    assert [PIECES[token] for token in encoded[2]["input_ids"]] == ["[CLS]", "[UNK]", "[SEP]"]
    assert "2 words in column 'words' give no tokens, the first of them word 2 of row 2, '\\x07'" in caplog.text
    assert "read as the unknown token '[UNK]'" in caplog.text


def test_words_without_tokens_need_an_unknown_token() -> None:
    tokenizer = byte_tokenizer(pad_token="<end>")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    with pytest.raises(DataError, match=r"Row 2, column 'words': word 1, '\\u200b', gives no tokens.*Remove the word"):
        TokenTagging(label_names=NAMES).encode(tagged([["x"], ["\u200b"]], [["O"], ["O"]]), tokenizer)


def test_cut_words_are_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    task = TokenTagging(label_names=NAMES, max_length=6)
    encoded, report = task.encode_with_report(DATA, piece_tokenizer())
    assert [PIECES[token] for token in encoded[0]["input_ids"]] == ["[CLS]", "ann", "##a", "met", "bo", "[SEP]"]
    assert encoded[0]["labels"] == [-100, 1, -100, 0, 1, -100]  # the end of a word is cut, its tag stays
    assert encoded[1]["labels"] == [-100, 0, 3, 4, -100, -100]
    assert report.describe() == {
        "rows": 2,
        "encoded_rows": 2,
        "truncated_rows": 2,
        "dropped_rows": 0,
        "tokens": 12,
        "trained_tokens": 6,
        "longest": 6,
        "words": 8,
        "cut_words": 2,
    }
    with caplog.at_level(logging.WARNING, "deltune"):
        task.encode(DATA, piece_tokenizer())
    assert "2 of 8 words cut: they are neither learned nor measured, and their predicted tag is 'O'" in caplog.text
    with pytest.raises(DataError, match=r"max_length 2 leaves no room for words.*at least 3"):
        TokenTagging(label_names=NAMES, max_length=2).encode(DATA, piece_tokenizer())


def test_a_tokenizer_that_cuts_on_the_left_changes_nothing() -> None:
    task = TokenTagging(label_names=NAMES, max_length=4)
    left = piece_tokenizer(truncation_side="left", padding_side="left")
    assert list(task.encode(DATA, left)) == list(task.encode(DATA, piece_tokenizer()))


# -- loss -----------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_first_tokens() -> None:
    task, tokenizer, model = TokenTagging(label_names=NAMES), piece_tokenizer(), encoder().double()
    batch = task.collator(tokenizer)(list(task.encode(DATA, tokenizer)))
    loss, logits = model(**batch).to_tuple()[:2]
    assert logits.dtype == torch.float64
    expected = []
    for number, row in enumerate(ROWS):
        place = 1
        for word, tag in zip(row["words"], row["tags"], strict=True):
            scores = logits[number, place].tolist()
            expected.append(np.log(np.exp(scores).sum()) - scores[NAMES.index(tag)])
            place += len(tokenizer(word, add_special_tokens=False)["input_ids"])
    assert len(expected) == 8
    assert float(loss.detach()) == pytest.approx(np.mean(expected), rel=1e-12)


def test_ignored_tokens_have_no_gradient() -> None:
    task, tokenizer, model = TokenTagging(label_names=NAMES), piece_tokenizer(), encoder()
    batch = task.collator(tokenizer)(list(task.encode(DATA, tokenizer)))
    output = model(**batch)
    (gradient,) = torch.autograd.grad(output.loss, output.logits)
    ignored = batch["labels"] == -100
    assert torch.equal(gradient[ignored], torch.zeros_like(gradient[ignored]))
    assert (gradient[~ignored].abs().sum(-1) > 0).all()
    assert int(ignored.sum()) == 16 - 8


# -- spans ----------------------------------------------------------------------------------------------

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


def logits_of(rows: list[list[str]], names: tuple[str, ...], width: int) -> torch.Tensor:
    """Logits [B, width, C] whose likeliest tags are ``rows``."""
    logits = torch.zeros(len(rows), width, len(names))
    for number, row in enumerate(rows):
        for place, tag in enumerate(row):
            logits[number, place, names.index(tag)] = 5.0
    return logits


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


# -- predictions ----------------------------------------------------------------------------------------


class Left(TokenTagging):
    prediction_padding_side = "left"


@pytest.mark.parametrize("kind", [TokenTagging, Left])
def test_predictions_are_by_word(kind: type[TokenTagging]) -> None:
    task, tokenizer = kind(label_names=NAMES), piece_tokenizer()
    rows = list(task.encode(DATA.remove_columns("tags"), tokenizer, labelled=False))
    batch = task.collator(tokenizer, padding_side=task.prediction_padding_side)(rows)
    assert set(batch) == {"input_ids", "attention_mask"}
    meaning = {"ann": "B-per", "##a": "I-place", "bo": "I-per", "new": "B-place", "york": "I-place", "##er": "B-per"}
    pieces = [[PIECES[token] for token in row] for row in batch["input_ids"].tolist()]
    logits = logits_of([[meaning.get(piece, "O") for piece in row] for row in pieces], NAMES, 8)
    first, second = task.predict_rows(logits, rows)
    assert first == {
        "words": ["Anna", "met", "Bob"],
        "tags": ["B-per", "O", "I-per"],
        "spans": [
            {"type": "per", "start": 0, "end": 1, "text": "Anna"},
            {"type": "per", "start": 2, "end": 3, "text": "Bob"},
        ],
        "cut_words": 0,
    }
    assert second["tags"] == ["O", "B-place", "I-place", "O", "O"]
    assert second["spans"] == [{"type": "place", "start": 1, "end": 3, "text": "New Yorker"}]


def test_cut_words_are_outside() -> None:
    task, tokenizer = TokenTagging(label_names=NAMES, max_length=5), piece_tokenizer()
    rows = list(task.encode(DATA, tokenizer, labelled=False))
    everywhere = logits_of([["B-per"] * 5] * 2, NAMES, 5)
    first, second = task.predict_rows(everywhere, rows)
    assert (first["tags"], first["cut_words"]) == (["B-per", "B-per", "O"], 1)
    assert (second["tags"], second["cut_words"]) == (["B-per", "B-per", "B-per", "O", "O"], 2)
    with pytest.raises(DataError, match=r"encoded for training.*labelled=False"):
        task.predict_rows(everywhere, list(task.encode(DATA, tokenizer)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_prediction(side: str) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = LlamaConfig(vocab_size=len(PIECES), num_labels=len(NAMES), pad_token_id=0, **size)
    model = LlamaForTokenClassification(config).eval().double()
    kind = Left if side == "left" else TokenTagging
    task, tokenizer = kind(label_names=NAMES), piece_tokenizer()
    draw = random.Random(0)
    words = [draw.choices(["Anna", "met", "Bob", "x", "Yorker"], k=draw.randint(1, 9)) for _ in range(12)]
    rows = list(task.encode(Dataset.from_dict({"words": words}), tokenizer, labelled=False))
    collate = task.collator(tokenizer, padding_side=side)
    together = task.predict_rows(model(**collate(rows)), rows)
    alone = [task.predict_rows(model(**collate([row])), [row])[0] for row in rows]
    assert together == alone
    assert {tag for row in alone for tag in row["tags"]} > {"O"}


def test_measuring_and_predicting_agree_and_do_not_depend_on_batches() -> None:
    pytest.importorskip("seqeval")
    task, tokenizer = TokenTagging.from_data(DATA), piece_tokenizer()
    tuned = deltune.attach(encoder(), "lora(rank=2)")
    data = Dataset.from_list(ROWS * 3 + [{"words": ["x"], "tags": ["B-per"]}])
    whole = evaluate(tuned, task, data, tokenizer, batch_size=16)
    assert evaluate(tuned, task, data, tokenizer, batch_size=2) == pytest.approx(whole, abs=1e-6)
    found = predict(tuned, task, data.remove_columns("tags"), tokenizer, batch_size=3)
    assert [row["words"] for row in found] == data["words"]
    pairs = [
        pair for row, tags in zip(found, data["tags"], strict=True) for pair in zip(row["tags"], tags, strict=True)
    ]
    assert whole["accuracy"] == pytest.approx(sum(one == other for one, other in pairs) / len(pairs))


# -- model and description ------------------------------------------------------------------------------


def test_loads_a_head_for_the_tags_which_is_trained(tmp_path: Path) -> None:
    encoder().bert.save_pretrained(tmp_path)
    piece_tokenizer().save_pretrained(tmp_path)
    task = TokenTagging.from_data(DATA)
    tokenizer = task.load_tokenizer(str(tmp_path))
    model = task.load_model(str(tmp_path), tokenizer=tokenizer)
    assert model.config.id2label == dict(enumerate(NAMES))
    assert model.config.label2id["I-place"] == 4
    tuned = deltune.attach(model, "lora(rank=2)", name="a")
    assert set(tuned.attachments["a"].head_names) == {"classifier.weight", "classifier.bias"}


def test_description_rebuilds_the_task() -> None:
    task = TokenTagging.from_data(DATA).resolve(piece_tokenizer())
    report = task.encode_with_report(DATA, piece_tokenizer()).report
    description = json.loads(json.dumps(task.describe({"train": report})))
    assert task_from_description(description) == task
    assert description["options"] == {
        "max_length": 64,
        "words": "words",
        "tags": "tags",
        "label_names": list(NAMES),
        "scheme": "BIO",
    }
    assert (description["metric"], description["greater_is_better"]) == ("f1", True)
    assert "first token of each word" in description["loss"]
    assert description["encoding"]["train"]["words"] == 8


# -- files ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".conll", ".bio", ".iob2"])
@pytest.mark.parametrize(
    "text",
    [
        "Anna\tB-per\nmet\tO\nBob\tB-per\n\n\nx\tO\n",
        "Anna B-per\nmet O\nBob B-per\n \nx O",
        "\r\nAnna NNP B-per\r\nmet VB O\r\nBob  NNP\tB-per\r\n\r\nx NN O\r\n".replace("\t", " "),
        "-DOCSTART- -X- O\n\nAnna NNP B-per\nmet VB O\nBob NNP B-per\n\n-DOCSTART- -X- O\n\nx NN O\n",
    ],
)
def test_reads_a_word_a_line(text: str, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"data{ending}"
    file.write_bytes(text.encode())
    data = read_dataset(file)
    assert data.column_names == ["words", "tags"]
    assert list(data) == [ROWS[0], {"words": ["x"], "tags": ["O"]}]


def test_words_of_files_may_hold_blanks_and_stand_alone(tmp_path: Path) -> None:
    file = tmp_path / "data.conll"
    file.write_text("New York\tB-place\na\u2028b\tO\n", encoding="utf-8")
    assert read_dataset(file)[0] == {"words": ["New York", "a\u2028b"], "tags": ["B-place", "O"]}
    file.write_text("Anna\nmet\n\nBob\n", encoding="utf-8")
    assert list(read_dataset(file)) == [{"words": ["Anna", "met"]}, {"words": ["Bob"]}]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x O\ny\n", r"data.conll, line 2: 1 columns where earlier lines have 2.*separated by blanks"),
        ("# a comment\nx O\n", "line 2: 2 columns where earlier lines have 3.*remove comments"),
        ("x\tO\ny O\n", "line 2: 1 columns where earlier lines have 2.*separated by tabs"),
        ("x\tO\n\tO\n", "line 2: the word .first column. is empty"),
        ("x\tO\ny\t\n", "line 2: the tag .last column. is empty"),
        ("-DOCSTART- O\n\n", "has no sentence"),
        ("\n", "is empty"),
    ],
)
def test_broken_files_are_refused(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "data.conll").write_text(text)
    with pytest.raises(DataError, match=message):
        read_dataset(tmp_path / "data.conll")


def test_real_tweets_are_read_whole() -> None:
    folder = shared_data("wnut17")
    train, test = read_dataset(folder / "train.jsonl"), read_dataset(folder / "test.jsonl")
    task = TokenTagging.from_data(train)
    assert task.scheme == "BIO"
    types = ("corporation", "creative-work", "group", "location", "person", "product")
    assert task.label_names == ("O", *(f"{letter}-{kind}" for kind in types for letter in "BI"))
    tokenizer = word_tokenizer(model_max_length=512)
    labels = task.encode(test, tokenizer)["labels"]
    read = [[task.label_names[label] for label in row if label >= 0] for row in labels]
    assert read == [row["tags"].split(" ") for row in test]
    assert sum(len(spans_of(row)) for row in read) == sum(row["tags"].count("B-") for row in test) > 1000
    seqeval = pytest.importorskip("seqeval.metrics.sequence_labeling")
    assert len(seqeval.get_entities(read)) == sum(len(spans_of(row)) for row in read)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (["a", 1], "row 2, column 'words': the list holds 1, int where earlier items are str"),
        ([["a"], "b"], r"row 2, column 'words': the list holds \['a'\], list where earlier items are str"),
        ("a b", "row 2, column 'words': 'a b' is str where earlier rows have list"),
    ],
)
def test_lists_of_mixed_items_are_refused(second: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text("".join(json.dumps({"words": words}) + "\n" for words in (["a", None, "b"], second)))
    with pytest.raises(DataError, match=message):
        read_dataset(file)
