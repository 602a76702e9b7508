"""When ranks grow, and how fast what is new learns.

Letters: t the step, from 1, and T their number.
"""

from __future__ import annotations

from dataclasses import dataclass

from deltune.errors import MethodError

__all__ = ["GrowthSchedule"]

#: In how many allocations the ranks grow at most, if nobody says: about as many as in the authors' scripts.
_ROUNDS = 16


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
