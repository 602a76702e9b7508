"""Training checkpoints: folders that are whole or absent, each with all that it takes to go on exactly.

A checkpoint holds the trained tensors (never the base model), the states of optimizer, schedule and random
numbers, and where in the data training is. It is written under a temporary name, flushed to the disk and then
renamed, so that a process may be killed at any moment.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from deltune.errors import CheckpointError

__all__ = [
    "TRAINER_STATE_FILE",
    "Snapshot",
    "newest_snapshot",
    "prune_snapshots",
    "remove_unfinished",
    "write_snapshot",
]

logger = logging.getLogger(__name__)

#: Name that transformers looks for.
TRAINER_STATE_FILE = "trainer_state.json"
_WEIGHTS_FILE = "weights.safetensors"
_BEST_FILE = "best.safetensors"
_STATE_FILE = "state.pt"
_NAME = re.compile(r"checkpoint-(\d+)")
_LITTLE = 2**16


@dataclass(frozen=True)
class Snapshot:
    """What a training checkpoint holds.

    Attributes:
        weights: the trained tensors, as :func:`deltune.training.weights.capture` gives them.
        best: those that were best in evaluation so far, if any were kept.
        state: optimizer, schedule, random numbers and what else the trainer needs; plain values and tensors.
    """

    weights: dict[str, Tensor]
    best: dict[str, Tensor] | None
    state: dict[str, Any]

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """Read a checkpoint.

        Raises:
            CheckpointError: if it is damaged.
        """
        try:
            state = torch.load(folder / _STATE_FILE, map_location="cpu", weights_only=True)
            json.loads((folder / TRAINER_STATE_FILE).read_text(encoding="utf-8"))
            best = load_file(folder / _BEST_FILE) if state["has_best"] else None
            return cls(load_file(folder / _WEIGHTS_FILE), best, state["trainer"])
        except (OSError, RuntimeError, ValueError, SafetensorError, KeyError, EOFError, UnpicklingError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"The training checkpoint {folder} is damaged ({reason}). Delete it to go on from "
                "an older one, or start anew with --restart (in Python: resume=False)."
            ) from error


def write_snapshot(folder: Path, snapshot: Snapshot, save_trainer_state: Callable[[str], None]) -> None:
    """Write a checkpoint as a whole; one that stood there before is replaced.

    Args:
        folder: where; its name must be ``checkpoint-`` and the step.
        snapshot: its content.
        save_trainer_state: writes the state of the transformers trainer to the path that it is given.

    Raises:
        CheckpointError: if the disk is full or the place cannot be written to; nothing is left behind then.
    """
    temporary: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.", suffix=".part"))
        save_file(snapshot.weights, temporary / _WEIGHTS_FILE)
        if snapshot.best is not None:
            save_file(snapshot.best, temporary / _BEST_FILE)
        state = {"trainer": snapshot.state, "has_best": snapshot.best is not None}
        torch.save(state, temporary / _STATE_FILE)
        save_trainer_state(str(temporary / TRAINER_STATE_FILE))
        for file in temporary.iterdir():
            _flush(file)
        _flush(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        _flush(folder.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        # PyTorch and safetensors hide the error number; the space that is left tells
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error) or _is_full(folder.parent)
        raise CheckpointError(
            f"Could not write the training checkpoint {folder}: {'the disk is full' if full else error}. Older "
            "checkpoints are untouched. Free some space, and run the same command again to go on; or choose another "
            "folder."
        ) from error
    finally:
        if temporary is not None and temporary.exists():
            shutil.rmtree(temporary)


def newest_snapshot(parent: Path) -> tuple[Path, Snapshot] | None:
    """The newest checkpoint in ``parent`` that can be read, None if there is none at all.

    Raises:
        CheckpointError: if there are some, all of them damaged.
    """
    failure: CheckpointError | None = None
    for folder in _folders(parent):
        try:
            return folder, Snapshot.read(folder)
        except CheckpointError as error:  # noqa: PERF203
            failure = failure or error
            logger.warning("%s Going on from an older one.", error)
    if failure is not None:
        raise failure
    return None


def prune_snapshots(parent: Path, keep: int, spare: str | None = None) -> None:
    """Delete all but the newest ``keep`` checkpoints, and the one at ``spare``."""
    for folder in _folders(parent)[keep:]:
        if spare is None or folder != Path(spare):
            shutil.rmtree(folder)


def remove_unfinished(parent: Path, name: str = "*") -> None:
    """Delete what a killed process left half written in ``parent``, of the file or folder ``name`` or of all."""
    for item in parent.glob(f".{name}.*.part"):
        if item.is_dir():
            shutil.rmtree(item)
        else:
            item.unlink()


def _folders(parent: Path) -> list[Path]:
    """The checkpoints in ``parent``, newest first."""
    if not parent.is_dir():
        return []
    steps = {item: int(match[1]) for item in parent.iterdir() if (match := _NAME.fullmatch(item.name))}
    return sorted(steps, key=steps.__getitem__, reverse=True)


def _flush(path: Path) -> None:
    """Have the system write a file or a folder to the disk."""
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free < _LITTLE
