"""The data of a comparison, split the same way in every process, and fingerprints of data and model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.compare.plan import Comparison
from deltune.errors import DataError
from deltune.tasks import TextClassification, TokenTagging, fingerprint, get_task, read_dataset, split_dataset

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["ComparisonData", "model_fingerprint", "prepare_data"]

#: Tasks that can be compared: those that assign one of several labels.
ComparableTask = TextClassification | TokenTagging

#: Of larger files of a model, only this many bytes at either end are read to know it again.
_SAMPLE_BYTES = 1 << 20


@dataclass(frozen=True)
class ComparisonData:
    """Task and examples that all runs share.

    Attributes:
        task: the task, with its classes.
        train: training examples.
        evaluation: evaluation examples; none of their texts is among the training examples.
    """

    task: ComparableTask
    train: Dataset
    evaluation: Dataset

    def fingerprints(self) -> dict[str, Any]:
        """Hashes and numbers of the examples."""
        return {
            "train": fingerprint(self.train),
            "evaluation": fingerprint(self.evaluation),
            "train_examples": len(self.train),
            "evaluation_examples": len(self.evaluation),
        }


def prepare_data(comparison: Comparison) -> ComparisonData:
    """Read and split the data of a comparison.

    Where an example has one class, the classes have the same shares among training and evaluation examples as in the
    data.

    Raises:
        DataError: if the data cannot be read, do not fit the task, or are fewer than asked for.
    """
    dataset = read_dataset(comparison.data)
    options = dict(comparison.task_options)
    if comparison.max_length is not None:
        options["max_length"] = comparison.max_length
    kind: Any = get_task(comparison.task)
    task: ComparableTask = kind.from_data(dataset, **options)
    seed = comparison.split_seed
    if comparison.evaluation_data is not None:
        train = dataset
        evaluation = _sample(
            read_dataset(comparison.evaluation_data), comparison.evaluation_size, task, seed, "evaluation"
        )
    else:
        # content, not position, decides: the next examples in the same order become the training examples
        train, evaluation = split_dataset(
            dataset,
            comparison.evaluation_size or 0.1,
            seed=seed,
            stratify=_class_column(task),
            texts=task.columns(labelled=False),
        )
    return ComparisonData(task, _sample(train, comparison.train_size, task, seed, "training"), evaluation)


def _sample(dataset: Dataset, size: int | None, task: ComparableTask, seed: int, what: str) -> Dataset:
    if size is None or size == len(dataset):
        return dataset
    if size > len(dataset):
        raise DataError(
            f"{size} {what} examples are asked for, but there are only {len(dataset)}. Ask for fewer, or give more "
            "data."
        )
    texts = task.columns(labelled=False)
    return split_dataset(dataset, size, seed=seed, stratify=_class_column(task), texts=texts).evaluation


def _class_column(task: ComparableTask) -> str | None:
    """The column of the class of an example; none where an example has many tags."""
    return task.label if isinstance(task, TextClassification) else None


def model_fingerprint(model: str) -> str:
    """A hash that tells models apart: of names, sizes and content of the folder's files, else of the name.

    Of large files the beginning and the end are read, which suffices to notice other weights.
    """
    folder = Path(model).expanduser()
    digest = hashlib.sha256()
    if not folder.is_dir():
        digest.update(model.encode())
        return digest.hexdigest()
    for file in sorted(folder.rglob("*")):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        length = file.stat().st_size
        digest.update(f"{file.relative_to(folder).as_posix()}\n{length}\n".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(_SAMPLE_BYTES))
            if length > _SAMPLE_BYTES:
                stream.seek(max(_SAMPLE_BYTES, length - _SAMPLE_BYTES))
                digest.update(stream.read())
    return digest.hexdigest()
