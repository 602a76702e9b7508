"""Numbers in a grid, drawn: the darker the higher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["grid_picture"]


def grid_picture(
    grid: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | Path,
    title: str,
    highest: float,
    number: Callable[[float], str],
) -> Path:
    """Draw a grid; the number stands in each cell.

    Args:
        grid: a sequence of numbers for each row; cells that are no number stay empty.
        rows: their names.
        columns: the columns' names.
        path: file to write; its ending chooses the format, svg, png or pdf.
        title: text above; none if empty.
        highest: what is drawn darkest.
        number: how a number is written.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed (extra ``report``).
        ValueError: if the ending is none that can be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "deltune", "font.size": 9}):
        longest = max((len(number(value)) for numbers in grid for value in numbers if value == value), default=0)
        width = max(0.42, 0.12 + 0.075 * longest)
        figure = Figure(figsize=(1.9 + width * len(columns), 0.9 + 0.36 * len(rows)), layout="constrained")
        axes = figure.subplots()
        axes.imshow(grid, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
        for row, numbers in enumerate(grid):
            for column, value in enumerate(numbers):
                if value == value:
                    color = "white" if value > 0.6 * highest else "#333333"
                    axes.text(column, row, number(value), ha="center", va="center", color=color)
        rotation = 90 if len(columns) > 8 else 30
        axes.set_xticks(range(len(columns)), columns, rotation=rotation, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), rows)
        axes.set_xticks([column - 0.5 for column in range(1, len(columns))], minor=True)
        axes.set_yticks([row - 0.5 for row in range(1, len(rows))], minor=True)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        for spine in axes.spines.values():
            spine.set_visible(False)
        if title:
            axes.set_title(title, loc="left", fontsize=10)
        figure.savefig(Path(path), dpi=150, metadata={"Date": None} if str(path).endswith(".svg") else None)
    return Path(path)
