"""Train a LoRA in a loop of plain PyTorch.

    python -m examples.plain_pytorch                                    # MiniLM on movie reviews
    python -m examples.plain_pytorch --model FOLDER --data FILE.csv     # columns: text, label

`examples/transformers_trainer.py` and `examples/accelerate_loop.py` do the same steps on the same batches. In a model
without dropout all three come to the same losses; with dropout they draw other random numbers.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
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
    tuned.bind(optimizer, chosen.steps)  # schedules of methods that have one follow the optimizer
    losses: list[float] = []
    model.train()
    while len(losses) < chosen.steps:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
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
