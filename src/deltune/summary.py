"""What an attachment trains, as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from deltune.attachment import Attachment
from deltune.quantization import Storage, format_of, storage

__all__ = ["Summary", "SummaryRow"]


@dataclass(frozen=True)
class SummaryRow:
    """One site: where, what kind of change, how many trained values that are left, how many bytes."""

    site: str
    kind: str
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Summary:
    """Per site and in total. ``str()`` gives a table.

    Attributes:
        rows: one per site, in the order of the model.
        model_parameters: values of the bare model.
        head_parameters: those of the trained values that belong to the task head.
        quantized: size of the model's part that is stored in 4 bits; None if there is none.
    """

    rows: tuple[SummaryRow, ...]
    model_parameters: int
    head_parameters: int
    quantized: Storage | None = None

    @classmethod
    def of(cls, model: nn.Module, attachments: Iterable[Attachment], model_parameters: int) -> Summary:
        """Count what these attachments train in a model of that many values."""
        rows: list[SummaryRow] = []
        head = 0
        for attachment in attachments:
            for key, placed in attachment.placed.items():
                kind = "shared" if placed.site is None else placed.site.insertion.value
                rows.append(_row(key, kind, list(placed.form.parameters()), placed.form.trained_count()))
            left = attachment.selected_counts()
            for name, parameter in attachment.selection:
                is_head = name in attachment.head_names
                rows.append(_row(name, "head" if is_head else "select", [parameter], left[name]))
                head += parameter.numel() if is_head else 0
        quantized = storage(model) if format_of(model) is not None else None
        return cls(tuple(rows), model_parameters, head, quantized)

    @property
    def parameters(self) -> int:
        """All trained values, the head's included."""
        return sum(row.parameters for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes of all trained values."""
        return sum(row.bytes for row in self.rows)

    @property
    def share(self) -> float:
        """Trained values as a share of the bare model's."""
        return self.parameters / self.model_parameters

    def __str__(self) -> str:
        width = max((len(row.site) for row in self.rows), default=4)
        lines = [f"{'site':<{width}}  {'kind':<10}  {'parameters':>12}  {'bytes':>12}"]
        lines += [f"{row.site:<{width}}  {row.kind:<10}  {row.parameters:>12,}  {row.bytes:>12,}" for row in self.rows]
        lines.append(
            f"{'total':<{width}}  {'':<10}  {self.parameters:>12,}  {self.bytes:>12,}   "
            f"{self.share:.3%} of {self.model_parameters:,}, head {self.head_parameters:,}"
        )
        if self.quantized is not None:
            lines.append(f"frozen matrices in 4 bits: {self.quantized}")
        return "\n".join(lines)


def _row(site: str, kind: str, values: list[nn.Parameter], count: int) -> SummaryRow:
    total = sum(value.numel() for value in values)
    size = sum(value.numel() * value.element_size() for value in values)
    return SummaryRow(site, kind, count, size if count == total else count * values[0].element_size())
