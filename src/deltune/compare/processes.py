"""Worker processes: start them, hear their events, stop them."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from deltune.compare.worker_job import Job

__all__ = ["Workers", "file_name"]

#: What starts a worker, in front of the path of its job.
WORKER_COMMAND = (sys.executable, "-m", "deltune.compare.worker")

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class _Worker:
    """One process and the thread that reads its events."""

    def __init__(self, job: Job, folder: Path, events: queue.Queue[tuple[str, dict[str, Any]]]) -> None:
        self.row = job.row
        self.log = folder / f"{file_name(job.row)}.log"
        path = folder / f"{file_name(job.row)}.json"
        path.write_text(job.to_json(), encoding="utf-8")
        environment = {**os.environ, **dict.fromkeys(_THREAD_VARIABLES, str(job.threads))}
        environment.update(TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                [*WORKER_COMMAND, str(path)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                encoding="utf-8",
                # Ctrl-C in the terminal must reach the comparison alone, which then stops its workers in order
                start_new_session=True,
            )
        self._events = events
        self._thread = threading.Thread(target=self._read, name=f"deltune-{job.row}", daemon=True)
        self._thread.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as stream:
            for line in stream:
                try:
                    event = json.loads(line)
                except ValueError:
                    continue  # torn by the end of the process, which is reported below
                self._events.put((self.row, event))
        status = self.process.wait()
        self._events.put((self.row, {"event": "ended", "status": status, "reason": self._reason(status)}))

    def _reason(self, status: int) -> str:
        """Why the process ended, for people."""
        if status == 0:
            return ""
        if status < 0:
            name = signal.Signals(-status).name
            hint = " That is how a system out of memory stops a process." if name == "SIGKILL" else ""
            return f"The process was ended by the signal {name}.{hint}"
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else f"The process ended with status {status} and said nothing."

    def stop(self, seconds: float) -> None:
        """End the process: politely, then by force."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(seconds)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self._thread.join(seconds)


class Workers:
    """At most ``limit`` worker processes at a time.

    Args:
        jobs: what is to do, in this order.
        limit: how many processes at a time.
        folder: for the jobs' files and logs; made if it does not exist.
    """

    def __init__(self, jobs: list[Job], limit: int, folder: Path) -> None:
        self._pending = list(jobs)
        self._limit = limit
        self._folder = folder
        self._active: dict[str, _Worker] = {}
        self._events: queue.Queue[tuple[str, dict[str, Any]]] = queue.Queue()
        folder.mkdir(parents=True, exist_ok=True)

    def next_event(self) -> tuple[str, dict[str, Any]] | None:
        """The next event with its row; None once all is done.

        Besides the workers' own events there is ``ended``, with ``reason`` empty if all went well.
        """
        while self._pending and len(self._active) < self._limit:
            job = self._pending.pop(0)
            self._active[job.row] = _Worker(job, self._folder, self._events)
        if not self._active:
            return None
        while True:
            try:
                # a wait without end could not be interrupted on Windows
                row, event = self._events.get(timeout=0.5)
            except queue.Empty:
                continue
            if event["event"] == "ended":
                self._active.pop(row)
            return row, event

    def log_of(self, row: str) -> Path:
        """Where a row's worker wrote what it had to say."""
        return self._folder / f"{file_name(row)}.log"

    def stop(self, seconds: float = 10.0) -> None:
        """End all processes that run."""
        for worker in self._active.values():
            if worker.process.poll() is None:
                worker.process.terminate()
        for worker in self._active.values():
            worker.stop(seconds)
        self._active.clear()
        self._pending.clear()


def file_name(row: str) -> str:
    """A row's name as part of a path."""
    return re.sub(r"[^\w.-]+", "_", row).strip("_") or "row"
