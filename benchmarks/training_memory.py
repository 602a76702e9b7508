"""Memory of one training step, each method in a process of its own: ``python -m benchmarks.training_memory``.

A 12-layer encoder of BERT-base's shape with random weights, in float32, trained on a batch of 32 texts of 128 tokens.
``masked`` is what a FISH mask usually is: full fine-tuning whose gradients are multiplied by a mask of ones and zeros.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification

import deltune
from benchmarks.sentiment import table
from deltune.measure import PeakMemory, SavedTensors, optimizer_state_bytes

METHODS = (
    "full",
    "lora(rank=8, targets='attention.* ffn.*')",
    "sequential-adapter",
    "prompt-tuning",
    "attention-fusion",
    "ladder-side-tuning(reduction=8, initialization=magnitude)",
    "fish-mask(ratio=0.005)",
    "masked",
)


def measured(method: str, rows: int, length: int) -> dict[str, Any]:
    """Peak memory of two steps, and what the forward pass keeps for the backward pass."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig())
    tuned = deltune.attach(model, "full" if method == "masked" else method, reversible=False)
    masks = {value: torch.rand_like(value) < 0.005 for value in model.parameters()} if method == "masked" else {}
    model.train()
    batch = {
        "input_ids": torch.randint(1000, 30000, (rows, length)),
        "attention_mask": torch.ones(rows, length, dtype=torch.long),
        "labels": torch.randint(2, (rows,)),
    }
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-4)
    with PeakMemory() as memory:
        for _ in range(2):
            model(**batch).loss.backward()
            for value, mask in masks.items():
                value.grad.mul_(mask)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    # apart, because what is counted is held as long as it is counted
    with SavedTensors(besides=list(model.parameters())) as saved:
        loss = model(**batch).loss
    assert loss.requires_grad
    trained, state = tuned.summary().parameters, optimizer_state_bytes(optimizer)
    return {"peak": memory.use.peak, "kept": saved.bytes, "parameters": trained, "optimizer": state}


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--methods", default=";".join(METHODS), help="with semicolons between them; full is added")
    given = parser.parse_args()
    found = {}
    for method in dict.fromkeys(["full", *given.methods.split(";")]):
        call = f"measured({method!r}, {given.rows}, {given.length})"
        code = f"import json\nfrom benchmarks.training_memory import measured\nprint('RESULT', json.dumps({call}))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        line = next(line for line in done.stdout.splitlines() if line.startswith("RESULT"))
        found[method] = json.loads(line.removeprefix("RESULT "))
        print(method, found[method], flush=True)
    full = found["full"]
    rows = {
        method: [
            f"{item['parameters']:,}",
            f"{item['optimizer'] / 1e6:,.1f} MB",
            f"{item['kept'] / 1e6:,.0f} MB",
            f"{item['kept'] / full['kept']:.2f}",
            f"{item['peak'] / 1e6:,.0f} MB",
            f"{item['peak'] / full['peak']:.2f}",
        ]
        for method, item in found.items()
    }
    header = ["method", "trained", "optimizer state", "kept for backward", "of full", "peak of the process", "of full"]
    print(table(header, rows))


if __name__ == "__main__":
    main()
