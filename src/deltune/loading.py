"""Attach what a folder holds."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from deltune.backbone import check_base_model
from deltune.checkpoints import fill, read
from deltune.methods import parse
from deltune.tuned import HANDLE, Tuned

__all__ = ["load"]


def load(model: nn.Module | Tuned, path: str | Path, name: str | None = None, *, strict: bool = True) -> Tuned:
    """Attach what a folder holds to ``model`` and make it live.

    Args:
        model: the model that it was trained on, bare or with methods attached; or its handle.
        path: the folder that :meth:`Tuned.save` wrote.
        name: under which name to attach; by default the one it was saved under.
        strict: refuse another base model, and missing or unexpected tensors. If False, a head that the model
            does not have is left out, and a differing base model is accepted; misshapen tensors never are.

    Raises:
        CheckpointError: if the folder holds no delta, a damaged one, or one that does not fit; every missing,
            unexpected and misshapen tensor is named.
    """
    description, tensors = read(path)
    tuned = model if isinstance(model, Tuned) else vars(model).get(HANDLE) or Tuned(model)
    if strict:
        check_base_model(description["base_model"], tuned.base_model)
    wanted = name or str(description["name"])
    head = set(description["head"])
    # initial values are drawn and overwritten at once: leave the caller's random numbers alone
    with torch.random.fork_rng(devices=[]):
        tuned.attach(parse(description["method"]), wanted, train_head=bool(head) and bool(tuned.anatomy.head))
    attachment = tuned.attachments[wanted]
    try:
        fill(attachment, tensors, head, strict, path)
    except Exception:
        tuned.detach(wanted)
        raise
    attachment.task = description.get("task")
    return tuned
