"""Checks of the columns of a dataset; every message says which row, which column and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from deltune.errors import DataError, suggestion

if TYPE_CHECKING:
    from datasets import Dataset


def require_rows(dataset: Dataset) -> None:
    """Refuses a dataset without rows."""
    if len(dataset) == 0:
        raise DataError("The dataset has no rows. Give data with at least one row, or check the filter or limit.")


def require_columns(dataset: Dataset, names: Iterable[str], user: str) -> None:
    """Refuses a dataset that lacks one of the columns ``names``, which ``user``, such as a task, reads."""
    present = list(dataset.column_names)
    for name in names:
        if name not in present:
            raise DataError(
                f"{user!r} reads the column {name!r}, which the data do not have. "
                f"Columns present: {', '.join(present)}. {suggestion(name, present)}"
            )


def text_column(dataset: Dataset, name: str) -> list[str]:
    """The values of a column, all of them text.

    Raises:
        DataError: A value is missing, or is not text.
    """
    values = list(dataset[name])
    for row, value in enumerate(values, start=1):
        check_text(value, row, name)
    return values


def check_text(value: Any, row: int, column: str) -> str:
    """``value`` itself where it is text with more than white space.

    Args:
        value: What the dataset holds.
        row: Number of the row, counting from 1.
        column: Name of the column.

    Raises:
        DataError: The value is missing, is no text, or is blank.
    """
    if value is None:
        raise DataError(f"Row {row} has no value in column {column!r}. Fill it in or remove the row.")
    if not isinstance(value, str):
        raise DataError(
            f"Row {row} holds {value!r} ({type(value).__name__}) in column {column!r}, where text is "
            f"expected. "
            "Name another column, or convert the values to text."
        )
    if not value.strip():
        raise DataError(
            f"The text in row {row}, column {column!r}, is empty and gives no tokens. Fill it in or remove "
            f"the "
            "row; deltune.tasks.drop_empty_rows removes all such rows."
        )
    return value


def no_tokens(row: int, column: str) -> DataError:
    """The error for a text that the tokenizer turns into no token at all."""
    return DataError(
        f"The text in row {row}, column {column!r}, gives no tokens: the tokenizer drops all its characters. "
        "Remove the row or correct the text."
    )


def wrong_type(value: Any, row: int, column: str, expected: str) -> DataError:
    """The error for a value of another type than ``expected``."""
    return DataError(
        f"Row {row} holds {value!r} ({type(value).__name__}) in column {column!r}, where {expected} expected."
    )
