"""What can be done with trained prompts: vote, transfer to other tasks, serve several tasks in one batch."""

from __future__ import annotations

from deltune.methods.additive.prompt_transfer import (
    mix_prompts,
    most_similar,
    prompt_similarity,
    read_prompt,
    transfer_weights,
)
from deltune.prompting.ensemble import EnsembleReport, PromptEnsemble, compare_votes, majority_vote, repeated
from deltune.prompting.multitask import separate_task, set_task, tasks_of_rows

__all__ = [
    "EnsembleReport",
    "PromptEnsemble",
    "compare_votes",
    "majority_vote",
    "mix_prompts",
    "most_similar",
    "prompt_similarity",
    "read_prompt",
    "repeated",
    "separate_task",
    "set_task",
    "tasks_of_rows",
    "transfer_weights",
]
