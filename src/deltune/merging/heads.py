"""Which task head a merged delta has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltune.errors import StateError, suggestion
from deltune.merging.reading import Delta
from deltune.merging.vectors import weighted_sum

__all__ = ["AVERAGE", "chosen_head", "task_of"]

#: Instead of a delta's name: the average of all heads.
AVERAGE = "average"


def chosen_head(deltas: Sequence[Delta], weights: Sequence[float], heads: str | None) -> dict[str, Tensor]:
    """The values of the merged delta's head, by name; none if ``heads`` is None.

    Args:
        deltas: alike.
        weights: of an average; they are divided by their sum.
        heads: the name of a delta, or ``average``.

    Raises:
        StateError: if there is no such head, or the deltas' labels or heads differ.
    """
    if heads is None:
        return {}
    if heads != AVERAGE:
        found = next((delta for delta in deltas if delta.name == heads), None)
        if found is None:
            names = [*(delta.name for delta in deltas), AVERAGE]
            raise StateError(f"heads cannot be {heads!r}: none of the deltas has that name. {suggestion(heads, names)}")
        if not found.head:
            raise StateError(f"{heads!r} has no task head. Leave heads out.")
        return dict(found.head)
    first = deltas[0]
    for other in deltas[1:]:
        if other.head.keys() != first.head.keys():
            raise StateError(
                f"{first.name!r} and {other.name!r} do not both have a head of the same parts. Choose one with heads=, "
                "or leave heads out."
            )
        if first.task and other.task and _labels(first.task) != _labels(other.task):
            raise StateError(
                f"The heads of {first.name!r} and {other.name!r} answer other questions: their labels are "
                f"{_words(first.task)} and {_words(other.task)}. Choose one head with heads=."
            )
    if not first.head:
        raise StateError("None of the deltas has a task head to average. Leave heads out.")
    total = sum(weights)
    if not total:
        raise StateError("The weights add up to zero, so that heads have no average. Choose one with heads=.")
    average = weighted_sum([delta.head for delta in deltas], [weight / total for weight in weights])
    return {name: average[name].to(value) for name, value in first.head.items()}


def task_of(deltas: Sequence[Delta], heads: str | None, headless: bool) -> dict[str, Any] | None:
    """The task that the merged delta can do: that of its head; without any, one that all have.

    Args:
        deltas: alike.
        heads: as for :func:`chosen_head`.
        headless: whether the model has no task head at all, as language models.
    """
    if heads is not None:
        return next((delta.task for delta in deltas if delta.name == heads), deltas[0].task)
    first = deltas[0].task
    return first if headless and all(delta.task == first for delta in deltas) else None


def _labels(task: Mapping[str, Any]) -> Any:
    return task.get("options", {}).get("label_names")


def _words(task: Mapping[str, Any]) -> str:
    return ", ".join(map(str, _labels(task) or ())) or "none"
