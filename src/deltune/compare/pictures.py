"""The pictures of the report, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from deltune.compare import units
from deltune.compare.labels import NEAR, Box, place_labels
from deltune.compare.pareto import pareto_front
from deltune.compare.table import ComparisonTable, TableRow
from deltune.measure import Spread

__all__ = ["Layout", "learning_curves", "pictures_available", "quality_picture"]

#: Stand-ins that matplotlib draws with; the page's style sheet says what each looks like, by day and by night.
_INK, _MUTED, _GRID, _ACCENT, _PAGE = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {_INK: "--ink", _MUTED: "--muted", _GRID: "--rule", _ACCENT: "--accent", _PAGE: "--page"}
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "deltune",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _MUTED,
    "axes.labelsize": 12,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelsize": 11,
    "ytick.labelsize": 11,
    "xtick.minor.visible": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.dpi": 72,  # so that a unit of the SVG is a pixel
}


@dataclass(frozen=True)
class Layout:
    """Size of a picture in pixels, and how many small ones stand in a row."""

    width: int
    height: int
    columns: int


WIDE = Layout(920, 460, 4)
NARROW = Layout(370, 400, 2)


def pictures_available() -> bool:
    """Whether matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True


def quality_picture(table: ComparisonTable, layout: Layout) -> str:
    """Quality against trainable parameters: a point with its spread for each method, baselines as lines.

    Returns:
        An ``svg`` element.
    """
    rows = [row for row in table.rows if row.done and not row.baseline]
    scale = 100.0 if units.percentage(table.metric) else 1.0
    front = pareto_front([(row.trainable, row.quality.mean) for row in rows], greater_is_better=table.greater_is_better)
    with _style():
        figure, axes = _figure(layout)
        axes.set_xscale("log")
        _limits(axes, [row for row in table.rows if row.done], scale)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.set_axisbelow(True)
        if len(front) > 1:
            axes.plot(
                [rows[index].trainable for index in front],
                [rows[index].quality.mean * scale for index in front],
                color=_ACCENT,
                linewidth=1.2,
                alpha=0.55,
                drawstyle="steps-post",
                zorder=2,
            )
        for index, row in enumerate(rows):
            _point(axes, row, scale, index in front)
        unit = " in %" if scale == 100 else ""
        axes.set_ylabel(f"{table.metric.replace('_', ' ')}{unit}")
        axes.set_xlabel("trainable parameters")
        _decades(axes, [row.trainable for row in rows])
        figure.tight_layout(pad=0.4)
        obstacles = _baselines(figure, axes, table, scale)
        _labels(figure, axes, rows, scale, obstacles, front)
        return _svg(figure, "Quality against trainable parameters")


def learning_curves(table: ComparisonTable, layout: Layout) -> str:
    """Training loss over the steps: a small picture for each method, with the others faint behind it.

    Returns:
        An ``svg`` element; empty text if no run logged its loss more than once.
    """
    curves = {row.name: curve for row in table.rows if row.done and (curve := _curve(row)) is not None}
    if not curves:
        return ""
    columns = min(layout.columns, len(curves))
    count = -(-len(curves) // columns)
    highest = max(max(curve.high) for curve in curves.values())
    lowest = min(min(curve.low) for curve in curves.values())
    margin = 0.08 * ((highest - lowest) or 1.0)
    with _style():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(layout.width / 72, count * 150 / 72))
        panels = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False)
        for position, panel in enumerate(panels.flat):
            if position >= len(curves):
                panel.set_visible(False)
                continue
            name, curve = list(curves.items())[position]
            for other in curves.values():
                panel.plot(other.steps, other.mean, color=_GRID, linewidth=1)
            panel.fill_between(curve.steps, curve.low, curve.high, color=_ACCENT, alpha=0.18, linewidth=0)
            panel.plot(curve.steps, curve.mean, color=_ACCENT, linewidth=1.6)
            panel.set_title(_shortened(name, 24), fontsize=12, loc="left", color=_INK, pad=4)
            panel.set_ylim(lowest - margin, highest + margin)
            panel.tick_params(length=3, labelbottom=position + columns >= len(curves))
            panel.locator_params(axis="both", nbins=4)
        figure.supylabel("training loss", fontsize=12, color=_MUTED, x=0.005)
        figure.supxlabel("step", fontsize=12, color=_MUTED, y=0.005)
        figure.tight_layout(pad=0.6, h_pad=0.9, w_pad=1.0)
        return _svg(figure, "Training loss of each method")


@dataclass(frozen=True)
class _Curve:
    """Mean loss over the seeds, and the lowest and highest, at the steps that all of them logged."""

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


def _curve(row: TableRow) -> _Curve | None:
    runs = [
        {entry["step"]: float(entry["loss"]) for entry in result["history"] if entry.get("loss") is not None}
        for result in row.results
    ]
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    if len(steps) < 2:
        return None
    smooth = [_smoothed([run[step] for step in steps]) for run in runs]
    spreads = [Spread.of(values) for values in zip(*smooth, strict=True)]
    return _Curve(
        steps,
        [spread.mean for spread in spreads],
        [spread.lowest for spread in spreads],
        [spread.highest for spread in spreads],
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    """Means over neighbours, a twentieth of the curve to either side."""
    reach = len(values) // 20
    found = []
    for index in range(len(values)):
        near = values[max(0, index - reach) : index + reach + 1]
        found.append(sum(near) / len(near))
    return found


def _style() -> Any:
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def _figure(layout: Layout) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(layout.width / 72, layout.height / 72))
    FigureCanvasAgg(figure)  # measures text
    return figure, figure.subplots()


