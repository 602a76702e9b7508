"""Additional positions in front of a text: how many each row has, and where they stand beside its padding.

Letters: B batch, T real positions, P additional positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deltune.errors import StateError

__all__ = ["Front", "Order", "widened_mask"]


@dataclass
class Front:
    """What stands in front of the text: ``count`` positions, of which a row has the last ``lengths``; all for None.

    ``lengths`` is (B,). Positions that a row lacks are masked like padding.
    """

    count: int
    lengths: Tensor | None = None

    def mask(self, like: Tensor) -> Tensor:
        """Which of the positions are real, (B, count), in the type of a padding mask."""
        if self.lengths is None:
            return like.new_ones(like.shape[0], self.count)
        return (torch.arange(self.count, device=like.device) >= self.missing).to(like.dtype)

    @property
    def missing(self) -> Tensor:
        """How many positions a row lacks, (B, 1)."""
        assert self.lengths is not None
        return self.count - self.lengths[:, None]


@dataclass
class Order:
    """Where each row of the widened input comes from, (B, P + T); None for rows first, then the text."""

    sources: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None, count: int) -> Order:
        """The order that puts ``count`` rows between the padding on the left, if any, and the text."""
        if mask is None:
            return cls(None)
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        place = torch.arange(mask.shape[1] + count, device=mask.device).expand(mask.shape[0], -1)
        prompt = place - padding
        return cls(torch.where(place < padding, place + count, torch.where(prompt < count, prompt, place)))

    def apply(self, values: Tensor) -> Tensor:
        """``values`` (B, P + T, ...) with rows first, in this order."""
        if self.sources is None:
            return values
        index = self.sources.view(*self.sources.shape, *(1,) * (values.dim() - 2)).expand_as(values)
        return values.gather(1, index)


def widened_mask(mask: Any, front: Front, in_front: bool = False) -> Tensor:
    """A padding mask (B, T) with the additional positions, before the text or in front of everything."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise StateError(
            "Prompt rows need a padding mask of shape (batch, positions), or none; the model was given "
            + (f"one of shape {tuple(mask.shape)}." if isinstance(mask, Tensor) else f"a {type(mask).__name__}.")
        )
    order = Order.of(None if in_front else mask, front.count)
    return order.apply(torch.cat([front.mask(mask), mask], dim=1))
