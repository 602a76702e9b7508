"""Gates that are exactly 0 or 1 with some probability, and have a gradient all the same.

Letters: s a value in (0, 1), z the gate, alpha its trained parameter, l < 0 and r > 1 the bounds to which s is
stretched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["HardConcrete"]

#: The uniform noise keeps this distance from 0 and 1, where its log-odds are infinite.
_MARGIN = 1e-4


@dataclass(frozen=True)
class HardConcrete:
    """z = min(1, max(0, s (r - l) + l)), s = sigmoid(log u - log(1 - u) + alpha), u uniform on (0, 1).

    Source: Louizos et al. 2018, arXiv 1712.01312, section 2.2; temperature 1, as in Guo et al. 2020, arXiv 2012.07463.
    """

    low: float
    high: float

    def concrete(self, alpha: Tensor, noise: Tensor | None = None) -> Tensor:
        """The binary concrete variable s, of the shape and type of ``alpha``.

        Args:
            alpha: of any shape, float32 or wider.
            noise: u, of the same shape; None for u = 1/2, of which the gates in evaluation are made.
        """
        if noise is None:
            return alpha.sigmoid()
        # in half precision the bounds of u would be 0 and 1
        odds = torch.logit(noise.float(), eps=_MARGIN).to(alpha.dtype)
        return odds.add_(alpha).sigmoid_()

    def gate(self, s: Tensor) -> Tensor:
        """The gates z."""
        return self._stretched(s).clamp_(0, 1)

    def gate_backward(self, gradient: Tensor, s: Tensor) -> Tensor:
        """The gradient of alpha from that of z: times (r - l) s (1 - s) where 0 < z < 1, zero elsewhere."""
        inner = torch.ops.aten.hardtanh_backward(gradient, self._stretched(s), 0.0, 1.0)
        found: Tensor = torch.ops.aten.sigmoid_backward(inner, s).mul_(self.high - self.low)
        return found

    def probability(self, alpha: Tensor) -> Tensor:
        """P(z > 0) = sigmoid(alpha - log(-l/r)), of the shape of ``alpha``."""
        shift = math.log(-self.low / self.high)
        return (alpha - shift).sigmoid() if shift else alpha.sigmoid()

    def _stretched(self, s: Tensor) -> Tensor:
        return s.mul(self.high - self.low).add_(self.low)

    def open(self, alpha: Tensor, sizes: Sequence[int]) -> Tensor:
        """The expected numbers of gates that are not 0, one for each of several parts of these sizes: (parts,)."""
        found: Tensor = _Open.apply(alpha, self, list(sizes))  # type: ignore[no-untyped-call]
        return found


class _Open(torch.autograd.Function):
    """Sums of P(z > 0); keeps nothing but alpha, which exists anyway, for the backward pass."""

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, gates: HardConcrete, sizes: list[int]) -> Tensor:
        ctx.save_for_backward(alpha)
        ctx.gates, ctx.sizes = gates, sizes
        return torch.stack([part.sum() for part in torch.split(gates.probability(_wide(alpha)), sizes)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (alpha,) = ctx.saved_tensors
        found = ctx.gates.probability(_wide(alpha))
        for part, factor in zip(torch.split(found, ctx.sizes), gradient, strict=True):
            # in place of the probabilities
            torch.ops.aten.sigmoid_backward.grad_input(factor.to(part).expand_as(part), part, grad_input=part)
        return found.to(alpha.dtype), None, None


def _wide(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
