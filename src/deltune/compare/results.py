"""The file ``results.jsonl``: one finished run a line, only ever appended to."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from deltune.errors import DeltuneError

__all__ = ["RESULTS_FILE", "ResultsFile"]

RESULTS_FILE = "results.jsonl"


class ResultsFile:
    """Reads and appends results; the latest line of a run counts.

    Args:
        folder: the comparison's output folder, which must exist.

    Attributes:
        path: the file.
        repaired: bytes of a torn last line, left by a kill, that were removed when opening.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / RESULTS_FILE
        self.repaired = self._repair()

    def read(self) -> dict[str, dict[str, Any]]:
        """Every run's latest result by the hash of its specification, in the order of the file.

        Raises:
            DeltuneError: if a line is no result.
        """
        if not self.path.exists():
            return {}
        found: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                result = json.loads(line)
                found[result["hash"]] = result
            except (ValueError, KeyError, TypeError) as error:
                raise DeltuneError(
                    f"Line {number} of {self.path} is no result of a comparison. Remove that line, or choose "
                    "another output folder."
                ) from error
        return found

    def append(self, result: Mapping[str, Any]) -> None:
        """Add one result; it stands in the file whole, or not at all.

        Raises:
            DeltuneError: if it cannot be written.
        """
        line = (json.dumps(result, sort_keys=True, ensure_ascii=False, allow_nan=True) + "\n").encode()
        try:
            descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                before = os.fstat(descriptor).st_size
                try:
                    if os.write(descriptor, line) < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(descriptor)
                except OSError:
                    os.ftruncate(descriptor, before)
                    raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise DeltuneError(
                f"Could not write {self.path}: {error.strerror}. All earlier results are still there. "
                "Free some space and run the same command again; it goes on where it stopped."
            ) from error

    def _repair(self) -> int:
        """Cut off a last line that has no end; a run that was being written is done again."""
        if not self.path.exists():
            return 0
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with self.path.open("rb+") as stream:
                stream.truncate(whole)
        return len(content) - whole


def of_hashes(results: Mapping[str, dict[str, Any]], hashes: Iterable[str]) -> list[dict[str, Any]]:
    """The results of these runs that are there, in the order asked for."""
    return [results[item] for item in hashes if item in results]
