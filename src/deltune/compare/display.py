"""What is seen while a comparison runs: a table that is redrawn, or plain lines where nothing can be redrawn."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deltune.compare import units
from deltune.measure import Spread

__all__ = ["Board"]


@dataclass
class _RowState:
    """Progress of one row."""

    runs: int
    qualities: list[float] = field(default_factory=list)
    failures: int = 0
    error: str = ""
    seed: int | None = None
    step: int = 0
    total: int = 0
    loss: float | None = None

    @property
    def finished(self) -> int:
        return len(self.qualities) + self.failures


class Board:
    """Shows every row: waiting, step and loss, or quality so far. Use it as a context manager.

    Args:
        console: where to print.
        rows: number of runs of each row by name.
        metric: the task's primary metric.
    """

    def __init__(self, console: Console, rows: Mapping[str, int], metric: str) -> None:
        self._console = console
        self._metric = metric
        self._rows = {name: _RowState(runs) for name, runs in rows.items()}
        self._started = time.monotonic()
        self._live = (
            Live(get_renderable=self.render, console=console, refresh_per_second=4, transient=True)
            if console.is_terminal
            else None
        )

    def __enter__(self) -> Board:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def found(self, row: str, result: Mapping[str, Any]) -> None:
        """A run had finished before this start."""
        self._rows[row].qualities.append(float(result["metrics"][self._metric]))

    def update(self, row: str, event: Mapping[str, Any]) -> None:
        """Take in an event of a worker; see :mod:`deltune.compare.worker`."""
        state = self._rows[row]
        kind = event["event"]
        if kind == "start":
            state.seed, state.step, state.total, state.loss = event["seed"], 0, 0, None
        elif kind == "step":
            state.step, state.total, state.loss = event["step"], event["total"], event["loss"]
        elif kind == "done":
            result = event["result"]
            state.qualities.append(float(result["metrics"][self._metric]))
            state.seed = None
            quality = units.quality(self._metric, Spread.of(state.qualities[-1:]))
            self._line(f"{row}, seed {event['seed']}: {quality} in {units.duration(result['seconds'])}")
        elif kind == "failed":
            state.failures += 1
            state.error = str(event["error"])
            state.seed = None
            self._line(f"{row}, seed {event['seed']}: failed: {state.error}")

    def render(self) -> Table:
        """The table as it stands now."""
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("method", no_wrap=True)
        table.add_column("progress", width=16)
        table.add_column(self._metric.replace("_", " "), justify="right", no_wrap=True)
        table.add_column("now", ratio=1, overflow="ellipsis", no_wrap=True)
        for name, state in self._rows.items():
            within = state.step / state.total if state.seed is not None and state.total else 0.0
            bar = ProgressBar(total=state.runs, completed=state.finished + within, width=16)
            quality = units.quality(self._metric, Spread.of(state.qualities)) if state.qualities else ""
            table.add_row(Text(name), bar, quality, self._now(state))
        finished = sum(state.finished for state in self._rows.values())
        total = sum(state.runs for state in self._rows.values())
        elapsed = units.duration(time.monotonic() - self._started)
        table.add_row("")
        table.add_row(Text(f"{finished} of {total} runs, {elapsed}", style="dim"))
        return table

    def _now(self, state: _RowState) -> Text:
        if state.seed is not None:
            seed = f"seed {state.seed}, "
            if not state.step:
                return Text(f"{seed}loading", style="cyan")
            if state.step >= state.total:
                return Text(f"{seed}evaluating", style="cyan")
            loss = "" if state.loss is None else f", loss {state.loss:.3f}"
            return Text(f"{seed}step {state.step} of {state.total}{loss}", style="cyan")
        if state.error:
            return Text(f"failed: {state.error}", style="red")
        if state.finished >= state.runs:
            return Text("done", style="green")
        return Text("waiting" if not state.finished else f"{state.finished} of {state.runs} runs done", style="dim")

    def _line(self, text: str) -> None:
        """Where nothing can be redrawn, one line for each finished run."""
        if self._live is None:
            self._console.print(Text(text), soft_wrap=True)
