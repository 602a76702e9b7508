"""Gates: modules that say how much of a change each row, or each position, uses.

Letters: B batch, b rows of it, T positions, d features of what a gate reads, k parts of a gated sum.
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.sites import GateForm, Pooling
from deltune.sites.base import Seen, rows_of

__all__ = ["CentralGate", "InputGate", "ScalarGate", "Share"]


class InputGate(GateForm):
    r"""G = mean_t sigmoid(w h_t + b), with w (1, d) and b initialised as any linear map.

    Args:
        features: d.
        pooling: ``mean`` over real positions, ``all`` positions, or ``token``: one value for each position.
        dtype: type of the parameters.
        device: where they are.

    Source:
        Mao et al. 2022, arXiv 2110.07577, section 3.2.
    """

    formula: ClassVar[str] = "mean_t sigmoid(w {x} + b)"

    def __init__(
        self, features: int, pooling: Pooling, dtype: torch.dtype = torch.float32, device: torch.device | None = None
    ) -> None:
        super().__init__(pooling)
        self.linear = nn.Linear(features, 1, dtype=dtype, device=device)

    def forward(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """G, (b, 1, 1) or (b, T, 1), for ``h`` (b, T, d)."""
        weight, bias = self.linear.weight.to(h.dtype), self.linear.bias.to(h.dtype)
        return self.pooled(torch.sigmoid(F.linear(h, weight, bias)), rows)

    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """As :meth:`forward`."""
        value: Tensor = self(h, rows)
        return value


class ScalarGate(GateForm):
    """G = sigmoid(a) with one trained number a, 0 at the start, whatever is read."""

    formula: ClassVar[str] = "sigmoid(a)"

    def __init__(self, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        super().__init__("token")
        self.logit = nn.Parameter(torch.zeros((), dtype=dtype, device=device))

    def forward(self, h: Tensor, rows: Tensor | None = None) -> Tensor:
        """G, (b, 1, 1), for ``h`` (b, T, d)."""
        return torch.sigmoid(self.logit).to(h.dtype).expand(h.shape[0], 1, 1)

    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """As :meth:`forward`."""
        value: Tensor = self(h, rows)
        return value


class CentralGate(GateForm):
    r"""One gate for all parts in a layer: softmax over the parts of mean_t relu(W h_t + c).

    h is what the layer's attention reads. The values of the k parts are positive and 1 in sum. W is (k, d), c (k).

    Args:
        features: d.
        parts: k.
        pooling: as for :class:`InputGate`.
        dtype: type of the parameters.
        device: where they are.

    Source:
        authors' code of Mao et al. 2022: morningmoni/UniPELT.
    """

    formula: ClassVar[str] = "softmax over parts of mean_t relu(W {x} + c)"

    def __init__(
        self,
        features: int,
        parts: int,
        pooling: Pooling,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__(pooling)
        self.linear = nn.Linear(features, parts, dtype=dtype, device=device)
        self._values = Seen()

    @property
    def observes(self) -> bool:
        """Always: it reads what attention reads."""
        return True

    def observe(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Compute the values of all parts for this call of the layer."""
        super().observe(hidden, mask)
        self._values.inputs[:] = [self(hidden)]

    def forget(self) -> None:
        """End what :meth:`observe` began."""
        super().forget()
        self._values.inputs.clear()

    def forward(self, h: Tensor) -> Tensor:
        """The values of all parts, (B, 1, k) or (B, T, k), for ``h`` (B, T, d)."""
        weight, bias = self.linear.weight.to(h.dtype), self.linear.bias.to(h.dtype)
        return self.pooled(F.relu(F.linear(h, weight, bias)), None).softmax(-1)

    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """The values of all parts in the present call of the layer, (b, 1, k) or (b, T, k)."""
        return rows_of(self._values.inputs[0], rows)


class Share:
    """What one part has of a central gate.

    Args:
        gate: the gate.
        number: of the part, from 0.
    """

    def __init__(self, gate: CentralGate, number: int) -> None:
        self.gate = gate
        self.number = number

    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """G of the part, (b, 1, 1) or (b, T, 1)."""
        return self.gate.value(h, rows)[..., self.number : self.number + 1]
