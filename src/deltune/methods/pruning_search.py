"""Architecture search by pruning: train all candidates, drop the least useful step by step, train those that are left.

Lawton et al. 2023, arXiv 2305.16597. Letters: N candidates, single trained values; K of them are to be left; delta the
update of a candidate, its value minus that at the start; g its gradient.

Dropping a candidate, that is setting its update to zero, changes the loss by about -delta g, in each batch by another
amount. Its score is the mean over the steps since candidates were last dropped, of the amounts themselves or of their
absolute values; those with the lowest go first.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from deltune.errors import MethodError
from deltune.methods.base import Method
from deltune.methods.optimizer_groups import restore_groups, split_groups
from deltune.methods.options import option
from deltune.sites import Form

__all__ = ["Candidates", "PruningSchedule", "PruningSearch", "prune"]


@dataclass(frozen=True)
class PruningSchedule:
    """After which steps how many candidates are left: from ``total`` to ``target`` in equal ratios.

    Attributes:
        total: number N of candidates at first.
        target: number K at the end.
        first: the step after which some are dropped for the first time, from 1.
        last: the step after which the target is met.
        events: how often some are dropped; less often where there are fewer steps.
    """

    total: int
    target: int
    first: int
    last: int
    events: int

    def left_after(self, step: int) -> int | None:
        """How many are left after the step; None where none are dropped then."""
        span = self.last - self.first
        count = min(self.events, span + 1)
        steps = (
            [self.last] if count == 1 else [self.first + round(span * event / (count - 1)) for event in range(count)]
        )
        if step not in steps:
            return None
        passed = (steps.index(step) + 1) / count
        left: float = self.total * (self.target / self.total) ** passed
        return round(left)


class Candidates(nn.Module):
    """Part of a form whose trained values are candidates of a search.

    Buffers hold, for all values flattened and put one behind the other, (N,): ``start``, what each began with;
    ``kept``, whether it is left; ``score``, the sum of its scores, float32. ``observed`` () counts the steps in that
    sum, ``finished`` () says whether the search is over.
    """

    start: Tensor
    kept: Tensor
    score: Tensor
    observed: Tensor
    finished: Tensor
    schedule: PruningSchedule | None

    def begin_search(self, values: Sequence[Tensor], vectors: Tensor) -> None:
        """Make the buffers.

        Args:
            values: the trained tensors, as they are at the start; :meth:`searched` gives the same ones.
            vectors: of each candidate the number of the vector that it belongs to, (N,), for structured pruning.
        """
        flat = torch.cat([value.detach().reshape(-1).to(values[0].device) for value in values])
        self.vectors = vectors.cpu()
        self.schedule = None
        self.register_buffer("start", flat.clone())
        self.register_buffer("kept", torch.ones_like(flat, dtype=torch.bool))
        self.register_buffer("score", torch.zeros_like(flat, dtype=torch.float32))
        self.register_buffer("observed", torch.zeros((), dtype=torch.int64, device=flat.device))
        self.register_buffer("finished", torch.zeros((), dtype=torch.bool, device=flat.device))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        score = self._buffers.pop("score", None)
        apply: Any = super()._apply
        moved: Self = apply(fn, recurse)
        if score is not None:
            # a sum over many steps stays float32, wherever the model goes
            there = fn(score)
            self.register_buffer("score", there if there.dtype == score.dtype else score.to(there.device))
        return moved

    def searched(self) -> Sequence[nn.Parameter]:
        """The trained tensors of which the candidates are entries."""
        raise NotImplementedError

    def trained_count(self) -> int:
        """How many candidates are left."""
        return int(self.kept_on_cpu().sum())

    def kept_on_cpu(self) -> Tensor:
        """``kept`` on the CPU; of a model on the meta device, which has no values, all."""
        return torch.ones(self.kept.shape, dtype=torch.bool) if self.kept.is_meta else self.kept.cpu()

    def _slices(self) -> list[tuple[nn.Parameter, slice]]:
        slices, first = [], 0
        for value in self.searched():
            slices.append((value, slice(first, first + value.numel())))
            first += value.numel()
        return slices

    @torch.no_grad()
    def observe(self, criterion: str = "signed") -> None:
        """Add -delta g of every candidate to its score, or its absolute value."""
        for value, part in self._slices():
            if value.grad is not None:
                update = value.reshape(-1) - self.start[part].to(value)
                change = -update.float() * value.grad.reshape(-1).float()
                self.score[part] += (change.abs() if criterion == "absolute" else change).to(self.score)
        self.observed += 1

    @torch.no_grad()
    def drop_gradients(self) -> None:
        """The gradients of dropped candidates become zero."""
        for value, part in self._slices():
            if value.grad is not None:
                value.grad.masked_fill_(~self.kept[part].to(value.device).view_as(value), 0)

    @torch.no_grad()
    def hold(self) -> None:
        """Dropped candidates are what they were at the start, whatever an optimizer's momentum did."""
        for value, part in self._slices():
            dropped = ~self.kept[part].to(value.device).view_as(value)
            value.copy_(torch.where(dropped, self.start[part].to(value).view_as(value), value))

    @torch.no_grad()
    def restart(self, optimizer: torch.optim.Optimizer) -> None:
        """Begin anew: all updates are zero, and the optimizer knows nothing of them."""
        for value, part in self._slices():
            value.copy_(self.start[part].to(value).view_as(value))
            optimizer.state.pop(value, None)

    def scores(self, structured: bool) -> tuple[Tensor, Tensor]:
        """Mean score and size of each candidate, or of each vector: the sum over what is left of it. On the CPU.

        Of those that are dropped already the size is zero.
        """
        kept = self.kept.cpu()
        score = torch.where(kept, self.score.cpu() / self.observed.clamp(min=1).cpu(), 0)
        if not structured:
            return score, kept.long()
        count = int(self.vectors.max()) + 1
        vectors = self.vectors
        return (
            torch.zeros(count).index_add(0, vectors, score),
            torch.zeros(count, dtype=torch.int64).index_add(0, vectors, kept.long()),
        )

    @torch.no_grad()
    def keep(self, kept: Tensor, structured: bool) -> None:
        """Keep these candidates, or vectors, of those that are left, and learn scores anew."""
        each = kept[self.vectors] if structured else kept
        self.kept &= each.to(self.kept.device)
        self.score.zero_()
        self.observed.zero_()
        self.hold()


