"""What comes out of encoding: a dataset of token ids, and a report of what was cut or dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from deltune.errors import DataError
from deltune.tasks._tokens import IGNORED

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class EncodingReport:
    """Counts of one encoding.

    Attributes:
        rows: Rows given.
        encoded_rows: Rows that came out; for plain language modeling these are pieces of documents.
        truncated_rows: Given rows that lost tokens.
        dropped_rows: Positions, counting from 0, of given rows that could not be kept at all.
        tokens: Input tokens that came out.
        trained_tokens: Labels that came out: tokens with a loss, or rows for one label a row.
        longest: Tokens of the longest row.
    """

    rows: int
    encoded_rows: int
    truncated_rows: int
    dropped_rows: tuple[int, ...]
    tokens: int
    trained_tokens: int
    longest: int

    def describe(self) -> dict[str, int]:
        """The counts as JSON values; ``dropped_rows`` becomes their number."""
        return {**asdict(self), "dropped_rows": len(self.dropped_rows)}

    def sentence(self) -> str:
        """One line for people: rows, tokens, and what was cut or dropped."""
        text = f"{self.encoded_rows} rows, {self.tokens} tokens, {self.trained_tokens} with a loss"
        if self.truncated_rows:
            text += f"; {self.truncated_rows} of {self.rows} rows cut to {self.longest} tokens or fewer"
        if self.dropped_rows:
            text += (
                f"; {len(self.dropped_rows)} of {self.rows} rows dropped, whose answers leave too little "
                f"room "
                "for the prompt"
            )
        return text


class Encoded(NamedTuple):
    """An encoded dataset and the report on its encoding."""

    dataset: Dataset
    report: EncodingReport


@dataclass
class EncodedRows:
    """Collects encoded rows compactly and builds the dataset.

    Attributes:
        rows: Rows given to the encoding.
    """

    rows: int
    _columns: dict[str, list[Any]] = field(default_factory=dict)
    _truncated: int = 0
    _dropped: list[int] = field(default_factory=list)
    _tokens: int = 0
    _trained: int = 0
    _longest: int = 0

    def add(self, columns: dict[str, list[int]], label: Sequence[int] | int | float | None = None) -> None:
        """Adds a row.

        Args:
            columns: ``input_ids`` and perhaps ``token_type_ids``.
            label: One label a row, or one a token, or none for prediction.
        """
        import numpy as np

        length = len(columns["input_ids"])
        for name, values in columns.items():
            self._columns.setdefault(name, []).append(np.asarray(values, dtype=np.int32))
        self._columns.setdefault("attention_mask", []).append(np.ones(length, dtype=np.int8))
        self._columns.setdefault("length", []).append(length)
        if isinstance(label, (int, float)):
            self._columns.setdefault("labels", []).append(label)
            self._trained += 1
        elif label is not None:
            labels = np.asarray(label, dtype=np.int32)
            self._columns.setdefault("labels", []).append(labels)
            self._trained += int((labels != IGNORED).sum())
        self._tokens += length
        self._longest = max(self._longest, length)

    def truncated(self) -> None:
        """Counts a given row that lost tokens."""
        self._truncated += 1

    def drop(self, row: int) -> None:
        """Counts a given row, by its position from 0, that is left out."""
        self._dropped.append(row)

    def finish(self) -> Encoded:
        """The dataset and its report.

        Raises:
            DataError: Every row was dropped.
        """
        from datasets import Dataset, Features, List, Value

        encoded = len(self._columns.get("input_ids", ()))
        if encoded == 0:
            raise DataError(
                f"None of the {self.rows} rows fits: the answers leave too little room for the prompts. "
                "Raise max_length."
            )
        types: dict[str, Any] = {
            name: List(Value("int8" if name == "attention_mask" else "int32"))
            for name in ("input_ids", "token_type_ids", "attention_mask")
            if name in self._columns
        }
        types["length"] = Value("int32")
        labels = self._columns.get("labels")
        if labels is not None:
            single = {int: Value("int64"), float: Value("float32")}
            types["labels"] = single.get(type(labels[0])) or List(Value("int32"))
        report = EncodingReport(
            rows=self.rows,
            encoded_rows=encoded,
            truncated_rows=self._truncated,
            dropped_rows=tuple(self._dropped),
            tokens=self._tokens,
            trained_tokens=self._trained,
            longest=self._longest,
        )
        return Encoded(Dataset.from_dict(self._columns, features=Features(types)), report)
