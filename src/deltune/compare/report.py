"""Writes the report of a comparison: ``report.html``, ``report.md`` and ``results.csv``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deltune.checkpoints import write_atomically
from deltune.compare import pictures
from deltune.compare.command import command
from deltune.compare.findings import facts, limits, subtitle, title
from deltune.compare.page import page

if TYPE_CHECKING:
    from deltune.compare.engine import Outcome

__all__ = ["ReportFiles", "write_report"]


@dataclass(frozen=True)
class ReportFiles:
    """What was written.

    Attributes:
        html: one page that needs no network.
        markdown: the same without pictures.
        csv: the table in plain numbers.
        pictures: whether the page has pictures; they need the package matplotlib.
    """

    html: Path
    markdown: Path
    csv: Path
    pictures: bool


def write_report(outcome: Outcome, output: str | Path) -> ReportFiles:
    """Write the report of a comparison into a folder.

    Without matplotlib (the extra ``report``) everything but the pictures is written.

    Args:
        outcome: what :func:`run_comparison` returned.
        output: the folder.

    Raises:
        CheckpointError: if a file cannot be written.
    """
    folder = Path(output).expanduser()
    drawn = pictures.pictures_available() and any(row.done and not row.baseline for row in outcome.table.rows)
    layouts = (pictures.WIDE, pictures.NARROW) if drawn else ()
    html = page(
        outcome,
        [pictures.quality_picture(outcome.table, layout) for layout in layouts],
        [pictures.learning_curves(outcome.table, layout) for layout in layouts],
    )
    contents = {"report.html": html, "report.md": _markdown(outcome), "results.csv": outcome.table.csv()}
    for name, text in contents.items():
        write_atomically(folder / name, _writer(text))
    return ReportFiles(folder / "report.html", folder / "report.md", folder / "results.csv", drawn)


def _writer(text: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def _markdown(outcome: Outcome) -> str:
    jobs = outcome.results[0]["jobs"] if outcome.results else 1
    parts = [f"# {title(outcome)}", subtitle(outcome)]
    stand_out = [f"- {fact.label}: **{fact.row}** ({fact.value})" for fact in facts(outcome)]
    parts += ["\n".join(stand_out)] if stand_out else []
    parts.append(outcome.table.markdown().rstrip())
    failures = [f"- **{row.name}** failed: {row.error}" for row in outcome.table.rows if row.failures]
    parts += ["## Failures", "\n".join(failures)] if failures else []
    parts += ["## What the numbers mean", "\n".join(f"- {text}" for text in limits(outcome))]
    parts += ["## Run it again", f"```sh\n{command(outcome.comparison, jobs=jobs)}\n```"]
    return "\n\n".join(parts) + "\n"