@torch.no_grad()
def prune(forms: Sequence[Candidates], left: int, structured: bool, owner: str) -> None:
    """Drop the candidates with the lowest scores of all forms together.

    Args:
        forms: what holds them.
        left: how many are to be left; of structured ones at most as many: vectors are kept in the order of their
            scores until the next one would be too much, and those that alone would be are dropped.
        structured: whether whole vectors are kept or dropped.
        owner: the method, for messages.

    Raises:
        MethodError: if there is no score to choose by, or no vector is small enough to be kept.
    """
    found = [form.scores(structured) for form in forms]
    scores, sizes = (torch.cat(list(column)) for column in zip(*found, strict=True))
    if not bool(scores.isfinite().all()):
        raise MethodError(
            f"{owner}: some scores are not finite numbers: training has diverged. Lower the learning rate, or train in "
            "float32."
        )
    if not scores.any():
        raise MethodError(
            f"{owner}: no candidate has a score, so there is nothing to choose by. Did gradients reach the model, and "
            "does the optimizer hold all of tuned.trainable_parameters()?"
        )
    order = torch.where((sizes > 0) & (sizes <= left), scores, -torch.inf).argsort(descending=True, stable=True)
    kept = torch.zeros(len(scores), dtype=torch.bool)
    # the first ones, up to the first that is too much
    kept[order[: int((sizes[order].cumsum(0) <= left).sum())]] = True
    if not kept.any():
        raise MethodError(
            f"{owner}: a budget of {left} values holds nothing: the smallest vector has {int(sizes[sizes > 0].min())}. "
            "Raise the budget."
        )
    first = 0
    for form, (score, _) in zip(forms, found, strict=True):
        form.keep(kept[first : first + len(score)], structured)
        first += len(score)


