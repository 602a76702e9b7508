"""Runs a comparison: a process for each row, results kept as they come, and the report at the end."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from deltune.checkpoints.files import claimed
from deltune.compare.command import command
from deltune.compare.content import ComparisonData, model_fingerprint, prepare_data
from deltune.compare.display import Board
from deltune.compare.plan import LINEAR_HEAD, MAJORITY, Comparison, specification_hash
from deltune.compare.processes import Workers, file_name
from deltune.compare.results import ResultsFile
from deltune.compare.table import ComparisonTable
from deltune.compare.worker_job import Job
from deltune.errors import DeltuneError
from deltune.measure import cpu_count, provenance

__all__ = ["Outcome", "PlannedRun", "run_comparison"]

_FORMAT = 1


@dataclass(frozen=True)
class PlannedRun:
    """A run with everything that its quality depends on.

    Attributes:
        row: its row.
        seed: its seed.
        specification: see :meth:`Comparison.specification`.
        hash: of the specification.
    """

    row: str
    seed: int
    specification: dict[str, Any]
    hash: str


@dataclass(frozen=True)
class Outcome:
    """What a comparison ends with.

    Attributes:
        comparison: the comparison.
        results: every run that finished or failed, in the order of the plan, as in ``results.jsonl``.
        table: the results by row.
        data: fingerprints and numbers of the examples.
        repeated: runs that had finished before this start and were not done again.
        others: runs in the same file that belong to other specifications.
        interrupted: whether it was stopped before the end.
    """

    comparison: Comparison
    results: tuple[dict[str, Any], ...]
    table: ComparisonTable
    data: dict[str, Any]
    repeated: int
    others: int
    interrupted: bool


def run_comparison(
    comparison: Comparison,
    output: str | Path,
    *,
    jobs: int = 1,
    keep: bool = False,
    console: Console | None = None,
) -> Outcome:
    """Do every run that ``output`` does not hold yet.

    Stopping it, by Ctrl-C or otherwise, loses no finished run; calling it again goes on, inside a run from its
    last training checkpoint. Failed runs are recorded, and tried again the next time.

    Args:
        comparison: what to compare.
        output: folder of ``results.jsonl`` and the logs; made if it does not exist.
        jobs: how many processes at a time; each computes with its share of the processors.
        keep: keep what each run trained in ``runs/<method>/<seed>-<hash>``.
        console: where to show progress; nowhere if None.

    Returns:
        The results.

    Raises:
        DataError: if the data cannot be used.
        DeltuneError: if ``jobs`` makes no sense, or results cannot be written.
        StateError: if another comparison is writing into the folder.
    """
    if jobs < 1:
        raise DeltuneError(f"jobs must be at least 1, not {jobs}.")
    console = console if console is not None else Console(quiet=True)
    data = prepare_data(comparison)
    plan, fingerprints = plan_runs(comparison, data)
    folder = Path(output).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    refusal = f"Another comparison is writing into {folder}. Wait for it, or choose another output folder."
    with claimed(folder, refusal):
        file = ResultsFile(folder)
        found = file.read()
        if file.repaired:
            console.print(f"The last line of {file.path} was torn; its run is done again.", style="yellow")
        engine = _Engine(comparison, plan, fingerprints, file, folder, jobs, keep)
        interrupted = engine.run(found, Board(console, engine.row_sizes(), data.task.metric))
        results = file.read()
    wanted = [run.hash for run in plan]
    ours = tuple(results[item] for item in wanted if item in results)
    return Outcome(
        comparison=comparison,
        results=ours,
        table=ComparisonTable.of(ours, data.task.metric, greater_is_better=data.task.greater_is_better),
        data=fingerprints["data"],
        repeated=sum(1 for item in wanted if found.get(item, {}).get("status") == "done"),
        others=len(results.keys() - set(wanted)),
        interrupted=interrupted,
    )


def plan_runs(comparison: Comparison, data: ComparisonData) -> tuple[list[PlannedRun], dict[str, Any]]:
    """Every run with the hash of what it depends on, and the fingerprints that went into it.

    Encodes the data once, so that unusable text is an error before anything has been computed.

    Raises:
        DataError: if the data cannot be used.
    """
    tokenizer = data.task.load_tokenizer(comparison.model)
    task = data.task.resolve(tokenizer)
    reports = {
        name: task.encode_with_report(examples, tokenizer).report
        for name, examples in (("train", data.train), ("evaluation", data.evaluation))
    }
    content = {
        "format": _FORMAT,
        "model": model_fingerprint(comparison.model),
        "data": data.fingerprints(),
        "task": task.describe(reports),
    }
    plan = []
    for run in comparison.runs:
        specification = comparison.specification(run, content)
        plan.append(PlannedRun(run.row, run.seed, specification, specification_hash(specification)))
    return plan, content


class _Engine:
    """The loop: hears the workers, keeps their results."""

    def __init__(
        self,
        comparison: Comparison,
        plan: list[PlannedRun],
        content: Mapping[str, Any],
        file: ResultsFile,
        folder: Path,
        jobs: int,
        keep: bool,
    ) -> None:
        self._comparison = comparison
        self._plan = {(run.row, run.seed): run for run in plan}
        self._content = content
        self._file = file
        self._folder = folder
        self._jobs = jobs
        self._keep = keep
        self._threads = max(1, cpu_count() // jobs)

    def row_sizes(self) -> dict[str, int]:
        """Number of runs of each row."""
        sizes: dict[str, int] = {}
        for row, _ in self._plan:
            sizes[row] = sizes.get(row, 0) + 1
        return sizes

    def run(self, found: Mapping[str, dict[str, Any]], board: Board) -> bool:
        """Do what is not among ``found``; returns whether it was interrupted."""
        missing: dict[str, dict[int, PlannedRun]] = {}
        for (row, seed), run in self._plan.items():
            result = found.get(run.hash)
            if result is not None and result["status"] == "done":
                board.found(row, result)
            else:
                missing.setdefault(row, {})[seed] = run
        workers = Workers([self._job(row, runs) for row, runs in missing.items()], self._jobs, self._folder / "logs")
        try:
            with _stop_signals(), board:
                while (heard := workers.next_event()) is not None:
                    for event in self._events(*heard, missing):
                        board.update(heard[0], event)
        except KeyboardInterrupt:
            return True
        finally:
            workers.stop()
            self._remove_empty_folders()
        return False

    def _job(self, row: str, runs: Mapping[int, PlannedRun]) -> Job:
        folders = {seed: str(self._run_folder(run)) for seed, run in runs.items()}
        return Job(self._comparison.to_dict(), row, folders, self._threads, self._keep)

    def _run_folder(self, run: PlannedRun) -> Path:
        return self._folder / "runs" / file_name(run.row) / f"{run.seed}-{run.hash[:8]}"

    def _events(
        self, row: str, event: dict[str, Any], missing: dict[str, dict[int, PlannedRun]]
    ) -> Iterator[dict[str, Any]]:
        """Record an event, and turn the end of a process into failures of the runs that it still owed."""
        kind = event["event"]
        if kind == "ended":
            for seed in list(missing[row]):
                reason = event["reason"] or "The process ended without a result."
                yield from self._events(row, {"event": "failed", "seed": seed, "error": reason}, missing)
            return
        if kind in ("done", "failed"):
            run = missing[row].pop(event["seed"])
            outcome = event["result"] if kind == "done" else {"error": event["error"], "provenance": provenance()}
            self._file.append({**self._description(run), "status": kind, **outcome})
        yield event

    def _description(self, run: PlannedRun) -> dict[str, Any]:
        """What is known of a run before it starts."""
        return {
            "format": _FORMAT,
            "hash": run.hash,
            "row": run.row,
            "kind": "baseline" if run.row in (MAJORITY, LINEAR_HEAD) else "method",
            "method": run.specification["method"],
            "seed": run.seed,
            "metric": self._content["task"]["metric"],
            "greater_is_better": self._content["task"]["greater_is_better"],
            "data": self._content["data"],
            "specification": run.specification,
            "jobs": self._jobs,
            "command": command(self._comparison, run.row, jobs=self._jobs),
        }

    def _remove_empty_folders(self) -> None:
        """Leave no empty folders behind; what a stopped run needs to go on stays."""
        runs = self._folder / "runs"
        for folder in sorted(runs.rglob("*"), reverse=True):
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()
        if runs.is_dir() and not any(runs.iterdir()):
            shutil.rmtree(runs)


@contextmanager
def _stop_signals() -> Iterator[None]:
    """Inside the block a request to terminate acts like Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
