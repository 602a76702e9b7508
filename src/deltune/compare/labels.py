"""Where to write the names of points in a picture so that they cover neither each other nor the points.

Lengths are in pixels; ``y`` grows upwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["NEAR", "Box", "place_labels"]

_DIRECTIONS = ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (1, -1), (-1, 1), (-1, -1))
_DISTANCES = (9.0, 16.0, 26.0, 40.0, 58.0, 80.0, 110.0)
_OUTSIDE_COST = 1e6
_COVER_COST = 1e5

#: A label that is farther away from its point than this is tied to it by a line.
NEAR = 14.0


@dataclass(frozen=True)
class Box:
    """A rectangle."""

    left: float
    bottom: float
    width: float
    height: float

    @property
    def right(self) -> float:
        """Its right side."""
        return self.left + self.width

    @property
    def top(self) -> float:
        """Its upper side."""
        return self.bottom + self.height

    def overlap(self, other: Box) -> float:
        """Area that both cover."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        high = min(self.top, other.top) - max(self.bottom, other.bottom)
        return wide * high if wide > 0 and high > 0 else 0.0

    def nearest_point(self, x: float, y: float) -> tuple[float, float]:
        """The point of the rectangle that is nearest to the given one."""
        return min(max(x, self.left), self.right), min(max(y, self.bottom), self.top)


def place_labels(
    points: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    bounds: Box,
    obstacles: Sequence[Box] = (),
) -> list[Box]:
    """A place for the label of each point.

    Crowded points choose first. Each takes the nearest place, right before left before above before below, that
    covers no label, no obstacle, no point and no line from another point to its label; where there is none, the one
    that covers least.

    Args:
        points: what is labelled.
        sizes: width and height of each label.
        bounds: where labels should stay.
        obstacles: what they should not cover, besides the points.

    Returns:
        One rectangle for each point, in their order.
    """
    marks = [Box(x - 5, y - 5, 10, 10) for x, y in points]
    taken = [*obstacles, *marks]
    placed: dict[int, Box] = {}

    def crowding(index: int) -> float:
        return sum(1 / (10 + math.dist(points[index], other)) for other in points)

    for index in sorted(range(len(points)), key=crowding, reverse=True):
        (x, y), (width, height) = points[index], sizes[index]
        best: tuple[float, Box] | None = None
        for rank, distance in enumerate(_DISTANCES):
            for order, (sideways, upwards) in enumerate(_DIRECTIONS):
                box = _box(x, y, width, height, sideways, upwards, distance)
                covered = sum(box.overlap(other) for other in taken)
                outside = width * height - box.overlap(bounds)
                crossed = sum(dot.overlap(other) for dot in _line((x, y), box) for other in placed.values())
                hidden = any(box.overlap(other) > 0 for other in placed.values())
                cost = 10 * (covered + crossed) + rank * 8 + order
                cost += _OUTSIDE_COST * (outside > 1e-6) + _COVER_COST * hidden
                if best is None or cost < best[0]:
                    best = (cost, box)
        assert best is not None
        placed[index] = best[1]
        taken += [best[1], *_line((x, y), best[1])]
    return [placed[index] for index in range(len(points))]


def _line(point: tuple[float, float], box: Box) -> list[Box]:
    """The line from a point to its label as small rectangles; none where the label is near and needs no line."""
    end = box.nearest_point(*point)
    length = math.dist(point, end)
    if length <= NEAR:
        return []
    steps = range(1, int(length / 4) + 1)
    where = [tuple(a + (b - a) * 4 * step / length for a, b in zip(point, end, strict=True)) for step in steps]
    return [Box(x - 2, y - 2, 4, 4) for x, y in where]


def _box(x: float, y: float, width: float, height: float, sideways: int, upwards: int, distance: float) -> Box:
    """The label's place in a direction from its point; diagonal ones keep the same distance."""
    reach = distance / math.hypot(sideways, upwards)
    centre_x = x + sideways * (reach + width / 2)
    centre_y = y + upwards * (reach + height / 2)
    return Box(centre_x - width / 2, centre_y - height / 2, width, height)
