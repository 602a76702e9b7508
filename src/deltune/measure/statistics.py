"""Mean and spread over repetitions, and how far a share of right answers can be trusted."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Spread", "proportion_interval"]


@dataclass(frozen=True)
class Spread:
    """Values of one measurement, repeated with several seeds.

    Attributes:
        values: as given, in order; at least one.
    """

    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.values:
            raise ValueError("A spread needs at least one value.")

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of ``values``."""
        return cls(tuple(float(value) for value in values))

    @property
    def count(self) -> int:
        """How many values there are."""
        return len(self.values)

    @property
    def mean(self) -> float:
        """Arithmetic mean."""
        return math.fsum(self.values) / len(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample (divided by one less than the count); None of a single value."""
        if len(self.values) < 2:
            return None
        mean = self.mean
        return math.sqrt(math.fsum((value - mean) ** 2 for value in self.values) / (len(self.values) - 1))

    @property
    def lowest(self) -> float:
        """The smallest value."""
        return min(self.values)

    @property
    def highest(self) -> float:
        """The greatest value."""
        return max(self.values)


def proportion_interval(share: float, count: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's interval for a share of right answers among ``count`` examples.

    It says how far the share could be from that on all possible examples of the same kind. It knows nothing of
    the spread over seeds.

    Args:
        share: right answers as a share, 0 to 1.
        count: number of examples, at least 1.
        z: quantile of the normal distribution; by default that of a 95 % interval.

    Returns:
        Lower and upper end, inside 0 to 1.

    Raises:
        ValueError: if an argument is outside its bounds.
    """
    if not 0 <= share <= 1 or count < 1:
        raise ValueError(f"share must be 0 to 1 and count at least 1, not {share} and {count}.")
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
