"""Rows of different lengths become one padded batch.

Dimensions: B rows of a batch, T tokens of its longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltune.errors import DataError, suggestion
from deltune.tasks._tokens import IGNORED

if TYPE_CHECKING:
    from torch import Tensor

_PADDED = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads rows to the longest one of the batch.

    Padding is known by its position: ``attention_mask`` is 0 and token labels are -100 exactly where padding
    was put, whatever ids the tokens have. A padding token that is also the end token is therefore learned
    as end token wherever a text really ends.

    Attributes:
        pad_token_id: Id that fills ``input_ids``.
        token_labels: Whether ``labels`` are one label a token (padded with -100) or one value a row.
        padding_side: ``"right"`` (default, for training) or ``"left"`` (for generating with decoders).
        labels_follow_inputs: Whether token labels belong to the input positions, and so are padded on the
            same side; labels of an encoder-decoder are padded on the right, on their own length.
        pad_to_multiple_of: Rounds T up to a multiple; none by default.
        pad_token_type_id: Id that fills ``token_type_ids``; 0 by default.
    """

    pad_token_id: int
    token_labels: bool
    padding_side: str = "right"
    labels_follow_inputs: bool = True
    pad_to_multiple_of: int | None = None
    pad_token_type_id: int = 0

    def __post_init__(self) -> None:
        if self.padding_side not in ("left", "right"):
            raise DataError(
                f"padding_side must be 'left' or 'right', not {self.padding_side!r}. "
                + suggestion(str(self.padding_side), ("left", "right"))
            )
        if self.pad_to_multiple_of is not None and self.pad_to_multiple_of < 1:
            raise DataError(f"pad_to_multiple_of must be 1 or more, not {self.pad_to_multiple_of}.")

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Builds a batch.

        Args:
            rows: Rows as ``Task.encode`` makes them; the column ``length`` is not for the model and left out.

        Returns:
            ``input_ids``, ``attention_mask`` and, where the rows have them, ``token_type_ids``, each int64
            [B, T]; ``labels`` where the rows have them: int64 [B, T] for token labels, else int64 or
            float32 [B].

        Raises:
            DataError: There are no rows, rows have different columns, or a column is unknown.
        """
        import torch

        if not rows:
            raise DataError("A batch needs at least one row.")
        names = set(rows[0])
        for row in rows:
            if set(row) != names:
                raise DataError(f"The rows of a batch have different columns: {sorted(names)} and {sorted(row)}.")
        unknown = names - {*_PADDED, "labels", "length"}
        if unknown or "input_ids" not in names:
            raise DataError(
                f"The batch has the columns {', '.join(sorted(names))}; 'input_ids' is needed, and "
                f"{', '.join(sorted({*_PADDED, 'labels', 'length'}))} are understood. "
                "Encode the data with the task first."
            )
        fill = {
            "input_ids": self.pad_token_id,
            "attention_mask": 0,
            "token_type_ids": self.pad_token_type_id,
        }
        complete = [
            row if "attention_mask" in names else {**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows
        ]
        length = self._rounded(max(len(row["input_ids"]) for row in complete))
        batch = {
            name: self._pad([row[name] for row in complete], length, fill[name], self.padding_side)
            for name in _PADDED
            if name in complete[0]
        }
        if "labels" in names:
            labels = [row["labels"] for row in complete]
            if not self.token_labels:
                numbers = torch.float32 if isinstance(labels[0], float) else torch.int64
                batch["labels"] = torch.tensor(labels, dtype=numbers)
            elif self.labels_follow_inputs:
                batch["labels"] = self._pad(labels, length, IGNORED, self.padding_side)
            else:
                longest = self._rounded(max(len(row) for row in labels))
                batch["labels"] = self._pad(labels, longest, IGNORED, "right")
        return batch

    def _rounded(self, length: int) -> int:
        multiple = self.pad_to_multiple_of or 1
        return -(-length // multiple) * multiple

    @staticmethod
    def _pad(rows: Sequence[Sequence[int]], length: int, fill: int, side: str) -> Tensor:
        """``rows`` as int64 [B, length], ``fill`` where a row has ended."""
        import torch

        padded = torch.full((len(rows), length), fill, dtype=torch.int64)
        for place, row in enumerate(rows):
            values = torch.as_tensor(row, dtype=torch.int64)
            if side == "right":
                padded[place, : len(values)] = values
            else:
                padded[place, length - len(values) :] = values
        return padded
