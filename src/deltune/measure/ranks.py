"""Which matrices got which rank: as a table for a terminal and as a picture.

A rank map has the site's key and its rank: ``{"encoder.0.attention.query": 3, ...}``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from deltune.measure.grids import grid_picture

__all__ = ["rank_picture", "rank_table"]

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


def _cells(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Layers and roles in the order of the model, and the ranks of those pairs that exist."""
    cells = {}
    for key, rank in ranks.items():
        place = _LAYER_KEY.fullmatch(key)
        cells[(place["layer"], place["role"]) if place else (key, "rank")] = rank
    layers = list(dict.fromkeys(layer for layer, _ in cells))
    # files have them in alphabetical order
    known = {role: place for place, role in enumerate(_ROLES)}
    roles = sorted(dict.fromkeys(role for _, role in cells), key=lambda role: known.get(role, len(known)))
    return layers, roles, cells


def rank_table(ranks: Mapping[str, int]) -> str:
    """Ranks by key as a table: a line for each layer, a column for each kind of matrix, and the sums."""
    layers, roles, cells = _cells(ranks)
    first, widths = max(map(len, [*layers, "layer"])), [max(len(role), 5) for role in roles]
    lines = [["layer".ljust(first), *(role.rjust(width) for role, width in zip(roles, widths, strict=True)), "  sum"]]
    for layer in layers:
        row = [cells.get((layer, role)) for role in roles]
        lines.append(_line(layer, first, row, widths))
    lines.append(_line("sum", first, [sum(cells.get((layer, role), 0) for layer in layers) for role in roles], widths))
    return "\n".join("  ".join(line) for line in lines)


def _line(label: str, first: int, row: list[int | None], widths: list[int]) -> list[str]:
    numbers = [("" if rank is None else str(rank)).rjust(width) for rank, width in zip(row, widths, strict=True)]
    return [label.ljust(first), *numbers, str(sum(rank or 0 for rank in row)).rjust(5)]


def rank_picture(ranks: Mapping[str, int], path: str | Path, title: str = "") -> Path:
    """Ranks as a grid of layers and kinds of matrices, the darker the higher; the number stands in each cell.

    Args:
        ranks: rank by key. A pair of layer and kind that is not among them stays empty.
        path: file to write; its ending chooses the format, svg, png or pdf.
        title: text above.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed (extra ``report``).
        ValueError: if there are no ranks, or the ending is none that can be written.
    """
    if not ranks:
        raise ValueError("There are no ranks to draw.")
    layers, roles, cells = _cells(ranks)
    grid = [[cells.get((layer, role), float("nan")) for layer in layers] for role in roles]
    return grid_picture(grid, roles, layers, path, title, max(*ranks.values(), 1), lambda rank: f"{rank:g}")
