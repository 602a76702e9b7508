"""Which matrices got which rank: as a table for a terminal and as a picture.

A rank map has the site's key and its rank: ``{"encoder.0.attention.query": 3, ...}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from deltune.measure.sites import site_picture, site_table

__all__ = ["rank_picture", "rank_table"]


def rank_table(ranks: Mapping[str, int]) -> str:
    """Ranks by key as a table: a line for each layer, a column for each kind of matrix, and the sums."""
    return site_table(ranks, "rank")


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
    return site_picture(ranks, "rank", path, title)
