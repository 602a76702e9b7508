"""Model outputs as numpy arrays."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deltune.errors import DataError, TrainingError


def first_output(outputs: Any) -> Any:
    """The logits among a model's outputs: entry ``logits`` of a mapping, first of a tuple, else itself."""
    if isinstance(outputs, Mapping):
        if "logits" not in outputs:
            raise DataError(f"The outputs have no 'logits', only: {', '.join(map(str, outputs))}.")
        return outputs["logits"]
    if isinstance(outputs, tuple):
        return outputs[0]
    return outputs


def as_array(outputs: Any) -> Any:
    """The logits among a model's outputs as a numpy array of float64, on the CPU.

    Raises:
        TrainingError: A value is not a finite number.
    """
    import numpy as np
    import torch

    values = first_output(outputs)
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu().to(torch.float64).numpy()
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        raise TrainingError(
            "The model's outputs hold values that are not finite numbers, so training has diverged. "
            "Lower the learning rate, or train in float32."
        )
    return array
