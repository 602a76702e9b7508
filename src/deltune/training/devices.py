"""Where to compute."""

from __future__ import annotations

import torch

from deltune.errors import TrainingError, suggestion

__all__ = ["usable_device"]

_KINDS = ("cuda", "mps", "cpu")


def usable_device(wanted: str | None = None) -> str:
    """The wanted kind of device, or the best that is present if none is wanted.

    Raises:
        TrainingError: if there is no such device here.
    """
    present = [kind for kind in _KINDS if _is_present(kind)]
    if wanted is None:
        return present[0]
    if wanted not in present:
        raise TrainingError(f"There is no device {wanted!r} here. {suggestion(wanted, present)}")
    return wanted


def _is_present(kind: str) -> bool:
    if kind == "cuda":
        return torch.cuda.is_available()
    return kind == "cpu" or torch.backends.mps.is_available()
