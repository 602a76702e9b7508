"""A number for each site of a model, as a table for a terminal and as a picture: layers against kinds of places.

A map has the site's key and its number: ``{"encoder.0.attention.query": 3, ...}``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from deltune.measure.grids import grid_picture

__all__ = ["site_picture", "site_table"]

_ROLES = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
)
_LAYER_KEY = re.compile(r"(?P<layer>(\d+\.)?\w+\.\d+)\.(?P<role>.+)")


def _cells(numbers: Mapping[str, float], column: str) -> tuple[list[str], list[str], dict[tuple[str, str], float]]:
    """Layers and roles in the order of the model, and the numbers of those pairs that exist."""
    cells = {}
    for key, number in numbers.items():
        place = _LAYER_KEY.fullmatch(key)
        cells[(place["layer"], place["role"]) if place else (key, column)] = number
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    # files have them in alphabetical order
    known = {role: place for place, role in enumerate(_ROLES)}
    roles = sorted(dict.fromkeys(role for _, role in cells), key=lambda role: known.get(role, len(known)))
    return layers, roles, cells


def site_table(
    numbers: Mapping[str, float],
    column: str,
    write: Callable[[float], str] = "{:g}".format,
    last: str = "sum",
    together: Callable[[list[float]], float] = sum,
) -> str:
    """Numbers by key: a line for each layer, a column for each kind of place, and what they come to together.

    Args:
        numbers: by key.
        column: name of the column of places outside of the layers.
        write: how a number is written.
        last: name of the last column and line.
        together: what stands there, of the numbers of a line or column.
    """
    layers, roles, cells = _cells(numbers, column)
    rows = [[cells.get((layer, role)) for role in roles] for layer in layers]
    rows.append([together(found) if (found := _present(column)) else 0 for column in zip(*rows, strict=True)])
    ends = [together(_present(row)) for row in rows[:-1]]
    ends.append(together(list(cells.values())))
    texts = [["" if number is None else write(number) for number in row] for row in rows]
    lines = [["layer", *roles, last]]
    lines += [[name, *row, write(end)] for name, row, end in zip([*layers, last], texts, ends, strict=True)]
    widths = [max(len(line[place]) for line in lines) for place in range(len(lines[0]))]
    widths[1:] = [max(width, 5) for width in widths[1:]]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(text.rjust(width) for text, width in zip(line[1:], widths[1:], strict=True))]
        )
        for line in lines
    )


def _present(numbers: tuple[float | None, ...] | list[float | None]) -> list[float]:
    return [number for number in numbers if number is not None]


def site_picture(
    numbers: Mapping[str, float],
    column: str,
    path: str | Path,
    title: str = "",
    write: Callable[[float], str] = "{:g}".format,
) -> Path:
    """Numbers as a grid of layers and kinds of places, the darker the higher; the number stands in each cell.

    Args:
        numbers: by key. A pair of layer and kind that is not among them stays empty.
        column: name of the row of places outside of the layers.
        path: file to write; its ending chooses the format, svg, png or pdf.
        title: text above.
        write: how a number is written.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed (extra ``report``).
        ValueError: if there are no numbers, or the ending is none that can be written.
    """
    if not numbers:
        raise ValueError("There are no numbers to draw.")
    layers, roles, cells = _cells(numbers, column)
    grid = [[cells.get((layer, role), float("nan")) for layer in layers] for role in roles]
    return grid_picture(grid, roles, layers, path, title, max(numbers.values()) or 1, write)
