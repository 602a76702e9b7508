"""Adapters of several tasks, fused for each: ``python -m benchmarks.adapter_fusion --task NAME TRAIN TEST LABEL ...``.

``--task`` is given once for each task: its name, files of examples to train on and to measure with, and the column of
the label. For each task an adapter is trained, then a fusion of all of them. Of each fusion: accuracy, what it uses
which adapter for (table and picture), and the accuracy that remains with the most used ones alone.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

import deltune
from benchmarks.sentiment import BATCH_SIZE, HEAD_LEARNING_RATE, table
from deltune.fusing import adapter_use, prune_adapters
from deltune.measure import use_picture, use_table
from deltune.tasks import TextClassification, read_dataset
from deltune.training import TrainingSettings, evaluate
from deltune.tuned import Tuned
from examples import assets


@dataclass
class Lesson:
    """One task: its examples, encoded, and how a method is trained on them."""

    name: str
    train_file: str
    test_file: str
    label: str
    size: int

    def __post_init__(self) -> None:
        self.model = str(assets.get("minilm"))
        train = read_dataset(self.train_file).shuffle(seed=0)
        self.task = TextClassification.from_data(train, label=self.label, max_length=48)
        self.tokenizer = self.task.load_tokenizer(self.model)
        self.train = self.task.encode(train.select(range(min(self.size, len(train)))), self.tokenizer)
        self.test = self.task.encode(read_dataset(self.test_file), self.tokenizer)

    def trained(self, method: str, steps: int, output: Path, seed: int) -> Tuned:
        """Train on a fresh model, or take what such a training left."""
        transformers.set_seed(seed)
        model = self.task.load_model(self.model, tokenizer=self.tokenizer, dropout=0.0)
        tuned = deltune.attach(model, method, reversible=False)
        settings = TrainingSettings(
            steps=steps,
            batch_size=BATCH_SIZE,
            head_learning_rate=HEAD_LEARNING_RATE,
            seed=seed,
            keep_best=False,
            threads=1,
        )
        deltune.fit(tuned, self.task, self.train, tokenizer=self.tokenizer, settings=settings, output=output)
        return tuned

    def accuracy(self, tuned: Tuned) -> float:
        """In percent, on the examples to measure with."""
        return 100 * evaluate(tuned, self.task, self.test, self.tokenizer, batch_size=64)["accuracy"]

    def batches(self, count: int = 20) -> list[Any]:
        """Some batches of the training examples."""
        rows = self.train.select(range(min(count * BATCH_SIZE, len(self.train))))
        collate = self.task.collator(self.tokenizer)
        return [dict(batch) for batch in DataLoader(rows, BATCH_SIZE, collate_fn=collate)]  # type: ignore[arg-type]


def main() -> None:
    """Train, measure, and print tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", nargs=4, action="append", required=True, metavar=("NAME", "TRAIN", "TEST", "LABEL"))
    parser.add_argument("--size", type=int, default=2000, help="examples to train on, of each task")
    parser.add_argument("--steps", type=int, default=250, help="of each adapter")
    parser.add_argument("--fusion-steps", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks/adapter_fusion"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lessons = [Lesson(*task, given.size) for task in given.task]
    names = [lesson.name for lesson in lessons]
    folders, rows = [], {}
    for lesson in lessons:
        folders.append(given.output / f"{lesson.name}_{given.seed}")
        adapter = lesson.trained("pfeiffer-adapter", given.steps, folders[-1], given.seed)
        rows[lesson.name] = [f"{lesson.accuracy(adapter):.1f}"]
        print(f"adapter of {lesson.name}: {rows[lesson.name][0]}", flush=True)
    method = f"adapter-fusion(adapters='{', '.join(map(str, folders))}')"
    for lesson in lessons:
        fused = lesson.trained(
            method, given.fusion_steps, given.output / f"fusion_{lesson.name}_{given.seed}", given.seed
        )
        rows[lesson.name].append(f"{lesson.accuracy(fused):.1f}")
        use = adapter_use(fused, lesson.batches())
        print(f"\nfused for {lesson.name}:\n{use_table(use, names)}\n", flush=True)
        use_picture(use, names, given.output / f"use_{lesson.name}.png", f"adapters fused for {lesson.name}")
        for keep in range(len(lessons) - 1, 0, -1):
            prune_adapters(fused, use, keep)
            rows[lesson.name].append(f"{lesson.accuracy(fused):.1f}")
    kept = [f"{keep} kept" for keep in range(len(lessons) - 1, 0, -1)]
    print(table(["task", "its adapter alone", "fused", *kept], rows))


if __name__ == "__main__":
    main()
