"""Any loop trains a tuned model: plain PyTorch, transformers' Trainer, accelerate, and deltune's own trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer, TrainingArguments

from deltune.training import DeltaTrainer
from deltune.tuned import Tuned
from tests.training import tiny

BATCH, EPOCHS, RATE = 8, 2, 5e-3


def batches() -> Any:
    """The same batches in the same order for everyone."""
    task, tokenizer = tiny.task(), tiny.tokenizer()
    return task.encode(tiny.reviews(40), tokenizer), task.collator(tokenizer)


def plain_pytorch(tuned: Tuned, folder: Path) -> list[float]:
    rows, collate = batches()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=RATE, weight_decay=0.0)
    tuned.bind(optimizer)
    losses = []
    tuned.model.train()
    for _ in range(EPOCHS):
        for batch in DataLoader(rows, BATCH, collate_fn=collate):
            loss = tuned.model(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def with_accelerate(tuned: Tuned, folder: Path) -> list[float]:
    rows, collate = batches()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=RATE, weight_decay=0.0)
    tuned.bind(optimizer)
    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(tuned.model, optimizer, DataLoader(rows, BATCH, collate_fn=collate))
    losses = []
    model.train()
    for _ in range(EPOCHS):
        for batch in loader:
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **{"save_strategy": "no", **options},
    )


class _InOrder(Trainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


class _DeltaInOrder(DeltaTrainer):
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(self.train_dataset)


def logged(trainer: Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def with_trainer(tuned: Tuned, folder: Path) -> list[float]:
    rows, collate = batches()
    return logged(_InOrder(model=tuned.model, args=arguments(folder), train_dataset=rows, data_collator=collate))


def with_delta_trainer(tuned: Tuned, folder: Path) -> list[float]:
    rows, collate = batches()
    return logged(_DeltaInOrder(tuned, arguments(folder), train_dataset=rows, data_collator=collate))


@pytest.mark.parametrize("loop", [with_accelerate, with_trainer, with_delta_trainer])
def test_every_loop_trains_to_the_same_loss(loop: Callable[[Tuned, Path], list[float]], tmp_path: Path) -> None:
    expected = plain_pytorch(tiny.classifier("lora(rank=2)", dropout=0.0), tmp_path)
    assert expected[-1] != expected[0]
    losses = loop(tiny.classifier("lora(rank=2)", dropout=0.0), tmp_path)
    assert losses == pytest.approx(expected, abs=1e-6)


def test_a_delta_trainer_resumes_exactly_and_never_writes_the_model(tmp_path: Path) -> None:
    rows, collate = batches()

    def trainer(tuned: Tuned, folder: Path, **options: Any) -> DeltaTrainer:
        saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "seed": 5}
        return DeltaTrainer(
            tuned, arguments(folder, **{**saving, **options}), train_dataset=rows, data_collator=collate
        )

    whole, rest = tiny.classifier(), tiny.classifier(seed=4)
    first = trainer(whole, tmp_path / "whole")
    first.train()
    checkpoint = tmp_path / "whole" / "checkpoint-8"
    assert sorted(item.name for item in checkpoint.parent.iterdir()) == ["checkpoint-10", "checkpoint-8"]
    assert sum(item.stat().st_size for item in checkpoint.iterdir()) < 60_000
    trainer(rest, tmp_path / "rest").train(resume_from_checkpoint=str(checkpoint))
    assert tiny.equal(tiny.weights(rest), tiny.weights(whole))
    first.save_model(str(tmp_path / "delta"))
    assert sorted(item.name for item in (tmp_path / "delta").iterdir()) == ["delta.safetensors", "deltune.json"]


def test_load_best_model_at_end_works(tmp_path: Path) -> None:
    rows, collate = batches()
    tuned = tiny.classifier("full")
    options = {
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    trainer = DeltaTrainer(
        tuned, arguments(tmp_path, **options), train_dataset=rows, eval_dataset=rows, data_collator=collate
    )
    trainer.args.learning_rate = 0.5
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(trainer.evaluate()["eval_loss"], abs=1e-6)


@pytest.mark.parametrize("kind", ["classification", "regression", "language"])
def test_accumulated_batches_equal_one_large_batch(kind: str, tmp_path: Path) -> None:
    """Also with rows of unequal length and an unequal last batch."""

    def gradients(batch_size: int, accumulation: int) -> torch.Tensor:
        tuned, rows = _model_and_rows(kind)
        options = {"max_steps": 1, "per_device_train_batch_size": batch_size, "max_grad_norm": 0.0}
        trainer = DeltaTrainer(
            tuned,
            TrainingArguments(
                str(tmp_path),
                report_to="none",
                disable_tqdm=True,
                use_cpu=True,
                save_strategy="no",
                gradient_accumulation_steps=accumulation,
                optim="sgd",
                learning_rate=1.0,
                lr_scheduler_type="constant",
                **options,
            ),
            train_dataset=rows,
            data_collator=_collate,
        )
        before = torch.cat([value.detach().flatten() for value in tuned.trainable_parameters()])
        trainer.train()
        return before - torch.cat([value.detach().flatten() for value in tuned.trainable_parameters()])

    one, several = gradients(10, 1), gradients(4, 3)
    assert one.abs().max() > 1e-4
    assert torch.allclose(one, several, atol=1e-6)


def _model_and_rows(kind: str) -> tuple[Tuned, list[dict[str, Any]]]:
    from transformers import BertForSequenceClassification

    import deltune
    from tests.tasks.tiny import decoder

    generator = torch.Generator().manual_seed(0)
    lengths = [2, 9, 4, 7, 3, 5, 8, 2, 6, 4]
    ids = [torch.randint(4, 16, (length,), generator=generator) for length in lengths]
    torch.manual_seed(0)
    if kind == "language":
        rows = [{"input_ids": row, "labels": torch.where(torch.arange(len(row)) < 1, -100, row)} for row in ids]
        return deltune.attach(decoder(), "lora(rank=2)"), rows
    problem = {"num_labels": 1, "problem_type": "regression"} if kind == "regression" else {"num_labels": 2}
    model = BertForSequenceClassification(tiny.config(0.0, **problem))
    label: Callable[[int], Any] = (lambda row: row / 3) if kind == "regression" else (lambda row: row % 2)
    rows = [{"input_ids": row, "labels": torch.tensor(label(place))} for place, row in enumerate(ids)]
    return deltune.attach(model, "lora(rank=2)"), rows


def _collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    pad = torch.nn.utils.rnn.pad_sequence
    batch = {
        "input_ids": pad([row["input_ids"] for row in rows], batch_first=True),
        "attention_mask": pad([torch.ones_like(row["input_ids"]) for row in rows], batch_first=True),
    }
    labels = [row["labels"] for row in rows]
    many = labels[0].dim() > 0
    return {**batch, "labels": pad(labels, batch_first=True, padding_value=-100) if many else torch.stack(labels)}


def test_an_own_subclass_works(tmp_path: Path) -> None:
    rows, collate = batches()

    class Doubled(_DeltaInOrder):
        def compute_loss(self, *args: Any, **options: Any) -> Any:
            return 2 * super().compute_loss(*args, **options)

    expected = with_delta_trainer(tiny.classifier("lora(rank=2)", dropout=0.0), tmp_path)
    trainer = Doubled(
        tiny.classifier("lora(rank=2)", dropout=0.0), arguments(tmp_path), train_dataset=rows, data_collator=collate
    )
    assert logged(trainer)[0] == pytest.approx(2 * expected[0], abs=1e-5)
