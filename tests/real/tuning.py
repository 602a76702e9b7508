"""Short runs on real models: one call that attaches, measures, trains and measures again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from filelock import FileLock
from torch import Tensor

import deltune
from deltune.tasks import Task
from deltune.training import TrainingSettings, evaluate
from deltune.tuned import Tuned


@dataclass(frozen=True)
class Lesson:
    """A task with a real model and real text, encoded once: what is trained on and what is held out."""

    task: Task
    model: Path
    tokenizer: Any
    train: Dataset
    held_out: Dataset

    @classmethod
    def of(cls, task: Task, model: Path, train: Dataset, held_out: Dataset) -> Lesson:
        tokenizer = task.load_tokenizer(str(model))
        task = task.resolve(tokenizer)
        return cls(task, model, tokenizer, task.encode(train, tokenizer), task.encode(held_out, tokenizer))

    def fresh_model(self, seed: int = 0) -> Any:
        """The pretrained model, its new head (if any) drawn with ``seed``, in evaluation mode."""
        with seeded(seed):
            return self.task.load_model(str(self.model), tokenizer=self.tokenizer).eval()

    def probe(self, rows: int = 6) -> dict[str, Tensor]:
        """A padded batch of held-out rows, without labels."""
        collate = self.task.collator(self.tokenizer)
        batch = collate([self.held_out[place] for place in range(rows)])
        labels = batch.pop("labels")
        if self.task.auto_class == "AutoModelForSeq2SeqLM":
            batch["decoder_input_ids"] = labels.clamp(min=0)
        return batch


@dataclass(frozen=True)
class Outcome:
    """What a short run came to.

    Attributes:
        before: metrics on the held-out rows, freshly attached.
        after: the same after training.
        losses: the training loss as it went.
        learning_rate: that of the run.
        folder: the saved delta.
        logits: of the tuned model, for the lesson's probe.
    """

    before: dict[str, float]
    after: dict[str, float]
    losses: list[float]
    learning_rate: float
    folder: Path
    logits: Tensor

    def attached_to(self, model: Any) -> Tuned:
        """A model with the saved delta."""
        return deltune.load(model, self.folder)


def train(
    lesson: Lesson, method: str, steps: int, folder: Path, *, rows: Dataset | None = None, **settings: Any
) -> Outcome:
    """Attach a method to a fresh model, train it for a few steps with its own learning rate, and save it."""
    with seeded(0):
        tuned = deltune.attach(lesson.fresh_model(), method)
    before = evaluate(tuned, lesson.task, lesson.held_out, lesson.tokenizer)
    settings = {"batch_size": 16, "threads": 1, **settings}
    result = deltune.fit(
        tuned,
        lesson.task,
        lesson.train if rows is None else rows,
        tokenizer=lesson.tokenizer,
        settings=TrainingSettings(steps=steps, **settings),
    )
    after = evaluate(tuned, lesson.task, lesson.held_out, lesson.tokenizer)
    outcome = Outcome(
        before,
        after,
        [entry["loss"] for entry in result.history if "loss" in entry],
        result.settings["learning_rate"],
        tuned.save(folder),
        logits_of(tuned.model.eval(), lesson.probe()),
    )
    _report(lesson, method, steps, outcome, result.seconds)
    return outcome


class Runs:
    """Does each run once, whichever of several test processes asks for it first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[str, Outcome] = {}

    def of(self, lesson: Lesson, method: str, steps: int, **settings: Any) -> Outcome:
        """As :func:`train`."""
        words = [lesson.model.name, lesson.task.name, *map(str, lesson.task.columns()), method, str(steps)]
        key = "-".join(word for word in words if word)
        if key in self._known:
            return self._known[key]
        folder = self._folder / key
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "outcome.pt"
        with FileLock(folder / "lock"):
            if not file.exists():
                torch.save(vars(train(lesson, method, steps, folder / "delta", **settings)), file)
        self._known[key] = Outcome(**torch.load(file, weights_only=False))
        return self._known[key]


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside the block, and as they were after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _report(lesson: Lesson, method: str, steps: int, outcome: Outcome, seconds: float) -> None:
    """Figures for whoever runs pytest with -s: the bounds in the tests were set by them."""
    names = ("accuracy", "loss")
    line = {
        "model": lesson.model.name,
        "method": method,
        "steps": steps,
        "learning_rate": outcome.learning_rate,
        "before": {name: round(outcome.before[name], 3) for name in names if name in outcome.before},
        "after": {name: round(outcome.after[name], 3) for name in names if name in outcome.after},
        "seconds": round(seconds, 1),
    }
    print(json.dumps(line))
