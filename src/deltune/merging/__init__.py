"""Arithmetic between trained deltas: sums, averages, negation, analogies, TIES, DARE."""

from __future__ import annotations

from deltune.merging.merge import STRATEGIES, Merged, analogy, merge_deltas, negate
from deltune.merging.vectors import LazyVector, TaskVector, dare, ties, trim, weighted_sum

__all__ = [
    "STRATEGIES",
    "LazyVector",
    "Merged",
    "TaskVector",
    "analogy",
    "dare",
    "merge_deltas",
    "negate",
    "ties",
    "trim",
    "weighted_sum",
]
