"""Token tagging: where labels stand, what the loss covers, and what is predicted for each word."""

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
from tokenizers import normalizers
from transformers import (
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForTokenClassification,
)

import deltune
from deltune.errors import DataError
from deltune.tasks import TokenTagging, task_from_description
from deltune.tasks._spans import label_set
from deltune.training import evaluate, predict
from tests.tasks.tagged import DATA, NAMES, PIECES, ROWS, encoder, logits_of, piece_tokenizer, tagged
from tests.tasks.tiny import byte_tokenizer

# -- labels -------------------------------------------------------------------------------------------


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


# -- schemes ------------------------------------------------------------------------------------------


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


# -- wrong input --------------------------------------------------------------------------------------


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


# -- words without tokens, and words that are cut -----------------------------------------------------


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


# -- loss ---------------------------------------------------------------------------------------------


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


# -- predictions --------------------------------------------------------------------------------------


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


# -- model and description ----------------------------------------------------------------------------


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
