"""Each method on a real decoder and real instructions: ``python -m benchmarks.instructions --data FILE``.

SmolLM2-135M learns short answers (json lines with instruction, input, output). Of each method: parameters, the loss on
held-out answers before and after, whether cached and uncached generation agree, and an answer to look at.
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
from examples import assets

METHODS = (
    "lora, adalora, krona, krona-b, increlora, dylora, fact, lorta, "
    "sequential-adapter, pfeiffer-adapter, residual-adapter, parallel-adapter, "
    "prefix-tuning, p-tuning-v2, prompt-tuning, p-tuning, ladder-side-tuning"
)
QUESTIONS = ("Name the capital of France.", "Write a sentence about the sea.", "What is the opposite of hot?")


def measured(method: str, data: str, steps: int, seed: int) -> dict[str, Any]:
    """Train, and look at what came of it."""
    folder = str(assets.get("smollm2-135m"))
    task = InstructionTuning(context="input")
    tokenizer = task.load_tokenizer(folder)
    task = task.resolve(tokenizer)
    train, held_out = instructions(data, steps * 4)
    rows, held_out = task.encode(train, tokenizer), task.encode(held_out, tokenizer)
    transformers.set_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = deltune.attach(model, parse(method))
    with tuned.disabled():
        bare = evaluate(tuned, task, held_out, tokenizer, batch_size=8)["loss"]
    settings = TrainingSettings(steps=steps, batch_size=4, seed=seed, keep_best=False, threads=1)
    result = deltune.fit(tuned, task, rows, tokenizer=tokenizer, settings=settings)
    questions = Dataset.from_list([{"instruction": item, "input": "", "output": ""} for item in QUESTIONS])
    answers, uncached = (
        [item["text"] for item in predict(tuned, task, questions, tokenizer, max_new_tokens=16, use_cache=cached)]
        for cached in (True, False)
    )
    return {
        "parameters": tuned.summary().parameters,
        "untuned": bare,
        "after": evaluate(tuned, task, held_out, tokenizer, batch_size=8)["loss"],
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    record = Record(given.output / f"instructions_{given.steps}.jsonl")
    rows = {}
    for method in split_specifications(given.methods):
        found = record.get(f"{method} seed {given.seed}", measured, method, given.data, given.steps, given.seed)
        rows[method] = [
            f"{found['parameters']:,}",
            f"{found['untuned']:.3f}",
            f"{found['after']:.3f}",
            "yes" if found["cached equals uncached"] else "no",
            found["answers"][0].strip().replace("\n", " ")[:40],
        ]
    print(table(["method", "parameters", "loss untuned", "loss after", "cache agrees", "answer"], rows))


if __name__ == "__main__":
    main()
