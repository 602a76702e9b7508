"""Files with a word a line, and lists in files, as rows for token tagging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deltune.errors import DataError
from deltune.tasks import TokenTagging, read_dataset
from deltune.tasks._spans import spans_of
from tests.assets import shared_data
from tests.tasks.tagged import ROWS
from tests.tasks.tiny import word_tokenizer


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
