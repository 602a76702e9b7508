"""Measure a tuned model on the terms of its task."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.errors import DataError
from deltune.tasks.base import Task
from deltune.training.pseudo_tokens import check_pseudo_tokens
from deltune.tuned import Tuned

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["arithmetic", "batches_by_length", "batches_of", "device_of", "encoded", "evaluate", "measuring"]


def evaluate(
    tuned: Tuned,
    task: Task,
    data: Dataset,
    tokenizer: Any,
    *,
    batch_size: int = 32,
    precision: str = "float32",
) -> dict[str, float]:
    """The metrics of the task, and ``loss``.

    Neither the random numbers nor the mode of the model are changed. The result does not depend on the order of
    the rows.

    Args:
        tuned: the handle of the model.
        task: what is measured.
        data: rows with the task's columns, or encoded ones.
        tokenizer: the model's tokenizer.
        batch_size: rows of a batch.
        precision: ``float32`` or ``bfloat16``.

    Raises:
        DataError: if the data do not fit the task.
        TrainingError: if the model's outputs are not finite numbers.
    """
    import numpy as np

    task = task.resolve(tokenizer)
    check_pseudo_tokens(tuned, task)
    rows = encoded(task, data, tokenizer)
    collate = task.collator(tokenizer)
    model = tuned.model
    aligned = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    order: list[int] = []
    predictions, labels, losses = [], [], []
    with measuring(model), arithmetic(device_of(model), precision):
        for batch_rows in batches_by_length(list(rows["length"]), batch_size):
            batch = {name: value.to(device_of(model)) for name, value in collate(_rows(rows, batch_rows)).items()}
            # decoders need no labels to run, and their own loss would be computed twice
            inputs = {key: value for key, value in batch.items() if key != "labels" or aligned or not task.token_labels}
            output = model(**inputs)
            predictions.append(_numbers(task.reduce_logits(output.logits, batch["labels"])))
            order.extend(batch_rows)
            if not task.token_labels:
                labels.append(_numbers(batch["labels"]))
                losses.append(float(output.loss) * len(batch_rows))
    place = np.argsort(np.array(order))
    true = np.concatenate(labels)[place] if labels else None
    metrics = task.metrics(np.concatenate(predictions)[place], true)
    return {**({"loss": sum(losses) / len(order)} if losses else {}), **metrics}


def encoded(task: Task, data: Dataset, tokenizer: Any, *, labelled: bool = True) -> Dataset:
    """``data`` as token ids; returned as they are if they are encoded already.

    Raises:
        DataError: if the data do not fit the task, or encoded data have no labels although they are needed.
    """
    if "input_ids" not in data.column_names:
        return task.encode(data, tokenizer, labelled=labelled)
    needed = ("length", "labels") if labelled else ("length",)
    missing = [repr(name) for name in needed if name not in data.column_names]
    if missing:
        raise DataError(
            f"The data are encoded, but have no column {' and no column '.join(missing)}. Encode them with "
            "task.encode, or give the rows as text."
        )
    return data


def batches_by_length(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Row positions, longest rows first, so that little is padded and memory runs out at once or never."""
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def batches_of(task: Task, data: Dataset, tokenizer: Any, batch_size: int) -> Iterator[dict[str, Tensor]]:
    """Batches of ``data`` as the model of the task takes them, in no order of their own; labels are left out.

    Raises:
        DataError: if the data do not fit the task.
    """
    task = task.resolve(tokenizer)
    rows = encoded(task, data, tokenizer)
    collate = task.collator(tokenizer)
    for places in batches_by_length(list(rows["length"]), batch_size):
        yield {key: value for key, value in collate(_rows(rows, places)).items() if key != "labels"}


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, no cache of keys and values inside the block; modes are as before after it."""
    training = [module for module in model.modules() if module.training]
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache:
        config.use_cache = False  # type: ignore[union-attr]
    try:
        # no_grad, not inference_mode: tables that a model caches here must serve in training too
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        if use_cache:
            config.use_cache = use_cache  # type: ignore[union-attr]


def arithmetic(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """Autocast where ``precision`` is bfloat16."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def device_of(model: nn.Module) -> torch.device:
    """Where the model is."""
    return next(model.parameters()).device


def _rows(data: Dataset, places: list[int]) -> list[dict[str, Any]]:
    columns = data[places]
    return [{name: values[index] for name, values in columns.items()} for index in range(len(places))]


def _numbers(values: Tensor) -> Any:
    """A tensor as a numpy array; bfloat16 becomes float32."""
    values = values.detach().cpu()
    return (values.float() if values.dtype == torch.bfloat16 else values).numpy()
