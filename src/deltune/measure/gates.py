"""How much of each gated change is used where: as a table for a terminal and as a picture.

Gate values have a key of place and part and a value for each batch: ``{"encoder.0.lora attention": [0.4, 0.5], ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltune.measure.sites import site_picture, site_table

__all__ = ["gate_picture", "gate_table"]


def gate_table(values: Mapping[str, Sequence[float]]) -> str:
    """Mean values over batches: a line for each layer, a column for each gated part, and the means of these."""
    return site_table(_means(values), "gate", "{:.2f}".format, "mean", lambda found: sum(found) / len(found))


def gate_picture(
    values: Mapping[str, Sequence[float]], path: str | Path, title: str = "", batch: int | None = None
) -> Path:
    """Gate values as a grid of layers and parts, the darker the higher; the number stands in each cell.

    Args:
        values: by key.
        path: file to write; its ending chooses the format, svg, png or pdf.
        title: text above.
        batch: of which batch, from 0; the mean over all if None.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed (extra ``report``).
        ValueError: if there are no values, or the ending is none that can be written.
    """
    numbers = _means(values) if batch is None else {key: found[batch] for key, found in values.items()}
    return site_picture(numbers, "gate", path, title, "{:.2f}".format)


def _means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {key: sum(found) / len(found) for key, found in values.items()}
