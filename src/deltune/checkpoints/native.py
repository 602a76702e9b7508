"""deltune's own format: a folder with ``delta.safetensors`` and ``deltune.json``.

The safetensors file alone is complete: its header holds the description (method, base model, task) that the
JSON file repeats for people. So a save replaces one file, and a reader never sees half of one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import deltune
from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.checkpoints.files import write_json, write_tensors
from deltune.checkpoints.formats import Format, Saved
from deltune.errors import CheckpointError
from deltune.methods import parse
from deltune.methods.saved import FORMAT, TENSOR_FILE, read, read_description

__all__ = [
    "DESCRIPTION_FILE",
    "TENSOR_FILE",
    "Native",
    "fill",
    "read",
    "read_description",
    "stored_tensors",
    "without_head",
    "write",
]

DESCRIPTION_FILE = "deltune.json"


class Native(Format):
    """deltune's own format."""

    name = "deltune"
    wanted = TENSOR_FILE

    def recognises(self, folder: Path) -> bool:
        """By the file with the tensors, which is complete alone."""
        return (folder / TENSOR_FILE).is_file()

    def read(self, folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
        """The description and the tensors as they stand in the file; the model is not needed."""
        description, tensors = read(folder)
        return Saved(
            name=str(description["name"]),
            method=parse(description["method"]),
            tensors=tensors,
            head=frozenset(description["head"]),
            task=description.get("task"),
            base_model=description["base_model"],
        )

    def write(
        self, attachment: Attachment, model: nn.Module, anatomy: Anatomy, base_model: Mapping[str, Any], folder: Path
    ) -> Path:
        """As :func:`write`."""
        return write(attachment, base_model, folder)


def write(attachment: Attachment, base_model: Mapping[str, Any], path: str | Path) -> Path:
    """Write what ``attachment`` trained into the folder ``path``, with a description of its base model.

    Raises:
        CheckpointError: if it cannot be written; what stood there before is untouched then.
    """
    folder = Path(path)
    description = _description(attachment, base_model)
    tensors = stored_tensors(attachment)
    # one entry alone: safetensors writes several in random order, and equal deltas shall be equal files
    header = {"deltune": json.dumps(description, sort_keys=True)}
    write_tensors(folder / TENSOR_FILE, tensors, header)
    shapes = {key: [str(value.dtype).removeprefix("torch."), *value.shape] for key, value in tensors.items()}
    write_json(folder / DESCRIPTION_FILE, {**description, "tensors": shapes})
    return folder


def _description(attachment: Attachment, base_model: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "name": attachment.name,
        "method": attachment.method.stored(attachment.forms).to_dict(),
        "base_model": dict(base_model),
        "head": list(attachment.head_names),
        "task": attachment.task,
        "versions": {"deltune": deltune.__version__, "torch": str(torch.__version__)},
    }


def stored_tensors(attachment: Attachment) -> dict[str, Tensor]:
    """What is written of an attachment, by key: its forms as they are stored, and its selected parameters."""
    tensors: dict[str, Tensor] = {}
    for key, placed in attachment.placed.items():
        form = placed.form.stored()
        if form is not None:
            tensors.update({f"{key}.{name}": value for name, value in form.named_parameters()})
            tensors.update({f"{key}.{name}": form.get_buffer(name) for name in form.saved_buffers})
    tensors.update(dict(attachment.written()))
    return tensors


def without_head(attachment: Attachment, tensors: Mapping[str, Tensor], head: Set[str]) -> dict[str, Tensor]:
    """``tensors`` without those of a task head.

    A method that selects the head by itself (``full``) has the model's own values there.

    Args:
        attachment: that they are for.
        tensors: by key.
        head: keys of the tensors of the head.
    """
    kept = {key: value for key, value in tensors.items() if key not in head}
    return {**{key: value.detach().clone() for key, value in attachment.written() if key in head}, **kept}


def fill(
    attachment: Attachment, tensors: Mapping[str, Tensor], head: Set[str], strict: bool, folder: str | Path
) -> None:
    """Copy tensors into the attachment's parameters, and into what its forms keep frozen.

    Args:
        attachment: freshly built by the method that the tensors were trained with.
        tensors: by key, as :class:`Saved` has them.
        head: keys of the tensors that belong to the task head.
        strict: if False, a head may be missing on either side.
        folder: where they were read, for messages.

    Raises:
        CheckpointError: naming every missing, unexpected and misshapen tensor; nothing is copied then.
    """
    parameters: dict[str, Tensor] = {**dict(attachment.form_parameters()), **dict(attachment.written())}
    for key, form in attachment.forms.items():
        parameters.update({f"{key}.{name}": form.get_buffer(name) for name in form.saved_buffers})
    missing = [key for key in parameters if key not in tensors]
    unexpected = [key for key in tensors if key not in parameters]
    misshapen = [
        f"{key} is {tuple(tensors[key].shape)} in the file and {tuple(parameter.shape)} in the model"
        for key, parameter in parameters.items()
        if key in tensors and tensors[key].shape != parameter.shape
    ]
    if not strict:
        unexpected = [key for key in unexpected if key not in head]
        missing = [key for key in missing if key not in attachment.head_names]
    problems = [
        f"{label}: {'; '.join(items[:8])}" + (f"; and {len(items) - 8} more" if len(items) > 8 else "")
        for label, items in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if items
    ]
    if problems:
        hint = (
            " The model has no head like the one that was trained: load it with the right class, or pass strict=False."
            if head & {*unexpected, *(item.split(" ")[0] for item in misshapen)}
            else ""
        )
        raise CheckpointError(f"{folder} does not fit this model. " + ". ".join(problems) + "." + hint)
    with torch.no_grad():
        for key, parameter in parameters.items():
            if key in tensors:
                parameter.copy_(tensors[key])
    for form in attachment.forms.values():
        form.restored()
