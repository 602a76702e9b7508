"""How to merge: the strategies and their options, checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from deltune.errors import StateError, suggestion
from deltune.merging.vectors import TaskVector, dare, ties, weighted_sum

__all__ = ["STRATEGIES", "Plan"]

#: Each strategy in a few words.
STRATEGIES = {
    "linear": "weighted sum: average, task arithmetic",
    "ties": "trim, elect signs, average what agrees",
    "dare": "drop entries at random, rescale the others, then a weighted sum",
    "dare-ties": "drop and rescale, then elect signs and average what agrees",
    "concatenate": "weighted sum of low-rank changes, their factors side by side: exact",
    "svd": "weighted sum of changes of matrices, then the best approximation of a rank",
}
_SUMS = ("linear", "concatenate", "svd")
_DENSITY = {"ties": 0.2, "dare-ties": 1.0}
_DROP = 0.9


@dataclass(frozen=True)
class Plan:
    """How to merge, checked."""

    strategy: str
    weights: tuple[float, ...]
    scale: float
    density: float
    drop: float
    seed: int
    rank: int | None

    @classmethod
    def of(
        cls,
        strategy: str,
        count: int,
        weights: Sequence[float] | None,
        scale: float,
        density: float | None,
        drop: float | None,
        seed: int,
        rank: int | None,
    ) -> Plan:
        """Refuse what makes no sense together.

        Raises:
            StateError: if so.
        """
        if strategy not in STRATEGIES:
            raise StateError(f"There is no strategy {strategy!r}. {suggestion(strategy, STRATEGIES)}")
        if not count:
            raise StateError("There is nothing to merge: name one delta at least.")
        if density is not None and strategy not in _DENSITY:
            raise StateError(f"density is for the strategies {' and '.join(_DENSITY)}, not for {strategy}.")
        if drop is not None and "dare" not in strategy:
            raise StateError(f"drop is for the strategies dare and dare-ties, not for {strategy}.")
        if seed and "dare" not in strategy:
            raise StateError(f"The seed is for the strategies dare and dare-ties; {strategy} draws nothing.")
        if rank is not None and strategy == "concatenate":
            raise StateError("concatenate is exact, and has no rank to choose. To compress, use the strategy svd.")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise StateError(f"The rank is a whole number of at least 1, not {rank!r}.")
        alone = 1.0 if strategy in _DENSITY else 1.0 / count
        given = (alone,) * count if weights is None else tuple(float(weight) for weight in weights)
        if len(given) != count:
            raise StateError(f"{count} deltas but {len(given)} weights were given.")
        if not all(math.isfinite(weight) for weight in (*given, scale)):
            raise StateError(f"Weights and scale must be finite numbers, not {given} and {scale}.")
        kept = _DENSITY.get(strategy, 1.0) if density is None else density
        return cls(strategy, given, scale, kept, _DROP if drop is None else drop, seed, rank)

    @property
    def sums(self) -> bool:
        """Whether it is a weighted sum of what the deltas hold."""
        return self.strategy in _SUMS

    @property
    def factors(self) -> list[float]:
        """The factors lambda w_i of the sum."""
        return [self.scale * weight for weight in self.weights]

    def apply(self, vectors: Sequence[TaskVector], names: Sequence[str]) -> TaskVector:
        """The merged task vector, lambda included."""
        if self.sums:
            return weighted_sum(vectors, self.factors)
        if self.strategy != "ties":
            vectors = [dare(vector, self.drop, self.seed, name) for vector, name in zip(vectors, names, strict=True)]
        if self.strategy == "dare":
            return weighted_sum(vectors, self.factors)
        return weighted_sum([ties(vectors, self.density, self.weights)], [self.scale])
