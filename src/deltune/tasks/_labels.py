"""Labels of a dataset: text, whole numbers, or names that the column itself carries."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deltune.errors import DataError
from deltune.tasks._columns import wrong_type

if TYPE_CHECKING:
    from datasets import Dataset


def class_names(dataset: Dataset, column: str) -> tuple[str, ...] | None:
    """The names that a ``ClassLabel`` column carries, or none."""
    from datasets import ClassLabel

    feature = dataset.features[column]
    return tuple(feature.names) if isinstance(feature, ClassLabel) else None


def read_labels(dataset: Dataset, column: str) -> list[Any]:
    """The labels as text or whole numbers; those of a ``ClassLabel`` column as their names."""
    names = class_names(dataset, column)
    found: list[Any] = []
    for row, value in enumerate(dataset[column], start=1):
        if value is None or (names is not None and value == -1) or (isinstance(value, str) and not value.strip()):
            raise no_label(row, column)
        if names is not None:
            found.append(names[value])
        elif isinstance(value, bool):
            found.append(str(value))
        elif isinstance(value, (int, str)):
            found.append(value)
        else:
            raise DataError(
                f"{wrong_type(value, row, column, 'a class (text or a whole number) is')} "
                "Write classes as text or whole numbers; for scores use the task 'text-regression'."
            )
    return found


def no_label(row: int, column: str) -> DataError:
    """The error for a row without a label."""
    return DataError(f"Row {row} has no label in column {column!r}. Fill it in or remove the row.")


def one_class(name: str, column: str) -> DataError:
    """The error for data of a single class."""
    return DataError(
        f"All rows have the same class {name!r} in column {column!r}, so there is nothing to learn. "
        "Give data of at least two classes, or name another label column."
    )
