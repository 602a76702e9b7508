"""Configurations and weights of other libraries' folders: safetensors, and pickles where they are allowed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from deltune.errors import CheckpointError

__all__ = ["read_config", "read_weights"]


def read_config(file: Path) -> dict[str, Any]:
    """The JSON object in ``file``.

    Raises:
        CheckpointError: if it is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(f"There is no {file.name} in {file.parent}, which says what its weights mean.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{file} is damaged or cut short ({error}). Copy it again; nothing was loaded."
        ) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object, but {type(content).__name__}. Copy it again.")
    return content


def _finite(text: str) -> float:
    """The number.

    Raises:
        ValueError: if it is none, or without bounds.
    """
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def read_weights(folder: Path, safetensors: str, pickle: str, pickled: bool) -> dict[str, Tensor]:
    """The tensors of a folder by key, on the CPU.

    Args:
        folder: where they are.
        safetensors: name of the file that is read where it exists.
        pickle: name of the pickled file that is read else.
        pickled: whether it may be. It is read with ``weights_only``, so that it cannot run code.

    Raises:
        CheckpointError: if there is no such file, it is damaged, or it is a pickle and these are not to be read.
    """
    file, other = folder / safetensors, folder / pickle
    if file.is_file():
        try:
            tensors: dict[str, Tensor] = load_file(str(file))
            return tensors
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is damaged or cut short ({error}). Save or copy it again; nothing was loaded."
            ) from error
    if not other.is_file():
        raise CheckpointError(f"{folder} has no weights: neither {safetensors} nor {pickle} is in it.")
    if not pickled:
        raise CheckpointError(
            f"{other} is a pickle, and these are not read by default, since a pickle can run code. Save the delta as "
            f"{safetensors}; or, if you trust where it comes from, pass pickled=True: it is then read with torch's "
            "weights_only."
        )
    try:
        content = torch.load(str(other), map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{other} cannot be read with weights_only: it is damaged, or holds more than tensors ({reason}). Nothing "
            "was loaded."
        ) from error
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{other} holds no tensors by name. Save the delta again; nothing was loaded.")
    return {str(key): value for key, value in content.items()}
