"""Changes of matrices that gain components while they train.

Letters: d_in and d_out the matrix's width and height, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.methods.reparameterized.growth import GrowthSchedule
from deltune.methods.reparameterized.low_rank import LowRank, low_rank_of
from deltune.methods.reparameterized.singular_triplets import orthonormality, smooth
from deltune.sites import WeightForm, WeightSite

__all__ = ["IncrementalTriplets", "grow"]

_DEVIATION = 0.02


class IncrementalTriplets(LowRank):
    r"""dh = s sum_i lambda_i b_i a_i dropout(x), with a_i (1, d_in) and b_i (d_out, 1), s = alpha / r.

    The first r components have a trained lambda_i (1, 1). Those after them are in reserve: theirs is a constant, and
    they act, and so learn, only in training mode, from the start of the schedule to the end of growth. All a_i and b_i
    are normal with deviation 0.02 at first, lambda_i is zero. Buffers hold the smoothed sensitivity of the whole
    change, the uncertainty of that, and ``joined`` (components, 2): before which step the two vectors of each
    component, and its lambda, began to train, in a training of ``total`` steps (-1 before one).

    Args:
        site: the matrix.
        rank: r at the start.
        alpha: numerator of the scale.
        divisor: denominator of the scale; the present rank if None.
        constant: lambda of the components in reserve, and with which they begin.
        reserves: how many are in reserve at a time.
        dropout: probability of zeroing an entry of x while training.
    """

    formula: ClassVar[str] = "{x} A diag(lambda) B"

    sensitivity: Tensor
    uncertainty: Tensor
    joined: Tensor
    total: Tensor

    def __init__(
        self,
        site: WeightSite,
        rank: int,
        alpha: float,
        divisor: int | None = None,
        *,
        constant: float = 1e-5,
        reserves: int = 1,
        dropout: float = 0.0,
    ) -> None:
        WeightForm.__init__(self)
        self.in_features, self.out_features = site.in_features, site.out_features
        self.alpha, self.divisor, self.constant, self.reserves = alpha, divisor, constant, reserves
        self.dropout = dropout
        self.schedule: GrowthSchedule | None = None
        #: Whether ranks still grow: what is in reserve learns, and backward passes collect the gradient of the change.
        self.observed = False
        self.gradient: Tensor | None = None
        self._pass = -1
        wide = torch.promote_types(site.dtype, torch.float32)
        self.register_buffer("sensitivity", torch.zeros((), dtype=wide, device=site.device))
        self.register_buffer("uncertainty", torch.zeros((), dtype=wide, device=site.device))
        self.register_buffer("total", torch.full((), -1, dtype=torch.long, device=site.device))
        self.register_buffer("joined", torch.zeros(0, 2, dtype=torch.long, device=site.device))
        self.a, self.b, self.lambdas = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        like = torch.empty(0, dtype=site.dtype, device=site.device)
        # the reserve comes with the first step: in a loop that binds no optimizer it would be trained by nothing
        for _ in range(rank or reserves):
            self._append(like, 0)
        for _ in range(rank):
            self.lambdas.append(nn.Parameter(like.new_zeros(1, 1)))
        self._rescale()

    # -- the change ------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """How many components have a trained lambda."""
        return len(self.lambdas)

    @property
    def capacity(self) -> int:
        """The highest rank that the matrix can have."""
        return min(self.in_features, self.out_features)

    @property
    def _acting(self) -> int:
        return len(self.a) if self.training and self.observed else self.rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """The vectors a_i as rows and lambda_i b_i as columns; while they learn those in reserve too."""
        return self._factors(self._acting)

    def _factors(self, count: int) -> tuple[Tensor, Tensor]:
        if count == 0:
            empty = torch.zeros(0, dtype=self.sensitivity.dtype, device=self.joined.device)
            return empty.view(0, 1).expand(0, self.in_features), empty.view(1, 0).expand(self.out_features, 0)
        factor_A = torch.cat(list(self.a)[:count])
        factor_B = torch.cat(list(self.b)[:count], dim=1)
        lambdas = list(self.lambdas)
        if count > len(lambdas):
            lambdas.append(factor_B.new_full((count - len(lambdas), 1), self.constant))
        return factor_A, factor_B * torch.cat(lambdas).T

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., d_out) for x (..., d_in)."""
        if not self._acting:
            return x.new_zeros(*x.shape[:-1], self.out_features)
        if not self._watches():
            return super().forward(x)
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        factor_A, factor_B = self.factors()
        thin = F.linear(x, factor_A.to(x.dtype))
        watched: Tensor = self._watched(self.scale * F.linear(thin, factor_B.to(thin.dtype)), x)
        return watched

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``output`` plus the change."""
        if not self._acting:
            return output
        if not self._watches():
            return super().add_to(output, x, weight)
        return WeightForm.add_to(self, output, x, weight)

    def weight_delta(self) -> Tensor:
        """The change of the matrix (d_out, d_in) in evaluation: without what is in reserve."""
        factor_A, factor_B = self._factors(self.rank)
        return self.scale * (factor_B @ factor_A)

    def deviations(self) -> list[Tensor]:
        """How far the vectors, also those in reserve, are from orthonormal: two matrices (components, components)."""
        if not len(self.a):
            return []
        return orthonormality(torch.cat(list(self.b), dim=1), torch.cat(list(self.a)))

    def stored(self) -> LowRank | None:
        """What acts in evaluation as a plain low-rank change; None if there is nothing."""
        if not self.rank:
            return None
        factor_A, factor_B = (factor.detach() for factor in self._factors(self.rank))
        if self.divisor not in (None, self.rank):
            # a file's scale is alpha / rank
            factor_B = factor_B * (self.rank / self.divisor)
        return low_rank_of(factor_A, factor_B, self.alpha / self.rank)

    # -- growth ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reserve(self, step: int) -> None:
        """Fill the reserve, before that step, counted from 1."""
        while len(self.a) < self.rank + self.reserves:
            self._append(self.a[0], step)

    @torch.no_grad()
    def promote(self, count: int, step: int) -> None:
        """Let the next ``count`` components in reserve count and train their lambda, before that step."""
        for _ in range(count):
            like = self.a[self.rank]
            self.joined[self.rank, 1] = step
            value = like.new_full((1, 1), self.constant)
            self.lambdas.append(nn.Parameter(value, requires_grad=like.requires_grad))
        self._rescale()

    def finish(self) -> list[nn.Parameter]:
        """Drop the reserve and observe no longer; returns the parameters that are no longer trained."""
        dropped = [*list(self.a)[self.rank :], *list(self.b)[self.rank :]]
        if dropped:
            self._take(self.rank)
        self.observed, self.gradient = False, None
        return dropped

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        """Have as many components as ``tensors``."""
        count = sum(name.startswith("a.") for name in tensors)
        rank = sum(name.startswith("lambdas.") for name in tensors)
        like = next(self.parameters(), None)
        if like is None:
            like = nn.Parameter(torch.zeros_like(tensors.get("a.0", self.sensitivity), device=self.joined.device))
        self._take(min(count, len(self.a)))
        self.lambdas = nn.ParameterList(list(self.lambdas)[:rank])
        while len(self.a) < count:
            for values, shape in ((self.a, (1, self.in_features)), (self.b, (self.out_features, 1))):
                values.append(nn.Parameter(like.new_zeros(shape), requires_grad=like.requires_grad))
        while self.rank < rank:
            self.lambdas.append(nn.Parameter(like.new_zeros(1, 1), requires_grad=like.requires_grad))
        self.joined = self.joined.new_zeros(count, 2)
        self._rescale()

    def _append(self, like: Tensor, step: int) -> None:
        for values, shape in ((self.a, (1, self.in_features)), (self.b, (self.out_features, 1))):
            vector = nn.init.normal_(like.new_empty(shape), std=_DEVIATION)
            values.append(nn.Parameter(vector, requires_grad=like.requires_grad or not like.numel()))
        self.joined = torch.cat([self.joined, self.joined.new_tensor([[step, 0]])])

    def _take(self, count: int) -> None:
        self.a, self.b = nn.ParameterList(list(self.a)[:count]), nn.ParameterList(list(self.b)[:count])
        self.joined = self.joined[:count].clone()

    def _rescale(self) -> None:
        self.scale = self.alpha / (self.divisor or max(self.rank, 1))

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As for every module, after taking the shapes of what is to be loaded."""
        if f"{prefix}joined" in state_dict:
            self.resize({key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def trained_since(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter, and before which step it began to train; 0 for those of the start."""
        for index, (vectors, weight) in enumerate(self.joined.tolist()):
            yield self.a[index], vectors
            yield self.b[index], vectors
            if index < self.rank:
                yield self.lambdas[index], weight

    # -- the score -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float, mean: bool = False) -> None:
        """Smooth the score of the step's gradient, and forget that gradient."""
        score = self.score(mean)
        if bool(torch.isfinite(score)):
            smooth(self.sensitivity, self.uncertainty, score, beta1, beta2)
        self.gradient = None

    @torch.no_grad()
    def score(self, mean: bool = False) -> Tensor:
        """The sum of abs(dW * dL/d(dW)) over all entries of the change dW, by the root of their number, or by it."""
        if self.gradient is None:
            return torch.zeros_like(self.sensitivity)
        wide = self.sensitivity.dtype
        factor_A, factor_B = (factor.to(wide) for factor in self.factors())
        product = (self.scale * (factor_B @ factor_A)).mul_(self.gradient.to(wide))
        return product.abs_().sum() / (product.numel() if mean else math.sqrt(product.numel()))

    def _watches(self) -> bool:
        return self.observed and torch.is_grad_enabled()

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _watched(self, change: Tensor, x: Tensor) -> Tensor:
        watched: Tensor = _Watched.apply(change, x, self)  # type: ignore[no-untyped-call]
        return watched

    def _collect(self, gradient: Tensor, x: Tensor) -> None:
        """Add what one backward pass through one call says: g^T x, of g (..., d_out) and x (..., d_in)."""
        # sums over many tokens overflow float16
        wide = torch.float32 if gradient.dtype == torch.float16 else gradient.dtype
        found = gradient.to(wide).flatten(0, -2).T @ x.to(wide).flatten(0, -2)
        # after zero_grad() without a step; a shared matrix is called several times in one pass
        current = torch._C._current_graph_task_id()
        stale = current != self._pass and (self.a[0].grad is None or not bool(self.a[0].grad.any()))
        self._pass = current
        if self.gradient is None or stale:
            self.gradient = found.to(torch.promote_types(found.dtype, torch.float32))
        else:
            self.gradient += found


class _Watched(torch.autograd.Function):
    """Passes a change on as it is, and tells the form the gradient that comes back for it."""

    @staticmethod
    def forward(ctx: Any, change: Tensor, x: Tensor, form: IncrementalTriplets) -> Tensor:
        # through the graph, so that gradient checkpointing need not keep it
        ctx.save_for_backward(x)
        ctx.form = form
        return change.view_as(change)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        ctx.form._collect(gradient, *ctx.saved_tensors)
        return gradient, None, None


def _chosen(forms: Sequence[IncrementalTriplets], count: int) -> Iterator[IncrementalTriplets]:
    """Of those that can grow the ``count`` with the highest scores; of equal ones the first in the model."""
    able = [form for form in forms if form.rank < form.capacity]
    if able:
        scores = [form.sensitivity * form.uncertainty for form in able]
        together = torch.stack([score.to(scores[0].device) for score in scores])
        for index in together.argsort(descending=True, stable=True)[:count].tolist():
            yield able[index]


def grow(forms: Sequence[IncrementalTriplets], schedule: GrowthSchedule, step: int) -> None:
    """Give ranks to the matrices with the highest scores, before that step, counted from 1."""
    left = schedule.target - sum(form.rank for form in forms)
    for form in _chosen(forms, min(schedule.top, left)):
        count = min(schedule.added, form.capacity - form.rank, left)
        form.promote(count, step)
        left -= count
        if not left:
            return
        form.reserve(step)