@dataclass(frozen=True)
class PruningSearch(Method):
    """What methods that search by pruning have in common."""

    budget: float = option(0.1, "share of the candidates that is left", minimum=0, maximum=1, exclusive=True)
    warm_up: float = option(0.1, "share of the training before the first are dropped", minimum=0, maximum=1)
    search: float = option(
        0.4, "share of the training after which the budget is met, warm-up included", minimum=0, maximum=1
    )
    events: int = option(8, "how often candidates are dropped", minimum=1)
    criterion: str = option(
        "absolute",
        "of -delta g, by whose mean over batches a candidate is scored: absolute or signed values",
        choices=("absolute", "signed"),
    )
    restart: bool = option(True, "train what is left from the start again; else go on from what was learnt")
    final_rate: float = option(
        1.0,
        "learning rate of what is left once the search is over, as a multiple of that of the search",
        minimum=0,
        exclusive=True,
    )

    @property
    @abstractmethod
    def structured(self) -> bool:
        """Whether whole vectors are kept or dropped."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warm_up > self.search:
            raise MethodError(
                f"{self.name}: warm_up is {self.warm_up:g} of the training, but the search ends after {self.search:g} "
                "of it. Lower warm_up, or raise search."
            )

    def searching(self, forms: Mapping[str, Form]) -> list[Candidates]:
        """The forms that hold candidates."""
        return [form for form in forms.values() if isinstance(form, Candidates)]

    def is_found(self) -> bool:
        """Whether the architecture is given, so that nothing is searched for."""
        return False

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether there is nothing to search for any more."""
        return self.is_found() or self.budget == 1 or all(bool(form.finished) for form in self.searching(forms))

    def _target(self, searching: Sequence[Candidates]) -> int:
        return max(1, round(self.budget * sum(form.kept.numel() for form in searching)))

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Lay out the schedule.

        A handle whose search is over trains what was found.

        Raises:
            MethodError: if nobody says how many steps there are, they are too few, or the budget is too small for
                anything.
        """
        searching = self.searching(forms)
        if self.settled(forms):
            for form in searching:
                form.schedule = None
            return
        if steps is None:
            raise MethodError(
                f"{self.name} has to know how many steps training will have. Pass it when binding the optimizer: "
                "tuned.bind(optimizer, steps)."
            )
        if steps < 3:
            raise MethodError(
                f"{self.name} needs three steps at least, two to search in and one to train what is left, not {steps}."
            )
        last = min(max(2, round(self.search * steps)), steps - 1)
        # before the second step all updates are zero
        first = min(max(2, round(self.warm_up * steps)), last)
        total = sum(form.kept.numel() for form in searching)
        smallest = min(int(form.scores(self.structured)[1].min()) for form in searching)
        if smallest > self._target(searching):
            raise MethodError(
                f"{self.name}: a budget of {self._target(searching)} values holds nothing: the smallest vector has "
                f"{smallest}. Raise the budget."
            )
        for form in searching:
            form.schedule = PruningSchedule(total, self._target(searching), first, last, self.events)

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Learn the scores, while something is searched for; afterwards give what is left its own rate."""
        own: list[nn.Parameter] = []
        for form in self.searching(forms):
            if form.schedule is not None and not form.finished:
                form.observe(self.criterion)
            form.drop_gradients()
            if form.finished or (self.is_found() and self.budget != 1):
                own += form.searched()
        if self.final_rate != 1:
            split_groups(optimizer, {id(value): self.final_rate for value in own}, present=True)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Drop what the schedule says, and see that what is dropped stays so.

        Raises:
            MethodError: if the schedule was not laid out, because another attachment was live at that time.
        """
        restore_groups(optimizer)
        searching = self.searching(forms)
        for form in searching:
            form.hold()
        if self.settled(forms):
            return
        schedule = searching[0].schedule
        if schedule is None:
            raise MethodError(f"{self.name} was not active when the optimizer was bound. Bind the optimizer again.")
        # a search that an earlier training left unfinished may be overdue
        left = schedule.target if step >= schedule.last else schedule.left_after(step)
        # where a warm-up starts at a rate of zero nothing has moved yet: the next time will do
        scored = step >= schedule.last or any(bool(form.score.any()) for form in searching)
        if left is not None and scored:
            prune(searching, left, self.structured, self.name)
        if step >= schedule.last:
            for form in searching:
                form.finished.fill_(True)
                if self.restart:
                    form.restart(optimizer)
