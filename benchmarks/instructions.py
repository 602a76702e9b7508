"""Each method on a real decoder and real instructions: ``python -m benchmarks.instructions --data FILE``.

SmolLM2-135M learns short answers (json lines with instruction, input, output). Of each method: parameters, the loss on
held-out answers (the first row is that of the untuned model), whether cached and uncached generation agree, an answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM

import deltune
from benchmarks.qlora import instructions
from benchmarks.sentiment import Record, table
from deltune.methods.registry import parse, split_specifications
from deltune.tasks import InstructionTuning
from deltune.training import TrainingSettings, evaluate, predict
from deltune.tuned import Tuned
from examples import assets

METHODS = (
    "lora, adalora, krona, krona-b, increlora, dylora, fact, lorta, "
    "sequential-adapter, pfeiffer-adapter, residual-adapter, parallel-adapter, "
    "prefix-tuning, p-tuning-v2, prompt-tuning, p-tuning, ladder-side-tuning"
)
QUESTIONS = ("Name the capital of France.", "Write a sentence about the sea.", "What is the opposite of hot?")


class Lesson:
    """Instructions, encoded for SmolLM2, and what a method makes of them."""

    def __init__(self, data: str, steps: int, held_out: int) -> None:
        self.steps = steps
        self.folder = str(assets.get("smollm2-135m"))
        task = InstructionTuning(context="input")
        self.tokenizer = task.load_tokenizer(self.folder)
        self.task = task.resolve(self.tokenizer)
        train, others = instructions(data, steps * 4)
        self.train = self.task.encode(train, self.tokenizer)
        self.held_out = self.task.encode(others.select(range(held_out)), self.tokenizer)

    def attached(self, method: str, seed: int) -> Tuned:
        """The method on a fresh model."""
        transformers.set_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return deltune.attach(model, parse(method))

    def loss(self, tuned: Tuned) -> float:
        """Mean loss of a token of the held-out answers."""
        return evaluate(tuned, self.task, self.held_out, self.tokenizer, batch_size=8)["loss"]

    def untuned(self) -> float:
        """The loss of the model as it is."""
        tuned = self.attached("lora", 0)
        with tuned.disabled():
            return self.loss(tuned)

    def measured(self, method: str, seed: int) -> dict[str, Any]:
        """Train, and look at what came of it."""
        tuned = self.attached(method, seed)
        settings = TrainingSettings(steps=self.steps, batch_size=4, seed=seed, keep_best=False, threads=1)
        result = deltune.fit(tuned, self.task, self.train, tokenizer=self.tokenizer, settings=settings)
        questions = Dataset.from_list([{"instruction": item, "input": "", "output": ""} for item in QUESTIONS])
        answers, uncached = (
            [
                item["text"]
                for item in predict(tuned, self.task, questions, self.tokenizer, max_new_tokens=16, use_cache=cached)
            ]
            for cached in (True, False)
        )
        return {
            "parameters": tuned.summary().parameters,
            "loss": self.loss(tuned),
            "seconds": result.seconds,
            "cached equals uncached": answers == uncached,
            "answers": answers,
        }


def main() -> None:
    """Measure, and print the table and the answers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=60, help="number of answers to measure the loss with")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    lesson = Lesson(given.data, given.steps, given.held_out)
    record = Record(given.output / f"instructions_{given.steps}_{given.held_out}.jsonl")
    rows = {"untuned": ["0", f"{record.get('untuned', lesson.untuned):.3f}", "", ""]}
    for method in split_specifications(given.methods):
        found = record.get(f"{method} seed {given.seed}", lesson.measured, method, given.seed)
        rows[method] = [
            f"{found['parameters']:,}",
            f"{found['loss']:.3f}",
            "yes" if found["cached equals uncached"] else "no",
            found["answers"][0].strip().replace("\n", " ")[:40],
        ]
    print(table(["method", "parameters", "loss", "cache agrees", QUESTIONS[0]], rows))


if __name__ == "__main__":
    main()
