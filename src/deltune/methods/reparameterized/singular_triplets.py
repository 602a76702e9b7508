"""Changes in the form of a singular value decomposition, whose triplets are zeroed along a common budget.

Letters: d_in and d_out the matrix's width and height, r the initial rank, t the step, from 0, and T their number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.methods.reparameterized.low_rank import LowRank, low_rank_of
from deltune.sites import Form, WeightSite

__all__ = ["BudgetSchedule", "SingularTriplets", "allocate", "final_ranks", "orthonormality", "smooth"]


@dataclass(frozen=True)
class BudgetSchedule:
    """How many triplets all matrices together keep after the step t, counted from 0 (equation 12 of the paper).

    Attributes:
        start: the number at first.
        target: the number at the end.
        initial: steps of the first phase, in which nothing is zeroed.
        final: steps of the last phase, in which scores and choice stay as they are.
        total: number of steps T.
        interval: steps from one allocation to the next between the two phases.
    """

    start: int
    target: int
    initial: int
    final: int
    total: int
    interval: int

    def settled(self, step: int) -> bool:
        """Whether the target holds after every step from here on; the last step is among these in any case."""
        return step > self.total - self.final or step >= self.total - 1

    def budget(self, step: int) -> int:
        """The number of triplets b(t)."""
        if self.settled(step):
            return self.target
        if step <= self.initial:
            return self.start
        left = 1 - (step - self.initial) / (self.total - self.final - self.initial)
        return int(self.target + (self.start - self.target) * left**3)

    def allocates(self, step: int) -> bool:
        """Whether triplets are zeroed after the step."""
        return self.settled(step) or (step > self.initial and step % self.interval == 0)

    def observes(self, step: int) -> bool:
        """Whether the scores still learn from the step."""
        return step < self.total - self.final


class SingularTriplets(LowRank):
    r"""dh = s P diag(Lambda) Q dropout(x): ``B`` is P (d_out, r), ``E`` is Lambda (r, 1), ``A`` is Q (r, d_in).

    P and Q are normal with deviation 0.02 at the start, Lambda is zero. Buffers hold the smoothed sensitivity and
    uncertainty of every entry, made in float32 at least, and ``kept`` (r): which triplets the last allocation kept.

    Args:
        site: the matrix.
        rank: r.
        scale: s, which does not depend on how many triplets are kept.
        whole: the rank at which a low-rank change has this scale in files.
        dropout: probability of zeroing an entry of x while training.
    """

    formula: ClassVar[str] = "{x} Q diag(lambda) P"

    kept: Tensor

    def __init__(self, site: WeightSite, rank: int, scale: float, whole: int, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        self.E = nn.Parameter(torch.zeros(rank, 1, dtype=site.dtype, device=site.device))
        nn.init.normal_(self.A, std=0.02)
        nn.init.normal_(self.B, std=0.02)
        self.whole = whole
        self.schedule: BudgetSchedule | None = None
        wide = torch.promote_types(site.dtype, torch.float32)
        for name, value in list(self.named_parameters()):
            self.register_buffer(f"sensitivity_{name}", torch.zeros_like(value, dtype=wide, requires_grad=False))
            self.register_buffer(f"uncertainty_{name}", torch.zeros_like(value, dtype=wide, requires_grad=False))
        self.register_buffer("kept", torch.ones(rank, dtype=torch.bool, device=site.device))

    def factors(self) -> tuple[Tensor, Tensor]:
        """Q and P diag(Lambda)."""
        return self.A, self.B * self.E.T

    def trained_count(self) -> int:
        """The values of the triplets that are left."""
        left = self.rank if self.kept.is_meta else int(self.alive().sum())
        return left * sum(value.numel() // self.rank for value in self.parameters())

    def alive(self) -> Tensor:
        """The triplets (r) that are not dropped: kept by the last allocation, or come back since."""
        return self.kept | (self.E.detach()[:, 0] != 0)

    @torch.no_grad()
    def observe(self, beta1: float, beta2: float) -> None:
        """Smooth sensitivity and uncertainty of every entry, from its value and its gradient."""
        for name, value in self.named_parameters():
            sensitivity = self.get_buffer(f"sensitivity_{name}")
            uncertainty = self.get_buffer(f"uncertainty_{name}")
            now = torch.zeros_like(sensitivity)
            if value.grad is not None:
                now = (value.to(now) * value.grad.to(now)).abs()
            smooth(sensitivity, uncertainty, now, beta1, beta2)

    def scores(self) -> Tensor:
        """The importance (r) of each triplet: of its entry of Lambda, and on average of its two vectors."""
        of_Q, of_P, of_Lambda = (
            self.get_buffer(f"sensitivity_{name}") * self.get_buffer(f"uncertainty_{name}") for name in "ABE"
        )
        return of_Lambda[:, 0] + of_Q.mean(1) + of_P.mean(0)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Zero Lambda of all triplets but these (r); their vectors stay, so that they may come back."""
        self.kept.copy_(kept)
        self.E.masked_fill_(~self.kept[:, None], 0)

    def deviations(self) -> list[Tensor]:
        """P^T P - I and Q Q^T - I, both (r, r), in float32 at least."""
        return orthonormality(self.B, self.A)

    def stored(self) -> LowRank | None:
        """The triplets that are not dropped as a plain low-rank change; None if there is none."""
        alive = self.alive()
        count = int(alive.sum())
        if count == 0:
            return None
        factor_A, factor_B = (factor.detach() for factor in self.factors())
        factor_A, factor_B = factor_A[alive], factor_B[:, alive]
        if count != self.whole:
            # a file's scale is alpha / rank
            factor_B = factor_B * (count / self.whole)
        return low_rank_of(factor_A, factor_B, self.scale * self.whole / count)


