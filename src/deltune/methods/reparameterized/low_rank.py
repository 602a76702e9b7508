"""The low-rank change of a matrix, its relatives, and ranks that differ from site to site.

Letters: r rank, d_in and d_out the two sides of the matrix, s the scale.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.reparameterized.decompositions import truncated_svd
from deltune.methods.reparameterized.grouped_low_rank import GroupedLowRank
from deltune.sites import WeightForm, WeightSite

__all__ = ["DecomposedLowRank", "LowRank", "PrincipalLowRank", "RankPattern", "checked_rank", "low_rank_of"]

#: The key of a site: ``encoder.3.attention.query``, ``encoder.embeddings``; other keys are names of modules.
_KEY = re.compile(
    rf"(?P<stack>\w+)\.((?P<layer>\d+)\.)?(?P<role>{'|'.join(map(re.escape, (*PROJECTION_ROLES, 'embeddings')))})"
)


class LowRank(WeightForm):
    r"""dh = s B A dropout(x), with A (r, d_in) and B (d_out, r).

    A is uniform within 1/sqrt(d_in) at the start and B is zero; in an embedding, whose input is the vocabulary, A is
    zero and B standard normal (both as in the authors' code).

    Args:
        site: the matrix.
        rank: r.
        scale: s.
        dropout: probability of zeroing an entry of x while training; the frozen product is not touched.
    """

    #: Whether it computes nothing but what :class:`GroupedLowRank` computes of its factors.
    _groupable: ClassVar[bool] = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = all(getattr(cls, name) is getattr(LowRank, name) for name in ("forward", "add_to", "_thin"))
        cls._groupable = own and not cls.reads_matrix

    formula: ClassVar[str] = "{x} W_down W_up"

    def __init__(self, site: WeightSite, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, site.in_features, dtype=site.dtype, device=site.device))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank, dtype=site.dtype, device=site.device))
        self.scale = scale
        self.dropout = dropout
        if site.kind == "embedding":
            nn.init.zeros_(self.A)
            nn.init.normal_(self.B)
        else:
            nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B as they act now."""
        return self.A, self.B

    def _thin(self, x: Tensor, factor: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(x, factor.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., d_out) for x (..., d_in)."""
        factor_A, factor_B = self.factors()
        thin = self._thin(x, factor_A)
        return self.scale * F.linear(thin, factor_B.to(thin.dtype))

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``output`` plus the change, the sum fused into the second product."""
        factor_A, factor_B = self.factors()
        thin = self._thin(x, factor_A)
        factor = factor_B.to(thin.dtype).T
        if output.dtype != thin.dtype:
            return output + (weight * self.scale) * (thin @ factor)
        flat = torch.addmm(
            output.reshape(-1, output.shape[-1]),
            thin.reshape(-1, thin.shape[-1]),
            factor,
            alpha=weight * self.scale,
        )
        return flat.view_as(output)

    def groups_with(self) -> Hashable | None:
        """Type and dropout, and ranks up to the same power of two: lower ones are filled up with zeros."""
        if not self._groupable:
            return None
        return LowRank, self.A.dtype, self.dropout if self.training else 0.0, (self.A.shape[0] - 1).bit_length()

    @classmethod
    def stack(cls, forms: Sequence[LowRank], dtype: torch.dtype) -> GroupedLowRank:
        """Several of them, in two batched products."""
        dropout = forms[0].dropout if forms[0].training else 0.0
        return GroupedLowRank.of([form.factors() for form in forms], [form.scale for form in forms], dropout, dtype)

    @classmethod
    def state(cls, forms: Sequence[LowRank]) -> Hashable | None:
        """Which tensors A and B are, and how often they were changed; unknown while gradients wait to be applied."""
        if any(type(form).factors is not LowRank.factors for form in forms):
            return None
        factors: list[Any] = [form._parameters[name] for form in forms for name in "AB"]
        if any(factor.grad is not None or factor.is_inference() for factor in factors):
            return None
        tensors = tuple([(id(factor), factor.data_ptr(), factor._version) for factor in factors])
        return tensors, tuple([form.scale for form in forms])

    def look_up(self, ids: Tensor) -> Tensor:
        """The change of an embedding's output: the columns of A for ``ids``, times B. There is no dropout."""
        factor_A, factor_B = self.factors()
        return self.scale * F.linear(F.embedding(ids, factor_A.T), factor_B)

    def convolve(self, x: Tensor, module: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> Tensor:
        """The change of a convolution's output: a convolution with r channels, then B at every place."""
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        if module.groups > 1:
            return super().convolve(x, module)
        factor_A, factor_B = self.factors()
        function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
        kernel = factor_A.to(x.dtype).view(-1, *module.weight.shape[1:])
        thin = function(x, kernel, None, module.stride, 0, module.dilation)
        return self.scale * torch.einsum("or,br...->bo...", factor_B.to(x.dtype), thin)

    def weight_delta(self) -> Tensor:
        """S B A, (d_out, d_in)."""
        factor_A, factor_B = self.factors()
        return self.scale * (factor_B @ factor_A)


class PrincipalLowRank(LowRank):
    r"""dh = s (B A - B0 A0) x, where s B0 A0 is the best approximation of rank r to the frozen matrix (PiSSA).

    A and B start at A0 = sqrt(S_r / s) V_r^T and B0 = U_r sqrt(S_r / s). Subtracting B0 A0 here equals taking it out of
    the frozen matrix, which stays as it is, so that the model can be switched and restored bit for bit.

    Args:
        site: the matrix.
        matrix: its frozen values, (d_out, d_in).
        rank: r.
        scale: s.
        dropout: as for :class:`LowRank`.

    Source:
        Meng et al. 2024, arXiv 2404.02948, section 3.
    """

    formula: ClassVar[str] = "{x} (W_down W_up - W_down0 W_up0)"

    A0: Tensor
    B0: Tensor

    def __init__(self, site: WeightSite, matrix: Tensor, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        if not matrix.is_meta:
            left, values, right = truncated_svd(matrix, rank)
            root = (values / scale).sqrt()
            with torch.no_grad():
                self.A.copy_(root[:, None] * right)
                self.B.copy_(left * root)
        self.register_buffer("A0", self.A.detach().clone())
        self.register_buffer("B0", self.B.detach().clone())

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of rank 2 r: what is trained, and what it started from with the opposite sign."""
        return torch.cat([self.A, self.A0]), torch.cat([self.B, -self.B0], dim=1)

    def stored(self) -> LowRank:
        """The change as one of rank 2 r, which needs no decomposition to be loaded."""
        return low_rank_of(*self.factors(), self.scale)


class DecomposedLowRank(LowRank):
    r"""Weight-decomposed adaptation: W' = diag(m / n) (W0 + s B A), n the norm of each row of W0 + s B A (DoRA).

    dh = (m / n - 1) W0 x + (m / n) s B A dropout(x). The magnitude m (d_out) is trained and starts at the row norms of
    W0; n is a constant in the backward pass.

    Args:
        site: the matrix.
        matrix: its frozen values, (d_out, d_in).
        rank: r.
        scale: s.
        dropout: as for :class:`LowRank`.

    Source:
        Liu et al. 2024, arXiv 2402.09353, equations 5 and 11.
    """

    formula: ClassVar[str] = "{x} ((W + s W_down W_up) m / n - W)"

    reads_matrix: ClassVar[bool] = True

    def factor(self) -> str:
        """None: the scale acts within the norm."""
        return ""

    def __init__(self, site: WeightSite, matrix: Tensor, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        self.magnitude = nn.Parameter(self._norms(matrix).to(site.dtype))

    @torch.no_grad()
    def _norms(self, matrix: Tensor) -> Tensor:
        """The norm of each row of W0 + s B A, without building that matrix."""
        wide = torch.promote_types(matrix.dtype, torch.float32)
        frozen, (factor_A, factor_B) = matrix.to(wide), (factor.to(wide) for factor in self.factors())
        squares = frozen.square().sum(1)
        mixed = ((frozen @ factor_A.T) * factor_B).sum(1)
        own = ((factor_B @ (factor_A @ factor_A.T)) * factor_B).sum(1)
        return (squares + 2 * self.scale * mixed + self.scale**2 * own).clamp_min(0).sqrt()

    def _ratio(self, matrix: Tensor) -> Tensor:
        with torch.autocast(matrix.device.type, enabled=False):
            # rounded as the magnitude is, so that the two are equal at the start
            norms = self._norms(matrix).to(self.magnitude.dtype)
        # a row of zeros has no direction: it stays as it is
        return torch.where(norms > 0, self.magnitude / norms.clamp_min(torch.finfo(norms.dtype).tiny), 1.0)

    def change(self, output: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The change dh (..., d_out)."""
        ratio = self._ratio(matrix).to(output.dtype)
        product = output if bias is None else output - bias.to(output.dtype)
        change: Tensor = self(x)
        return (ratio - 1) * product + ratio * change

    def weight_delta_of(self, matrix: Tensor) -> Tensor:
        """The change of ``matrix`` (d_out, d_in)."""
        ratio = self._ratio(matrix)[:, None]
        return (ratio - 1) * matrix + ratio * self.weight_delta().to(matrix)


def low_rank_of(factor_A: Tensor, factor_B: Tensor, scale: float) -> LowRank:
    """A form that holds these factors."""
    form = LowRank.__new__(LowRank)
    nn.Module.__init__(form)
    form.A = nn.Parameter(factor_A.detach().clone())
    form.B = nn.Parameter(factor_B.detach().clone())
    form.scale, form.dropout = scale, 0.0
    return form


def checked_rank(rank: int, site: WeightSite) -> int:
    """``rank``, if the matrix at ``site`` can have it.

    Raises:
        MethodError: if not.
    """
    largest = min(site.in_features, site.out_features)
    if rank > largest:
        raise MethodError(
            f"Rank {rank} exceeds what {site.key} can have: the matrix is {site.out_features} x {site.in_features}, so "
            f"its rank is at most {largest}."
        )
    return rank


class RankPattern:
    """Ranks that differ from site to site: ``"ffn.up layers=-4: -> 16; attention.query -> 0"``; none if None.

    Each entry is a target expression and the rank of what it selects; of several that select a site the last counts.
    A rank of zero leaves a site out.

    Raises:
        MethodError: if an entry is malformed.
        TargetError: if a target expression is.
    """

    def __init__(self, text: str | None) -> None:
        self.entries: list[tuple[Targets, int]] = []
        for entry in (text or "").split(";"):
            targets, arrow, rank = (piece.strip() for piece in entry.partition("->"))
            if not entry.strip():
                continue
            if not (arrow and targets and rank.isdigit()):
                raise MethodError(
                    f"{entry.strip()!r} gives no rank. Write targets, an arrow and a rank, such as "
                    "'ffn.up layers=-4: -> 16'; join several by semicolons."
                )
            self.entries.append((Targets.parse(targets), int(rank)))

    def ranks(
        self, sites: Iterable[WeightSite], default: int, model: nn.Module, anatomy: Anatomy
    ) -> list[tuple[WeightSite, int]]:
        """Every site that is not left out, with its rank.

        Raises:
            MethodError: if an entry concerns none of the sites, or a matrix cannot have its rank.
            TargetError: if an entry selects nothing.
        """
        sites = list(sites)
        names = tuple(name for name, _ in model.named_modules(remove_duplicate=False))
        ranks = dict.fromkeys((site.key for site in sites), default)
        for targets, rank in self.entries:
            keys = [part.key for part in targets.select(anatomy, names) if part.key in ranks]
            if not keys:
                raise MethodError(f"The ranks name {targets}, but none of that is among the targets.")
            ranks.update(dict.fromkeys(keys, rank))
        return [(site, checked_rank(ranks[site.key], site)) for site in sites if ranks[site.key]]

    def times(self, factor: int) -> str:
        """The entries with every rank multiplied."""
        return "; ".join(f"{targets} -> {factor * rank}" for targets, rank in self.entries)

    @staticmethod
    def text(ranks: Mapping[str, int], default: int) -> str:
        """The entries that give these ranks, by key of the site, where they differ from ``default``."""
        entries: dict[tuple[str, str, int], list[str]] = {}
        for key, rank in ranks.items():
            if rank != default:
                place = _KEY.fullmatch(key)
                name, stack, layer = (place["role"], place["stack"], place["layer"]) if place else (key, "", None)
                entries.setdefault((name, stack, rank), []).append(layer or "")
        pieces = []
        for (name, stack, rank), layers in entries.items():
            where = f" layers={','.join(layers)}" if layers[0] else ""
            where += f" stacks={stack}" if stack not in ("", "model") else ""
            pieces.append(f"{name}{where} -> {rank}")
        return "; ".join(pieces)
