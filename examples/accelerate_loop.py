"""Train a LoRA in a loop with accelerate, which moves model and batches to the device.

    python -m examples.accelerate_loop                                    # MiniLM on movie reviews
    python -m examples.accelerate_loop --model FOLDER --data FILE.csv     # columns: text, label

`examples/plain_pytorch.py` is the same loop without accelerate.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader

import deltune
from deltune.tasks import TextClassification, read_dataset
from examples.inputs import options


def train(chosen: argparse.Namespace) -> list[float]:
    """The loss of every step."""
    data = read_dataset(chosen.data).shuffle(seed=chosen.seed)
    task = TextClassification.from_data(data)
    tokenizer = task.load_tokenizer(chosen.model)
    torch.manual_seed(chosen.seed)  # draws the head and the LoRA
    model = task.load_model(chosen.model, tokenizer=tokenizer)
    tuned = deltune.attach(model, deltune.LoRA(rank=8, alpha=16))

    rows = task.encode(data, tokenizer)
    batches = DataLoader(rows, chosen.batch_size, collate_fn=task.collator(tokenizer))
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=chosen.learning_rate, weight_decay=0.0)
    tuned.bind(optimizer, chosen.steps)  # before prepare, which wraps the optimizer
    accelerator = Accelerator()
    model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
    losses: list[float] = []
    model.train()
    while len(losses) < chosen.steps:
        for batch in batches:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            if len(losses) == chosen.steps:
                break

    tuned.save(chosen.output)
    return losses


def main(given: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    losses = train(options(__doc__, given))
    print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}, {len(losses)} steps")


if __name__ == "__main__":
    main()
