"""Several low-rank changes of one matrix computed together, for the rows of a routed batch.

Letters: G changes, r the largest of their ranks, T rows of a block, d_in and d_out the two sides of the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from deltune.sites import GroupedForms

__all__ = ["GroupedLowRank"]


class GroupedLowRank(GroupedForms):
    """dh_i = s_i B_i A_i dropout(x_i) for G blocks of rows in two batched products.

    Args:
        factor_A: every A_i transposed, (G, d_in, r).
        factor_B: every B_i transposed, (G, r, d_out).
        scale: s, where all have the same; else one, with each s_i in B_i.
        dropout: probability of zeroing an entry of x.
    """

    def __init__(self, factor_A: Tensor, factor_B: Tensor, scale: float, dropout: float) -> None:
        self.factor_A, self.factor_B = factor_A, factor_B
        self.scale, self.dropout = scale, dropout
        self.rank = factor_A.shape[2]

    @classmethod
    def of(
        cls, factors: Sequence[tuple[Tensor, Tensor]], scales: Sequence[float], dropout: float, dtype: torch.dtype
    ) -> GroupedLowRank:
        """Stack A_i (r_i, d_in) and B_i (d_out, r_i); lower ranks are filled up with zeros.

        Args:
            factors: A_i and B_i.
            scales: s_i.
            dropout: of all.
            dtype: in which to compute.
        """
        if len({factor_A.shape[0] for factor_A, _ in factors}) == 1:
            stacked_A = torch.stack([factor_A for factor_A, _ in factors])
            stacked_B = torch.stack([factor_B for _, factor_B in factors]).transpose(1, 2)
        else:
            stacked_A = pad_sequence([factor_A for factor_A, _ in factors], batch_first=True)
            stacked_B = pad_sequence([factor_B.T for _, factor_B in factors], batch_first=True)
        scale = scales[0]
        if any(other != scale for other in scales):
            stacked_B = stacked_B * torch.tensor(scales, dtype=stacked_B.dtype, device=stacked_B.device)[:, None, None]
            scale = 1.0
        # in the layout that batched products read fastest
        return cls(stacked_A.transpose(1, 2).to(dtype).contiguous(), stacked_B.to(dtype).contiguous(), scale, dropout)

    def gathered(self, owners: Tensor) -> GroupedLowRank:
        """Those of these indices."""
        factor_A, factor_B = self.factor_A.index_select(0, owners), self.factor_B.index_select(0, owners)
        return GroupedLowRank(factor_A, factor_B, self.scale, self.dropout)

    def change(self, x: Tensor) -> Tensor:
        """The changes (G, T, d_out) for x (G, T, d_in)."""
        thin = self._thin(x)
        return self.scale * torch.bmm(thin, self.factor_B.to(thin.dtype))

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """``output`` (G, T, d_out) plus the changes, the sum fused into the second product."""
        thin = self._thin(x)
        if output.dtype != thin.dtype:
            return output + (self.scale * torch.bmm(thin, self.factor_B.to(thin.dtype))).to(output.dtype)
        return torch.baddbmm(output, thin, self.factor_B.to(thin.dtype), alpha=self.scale)

    def _thin(self, x: Tensor) -> Tensor:
        return torch.bmm(F.dropout(x, self.dropout) if self.dropout else x, self.factor_A)
