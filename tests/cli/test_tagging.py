"""Token tagging from the command line: tune, eval, predict, and what is said about wrong data."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForTokenClassification, BertModel

from tests.cli.conftest import Command, Place
from tests.cli.test_wrong_input import refused
from tests.training import tiny

Rows = list[dict[str, Any]]


def sentences(count: int, seed: int) -> Rows:
    """'good' and 'good acting' are a praise, 'bad' is a complaint, all other words are neither."""
    phrases = {(word,): ("O",) for word in tiny.NEUTRAL if word != "acting"}
    phrases |= {("good",): ("B-praise",), ("good", "acting"): ("B-praise", "I-praise"), ("bad",): ("B-complaint",)}
    draw = random.Random(seed)
    rows: Rows = []
    for _ in range(count):
        chosen = draw.choices(list(phrases), k=draw.randint(2, 8))
        tags = [tag for phrase in chosen for tag in phrases[phrase]]
        rows.append({"words": [word for phrase in chosen for word in phrase], "tags": tags})
    return rows


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_conll(path: Path, rows: Rows) -> Path:
    text = ("".join(f"{word}\t{tag}\n" for word, tag in zip(row["words"], row["tags"], strict=True)) for row in rows)
    path.write_text("\n".join(text))
    return path


def tune(model: Path, data: Path, output: Path, *more: object) -> list[object]:
    return [
        *("tune", "--model", model, "--task", "token-tagging", "--data", data, "--output", output),
        *("--threads", 1, "--seed", 1, *more),
    ]


@pytest.fixture
def trained(place: Place, deltune: Command, tmp_path: Path) -> Path:
    """A delta that was trained without evaluation data."""
    data = write_conll(tmp_path / "train.conll", sentences(16, 0))
    ended = deltune(*tune(place.model, data, tmp_path / "delta", "--steps", 2, "--max-length", 8))
    assert ended.status == 0, ended.err
    return tmp_path / "delta"


def test_tagging_is_learned_measured_and_predicted(deltune: Command, tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    model = tmp_path / "model"  # without dropout, which such a small model learns little with
    torch.manual_seed(0)
    BertModel(tiny.config(0.0)).save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    train = write_conll(tmp_path / "train.conll", sentences(200, 0))
    rows = sentences(60, 1)
    test = write_lines(tmp_path / "test.jsonl", rows)
    options = ("--method", "full", "--learning-rate", 0.01, "--epochs", 16)
    ended = deltune(*tune(model, train, tmp_path / "out", "--evaluation", test, *options, "--json"))
    assert ended.status == 0, ended.err
    metrics = ended.json["metrics"]
    assert metrics["f1"] > 0.95
    assert metrics["f1"] == pytest.approx(
        2 * metrics["precision"] * metrics["recall"] / (metrics["precision"] + metrics["recall"])
    )
    task = ended.json["provenance"]["task"]["options"]
    assert task["label_names"] == ["O", "B-complaint", "I-complaint", "B-praise", "I-praise"]
    assert task["scheme"] == "BIO"

    base = ("--model", model, "--delta", tmp_path / "out")
    evaluated = deltune("eval", *base, "--data", test, "--json")
    assert evaluated.json["metrics"] == pytest.approx(metrics, abs=1e-6)
    table = deltune("eval", *base, "--data", test).out
    assert all(name in table for name in ("f1", "precision", "recall", "accuracy", "loss"))

    file = tmp_path / "predictions.jsonl"
    assert deltune("predict", *base, "--data", test, "--output", file, "--batch-size", 7).status == 0
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["words"] for row in found] == [row["words"] for row in rows]
    right = [
        one == other
        for row, true in zip(found, rows, strict=True)
        for one, other in zip(row["tags"], true["tags"], strict=True)
    ]
    assert sum(right) / len(right) == pytest.approx(metrics["accuracy"])
    typed = deltune("predict", *base, "--text", "the film was bad and good acting").json
    assert typed["tags"] == ["O", "O", "O", "B-complaint", "O", "B-praise", "I-praise"]
    assert typed["spans"][1] == {"type": "praise", "start": 5, "end": 7, "text": "good acting"}


def test_a_share_of_the_data_is_set_aside(place: Place, deltune: Command, tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    data = write_lines(
        tmp_path / "data.jsonl",
        [{"tokens": row["words"], "ner_tags": row["tags"]} for row in sentences(30, 2)],
    )
    ended = deltune(*tune(place.model, data, tmp_path / "out", "--evaluation", 0.2, "--steps", 2))
    assert ended.status == 0, ended.err
    assert "f1" in ended.out


@pytest.mark.parametrize("method", ["prompt-tuning(length=2)", "prefix-tuning(length=2)", "lora(rank=2) + bitfit"])
def test_methods_keep_tokens_and_words_together(method: str, place: Place, deltune: Command, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", sentences(12, 0))
    ended = deltune(*tune(place.model, data, tmp_path / "out", "--method", method, "--steps", 2))
    assert ended.status == 0, ended.err
    ended = deltune("predict", "--model", place.model, "--delta", tmp_path / "out", "--data", data)
    found = [json.loads(line) for line in ended.out.splitlines()]
    assert [len(row["tags"]) for row in found] == [len(row["words"]) for row in sentences(12, 0)]


def test_cut_words_are_outside_and_told(place: Place, trained: Path, deltune: Command) -> None:
    ended = deltune("predict", "--model", place.model, "--delta", trained, "--text", "the film " * 5)
    assert "4 of 10 words cut" in ended.err
    assert "their predicted tag is 'O'" in ended.err
    assert ended.json["tags"][6:] == ["O"] * 4
    assert len(ended.json["words"]) == len(ended.json["tags"]) == 10
    assert ended.json["cut_words"] == 4


def test_words_alone_are_enough_to_predict(place: Place, trained: Path, deltune: Command, tmp_path: Path) -> None:
    (tmp_path / "words.conll").write_text("the\nfilm\n\ngood\n")
    ended = deltune("predict", "--model", place.model, "--delta", trained, "--data", tmp_path / "words.conll")
    assert [json.loads(line)["words"] for line in ended.out.splitlines()] == [["the", "film"], ["good"]]


def test_a_merged_model_tags(place: Place, trained: Path, deltune: Command, tmp_path: Path) -> None:
    merge = ("merge", "--model", place.model, "--delta", trained, "--output", tmp_path / "merged")
    ended = deltune(*merge, "--json")
    assert ended.status == 0, ended.err
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "merged")
    assert model.config.id2label[3] == "B-praise"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"words": ["good", "film"], "tags": ["O"]}, ["Row 3 has 2 words", "'tags', 1 tags"]),
        ({"words": ["good"], "tags": ["B-prais"]}, ["Row 3, column 'tags'", "'B-prais'", "Did you mean 'B-praise'"]),
        ({"words": ["good"], "tags": ["I-praise"]}, ["Row 3, column 'tags'", "scheme BIO forbids", "--scheme IOB1"]),
        ({"words": [" "], "tags": ["O"]}, ["Row 3, column 'words'", "word 1 is ' '"]),
    ],
)
def test_eval_refuses(
    row: dict[str, Any], words: list[str], place: Place, trained: Path, deltune: Command, tmp_path: Path
) -> None:
    data = write_lines(tmp_path / "test.jsonl", [*sentences(2, 1), row])
    refused(deltune("eval", "--model", place.model, "--delta", trained, "--data", data), *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"words": [["good"]], "tags": [["O"]]}], ["Row 1, column 'words'", "itself a list"]),
        ([{"text": "good", "label": "O"}], ["column 'words'", "Columns present: text, label"]),
        ([{"words": ["good"], "tags": ["ADJ"]}], ["Row 1, column 'tags'", "'ADJ'", "B-type"]),
    ],
)
def test_tune_refuses(rows: Rows, words: list[str], place: Place, deltune: Command, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", rows)
    refused(deltune(*tune(place.model, data, tmp_path / "out")), *words)


def test_texts_are_no_column_of_tagging(place: Place, deltune: Command, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "data.jsonl", sentences(4, 0))
    refused(deltune(*tune(place.model, data, tmp_path / "out", "--text", "words")), "no option 'text'", "token-tagging")


def test_generated_texts_are_not_for_tagging(place: Place, trained: Path, deltune: Command, tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    data = write_lines(tmp_path / "test.jsonl", sentences(4, 1))
    ended = deltune("eval", "--model", place.model, "--delta", trained, "--data", data, "--generate")
    refused(ended, "has no true texts")
