"""Tasks: what is learned from which data, and how it is measured.

A task reads columns of a dataset, encodes them, says which model head it needs and which metrics count, and
describes itself so that a saved delta can be evaluated on the same terms. Nothing here knows of methods.
Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.tasks._encoding import Encoded, EncodingReport
    from deltune.tasks.base import Task
    from deltune.tasks.batching import LengthBucketSampler, padding_share
    from deltune.tasks.classification import TextClassification, TextRegression
    from deltune.tasks.cloze import Cloze
    from deltune.tasks.collation import Collator
    from deltune.tasks.data import Cleaned, Split, drop_empty_rows, fingerprint, read_dataset, split_dataset
    from deltune.tasks.instruction import InstructionTuning
    from deltune.tasks.language_modeling import CausalLanguageModeling
    from deltune.tasks.registry import get_task, task_from_description, task_names
    from deltune.tasks.sequence_to_sequence import SequenceToSequence
    from deltune.tasks.tagging import TokenTagging
    from deltune.tasks.template import Template

_MODULES = {
    "CausalLanguageModeling": "language_modeling",
    "Cleaned": "data",
    "Cloze": "cloze",
    "Collator": "collation",
    "Encoded": "_encoding",
    "EncodingReport": "_encoding",
    "InstructionTuning": "instruction",
    "LengthBucketSampler": "batching",
    "SequenceToSequence": "sequence_to_sequence",
    "Split": "data",
    "Task": "base",
    "Template": "template",
    "TextClassification": "classification",
    "TextRegression": "classification",
    "TokenTagging": "tagging",
    "drop_empty_rows": "data",
    "fingerprint": "data",
    "get_task": "registry",
    "padding_share": "batching",
    "read_dataset": "data",
    "split_dataset": "data",
    "task_from_description": "registry",
    "task_names": "registry",
}

__all__ = [
    "CausalLanguageModeling",
    "Cleaned",
    "Cloze",
    "Collator",
    "Encoded",
    "EncodingReport",
    "InstructionTuning",
    "LengthBucketSampler",
    "SequenceToSequence",
    "Split",
    "Task",
    "Template",
    "TextClassification",
    "TextRegression",
    "TokenTagging",
    "drop_empty_rows",
    "fingerprint",
    "get_task",
    "padding_share",
    "read_dataset",
    "split_dataset",
    "task_from_description",
    "task_names",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
