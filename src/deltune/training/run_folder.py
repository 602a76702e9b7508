"""The folder of a run: what the run is, its training checkpoints, its result."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltune.checkpoints import DESCRIPTION_FILE, TENSOR_FILE, read, write_json, write_tensors
from deltune.errors import CheckpointError, StateError
from deltune.training.result import FitResult
from deltune.training.snapshot import remove_unfinished
from deltune.training.weights import capture
from deltune.tuned import Tuned

__all__ = ["RunFolder"]

logger = logging.getLogger(__name__)

#: What runs of earlier versions do not say of themselves.
_LATER = {"dropouts"}
_RUN_FILE = "run.json"
_RESULT_FILE = "result.json"
_RAW_FILE = "trained.safetensors"


class RunFolder:
    """One run on the disk.

    Args:
        path: the folder; made if it does not exist.
        identity: what makes the run the same: method, settings, task, data, base model. Plain values.
        versions: of the libraries; a difference is told, not refused.
        resume: whether to go on with the run that is there. If False it is deleted.

    Raises:
        StateError: if the folder holds another run, or a delta that is from no run.
        CheckpointError: if it cannot be written.
    """

    def __init__(
        self, path: str | Path, identity: Mapping[str, Any], versions: Mapping[str, str], *, resume: bool
    ) -> None:
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise StateError(f"{self.path} is a file, not a folder. Choose another output folder.")
        remove_unfinished(self.path)
        remove_unfinished(self.checkpoints)
        if not resume:
            self._clear()
        elif (self.path / _RUN_FILE).is_file():
            self._compare(identity, versions)
            return
        elif (self.path / TENSOR_FILE).exists():
            raise StateError(
                f"{self.path} holds a delta that this run did not write. Choose another output folder, or replace it "
                "with --restart (in Python: resume=False)."
            )
        write_json(self.path / _RUN_FILE, {"run": dict(identity), "versions": dict(versions)})

    @property
    def checkpoints(self) -> Path:
        """Where the training checkpoints are."""
        return self.path / "checkpoints"

    def finished(self, name: str) -> tuple[FitResult, dict[str, Tensor]] | None:
        """The result and the trained tensors of the run, if it has ended; ``name`` is the attachment's.

        Raises:
            CheckpointError: if they are damaged.
        """
        file = self.path / _RESULT_FILE
        if not file.is_file():
            return None
        try:
            result = FitResult.from_dict(json.loads(file.read_text(encoding="utf-8")))
            raw = self.path / _RAW_FILE
            tensors = load_file(raw) if raw.is_file() else _prefixed(name, read(self.path)[1])
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise CheckpointError(
                f"The run in {self.path} has ended, but its result is damaged ({error}). Start anew with --restart (in "
                "Python: resume=False)."
            ) from error
        self._tidy()
        return result, tensors

    def finish(self, tuned: Tuned, result: FitResult) -> None:
        """Write the delta and the result; training checkpoints are no longer needed then.

        The trained tensors are written besides only where the delta holds them in another form.

        Raises:
            CheckpointError: if they cannot be written.
        """
        tuned.save(self.path, tuned.trained[0])
        trained = capture(tuned)
        (self.path / _RAW_FILE).unlink(missing_ok=True)
        if not _equal(trained, _prefixed(tuned.trained[0], read(self.path)[1])):
            write_tensors(self.path / _RAW_FILE, trained, {"format": "pt"})
        write_json(self.path / _RESULT_FILE, result.to_dict())
        self._tidy()

    def _tidy(self) -> None:
        if self.checkpoints.is_dir():
            shutil.rmtree(self.checkpoints)

    def _clear(self) -> None:
        # the result first: a run that was partly deleted must not seem to have ended
        for name in (_RESULT_FILE, _RAW_FILE, TENSOR_FILE, DESCRIPTION_FILE):
            (self.path / name).unlink(missing_ok=True)
        self._tidy()
        (self.path / _RUN_FILE).unlink(missing_ok=True)

    def _compare(self, identity: Mapping[str, Any], versions: Mapping[str, str]) -> None:
        file = self.path / _RUN_FILE
        try:
            saved = json.loads(file.read_text(encoding="utf-8"))
            run, then = saved["run"], saved["versions"]
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{file} is damaged ({error}). Start anew with --restart (in Python: resume=False)."
            ) from error
        now = json.loads(json.dumps(identity))
        for key in _LATER - run.keys():
            now.pop(key, None)
        changes = list(_differences(run, now))
        if changes:
            raise StateError(
                f"{self.path} holds another run: {'; '.join(changes[:8])}"
                f"{f'; and {len(changes) - 8} more' if len(changes) > 8 else ''}. Choose another output folder, go "
                "back to the values of that run, or delete it and start anew with --restart (in Python: resume=False)."
            )
        for name, version in versions.items():
            if then.get(name) != version:
                logger.warning(
                    "This run was begun with %s %s and goes on with %s: its last bits may differ from those of a run "
                    "that was never stopped.",
                    name,
                    then.get(name),
                    version,
                )


def _prefixed(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a saved delta under the names that training uses."""
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def _differences(then: Any, now: Any, name: str = "") -> Iterator[str]:
    """In what two sets of plain values differ, in words."""
    if isinstance(then, dict) and isinstance(now, dict):
        for key in sorted(then.keys() | now.keys()):
            yield from _differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
    elif then != now:
        short = all(isinstance(value, str | int | float | bool | None) for value in (then, now))
        yield f"{name} was {_short(then)} and is {_short(now)} now" if short else f"{name} differs"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:24]}…"