@torch.no_grad()
def smooth(sensitivity: Tensor, uncertainty: Tensor, now: Tensor, beta1: float, beta2: float) -> None:
    """Let the running means of a sensitivity, and of its distance from its mean, learn in place from a step."""
    sensitivity.mul_(beta1).add_(now, alpha=1 - beta1)
    # the distance from the mean that knows this step already
    uncertainty.mul_(beta2).add_((now - sensitivity).abs(), alpha=1 - beta2)


def orthonormality(P: Tensor, Q: Tensor) -> list[Tensor]:
    """P^T P - I and Q Q^T - I, both (r, r), of P (d_out, r) and Q (r, d_in), in float32 at least."""
    kind = Q.device.type
    # half precision would drown what is left of the deviation near the end
    exact = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    with exact:
        wide = torch.promote_types(Q.dtype, torch.float32)
        P, Q = P.to(wide), Q.to(wide)
        unit = torch.eye(len(Q), dtype=Q.dtype, device=Q.device)
        return [P.T @ P - unit, Q @ Q.T - unit]


@torch.no_grad()
def allocate(forms: Sequence[SingularTriplets], budget: int) -> None:
    """Keep the ``budget`` triplets with the highest scores of all forms, and zero the others."""
    scores = [form.scores() for form in forms]
    together = torch.cat([score.to(scores[0].device) for score in scores])
    kept = torch.zeros_like(together, dtype=torch.bool)
    kept[together.argsort(descending=True, stable=True)[:budget]] = True
    first = 0
    for form in forms:
        form.keep(kept[first : first + form.rank])
        first += form.rank


def final_ranks(forms: Mapping[str, Form]) -> dict[str, int]:
    """The number of triplets that each matrix has left, by key; of plain low-rank changes their rank.

    Args:
        forms: the forms of an attachment by key, ``tuned.attachments["default"].forms``.
    """
    return {
        key: int(form.alive().sum()) if isinstance(form, SingularTriplets) else form.rank
        for key, form in forms.items()
        if isinstance(form, LowRank)
    }
