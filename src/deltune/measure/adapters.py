"""Which of several fused adapters is used where: as a table for a terminal and as a picture.

A use map has the key of the place and a weight for each adapter: ``{"encoder.0.ffn": [0.7, 0.3], ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from deltune.measure.grids import grid_picture

__all__ = ["use_picture", "use_table"]


def use_table(use: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Weights as a table: a line for each place, a column for each adapter by its name, and the means."""
    rows = [(key, list(values)) for key, values in use.items()]
    means = [sum(values[index] for _, values in rows) / len(rows) for index in range(len(names))]
    first = max(len(key) for key, _ in [*rows, ("mean", means)])
    widths = [max(len(name), 5) for name in names]
    lines = [" ".join(["".ljust(first), *(name.rjust(width) for name, width in zip(names, widths, strict=True))])]
    for key, values in [*rows, ("mean", means)]:
        cells = [f"{value:.2f}".rjust(width) for value, width in zip(values, widths, strict=True)]
        lines.append(" ".join([key.ljust(first), *cells]))
    return "\n".join(lines)


def use_picture(use: Mapping[str, Sequence[float]], names: Sequence[str], path: str | Path, title: str = "") -> Path:
    """Weights as a grid of adapters and places, the darker the higher; the number stands in each cell.

    Args:
        use: weights by place.
        names: of the adapters, in their order.
        path: file to write; its ending chooses the format, svg, png or pdf.
        title: text above.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed (extra ``report``).
        ValueError: if there is nothing to draw, or the ending is none that can be written.
    """
    if not use:
        raise ValueError("There are no weights to draw.")
    grid = [[values[index] for values in use.values()] for index in range(len(names))]
    return grid_picture(grid, list(names), list(use), path, title, highest=1.0, number=lambda value: f"{value:.2f}")
