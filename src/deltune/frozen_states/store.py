"""Hidden states in a folder, found again by what they were made of.

Letters: N rows, S kept states of a row, T its real positions, d hidden size.

Two files: ``states.bin`` holds rows of (S, T, d) one after the other, ``index.txt`` one line for each: key, where it
begins, how many positions, checksum. A row is written before its line, so that what a killed run leaves behind is
whole rows; what stands behind the last line is written over.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltune.checkpoints.files import claimed, write_json
from deltune.errors import CheckpointError, StateError

__all__ = ["StateStore"]

logger = logging.getLogger("deltune")

_HEADER = "store.json"
_INDEX = "index.txt"
_STATES = "states.bin"
_FORMAT = 1


@dataclass(frozen=True)
class _Row:
    """Where a row is: bytes from ``start``, ``positions`` of its T positions, and their checksum."""

    start: int
    positions: int
    checksum: int


class StateStore:
    """Rows of (S, T, d) by key, in a folder that one process uses at a time.

    Args:
        folder: made if it does not exist.
        origin: what the states depend on besides their key, as plain values; a folder of another origin is refused.
        dtype: type of the kept numbers.
        states: S.
        hidden_size: d.

    Raises:
        CheckpointError: if the folder holds states of another origin, or cannot be read.
        StateError: if another process uses the folder, or ``dtype`` is no floating-point type.
    """

    def __init__(
        self, folder: str | Path, origin: Mapping[str, Any], dtype: torch.dtype, states: int, hidden_size: int
    ) -> None:
        if not dtype.is_floating_point:
            raise StateError(f"States cannot be kept as {dtype}. Choose float32, float16 or bfloat16.")
        self.folder = Path(folder).expanduser()
        self.dtype = dtype
        self.states = states
        self.hidden_size = hidden_size
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{self.folder} cannot be a folder of states: {error.strerror}.") from error
        shape = {"format": _FORMAT, "dtype": str(dtype).removeprefix("torch."), "states": states}
        self._header = {**shape, "hidden_size": hidden_size, **origin}
        self._guard = threading.Lock()
        self._warned = False
        with ExitStack() as opened:
            refusal = f"Another training uses the states in {self.folder}. Wait for it, or give another folder."
            opened.enter_context(claimed(self.folder, refusal))
            self._check_header()
            self._rows, self._end = self._read_index()
            (self.folder / _STATES).touch()
            self._file = opened.enter_context((self.folder / _STATES).open("r+b", buffering=0))
            self._index = opened.enter_context((self.folder / _INDEX).open("ab", buffering=0))
            self._opened = opened.pop_all()

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    @property
    def bytes(self) -> int:
        """Size of the kept states."""
        return self._end

    def get(self, key: str) -> Tensor | None:
        """The row of that key, (S, T, d); None if there is none, or it is damaged."""
        row = self._rows.get(key)
        if row is None:
            return None
        content = bytearray(self._size(row.positions))
        with self._guard:
            self._file.seek(row.start)
            count = self._file.readinto(content)
        if count != len(content) or zlib.crc32(content) != row.checksum:
            self._rows.pop(key, None)
            return None
        flat = torch.frombuffer(content, dtype=self.dtype) if content else torch.empty(0, dtype=self.dtype)
        return flat.view(self.states, row.positions, self.hidden_size)

    def put(self, rows: Mapping[str, Tensor]) -> None:
        """Keep rows (S, T, d); a key that is known already keeps what it has.

        Rows with numbers that are not finite in the store's type are not kept.

        Raises:
            CheckpointError: if the disk is full; what was kept before stays.
        """
        with self._guard:
            self._put({key: states for key, states in rows.items() if key not in self._rows})

    def _put(self, rows: Mapping[str, Tensor]) -> None:
        pieces, end = [], self._end
        found: dict[str, _Row] = {}
        for key, states in rows.items():
            narrowed = states.detach().to("cpu", self.dtype).contiguous()
            if not narrowed.isfinite().all():
                self._warn_not_finite()
                continue
            content = narrowed.view(torch.uint8).numpy().tobytes()
            found[key] = _Row(end, states.shape[1], zlib.crc32(content))
            pieces.append(content)
            end += len(content)
        try:
            self._file.seek(self._end)
            left = memoryview(b"".join(pieces))
            while left:
                left = left[self._file.write(left) :]
            lines = (f"{key} {row.start} {row.positions} {row.checksum}\n" for key, row in found.items())
            self._index.write("".join(lines).encode("ascii"))
        except OSError as error:
            raise CheckpointError(
                f"The states of the frozen layers could not be kept in {self.folder}: {error.strerror}. They took "
                f"{self._end / 1e6:,.0f} MB so far. Give a folder on a larger disk, or train without keeping them."
            ) from error
        self._rows.update(found)
        self._end = end

    def _warn_not_finite(self) -> None:
        if not self._warned:
            logger.warning(
                "States with numbers too large for %s, or not finite, are not kept in %s: the frozen layers go on "
                "running for these texts.",
                str(self.dtype).removeprefix("torch."),
                self.folder,
            )
        self._warned = True

    def close(self) -> None:
        """Let other processes have the folder."""
        self._opened.close()

    def _size(self, positions: int) -> int:
        return self.states * positions * self.hidden_size * self.dtype.itemsize

    def _check_header(self) -> None:
        file = self.folder / _HEADER
        if not file.exists():
            if (self.folder / _INDEX).exists() or (self.folder / _STATES).exists():
                raise CheckpointError(f"{self.folder} has no {_HEADER}, so it is not known what it holds. Delete it.")
            write_json(file, self._header)
            return
        try:
            found = dict(json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged. Delete the folder; its states are made anew.") from error
        differing = [key for key in {**found, **self._header} if found.get(key) != self._header.get(key)]
        if differing:
            raise CheckpointError(
                f"{self.folder} keeps states of another model, or of other layers of it: "
                + "; ".join(f"{key} is {found.get(key)!r} there, {self._header.get(key)!r} here" for key in differing)
                + ". Give another folder, or delete this one."
            )

    def _read_index(self) -> tuple[dict[str, _Row], int]:
        """The rows whose line is whole, and where the next one goes; lines that are not whole are cut off."""
        file = self.folder / _INDEX
        rows: dict[str, _Row] = {}
        end = whole = 0
        if not file.exists():
            return rows, end
        for line in file.read_bytes().splitlines(keepends=True):
            parts = line.split()
            if not line.endswith(b"\n") or len(parts) != 4:
                break
            try:
                row = _Row(*(int(part) for part in parts[1:]))
            except ValueError:
                break
            if row.start < 0 or row.positions < 0:
                break
            rows[parts[0].decode("ascii", "replace")] = row
            end = max(end, row.start + self._size(row.positions))
            whole += len(line)
        os.truncate(file, whole)
        return rows, end
