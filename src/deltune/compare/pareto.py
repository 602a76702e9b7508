"""Which points nothing else beats in both quality and cost."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["pareto_front"]


def pareto_front(points: Sequence[tuple[float, float]], *, greater_is_better: bool = True) -> list[int]:
    """The points to which no other is at least equal in both respects and better in one.

    Args:
        points: cost (less is better) and quality of each.
        greater_is_better: whether a greater quality is better.

    Returns:
        Their positions, sorted by cost. Equal points are either all among them or none.
    """
    sign = 1 if greater_is_better else -1
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -sign * points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or sign * points[index][1] > sign * points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front
