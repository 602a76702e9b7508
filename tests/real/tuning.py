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
from torch import Tensor

import deltune
from deltune.tasks import Task
from deltune.training import FitResult, TrainingSettings, evaluate
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
    """What a short run came to: metrics on held-out rows before and after."""

    tuned: Tuned
    before: dict[str, float]
    after: dict[str, float]
    result: FitResult

    @property
    def losses(self) -> list[float]:
        """The training loss as it went."""
        return [entry["loss"] for entry in self.result.history if "loss" in entry]


def train(
    lesson: Lesson, method: deltune.tuned.Method | str, steps: int, *, rows: Dataset | None = None, **settings: Any
) -> Outcome:
    """Attach a method to a fresh model and train it for a few steps, with the method's own learning rate."""
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
    tuned.model.eval()
    _report(lesson, method, result, before, after)
    return Outcome(tuned, before, after, result)


def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random numbers from ``seed`` inside the block, and as they were after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _report(lesson: Lesson, method: Any, result: FitResult, before: dict[str, float], after: dict[str, float]) -> None:
    """Figures for whoever runs pytest with -s: the assertions below were made from them."""
    names = ("accuracy", "loss")
    line = {
        "model": lesson.model.name,
        "method": str(method),
        "steps": result.steps,
        "learning_rate": result.settings["learning_rate"],
        "before": {name: round(before[name], 3) for name in names if name in before},
        "after": {name: round(after[name], 3) for name in names if name in after},
        "seconds": round(result.seconds, 1),
    }
    print(json.dumps(line))
