"""Formats of folders that hold a trained delta: which there are, and which of them a folder has.

A format is a class in a module of its own, which is loaded when it is asked for::

    class Native(Format):
        name = "deltune"
        wanted = "delta.safetensors"

        def recognises(self, folder): ...
        def read(self, folder, model, anatomy, pickled): ...
        def write(self, attachment, model, anatomy, base_model, folder): ...
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import CheckpointError, suggestion
from deltune.methods.saved import absent

if TYPE_CHECKING:
    from torch import Tensor, nn

    from deltune.attachment import Attachment
    from deltune.backbone import Anatomy
    from deltune.methods import Method

__all__ = ["FORMATS", "Format", "Saved", "format_named", "other_formats", "recognised"]

#: Where the class of each format stands, by the name that ``tuned.save(format=...)`` takes.
FORMATS = {
    "deltune": "deltune.checkpoints.native:Native",
    "peft": "deltune.checkpoints.peft:PEFT",
    "adapterhub": "deltune.checkpoints.adapterhub:AdapterHub",
}


@dataclass(frozen=True)
class Saved:
    """What a folder holds, in deltune's own terms.

    Attributes:
        name: under which it was saved.
        method: the method that places forms for these tensors on this model, as it is written in deltune's own format.
        tensors: values by key, those that ``fill`` copies: of forms, of selected parameters, of the task head.
        head: the keys among them that belong to the task head.
        task: description of the task, if the folder has one.
        base_model: kind, size and a sample of the weights of its base model, if the folder has them.
        notes: what a user should know of what was not taken over, or only nearly; one sentence each.
    """

    name: str
    method: Method
    tensors: Mapping[str, Tensor]
    head: frozenset[str] = frozenset()
    task: dict[str, Any] | None = None
    base_model: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()


class Format(ABC):
    """One format.

    Attributes:
        name: what ``tuned.save(format=...)`` takes.
        wanted: the files by which it is known, in words, for the message where no format fits.
    """

    name: ClassVar[str]
    wanted: ClassVar[str]

    @abstractmethod
    def recognises(self, folder: Path) -> bool:
        """Whether ``folder`` seems to hold a delta in this format; it may be damaged. It must not raise."""

    @abstractmethod
    def read(self, folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
        """What ``folder`` holds for ``model``.

        Args:
            folder: that this format recognises.
            model: the model, with nothing live on it; it is only looked at.
            anatomy: its parts.
            pickled: whether pickled weights may be read too.

        Raises:
            CheckpointError: if it is damaged, does not fit the model, or says what deltune cannot do.
        """

    @abstractmethod
    def write(
        self, attachment: Attachment, model: nn.Module, anatomy: Anatomy, base_model: Mapping[str, Any], folder: Path
    ) -> Path:
        """Write ``attachment`` into ``folder``, which is made if it does not exist.

        Args:
            attachment: what to write.
            model: the model that it is attached to; it is only looked at.
            anatomy: its parts.
            base_model: kind, size, a sample of its weights and how they are quantised.
            folder: where; returned.

        Raises:
            CheckpointError: if the format cannot hold this method; nothing is written then.
        """


def format_named(name: str) -> Format:
    """The format of that name.

    Raises:
        CheckpointError: if there is none.
    """
    if name not in FORMATS:
        raise CheckpointError(f"There is no format {name!r}. {suggestion(name, FORMATS)}")
    module, _, attribute = FORMATS[name].partition(":")
    found: Format = getattr(importlib.import_module(module), attribute)()
    return found


def other_formats(path: str | Path, name: str) -> list[str]:
    """The names of the formats other than ``name`` in which the folder ``path`` holds a delta."""
    return [other for other in FORMATS if other != name and format_named(other).recognises(Path(path))]


def recognised(path: str | Path, name: str | None = None) -> Format:
    """The format of the folder ``path``.

    Args:
        path: the folder.
        name: of its format, where that is known.

    Raises:
        CheckpointError: if it holds no delta in a format that is known, or deltas in several.
    """
    folder = Path(path)
    formats = [format_named(other) for other in FORMATS] if name is None else [format_named(name)]
    found = [format for format in formats if format.recognises(folder)]
    if not found:
        wanted = "; ".join(f"{format.wanted} ({format.name})" for format in formats)
        raise CheckpointError(absent(folder, lambda below: any(format.recognises(below) for format in formats), wanted))
    if len(found) > 1:
        names = [format.name for format in found]
        raise CheckpointError(
            f"{folder} holds deltas in several formats: {', '.join(names)}. Say which: format={names[0]!r}."
        )
    return found[0]
