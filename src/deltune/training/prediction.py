"""Predictions of a tuned model, for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from deltune.errors import TrainingError
from deltune.tasks.base import Task
from deltune.training.evaluation import arithmetic, batches_by_length, device_of, encoded, measuring
from deltune.training.pseudo_tokens import check_pseudo_tokens
from deltune.tuned import Tuned

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["predict"]


def predict(
    tuned: Tuned,
    task: Task,
    data: Dataset,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    precision: str = "float32",
    max_new_tokens: int = 128,
    **generation: Any,
) -> list[dict[str, Any]]:
    """Predict a label, a number or a text for every row.

    Args:
        tuned: the handle of the model.
        task: what the model was trained for.
        data: rows with the task's text columns; labels are not needed.
        tokenizer: the model's tokenizer.
        batch_size: rows of a batch.
        precision: ``float32`` or ``bfloat16``.
        max_new_tokens: longest generated text, for tasks that generate.
        **generation: further arguments of ``model.generate``; by default the likeliest token is taken.

    Returns:
        One dictionary a row, in the order of the rows; what is in it depends on the task.

    Raises:
        DataError: if the data do not fit the task.
        TrainingError: if generation options are given to a task that does not generate.
    """
    if generation and not task.generates:
        raise TrainingError(f"The task {task.name!r} does not generate text: leave out {', '.join(generation)}.")
    task = task.resolve(tokenizer)
    check_pseudo_tokens(tuned, task)
    rows = encoded(task, data, tokenizer, labelled=False)
    drop = [name for name in rows.column_names if name == "labels"]
    rows = rows.remove_columns(drop) if drop else rows
    collate = task.collator(tokenizer, padding_side=task.prediction_padding_side)
    model: Any = tuned.model
    device = device_of(model)
    found: dict[int, dict[str, Any]] = {}
    for places in batches_by_length(list(rows["length"]), batch_size):
        columns = rows[places]
        batch_rows = [{name: values[row] for name, values in columns.items()} for row in range(len(places))]
        batch = {name: value.to(device) for name, value in collate(batch_rows).items()}
        if task.generates:
            options = {**task.generation_options(tokenizer), "max_new_tokens": max_new_tokens, **generation}
            outputs = _generate(model, batch, precision, options)
        else:
            with measuring(model), arithmetic(device, precision):
                outputs = model(**batch).logits
        found.update(zip(places, task.predict_rows(outputs, batch_rows, tokenizer), strict=True))
    return [found[row] for row in range(len(rows))]


def _generate(model: Any, batch: dict[str, Any], precision: str, options: dict[str, Any]) -> Any:
    """New token ids, without the prompt."""
    training = model.training
    model.eval()
    batch = {name: value for name, value in batch.items() if name != "token_type_ids"}
    try:
        with torch.no_grad(), arithmetic(device_of(model), precision):
            ids = model.generate(**batch, **{"do_sample": False, "use_cache": True, **options})
    finally:
        model.train(training)
    if model.config.is_encoder_decoder:
        return ids
    return ids[:, batch["input_ids"].shape[1] :]
