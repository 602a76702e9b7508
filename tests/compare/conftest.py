from __future__ import annotations

import csv
import json
import random
import sys
from pathlib import Path

import pytest

from deltune.compare import Comparison, processes
from tests.compare import samples
from tests.tasks.tiny import encoder, word_tokenizer

WORDS = ["fine", "film", "plot", "acting", "the", "a", "was", "is", "very", "not", "and"]


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``reviews.csv``: 160 texts in which one word decides the class."""
    folder = tmp_path_factory.mktemp("comparison")
    encoder().bert.save_pretrained(folder / "model")  # without a head, so that every run draws one
    word_tokenizer().save_pretrained(folder / "model")
    generator = random.Random(0)
    texts: set[str] = set()
    while len(texts) < 160:
        words = generator.choices(WORDS, k=7)
        texts.add(" ".join([*words, "good" if len(texts) % 5 < 3 else "bad"]))
    with (folder / "reviews.csv").open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["text", "label"])
        writer.writerows([text, int(text.endswith("good"))] for text in sorted(texts))
    return folder


@pytest.fixture
def comparison(files: Path) -> Comparison:
    return Comparison(
        model=str(files / "model"),
        data=str(files / "reviews.csv"),
        methods=("lora(rank=2)", "bitfit"),
        seeds=(0, 1),
        steps=4,
        batch_size=8,
        train_size=64,
        evaluation_size=40,
    )


class FakeWorkers:
    """Stands in for the real workers; says which runs were done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._calls = folder / "calls.txt"
        self._monkeypatch = monkeypatch
        script = folder / "fake_worker.py"
        script.write_text(samples.FAKE_WORKER)
        monkeypatch.setattr(processes, "WORKER_COMMAND", (sys.executable, str(script)))
        monkeypatch.setenv("CALLS", str(self._calls))
        monkeypatch.setenv("RESULT", json.dumps(samples.measured()))

    def behave(self, **rows: str) -> None:
        """Let the worker of a row fail, kill, crash or hang itself: ``behave(FAIL="bitfit")``."""
        for name in ("FAIL", "KILL", "CRASH", "HANG"):
            self._monkeypatch.setenv(name, rows.get(name, ""))

    def calls(self) -> list[str]:
        """Runs done since the last call, as ``row seed``."""
        done = self._calls.read_text().splitlines() if self._calls.exists() else []
        self._calls.unlink(missing_ok=True)
        return done


@pytest.fixture
def fake_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeWorkers:
    return FakeWorkers(tmp_path, monkeypatch)
