from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deltune.cli import main
from tests.training import tiny


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Ended]


@pytest.fixture
def deltune(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs a command in this process."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Ended:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ended(int(ended.value.code or 0), captured.out, captured.err)

    return run


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


@dataclass(frozen=True)
class Place:
    """A folder with a model, data and a delta."""

    model: Path
    other_model: Path
    train: Path
    test: Path

    def tune(self, output: Path, *more: object) -> list[object]:
        """Arguments of a short run."""
        return [
            *("tune", "--model", self.model, "--data", self.train, "--evaluation", self.test, "--output", output),
            *("--steps", 4, "--batch-size", 8, "--threads", 1, "--seed", 1, *more),
        ]


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    folder = tmp_path_factory.mktemp("place")
    return Place(
        tiny.write_model(folder / "model"),
        tiny.write_model(folder / "other", seed=6),
        write_csv(folder / "train.csv", list(tiny.reviews(60))),
        write_csv(folder / "test.csv", list(tiny.reviews(30, seed=1))),
    )


@pytest.fixture(scope="session")
def delta(place: Place) -> Path:
    """A trained LoRA."""
    output = place.train.parent / "delta"
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in place.tune(output, "--rank", 2, "--json")])
    assert ended.value.code == 0
    return output
