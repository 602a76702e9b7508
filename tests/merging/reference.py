"""Slow, obvious twins of the strategies: loops over single numbers."""

from __future__ import annotations

import numpy as np

Vector = dict[str, np.ndarray]


def flat(vector: Vector) -> list[float]:
    return [float(value) for key in sorted(vector) for value in vector[key].reshape(-1)]


def shaped(values: list[float], like: Vector) -> Vector:
    found, start = {}, 0
    for key in sorted(like):
        size = like[key].size
        found[key] = np.array(values[start : start + size]).reshape(like[key].shape)
        start += size
    return found


def linear(vectors: list[Vector], weights: list[float], scale: float = 1.0) -> Vector:
    rows = [flat(vector) for vector in vectors]
    return shaped(
        [scale * sum(weight * value for weight, value in zip(weights, column)) for column in zip(*rows)],  # noqa: B905
        vectors[0],
    )


def kept(values: list[float], density: float) -> list[bool]:
    """Which entries trimming keeps: those not below the magnitude that has the rank N - floor(density N)."""
    rank = len(values) - int(density * len(values))
    bound = sorted(abs(value) for value in values)[rank - 1] if rank else 0.0
    return [abs(value) >= bound for value in values]


def trimmed(vector: Vector, density: float) -> Vector:
    values = flat(vector)
    return shaped([value if keep else 0.0 for value, keep in zip(values, kept(values, density), strict=True)], vector)


def ties(vectors: list[Vector], density: float, weights: list[float] | None = None, scale: float = 1.0) -> Vector:
    factors = weights or [1.0] * len(vectors)
    rows = [
        [factor * value for value in flat(trimmed(vector, density))]
        for factor, vector in zip(factors, vectors, strict=True)
    ]
    columns = list(zip(*rows, strict=True))
    signs = [int(np.sign(sum(column))) for column in columns]
    majority = int(np.sign(sum(signs)))
    merged = []
    for column, sign in zip(columns, signs, strict=True):
        elected = sign or majority
        agreeing = [value for value in column if (value > 0 if elected > 0 else value < 0)]
        merged.append(scale * sum(agreeing) / len(agreeing) if agreeing else 0.0)
    return shaped(merged, vectors[0])
