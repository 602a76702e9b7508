"""Train a LoRA with ``transformers.Trainer``, which knows nothing of deltune.

    python -m examples.transformers_trainer                                    # MiniLM on movie reviews
    python -m examples.transformers_trainer --model FOLDER --data FILE.csv     # columns: text, label

It does the steps of `examples/plain_pytorch.py`. `deltune.fit` and `deltune.training.DeltaTrainer` are trainers
too; their checkpoints hold what was trained alone, and resume exactly.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
from transformers import Trainer, TrainingArguments

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

    with tempfile.TemporaryDirectory() as scratch:
        settings = TrainingArguments(
            scratch,
            max_steps=chosen.steps,
            per_device_train_batch_size=chosen.batch_size,
            learning_rate=chosen.learning_rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            train_sampling_strategy="sequential",  # the rows are shuffled already
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=chosen.seed,
        )
        rows = task.encode(data, tokenizer)
        trainer = Trainer(model=model, args=settings, train_dataset=rows, data_collator=task.collator(tokenizer))
        trainer.create_optimizer()
        tuned.bind(trainer.optimizer, chosen.steps)  # schedules of methods that have one follow the optimizer
        trainer.train()

    tuned.save(chosen.output)
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def main(given: Sequence[str] | None = None) -> None:
    """Train and print the losses."""
    losses = train(options(__doc__, given))
    print(f"first loss {losses[0]:.4f}, last loss {losses[-1]:.4f}, {len(losses)} steps")


if __name__ == "__main__":
    main()
