"""The tasks by name; a task's module is imported when the task is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from deltune.errors import DataError, suggestion

if TYPE_CHECKING:
    from deltune.tasks.base import Task

_TASKS = {
    "text-classification": "deltune.tasks.classification:TextClassification",
    "text-regression": "deltune.tasks.classification:TextRegression",
    "token-tagging": "deltune.tasks.tagging:TokenTagging",
    "cloze": "deltune.tasks.cloze:Cloze",
    "causal-language-modeling": "deltune.tasks.language_modeling:CausalLanguageModeling",
    "instruction-tuning": "deltune.tasks.instruction:InstructionTuning",
    "sequence-to-sequence": "deltune.tasks.sequence_to_sequence:SequenceToSequence",
}


def task_names() -> tuple[str, ...]:
    """Names of all tasks."""
    return tuple(_TASKS)


def get_task(name: str) -> type[Task]:
    """The class of a task.

    Args:
        name: Such as ``"text-classification"``; see ``task_names``.

    Raises:
        DataError: There is no such task; the message names the nearest.
    """
    if name not in _TASKS:
        raise DataError(f"There is no task {name!r}. {suggestion(str(name), _TASKS)}")
    module, _, attribute = _TASKS[name].partition(":")
    task: type[Task] = getattr(importlib.import_module(module), attribute)
    return task


def task_from_description(description: Mapping[str, Any]) -> Task:
    """Rebuilds a task of any kind from what ``Task.describe`` returned.

    Raises:
        DataError: The description names no known task or does not fit it.
    """
    if not isinstance(description.get("task"), str):
        raise DataError(
            f"A task's description must name its task under 'task'. {suggestion(str(description.get('task')), _TASKS)}"
        )
    return get_task(description["task"]).from_description(description)
