"""Keys and values of a prefix: as plain parameters, or made by a small network; and their joint layout.

Letters: P length of the prefix, L layers, K key/value heads, D width of a head, d hidden size, M width of the
network.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import MethodError
from deltune.sites import Form, KeyValueForm

__all__ = ["Prefix", "PrefixTrunk", "ReparameterizedPrefix", "joined_prefixes", "split_prefixes"]


def joined_prefixes(prefixes: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The prefixes of all layers as one matrix, (P, 2 L K D): the layout of the authors' code, and of peers.

    Row p holds position p: the keys of layer 0, its values, the keys of layer 1, and so on, each head by head.

    Args:
        prefixes: keys and values of each layer, each (K, P, D).
    """
    return torch.cat([tensor.transpose(0, 1).flatten(1) for pair in prefixes for tensor in pair], dim=1)


def split_prefixes(table: Tensor, heads: int, head_dim: int) -> list[tuple[Tensor, Tensor]]:
    """The inverse of :func:`joined_prefixes`: keys and values of each layer, each (K, P, D).

    Args:
        table: (P, 2 L K D).
        heads: K.
        head_dim: D.

    Raises:
        MethodError: if the matrix is not of whole layers.
    """
    block = 2 * heads * head_dim
    if table.dim() != 2 or table.shape[1] % block:
        raise MethodError(
            f"The prefixes of layers with {heads} key/value heads of width {head_dim} are a matrix whose width is a "
            f"multiple of {block}, not one of shape {tuple(table.shape)}."
        )
    layers = table.view(table.shape[0], -1, 2, heads, head_dim).permute(1, 2, 3, 0, 4)
    return [(keys, values) for keys, values in layers]


class Prefix(KeyValueForm):
    """Keys and values as plain parameters, each (K, P, D), standard normal at the start."""

    formula: ClassVar[str] = "softmax({x} W_q P_k^T) P_v"

    def __init__(
        self,
        heads: int,
        length: int,
        head_dim: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, length, head_dim, dtype=dtype, device=device))
        self.values = nn.Parameter(torch.randn(heads, length, head_dim, dtype=dtype, device=device))
        self.dropout = dropout

    @property
    def length(self) -> int:
        """P."""
        return self.keys.shape[1]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (K, P, D)."""
        return F.dropout(self.keys, self.dropout, self.training), F.dropout(self.values, self.dropout, self.training)

    @torch.no_grad()
    def start_at(self, keys: Tensor, values: Tensor) -> None:
        """Take these keys and values, each (K, P, D)."""
        self.keys.copy_(keys)
        self.values.copy_(values)


class PrefixTrunk(Form):
    """tanh(W P' + b): the part of the reparameterisation that the layers of one kind of attention share.

    P' is (P, d), standard normal; the result is (P, M).
    """

    def __init__(
        self, length: int, features: int, width: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, features, dtype=dtype, device=device))
        self.linear = nn.Linear(features, width, dtype=dtype, device=device)

    def forward(self) -> Tensor:
        """The shared hidden rows, (P, M)."""
        return torch.tanh(self.linear(self.rows))

    def stored(self) -> None:
        """Not written: the layers' flat prefixes say everything."""
        return


class ReparameterizedPrefix(KeyValueForm):
    """One layer's keys and values as a linear map of the trunk's rows; flat once stored.

    The paper's last linear map serves all layers at once; here each layer owns its rows of it, which is the
    same map.
    """

    formula: ClassVar[str] = "softmax({x} W_q P_k^T) P_v, P = tanh(P' W_1) W_2"

    def __init__(
        self,
        trunk: PrefixTrunk,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # in a tuple, so that the shared trunk is not registered again with every layer
        self._trunk = (trunk,)
        self.linear = nn.Linear(trunk.linear.out_features, 2 * heads * head_dim, dtype=dtype, device=device)
        self.heads, self.head_dim = heads, head_dim
        self.dropout = dropout

    @property
    def length(self) -> int:
        """P."""
        return self._trunk[0].rows.shape[0]

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (K, P, D)."""
        both = F.dropout(self.linear(self._trunk[0]()), self.dropout, self.training)
        (pair,) = split_prefixes(both, self.heads, self.head_dim)
        return pair

    @torch.no_grad()
    def stored(self) -> Prefix:
        """The same keys and values as plain parameters."""
        training = self.training
        keys, values = self.eval()()
        self.train(training)
        flat = Prefix(self.heads, self.length, self.head_dim, self.dropout, keys.dtype, keys.device)
        flat.start_at(keys, values)
        return flat.train(training)
