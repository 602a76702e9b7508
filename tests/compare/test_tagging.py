"""A comparison of methods on token tagging."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from deltune.compare import Comparison, worker
from deltune.compare.content import prepare_data
from deltune.compare.worker_job import Job
from tests.cli.test_tagging import sentences, write_lines


@pytest.fixture
def comparison(files: Path, tmp_path: Path) -> Comparison:
    return Comparison(
        model=str(files / "model"),
        data=str(write_lines(tmp_path / "data.jsonl", sentences(80, 0))),
        methods=("lora(rank=2)",),
        task="token-tagging",
        seeds=(0,),
        steps=3,
        batch_size=8,
        train_size=40,
        evaluation_size=20,
    )


def result_of(comparison: Comparison, row: str, folder: Path) -> dict[str, float]:
    events: list[dict[str, object]] = []
    worker.run_job(Job(comparison.to_dict(), row, {0: str(folder)}, 1, False), lambda event: events.append(dict(event)))
    assert events[-1]["event"] == "done", events[-1]
    json.dumps(events[-1])
    return events[-1]["result"]["metrics"]  # type: ignore[index]


def test_examples_are_divided_by_their_words(comparison: Comparison) -> None:
    data = prepare_data(comparison)
    assert data.task.name == "token-tagging"
    assert (len(data.train), len(data.evaluation)) == (40, 20)
    assert not {tuple(row) for row in data.train["words"]} & {tuple(row) for row in data.evaluation["words"]}


def test_the_most_frequent_tag_finds_no_span(comparison: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    data = prepare_data(comparison)
    metrics = result_of(comparison, "majority", tmp_path / "run")
    assert (metrics["f1"], metrics["precision"], metrics["recall"]) == (0, 0, 0)
    tags = [tag for row in data.evaluation["tags"] for tag in row]
    assert metrics["accuracy"] == pytest.approx(tags.count("O") / len(tags))
    learned = [tag for row in data.train["tags"] for tag in row]
    names = data.task.label_names
    shares = {name: (learned.count(name) + 1) / (len(learned) + len(names)) for name in names}
    assert metrics["loss"] == pytest.approx(-np.mean([np.log(shares[tag]) for tag in tags]), rel=1e-5)


def test_methods_are_trained_and_measured(comparison: Comparison, tmp_path: Path) -> None:
    pytest.importorskip("seqeval")
    metrics = result_of(comparison, "lora(rank=2)", tmp_path / "run")
    assert set(metrics) == {"loss", "f1", "precision", "recall", "accuracy"}
    assert 0 <= metrics["f1"] <= 1
