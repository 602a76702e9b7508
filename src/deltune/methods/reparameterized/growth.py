"""When ranks grow, and what that means for an optimizer: new parameters, with a learning rate of their own.

Letters: t the step, from 1, and T their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from deltune.errors import MethodError

__all__ = ["GrowthSchedule", "join", "leave", "restore_groups", "split_groups"]

#: In how many allocations the ranks grow at most, if nobody says: about as many as in the authors' scripts.
_ROUNDS = 16
#: Key by which a parameter group is known that exists during one step only.
_OWN_RATE = "deltune_split_from"


@dataclass(frozen=True)
class GrowthSchedule:
    """When matrices gain ranks, how many of them, and how fast what is new learns.

    Attributes:
        target: ranks of all matrices together at the end.
        initial: ranks grow only after this step t.
        interval: and only at its multiples.
        top: how many matrices grow at a time.
        added: ranks that each of them gains.
        total: number of steps T.
        warmup: steps in which the rate of a new component rises.
    """

    target: int
    initial: int
    interval: int
    top: int
    added: int
    total: int
    warmup: int

    def grows(self, step: int) -> bool:
        """Whether ranks may grow before the step t."""
        return step > self.initial and step % self.interval == 0

    def multiplier(self, joined: int, step: int) -> float | None:
        """Share of the initial rate in a step, both counted from 1, for what joined just before the step ``joined``.

        It rises from 0 to 1, then falls so that it would be 0 after the last step. None where the optimizer's own rate
        holds: for what was there from the start (0), in the step of joining, and after the training.
        """
        taken = step - joined - 1
        if joined == 0 or taken < 0 or step > self.total:
            return None
        if taken < self.warmup:
            return taken / self.warmup
        left = self.total - joined
        return (left - taken) / (left - self.warmup)

    @classmethod
    def plan(
        cls,
        start: int,
        target: int,
        matrices: int,
        *,
        added: int,
        total: int,
        initial: int,
        final: int,
        warmup: int,
        interval: int | None = None,
        top: int | None = None,
    ) -> GrowthSchedule:
        """A schedule that goes from ``start`` ranks to ``target`` in ``total`` steps.

        Args:
            start: ranks of all matrices together at the start.
            target: and at the end.
            matrices: how many matrices there are.
            added: ranks that a matrix gains at a time.
            total: number of steps T.
            initial: steps without growth at the start.
            final: and at the end, where ``interval`` and ``top`` leave it open and the training is not too short.
            warmup: steps in which the rate of a new component rises.
            interval: steps from one allocation to the next; what fits if None.
            top: how many matrices grow at a time; what is needed if None.

        Raises:
            MethodError: if the target cannot be reached.
        """
        grants = -(-(target - start) // added)
        most = min(top or matrices, matrices)
        fewest = -(-grants // most)

        def rounds(last: int, every: int) -> int:
            return max(0, last // every - initial // every)

        every = interval or 1
        last = total - 1 - final
        if (interval and top) or rounds(last, every) < fewest:
            last = total - 1
        room = rounds(last, every)
        if room < fewest:
            needed = (initial // every + fewest) * every + 1
            raise MethodError(
                f"increlora: to grow from {start} to {target} ranks, {most} matrices at a time by {added}, takes "
                f"{fewest} allocations. {total} steps with one every {interval or 1} after the first {initial} have "
                f"room for {room}. With as many initial steps it takes {needed} steps; or shorten initial or interval, "
                "or raise top."
            )
        if grants and top is None:
            most = -(-grants // (room if interval else max(fewest, min(grants, room, _ROUNDS))))
        if grants and interval is None:
            needed = -(-grants // most)
            every = next(length for length in range(max(1, last // needed), 0, -1) if rounds(last, length) >= needed)
        return cls(target, initial, every, most, added, total, warmup)


def join(optimizer: torch.optim.Optimizer, owners: Sequence[Sequence[Sequence[nn.Parameter]]]) -> None:
    """Let the optimizer train the parameters that it does not know, each in the group of those of its kind.

    They get the places that they would have if the optimizer were made now, because its saved state goes by places:
    a run that goes on from a checkpoint makes its optimizer anew, with all that has grown.

    Args:
        optimizer: its groups change, the states of the others do not.
        owners: for each form the parameters of each kind, all in the order in which they are listed.

    Raises:
        MethodError: if the optimizer has none of them, so that nothing says where they belong.
    """
    group_of = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    known = [value for kinds in owners for kind in kinds for value in kind if id(value) in group_of]
    for kinds in owners:
        ordered = [value for kind in kinds for value in kind]
        for kind in kinds:
            for value in kind:
                if id(value) in group_of:
                    continue
                relatives = [other for other in (*kind, *ordered, *known) if id(other) in group_of]
                if not relatives:
                    raise MethodError(
                        "increlora: the optimizer that was bound trains none of the method's parameters, so new ones "
                        "cannot join it. Make it with tuned.trainable_parameters()."
                    )
                group = group_of[id(value)] = group_of[id(relatives[0])]
                for listed in _lists(optimizer, group):
                    listed.insert(_place(value, ordered, listed), value)


def _lists(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[list[nn.Parameter]]:
    """The group's parameters; and those that it will have again, where another attachment has split it."""
    lists = {id(group["params"]): group["params"]}
    for other in optimizer.param_groups:
        if _OWN_RATE in other and other[_OWN_RATE][0] is group:
            lists[id(other[_OWN_RATE][1])] = other[_OWN_RATE][1]
    return list(lists.values())


