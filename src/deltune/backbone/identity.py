"""Is this the same pretrained model? Its kind and a small sample of its weights tell."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from deltune.errors import CheckpointError

__all__ = ["check_base_model", "describe_base_model"]

_TENSORS = 16
_VALUES = 4
#: bfloat16 keeps 8 bits: a model loaded in another precision is still the same model.
_TOLERANCE = 1e-2


def describe_base_model(model: nn.Module) -> dict[str, Any]:
    """Kind, size and a sample of weights of the pretrained model below the head.

    Quantised weights are left out of the sample, as are those without values (on the meta device).
    """
    base = getattr(model, "base_model", model)
    config = getattr(model, "config", None)
    named = [
        (name, parameter)
        for name, parameter in base.named_parameters()
        if parameter.dtype.is_floating_point and parameter.dim() >= 2 and not parameter.is_meta
    ]
    step = max(1, len(named) // _TENSORS)
    sample: dict[str, list[float]] = {}
    for name, parameter in named[::step][:_TENSORS]:
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // _VALUES)
        sample[name] = [round(float(value), 6) for value in flat[::stride][:_VALUES]]
    return {
        "model_type": getattr(config, "model_type", type(base).__name__),
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "sample": sample,
    }


def check_base_model(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    """Refuse a delta that was trained on another model.

    Raises:
        CheckpointError: saying in what the models differ.
    """
    if saved["model_type"] != present["model_type"]:
        raise CheckpointError(
            f"This delta was trained on a model of the type {saved['model_type']!r}; the given one is "
            f"{present['model_type']!r}. Load the model that it was trained on."
        )
    for name, values in saved["sample"].items():
        here = present["sample"].get(name)
        if here is None:
            continue
        close = all(
            math.isclose(one, other, rel_tol=_TOLERANCE, abs_tol=1e-5) for one, other in zip(values, here, strict=True)
        )
        if not close:
            raise CheckpointError(
                f"This delta was trained on another {saved['model_type']} than the given one: {name} has other "
                "values. Load the model that it was trained on; to use it all the same, pass strict=False."
            )
