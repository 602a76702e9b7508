"""The entries of a model's parameters with the greatest scores."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from deltune.errors import MethodError

__all__ = ["greatest"]


def greatest(scores: Mapping[str, Tensor], count: int, starts: Mapping[str, int]) -> Tensor:
    """Positions of the ``count`` greatest scores of all parameters together, ascending.

    Args:
        scores: by parameter.
        count: how many.
        starts: position of the first entry of each parameter.

    Raises:
        MethodError: if there are fewer.
    """
    total = sum(value.numel() for value in scores.values())
    if count > total:
        raise MethodError(f"{count:,} entries cannot be selected of {total:,}. Take a smaller ratio, or more targets.")
    values, places = [], []
    for name, value in scores.items():
        best = value.reshape(-1).float().topk(min(count, value.numel()))
        values.append(best.values)
        places.append(best.indices + starts[name])
    chosen = torch.cat(values).topk(count).indices
    return torch.cat(places)[chosen].sort().values