def _limits(axes: Any, rows: Sequence[TableRow], scale: float) -> None:
    """Room around the points: on the logarithmic axis by factors, on the other by a share of the range."""
    trainable = [row.trainable for row in rows if not row.baseline] or [1]
    values = [edge * scale for row in rows for edge in (row.quality.lowest, row.quality.highest)]
    axes.set_xlim(min(trainable) / 2.2, max(trainable) * 2.2)
    margin = 0.08 * ((max(values) - min(values)) or 1.0)
    axes.set_ylim(min(values) - margin, max(values) + margin)


def _decades(axes: Any, values: Sequence[int]) -> None:
    """Ticks at round numbers; more of them where the values span little."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    wide = max(values, default=1) >= 100 * min(values, default=1)
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0), numticks=20))
    axes.xaxis.set_major_formatter(lambda value, _: units.count(value))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _point(axes: Any, row: TableRow, scale: float, on_front: bool) -> None:
    spread = row.quality
    axes.errorbar(
        row.trainable,
        spread.mean * scale,
        yerr=None if spread.deviation is None else spread.deviation * scale,
        fmt="o",
        markersize=7.5,
        color=_ACCENT if on_front else _MUTED,
        markerfacecolor=_ACCENT if on_front else _PAGE,
        markeredgewidth=1.5,
        elinewidth=1.2,
        capsize=0,
        zorder=3,
    )


def _baselines(figure: Any, axes: Any, table: ComparisonTable, scale: float) -> list[Box]:
    """A dashed line for each baseline, and its name where it covers least; returns the places of both."""
    places = _marks(axes, [row for row in table.rows if row.done and not row.baseline], scale)
    bounds = _place(axes.get_window_extent(figure.canvas.get_renderer()))
    baselines = [row for row in table.rows if row.done and row.baseline]
    heights = [axes.transData.transform((1, row.quality.mean * scale))[1] for row in baselines]
    places += [Box(bounds.left, height - 1, bounds.width, 2) for height in heights]
    for row, height in zip(baselines, heights, strict=True):
        name = f"{row.name} {units.quality(table.metric, row.quality)}"
        wide, high = _text_size(figure, name, 11)
        candidates = [
            Box(left, bottom, wide, high)
            for bottom in (height + 3, height - high - 3)
            for left in (bounds.right - wide - 2, bounds.left + 6, bounds.left + (bounds.width - wide) / 2)
        ]
        best = min(candidates, key=lambda box: sum(box.overlap(other) for other in places))
        axes.axhline(row.quality.mean * scale, color=_MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(name, (best.left, best.bottom), xycoords="figure pixels", va="bottom", fontsize=11, color=_MUTED)
        places.append(best)
    return places


def _marks(axes: Any, rows: Sequence[TableRow], scale: float) -> list[Box]:
    """Where points and their bars are."""
    places = []
    for row in rows:
        mean, deviation = row.quality.mean * scale, (row.quality.deviation or 0.0) * scale
        x, y = axes.transData.transform((row.trainable, mean))
        low, high = (axes.transData.transform((row.trainable, mean + sign * deviation))[1] for sign in (-1, 1))
        places += [Box(float(x) - 1, float(low), 2, float(high - low)), Box(float(x) - 5, float(y) - 5, 10, 10)]
    return places


def _text_size(figure: Any, text: str, size: float) -> tuple[float, float]:
    """Width and height of a text in pixels."""
    probe = figure.text(0, 0, text, fontsize=size)
    extent = probe.get_window_extent(figure.canvas.get_renderer())
    probe.remove()
    return float(extent.width), float(extent.height)


def _labels(
    figure: Any, axes: Any, rows: Sequence[TableRow], scale: float, obstacles: list[Box], front: Sequence[int]
) -> None:
    if not rows:
        return
    names = [_shortened(row.name, 34) for row in rows]
    sizes = [(width + 2, height + 1) for width, height in (_text_size(figure, name, 12) for name in names)]
    transformed = (axes.transData.transform((row.trainable, row.quality.mean * scale)) for row in rows)
    points = [(float(x), float(y)) for x, y in transformed]
    for one, other in itertools.pairwise(front):
        (left, low), (right, high) = points[one], points[other]
        obstacles += [Box(left, low - 1, right - left, 2), Box(right - 1, min(low, high), 2, abs(high - low))]
    bounds = _place(axes.get_window_extent(figure.canvas.get_renderer()))
    for index, place in enumerate(place_labels(points, sizes, bounds, obstacles)):
        x, y = place.left + place.width / 2, place.bottom + place.height / 2
        near = place.nearest_point(*points[index])
        far = math.dist(near, points[index]) > NEAR
        axes.annotate(
            names[index],
            points[index],
            xycoords="figure pixels",
            xytext=(x, y),
            textcoords="figure pixels",
            ha="center",
            va="center",
            color=_INK if index in front else _MUTED,
            arrowprops={"arrowstyle": "-", "color": _MUTED, "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
            if far
            else None,
            zorder=4,
        )


def _place(extent: Any) -> Box:
    return Box(float(extent.x0), float(extent.y0), float(extent.width), float(extent.height))


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def _svg(figure: Any, title: str) -> str:
    """The figure as an element for a page: no declarations, no fixed colours or fonts, no unused names."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: match.group(0) if match.group(1) in used else "", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for colour, variable in _VARIABLES.items():
        text = text.replace(colour, f"var({variable})")
    text = text.replace("'DejaVu Sans'", _FONT).replace("DejaVu Sans", _FONT)
    start = re.match(r"<svg[^>]*>", text)
    assert start is not None
    box = re.search(r'viewBox="([^"]+)"', start.group(0))
    assert box is not None
    opening = f'<svg viewBox="{box.group(1)}" role="img" aria-label="{title}">'
    return opening + re.sub(r"\n\s*", "\n", text[start.end() :]).strip()
