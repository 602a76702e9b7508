"""Epochs on kept states of frozen layers against those that run them: ``python -m benchmarks.frozen_states``.

Sentences of movie reviews; MiniLM (6 layers), or with ``--layers 12`` an encoder of BERT-base's shape with random
weights, of which only the time is of interest. Each method trains twice in one process, with and without kept states;
both must come to the same losses and weights. Times are those of the processor for one thread.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoConfig, AutoModelForSequenceClassification, TrainerCallback

import deltune
from benchmarks.sentiment import Sentiment, table
from deltune.training import FitResult, TrainingSettings

METHODS = ("ladder-side-tuning", "attention-fusion(dropout=0)", "freeze(layers=0)", "freeze(layers=2)")
BERT_BASE = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


class Epochs(TrainerCallback):  # type: ignore[misc]
    """Processor seconds of each epoch."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        """Start the clock."""
        self._start = time.process_time()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        """Stop it."""
        self.seconds.append(time.process_time() - self._start)


def trained(
    lesson: Sentiment, method: str, layers: int, epochs: int, folder: str | None
) -> tuple[FitResult, Epochs, dict[str, Tensor]]:
    """Train on a fresh model; also what was trained, as it is at the end."""
    transformers.set_seed(0)
    if layers:
        config = AutoConfig.from_pretrained(
            lesson.model,
            **{**BERT_BASE, "num_hidden_layers": layers, "num_labels": 2},
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        model: Any = AutoModelForSequenceClassification.from_config(config)
    else:
        model = lesson.task.load_model(lesson.model, tokenizer=lesson.tokenizer, dropout=0.0)
    tuned = deltune.attach(model, method, reversible=False)
    settings = TrainingSettings(epochs=epochs, keep_best=False, threads=1, frozen_states=folder)
    clock = Epochs()
    result = deltune.fit(
        tuned, lesson.task, lesson.train_rows, tokenizer=lesson.tokenizer, settings=settings, callbacks=[clock]
    )
    return result, clock, {name: value.detach() for name, value in tuned.named_trainable_parameters()}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--methods", default=";".join(METHODS), help="with semicolons between them")
    parser.add_argument("--layers", type=int, default=0, help="of a random encoder; 0 for MiniLM")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-size", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(1)
    lesson = Sentiment(steps=1, train_size=given.train_size)
    rows = {}
    for method in given.methods.split(";"):
        with tempfile.TemporaryDirectory() as folder:
            kept, clock, weights = trained(lesson, method, given.layers, given.epochs, folder)
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
        plain, plain_clock, plain_weights = trained(lesson, method, given.layers, given.epochs, None)
        losses = [[entry["loss"] for entry in result.history] for result in (kept, plain)]
        apart = max(abs(one - other) for one, other in zip(*losses, strict=True))
        differ = sum(int((weights[name] != value).sum()) for name, value in plain_weights.items())
        entries = sum(value.numel() for value in plain_weights.values())
        largest = max(float((weights[name] - value).abs().max()) for name, value in plain_weights.items())
        later, first, usual = median(clock.seconds[1:]), clock.seconds[0], median(plain_clock.seconds)
        rows[method] = [
            f"{later / first:.2f}",
            f"{min(clock.seconds[1:]) / first:.2f} to {max(clock.seconds[1:]) / first:.2f}",
            f"{later / usual:.2f}",
            f"{first / usual:.2f}",
            f"{sum(clock.seconds) / sum(plain_clock.seconds):.2f}",
            f"{size / 1e6:.0f} MB",
            f"{apart:.1e}",
            f"{differ:,} of {entries:,}, by at most {largest:.1e}" if differ else "none",
        ]
        print(f"{method}: kept {clock.seconds}, plain {plain_clock.seconds}", flush=True)
    header = ["method", "epochs 2 to 5 / epoch 1", "spread", "/ plain epoch", "epoch 1 / plain", "all / plain"]
    print(table([*header, "on disk", "losses apart", "weights that differ"], rows))


if __name__ == "__main__":
    main()
