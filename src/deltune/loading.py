"""Attach what a folder holds."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deltune.backbone import check_base_model
from deltune.checkpoints import Format, Saved, fill, recognised, without_head
from deltune.errors import CheckpointError, MethodError, TargetError
from deltune.quantization import NF4
from deltune.tuned import HANDLE, Tuned

__all__ = ["load"]


def load(
    model: nn.Module | Tuned,
    path: str | Path,
    name: str | None = None,
    *,
    strict: bool = True,
    head: bool = True,
    format: str | None = None,
    pickled: bool = False,
) -> Tuned:
    """Attach what a folder holds to ``model`` and make it live.

    Args:
        model: the model that it was trained on, bare or with methods attached; or its handle.
        path: the folder that :meth:`Tuned.save` wrote, or another library.
        name: under which name to attach; by default the one it was saved under.
        strict: refuse another base model, one that is quantised otherwise, and missing or unexpected tensors. If
            False, a head that the model does not have is left out, and a differing base model is accepted; misshapen
            tensors never are. Where only one of the models, that of the training or the present one, is quantised, a
            warning says so. Folders of other libraries hold no sample of the base model to know it by.
        head: whether to attach the task head that it was trained with. If False the model keeps its own, which may be
            of another size.
        format: the folder's format, one of ``deltune.checkpoints.FORMATS``; found out if None.
        pickled: read weights that are pickled too (``.bin``), with torch's ``weights_only``. By default safetensors
            alone are read.

    Raises:
        CheckpointError: if the folder holds no delta, a damaged one, or one that does not fit; every missing,
            unexpected and misshapen tensor is named.
    """
    tuned = model if isinstance(model, Tuned) else vars(model).get(HANDLE) or Tuned(model)
    reader = recognised(path, format)
    saved = _read(reader, Path(path), tuned, pickled)
    if strict and saved.base_model is not None:
        check_base_model(saved.base_model, tuned.base_model)
        _check_quantization(saved.base_model.get("quantization"), tuned.base_model["quantization"], path)
    wanted, tensors = name or saved.name, saved.tensors
    with_head = head and bool(saved.head) and bool(tuned.anatomy.head)
    # initial values are drawn and overwritten at once: leave the caller's random numbers alone
    with torch.random.fork_rng(devices=[]):
        tuned.attach(saved.method, wanted, train_head=with_head)
    attachment = tuned.attachments[wanted]
    if not head:
        tensors = without_head(attachment, tensors, saved.head)
    try:
        fill(attachment, tensors, saved.head, strict, path)
    except Exception:
        tuned.detach(wanted)
        raise
    attachment.task = saved.task
    for note in saved.notes:
        warnings.warn(f"{path}: {note}", UserWarning, stacklevel=2)
    return tuned


#: What reading raises of a configuration in which something of another type stands than its library writes.
_NONSENSE = (
    *(TypeError, KeyError, IndexError, ValueError, AttributeError, AssertionError, ArithmeticError, RecursionError),
    *(re.error, MethodError, TargetError),
)


def _read(reader: Format, folder: Path, tuned: Tuned, pickled: bool) -> Saved:
    """What ``folder`` holds.

    Raises:
        CheckpointError: if it cannot be read, whatever is wrong in it.
    """
    try:
        with tuned.disabled():
            return reader.read(folder, tuned.model, tuned.anatomy, pickled)
    except CheckpointError as error:
        if str(folder) in str(error):
            raise
        raise CheckpointError(f"{folder}: {error}") from error
    except _NONSENSE as error:
        said = str(error) if isinstance(error, MethodError | TargetError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder} is recognised as {reader.name}, but what stands in it cannot be understood ({said}). Compare "
            "its configuration with one that the library writes, or save it again. Nothing was loaded."
        ) from error


def _check_quantization(saved: Mapping[str, Any] | None, present: Mapping[str, Any] | None, path: str | Path) -> None:
    """Warn where the delta was trained beside other numbers; refuse another way of quantising.

    Raises:
        CheckpointError: if both are quantised, but not alike.
    """
    if saved is None and present is None:
        return
    if saved is not None and present is not None:
        one, other = NF4.from_dict(saved), NF4.from_dict(present)
        if not one.same_levels(other):
            raise CheckpointError(
                f"The delta in {path} was trained beside a model in {_words(one)}, but this one is in {_words(other)}. "
                f"Quantise the model anew with deltune.quantize(model, NF4(block={one.block}, "
                f"double_quantization={one.double_quantization})); to use it all the same, pass strict=False."
            )
        return
    if saved is not None:
        one = NF4.from_dict(saved)
        text = (
            f"was trained beside a model in {_words(one)}, and this one holds floating-point numbers: results differ a "
            "little, unless it was dequantised. For those of the training call deltune.quantize(model, "
            f"NF4(block={one.block}, double_quantization={one.double_quantization})) first"
        )
    else:
        text = "was trained beside a model that was not quantised, and this one is: results differ a little"
    warnings.warn(f"The delta in {path} {text}.", UserWarning, stacklevel=3)


def _words(format: NF4) -> str:
    scales = "double quantisation" if format.double_quantization else "plain scales"
    return f"4 bits (blocks of {format.block}, {scales})"
