"""Additional keys and values of one attention call, of several forms, rows and gates.

Letters: B batch, b rows of it that a form serves, H heads, K key/value heads, Q queries, T keys, P additional keys,
D width of a head, n forms whose gates differ from query to query.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["AddedKeys", "Keys"]


@dataclass
class Keys:
    """What one form adds.

    Attributes:
        owner: name of its attachment.
        keys: (K, P, D).
        values: (K, P, D).
        weight: 1, or the gate's value, (b, 1, 1) or (b, Q, 1): it multiplies keys and values (Mao et al. 2022).
        rows: indices of the b rows that see them; None for all of the batch.
    """

    owner: str
    keys: Tensor
    values: Tensor
    weight: float | Tensor
    rows: Tensor | None

    @property
    def each_query(self) -> bool:
        """Whether the gate differs from query to query, so that it cannot be multiplied into the keys."""
        return isinstance(self.weight, Tensor) and self.weight.shape[1] > 1

    def of_batch(self, tensor: Tensor, reference: Tensor) -> Tensor:
        """Keys or values for every row, (B, K, P, D), in the type of ``reference`` (B, ...)."""
        batch = reference.shape[0]
        if not isinstance(self.weight, Tensor) or self.each_query:
            return tensor.to(reference).expand(batch, -1, -1, -1)
        scaled = (self.weight[..., None] * tensor).to(reference)
        if self.rows is None:
            return scaled
        return scaled.new_zeros(batch, *tensor.shape).index_copy(0, self.rows, scaled)

    def gate(self, reference: Tensor) -> Tensor:
        """The gate of each query, (B, 1, Q, 1); 0 where the form is not seen."""
        assert isinstance(self.weight, Tensor)
        gate = self.weight[:, None].to(reference)
        if self.rows is None:
            return gate
        return gate.new_zeros(reference.shape[0], *gate.shape[1:]).index_copy(0, self.rows, gate)


@dataclass
class AddedKeys:
    """Keys and values (B, K, P, D) to put in front of the real ones.

    Attributes:
        keys: all of them.
        values: as many.
        visible: which of them each row sees, (B, 1, 1, P) boolean; all of them for None.
        lengths: how many of them belong to which attachment, in order.
        gates: of forms that have another gate for each query: its values (B, 1, Q, 1), and the first and the last but
            one of its columns.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    lengths: tuple[tuple[str, int], ...]
    gates: tuple[tuple[Tensor, int, int], ...] = ()

    @classmethod
    def of(cls, found: Sequence[Keys], reference: Tensor) -> AddedKeys:
        """Those of several forms, for a batch shaped and typed ``reference`` (B, K, T, D)."""
        keys = torch.cat([one.of_batch(one.keys, reference) for one in found], dim=2)
        values = torch.cat([one.of_batch(one.values, reference) for one in found], dim=2)
        visible = None
        if any(one.rows is not None for one in found):
            # each form has columns of its own, which other rows do not see
            visible = torch.zeros(reference.shape[0], 1, 1, keys.shape[2], dtype=torch.bool, device=reference.device)
        gates, start = [], 0
        for one in found:
            end = start + one.keys.shape[1]
            if visible is not None:
                visible[slice(None) if one.rows is None else one.rows, :, :, start:end] = True
            if one.each_query:
                gates.append((one.gate(reference), start, end))
            start = end
        lengths = tuple((one.owner, one.keys.shape[1]) for one in found)
        return cls(keys, values, visible, lengths, tuple(gates))

    def widened(self, mask: Tensor) -> Tensor:
        """``mask`` (B or 1, H or 1, Q or 1, T), boolean or additive, with the additional columns in front."""
        boolean = mask.dtype == torch.bool
        count = self.keys.shape[2]
        if self.visible is None:
            front = mask.new_full((*mask.shape[:-1], count), True if boolean else 0.0)
            return torch.cat([front, mask], dim=-1)
        front = self.visible
        if not boolean:
            front = mask.new_zeros(front.shape).masked_fill(~front, torch.finfo(mask.dtype).min)
        front = front.expand(-1, mask.shape[1], mask.shape[2], -1)
        return torch.cat([front, mask.expand(front.shape[0], -1, -1, -1)], dim=-1)

    def joined(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the call, (B, H, Q, D), (B, K, P + T, D) twice.

        A gate G of each query turns the logit q k of its columns into G q k, and their values into G v, which no key
        can do for all queries. Each such form therefore has D dimensions of its own: queries (q, G q), its keys
        (0, k), all others (k, 0); values likewise. The widths are D (1 + n) then.
        """
        keys, values = torch.cat([self.keys, key], dim=2), torch.cat([self.values, value], dim=2)
        if not self.gates:
            return query, keys, values
        queries = torch.cat([query, *(gate * query for gate, _, _ in self.gates)], dim=-1)
        return queries, self._apart(keys), self._apart(values)

    def _apart(self, tensor: Tensor) -> Tensor:
        """(B, K, P + T, D) with the columns of each gate in dimensions of their own, (B, K, P + T, D (1 + n))."""
        own = torch.zeros_like(tensor[:1, :1, :, :1])
        blocks = [own + 1]
        for number, (_, start, end) in enumerate(self.gates):
            blocks[0][:, :, start:end] = 0
            blocks.append(own.clone())
            blocks[number + 1][:, :, start:end] = 1
        return torch.cat([tensor * block for block in blocks], dim=-1)

    def parted(self, output: Tensor) -> Tensor:
        """What came of :meth:`joined`, (B, Q, H, D (1 + n)), as the heads' result (B, Q, H, D)."""
        if not self.gates:
            return output
        first, *others = output.chunk(1 + len(self.gates), dim=-1)
        for (gate, _, _), other in zip(self.gates, others, strict=True):
            first = first + gate.transpose(1, 2) * other
        return first
