"""What a folder with a trained delta holds: its description and its tensors.

Reading stands here, and not with writing, because there are methods that start from trained deltas.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from deltune.errors import CheckpointError, nearest

__all__ = ["FORMAT", "TENSOR_FILE", "absent", "read", "read_description"]

#: The file that is complete alone: its header holds the description.
TENSOR_FILE = "delta.safetensors"
#: Version of the format that is written, and the latest that can be read.
FORMAT = 1


def read_description(path: str | Path) -> dict[str, Any]:
    """What a folder says of its delta: method, base model, task, versions.

    Raises:
        CheckpointError: if it holds no delta or a damaged one.
    """
    return read(path, tensors=False)[0]


def read(path: str | Path, tensors: bool = True) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description in the folder ``path``, and its tensors by key.

    Raises:
        CheckpointError: if it holds no delta or a damaged one.
    """
    folder = Path(path)
    file = folder / TENSOR_FILE
    if not file.is_file():
        raise CheckpointError(absent(folder, lambda below: (below / TENSOR_FILE).is_file(), TENSOR_FILE))
    try:
        with safe_open(str(file), framework="pt") as stream:
            metadata = stream.metadata() or {}
            values = {key: stream.get_tensor(key) for key in stream.keys()} if tensors else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged or cut short ({error}). Save or copy it again; nothing was loaded."
        ) from error
    if "deltune" not in metadata:
        raise CheckpointError(f"{file} was not written by deltune: its header has no description.")
    description: dict[str, Any] = json.loads(metadata["deltune"])
    if description["format"] > FORMAT:
        raise CheckpointError(
            f"{file} has format {description['format']}; this deltune reads up to {FORMAT}. Upgrade deltune."
        )
    return description, values


def absent(folder: Path, holds: Callable[[Path], bool], wanted: str) -> str:
    """Why there is no delta in ``folder``, and where one may be meant.

    Args:
        folder: what was given.
        holds: whether a folder holds a delta.
        wanted: the files that were looked for.
    """
    if not folder.exists():
        around = [item.name for item in folder.parent.iterdir()] if folder.parent.is_dir() else []
        close = nearest(folder.name, around)
        return f"{folder} does not exist." + (f" Did you mean {' or '.join(close)}?" if close else "")
    below = sorted(str(found) for found in folder.iterdir() if holds(found)) if folder.is_dir() else []
    if below:
        return f"{folder} holds no delta itself, but these folders do: {', '.join(below[:5])}."
    return f"{folder} holds no delta: there is no {wanted} in it. Give the folder that save() wrote."
