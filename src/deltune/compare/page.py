"""The report as one HTML page that loads nothing. Every text that comes from outside is escaped here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from html import escape
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from deltune.compare import units
from deltune.compare.command import command
from deltune.compare.findings import facts, limits, subtitle, title
from deltune.compare.table import ABSENT, ComparisonTable, TableRow

if TYPE_CHECKING:
    from deltune.compare.engine import Outcome

__all__ = ["page"]

#: Forbids the page to load or send anything, whatever a name in it might contain.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"


def page(outcome: Outcome, quality: Sequence[str], curves: Sequence[str]) -> str:
    """The whole page.

    Args:
        outcome: the comparison's.
        quality: the picture of quality against parameters, wide and narrow; empty without pictures.
        curves: likewise the learning curves.
    """
    content = "\n".join(
        part
        for part in (
            f"<h1>{escape(title(outcome))}</h1>",
            f'<p class="lead">{escape(subtitle(outcome))}</p>',
            _incomplete(outcome),
            _facts(outcome),
            _quality_figure(outcome, quality),
            _table(outcome.table),
            _curves_figure(curves),
            _limits(outcome),
            _again(outcome),
            _provenance(outcome),
        )
        if part
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title(outcome))}: deltune compare</title>
<style>
{_asset("report.css")}</style>
</head>
<body>
<main>
{content}
</main>
<script>
{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return files("deltune.compare").joinpath(name).read_text(encoding="utf-8")


def _incomplete(outcome: Outcome) -> str:
    planned = len(outcome.comparison.runs)
    finished = sum(len(row.results) for row in outcome.table.rows)
    failed = sum(len(row.failures) for row in outcome.table.rows)
    if finished == planned:
        return ""
    text = f"{finished} of {planned} runs finished"
    text += f", {failed} failed: the table says why." if failed else "; the same command goes on with the others."
    return f'<p class="notice">{text}</p>'


def _facts(outcome: Outcome) -> str:
    items = "\n".join(
        f"<div><dt>{escape(fact.label)}</dt><dd>{escape(fact.row)}</dd><dd>{escape(fact.value)}</dd></div>"
        for fact in facts(outcome)
    )
    return f'<dl class="facts">\n{items}\n</dl>' if items else ""


def _figure(pictures: Sequence[str], caption: str) -> str:
    wide, narrow = pictures
    return (
        f'<figure>\n<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _quality_figure(outcome: Outcome, pictures: Sequence[str]) -> str:
    if not pictures:
        return ""
    metric = escape(outcome.table.metric.replace("_", " "))
    bars = "Bars are one standard deviation over the seeds. " if len(outcome.comparison.seeds) > 1 else ""
    caption = (
        f"Trainable parameters include the task head; their scale is logarithmic. {bars}Filled points form the Pareto "
        f"front: no other method reaches their {metric} with as few parameters. Dashed lines are the baselines."
    )
    return f"<h2>{metric.capitalize()} against trainable parameters</h2>\n{_figure(pictures, caption)}"


def _curves_figure(pictures: Sequence[str]) -> str:
    if not all(pictures) or not pictures:
        return ""
    caption = (
        "Mean over the seeds, from the lowest to the highest of them shaded; the other methods are faint behind it. "
        "A curve that still falls at the end says that the method would have used more steps."
    )
    return f"<h2>Training loss</h2>\n{_figure(pictures, caption)}"


# -- the table ---------------------------------------------------------------------------------------------


def _table(table: ComparisonTable) -> str:
    first = ("ascending", "descending" if table.greater_is_better else "ascending", *["ascending"] * 5)
    headings = []
    for position, (heading, direction) in enumerate(zip(table.headings, first, strict=True)):
        sorted_now = f' aria-sort="{direction}"' if position == 1 else ""
        headings.append(
            f'<th scope="col" data-first="{direction}"{sorted_now}>'
            f'<button type="button">{escape(heading)}</button></th>'
        )
    done = [row for row in table.rows if row.done]
    span = (
        min((row.quality.lowest for row in done), default=0.0),
        max((row.quality.highest for row in done), default=1.0),
    )
    body = "\n".join(_table_row(row, span) for row in table.rows)
    return (
        "<h2>All methods</h2>\n"
        '<p class="note">Best first; the headings sort. Grey rows are baselines: the majority class, and a linear head '
        "on the frozen model.</p>\n"
        '<div class="scroll" role="region" aria-label="All methods" tabindex="0">\n<table class="sortable">\n'
        f"<thead><tr>{''.join(headings)}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _table_row(row: TableRow, span: tuple[float, float]) -> str:
    breakable = escape(row.name).replace("(", "(<wbr>")
    name = f'<th scope="row" data-value="{escape(row.name)}">{breakable}</th>'
    if not row.done:
        return (
            f'<tr class="failed">{name}<td class="error" colspan="6"><span>failed: {escape(row.error)}</span></td></tr>'
        )
    cells = row.cells()[1:]
    values = [
        row.quality.mean,
        row.trainable,
        row.share,
        row.seconds.mean,
        row.peak_memory,
        row.checkpoint_bytes,
    ]
    rest = "".join(
        "<td></td>" if cell == ABSENT else f'<td data-value="{value!r}">{escape(cell)}</td>'
        for cell, value in list(zip(cells, values, strict=True))[1:]
    )
    failed = f'<br><span class="note">{len(row.failures)} failed: {escape(row.error)}</span>' if row.failures else ""
    quality = f'<td data-value="{values[0]!r}">{escape(cells[0])}{_range(row, span)}{failed}</td>'
    kind = "baseline" if row.baseline else "method"
    return f'<tr class="{kind}">{name}{quality}{rest}</tr>'


def _range(row: TableRow, span: tuple[float, float]) -> str:
    """A small line with the mean and the lowest and highest seed, on the scale of all rows."""
    width = (span[1] - span[0]) or 1.0
    low, mean, high = (
        f"{(value - span[0]) / width:.2%}" for value in (row.quality.lowest, row.quality.mean, row.quality.highest)
    )
    return (
        f'<span class="range" style="--low:{low};--mean:{mean};--high:{high}" aria-hidden="true"><i></i><b></b></span>'
    )


# -- below the table ---------------------------------------------------------------------------------------


def _limits(outcome: Outcome) -> str:
    items = "\n".join(f"<li>{escape(text)}</li>" for text in limits(outcome))
    return f"<h2>What the numbers mean</h2>\n<ul>\n{items}\n</ul>"


def _again(outcome: Outcome) -> str:
    jobs = outcome.results[0]["jobs"] if outcome.results else 1
    whole = _command(command(outcome.comparison, jobs=jobs))
    details = "\n".join(_row_details(row) for row in outcome.table.rows)
    return (
        "<h2>Run it again</h2>\n"
        '<p class="note">The whole comparison, then each row with its settings. Baselines always run besides.</p>\n'
        f"{whole}\n{details}"
    )


def _row_details(row: TableRow) -> str:
    result = (row.results or row.failures)[0]
    values: list[tuple[str, str]] = []
    if row.done and row.trainable:
        settings, parameters = result["settings"], result["parameters"]
        values = [
            ("learning rate", f"{settings['learning_rate']:g}"),
            ("weight decay", f"{settings['weight_decay']:g}"),
            ("steps", f"{result['steps']:,}"),
            ("trainable parameters", f"{parameters['trainable']:,}, of these {parameters['head']:,} in the head"),
            ("checkpoint", f"{row.checkpoint_bytes:,} bytes"),
        ]
        if row.trainable_at_start not in (None, row.trainable):
            values.append(("trainable parameters at the start", f"{row.trainable_at_start:,}"))
        if row.optimizer_state is not None:
            values.append(("state of the optimizer", f"{row.optimizer_state:,} bytes at most"))
    for item in row.results:
        metrics = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in item["metrics"].items())
        values.append((f"seed {item['seed']}", f"{metrics}; {units.duration(item['seconds'])}"))
    values += [(f"seed {item['seed']}", f"failed: {item['error']}") for item in row.failures]
    return (
        f"<details><summary>{escape(row.name)}</summary><div>\n{_command(result['command'])}\n"
        f"{_values(values)}\n</div></details>"
    )


def _command(text: str) -> str:
    # each option is a box of its own, so that lines do not break between two hyphens
    pieces = " ".join(f"<span>{escape(piece)}</span>" for piece in re.split(r" (?=--[a-z])", text))
    return f'<div class="command"><pre>{pieces}</pre><button class="copy" type="button" hidden>Copy</button></div>'


def _provenance(outcome: Outcome) -> str:
    done = [row.results[0] for row in outcome.table.rows if row.done and row.trainable]
    results = done or list(outcome.results)
    if not results:
        return ""
    origin: dict[str, Any] = results[0]["provenance"]
    dates = sorted(result["provenance"]["date"] for result in outcome.results)
    versions = ", ".join(f"{name} {version}" for name, version in origin["versions"].items())
    specification = results[0]["specification"]
    values = [
        ("measured", _period(dates[0], dates[-1])),
        ("device", f"{origin['device_name']} ({origin['device']})"),
        ("processors", f"{origin['cpu_count']}, {origin['threads']} threads a process"),
        ("platform", origin["platform"]),
        ("versions", versions),
        ("deltune commit", origin["commit"] or "not from a checkout"),
        ("model", specification["model"]),
        ("training data", outcome.data["train"]),
        ("evaluation data", outcome.data["evaluation"]),
        ("task", f"{specification['task']['task']}; loss: {specification['task']['loss']}"),
        *((f"{name} texts", _encoding(report)) for name, report in specification["task"].get("encoding", {}).items()),
    ]
    note = "Model and data are named by hashes of their content (SHA-256)."
    mixed = {str(result["provenance"]["versions"]) for result in outcome.results}
    if len(mixed) > 1:
        note += " Runs were made with different versions of the software; these are the first one's."
    return f'<h2>Provenance</h2>\n<p class="note">{note}</p>\n{_values(values)}'


def _period(first: str, last: str) -> str:
    """From one moment to another, to the minute; both are in UTC."""
    start, end = (datetime.fromisoformat(moment) for moment in (first, last))
    text = f"{start:%Y-%m-%d %H:%M}"
    if f"{end:%Y-%m-%d %H:%M}" != text:
        text += f" to {end:%H:%M}" if start.date() == end.date() else f" to {end:%Y-%m-%d %H:%M}"
    return f"{text} UTC"


def _encoding(report: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in report.items() if value is not None)


def _values(values: Sequence[tuple[str, str]]) -> str:
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in values)
    return f'<dl class="values">{items}</dl>'
