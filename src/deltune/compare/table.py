"""The table: one row a method, averaged over seeds, best first; for the terminal, Markdown and CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deltune.compare import units
from deltune.measure import Spread

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = ["ABSENT", "ComparisonTable", "TableRow"]

#: What stands where there is no value.
ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class TableRow:
    """One method over its seeds.

    Attributes:
        name: of the row.
        results: of the runs that finished, as they stand in the results file.
        failures: of the runs that did not.
        metric: the task's primary metric.
    """

    name: str
    results: tuple[dict[str, Any], ...]
    failures: tuple[dict[str, Any], ...]
    metric: str

    @property
    def done(self) -> bool:
        """Whether at least one run finished."""
        return bool(self.results)

    @property
    def baseline(self) -> bool:
        """Whether the row is a reference and not a method under comparison."""
        return any(result["kind"] == "baseline" for result in (*self.results, *self.failures))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of the finished runs."""
        return tuple(result["seed"] for result in self.results)

    @property
    def quality(self) -> Spread:
        """The primary metric over the seeds."""
        return Spread.of(result["metrics"][self.metric] for result in self.results)

    @property
    def trainable(self) -> int:
        """Number of trained values, the head's included; the most of all seeds, as searches may keep different ones."""
        return max(int(result["parameters"]["trainable"]) for result in self.results)

    @property
    def share(self) -> float:
        """Trained values as a share of the model's."""
        return max(float(result["parameters"]["share"]) for result in self.results)

    @property
    def seconds(self) -> Spread:
        """Training time of a run, without loading and without the final evaluation."""
        return Spread.of(result["seconds"] for result in self.results)

    @property
    def peak_memory(self) -> int:
        """Highest memory that any run of the method needed."""
        return max(int(result["memory"]["peak"]) for result in self.results)

    @property
    def trainable_at_start(self) -> int | None:
        """Number of trained values when training began, of which some methods drop or add; None of old results."""
        found = self.results[0]["parameters"].get("trainable_at_start")
        return None if found is None else int(found)

    @property
    def optimizer_state(self) -> int | None:
        """Most bytes that any run's optimizer kept from step to step; None of old results and where none trained."""
        found = [result["memory"].get("optimizer_state") for result in self.results]
        return max((value for value in found if value is not None), default=None)

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of the file that holds what was trained; the most of all seeds."""
        return max(int(result["checkpoint_bytes"]) for result in self.results)

    @property
    def error(self) -> str:
        """What the first failed run said; empty if none failed."""
        return str(self.failures[0]["error"]) if self.failures else ""

    def cells(self) -> list[str]:
        """What stands in the columns of :attr:`ComparisonTable.headings`."""
        if not self.done:
            return [self.name, "failed", *[ABSENT] * 5]
        trained = self.trainable > 0
        return [
            self.name,
            units.quality(self.metric, self.quality),
            units.count(self.trainable),
            units.share(self.share),
            units.duration(self.seconds.mean) if trained else ABSENT,
            units.size(self.peak_memory) if trained else ABSENT,
            units.size(self.checkpoint_bytes) if trained else ABSENT,
        ]


@dataclass(frozen=True)
class ComparisonTable:
    """All rows, best first; rows without any finished run come last.

    Attributes:
        rows: the rows.
        metric: the task's primary metric.
        greater_is_better: whether a greater value of it is better.
    """

    rows: tuple[TableRow, ...]
    metric: str
    greater_is_better: bool

    @classmethod
    def of(cls, results: Iterable[dict[str, Any]], metric: str, *, greater_is_better: bool = True) -> ComparisonTable:
        """Collect results by row and sort them."""
        grouped: dict[str, list[dict[str, Any]]] = {}
        for result in results:
            grouped.setdefault(result["row"], []).append(result)
        rows = [
            TableRow(
                name,
                tuple(item for item in items if item["status"] == "done"),
                tuple(item for item in items if item["status"] != "done"),
                metric,
            )
            for name, items in grouped.items()
        ]
        sign = -1 if greater_is_better else 1
        done = sorted((row for row in rows if row.done), key=lambda row: (sign * row.quality.mean, row.trainable))
        return cls((*done, *(row for row in rows if not row.done)), metric, greater_is_better)

    @property
    def headings(self) -> tuple[str, ...]:
        """Column headings."""
        return (
            "method",
            self.metric.replace("_", " "),
            "trainable parameters",
            "share",
            "training time",
            "peak memory",
            "checkpoint",
        )

    def rich(self) -> RichTable:
        """For the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        for position, heading in enumerate(self.headings):
            if position == 0:
                table.add_column(heading, overflow="fold")
            else:
                table.add_column(heading.replace(" ", "\n"), justify="right", no_wrap=True, vertical="bottom")
        for row in self.rows:
            style = "red" if not row.done else "dim" if row.baseline else ""
            table.add_row(*(Text(cell) for cell in row.cells()), style=style)
        return table

    def markdown(self) -> str:
        """As a Markdown table."""
        lines = [_markdown_line(self.headings), "|---" + "|---:" * (len(self.headings) - 1) + "|"]
        lines += [_markdown_line(row.cells()) for row in self.rows]
        return "\n".join(lines) + "\n"

    def csv(self) -> str:
        """As comma-separated values: plain numbers, bytes and seconds."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(
            [
                "method",
                "seeds",
                f"{self.metric}_mean",
                f"{self.metric}_standard_deviation",
                f"{self.metric}_lowest",
                f"{self.metric}_highest",
                "trainable_parameters",
                "trainable_parameters_at_start",
                "head_parameters",
                "share",
                "training_seconds_mean",
                "training_seconds_standard_deviation",
                "peak_memory_bytes",
                "baseline_memory_bytes",
                "optimizer_state_bytes",
                "checkpoint_bytes",
                "failed_runs",
                "error",
            ]
        )
        for row in self.rows:
            writer.writerow([row.name, *_plain_cells(row), len(row.failures), row.error])
        return stream.getvalue()


def _plain_cells(row: TableRow) -> list[Any]:
    if not row.done:
        return [""] * 15
    quality, seconds = row.quality, row.seconds
    first = row.results[0]
    return [
        " ".join(str(seed) for seed in row.seeds),
        quality.mean,
        "" if quality.deviation is None else quality.deviation,
        quality.lowest,
        quality.highest,
        row.trainable,
        "" if row.trainable_at_start is None else row.trainable_at_start,
        first["parameters"]["head"],
        row.share,
        seconds.mean,
        "" if seconds.deviation is None else seconds.deviation,
        row.peak_memory,
        min(int(result["memory"]["resident_baseline"]) for result in row.results),
        "" if row.optimizer_state is None else row.optimizer_state,
        row.checkpoint_bytes,
    ]


def _markdown_line(cells: Sequence[str]) -> str:
    escaped = (cell.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;") for cell in cells)
    return "| " + " | ".join(escaped) + " |"
