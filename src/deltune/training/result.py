"""What a training run ends with."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["FitResult"]


@dataclass(frozen=True)
class FitResult:
    """What came out of a run. Everything in it is a plain value that JSON can write.

    Attributes:
        metrics: evaluation of the weights that the run ended with, by the names of the task; ``loss`` besides.
            Empty without evaluation data.
        history: one dictionary for each logged step, in order: ``step``, ``epoch``, ``loss``,
            ``learning_rate``, ``gradient_norm`` and, where an evaluation took place, ``evaluation`` with its
            metrics. The loss is the mean since the entry before.
        seconds: time spent training alone: no evaluation, no writing of files.
        steps: steps done.
        examples: rows read, repeated ones included.
        best_step: the step whose weights were kept, None without evaluation or with ``keep_best=False``.
        stopped_early: whether patience ended the run before its last step.
        padding_share: share of padding among the tokens of all training batches.
        settings: the settings with every default filled in.
        provenance: method, task, data, versions, seed, device and so on: what it takes to do the run again.
    """

    metrics: dict[str, float]
    history: list[dict[str, Any]]
    seconds: float
    steps: int
    examples: int
    best_step: int | None
    stopped_early: bool
    padding_share: float
    settings: dict[str, Any]
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All values by name."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> FitResult:
        """The result that :meth:`to_dict` described."""
        return cls(**{item.name: values[item.name] for item in dataclasses.fields(cls)})