def _place(value: nn.Parameter, ordered: Sequence[nn.Parameter], listed: Sequence[nn.Parameter]) -> int:
    """Where ``value`` belongs among those that are listed: behind the one before it, or else before the one behind."""
    places = {id(other): place for place, other in enumerate(listed)}
    own = next(place for place, other in enumerate(ordered) if other is value)
    before = next((places[id(other)] for other in reversed(ordered[:own]) if id(other) in places), None)
    if before is not None:
        return before + 1
    return next((places[id(other)] for other in ordered[own:] if id(other) in places), len(listed))


def leave(optimizer: torch.optim.Optimizer, dropped: Iterable[nn.Parameter]) -> None:
    """Let the optimizer forget parameters, and their states."""
    gone = {id(value): value for value in dropped}
    for group in optimizer.param_groups:
        for listed in _lists(optimizer, group):
            listed[:] = [value for value in listed if id(value) not in gone]
    for value in gone.values():
        optimizer.state.pop(value, None)
        value.grad = None


def split_groups(optimizer: torch.optim.Optimizer, multipliers: Mapping[int, float]) -> None:
    """For the step to come, give some parameters a rate of their own.

    A scheduler expects the groups that it found at first, so that new ones can exist during the step only.

    Args:
        optimizer: :func:`restore_groups` puts its groups back.
        multipliers: share of the group's initial rate, by ``id`` of the parameter.
    """
    if any(_OWN_RATE in group and id(group["params"][0]) in multipliers for group in optimizer.param_groups):
        # a step that failed has left them
        restore_groups(optimizer)
    for group in list(optimizer.param_groups):
        together: dict[float, list[nn.Parameter]] = {}
        for value in group["params"]:
            if id(value) in multipliers and value.grad is not None:
                together.setdefault(multipliers[id(value)], []).append(value)
        if not together:
            continue
        original = group["params"]
        own = {id(value) for values in together.values() for value in values}
        group["params"] = [value for value in original if id(value) not in own]
        initial: Any = group.get("initial_lr", group["lr"])
        for share, values in together.items():
            optimizer.param_groups.append(
                {**group, "params": values, "lr": share * initial, _OWN_RATE: (group, original)}
            )


def restore_groups(optimizer: torch.optim.Optimizer) -> None:
    """Undo all that :func:`split_groups` did."""
    for group in reversed(optimizer.param_groups):
        if _OWN_RATE in group:
            whole, original = group[_OWN_RATE]
            whole["params"] = original
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if _OWN_RATE not in group]
