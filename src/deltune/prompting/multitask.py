"""Tasks of multitask prompt tuning: which one is live, which rows have which, and a task as a prompt of its own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from deltune.attachment import Attachment
from deltune.errors import StateError
from deltune.methods.additive.multitask_prompt_tuning import MultitaskPrompt, MultitaskPromptTuning
from deltune.methods.additive.prompt_tuning import Prompt, PromptTuning
from deltune.tuned import Tuned

__all__ = ["separate_task", "set_task", "tasks_of_rows"]


def set_task(tuned: Tuned, task: str, name: str | None = None) -> None:
    """Make a task live for whole batches, in training and in use; it is saved along.

    Args:
        tuned: the handle.
        task: name of the task.
        name: name of the attachment; by default the only live one with several tasks.

    Raises:
        MethodError: if there is no such task.
        StateError: if there is no such attachment.
    """
    forms = _forms(_attachment(tuned, name))
    for form in forms.values():
        form.check_tasks([task])
    for form in forms.values():
        form.task = task


@contextmanager
def tasks_of_rows(tuned: Tuned, tasks: Iterable[str], name: str | None = None) -> Iterator[None]:
    """Inside the block each row of a batch has a task of its own, in training and in use.

    A batch that is a multiple as long repeats each entry, as beam search repeats each row. Where rows are routed to
    attachments too (:meth:`deltune.Tuned.route`), the tasks are those of the rows that this attachment takes.

    Args:
        tuned: the handle.
        tasks: name of the task of each row.
        name: name of the attachment; by default the only live one with several tasks.

    Raises:
        MethodError: if there is no such task.
        StateError: if there is no such attachment; in the model's call, if a batch does not fit.
    """
    rows = tuple(tasks)
    if isinstance(tasks, str) or not rows:
        raise StateError(f"Give a list with the name of the task of each row of a batch, not {tasks!r}.")
    forms = _forms(_attachment(tuned, name))
    before = {key: form.tasks_of_rows for key, form in forms.items()}
    for form in forms.values():
        form.check_tasks(rows)
    for form in forms.values():
        form.tasks_of_rows = rows
    try:
        yield
    finally:
        for key, form in forms.items():
            form.tasks_of_rows = before[key]


def separate_task(tuned: Tuned, task: str, as_name: str, name: str | None = None) -> None:
    """Attach the prompt of one task as plain prompt tuning, with the head trained along, and make it the live one.

    Saved, it can be loaded alone, and other tasks can start from it. Outputs are bit for bit those of the task.

    Args:
        tuned: the handle.
        task: name of the task.
        as_name: name of the new attachment.
        name: name of the attachment with several tasks; by default the only live one.

    Raises:
        MethodError: if there is no such task.
        StateError: if there is no such attachment, or the new name is taken.
    """
    source = _attachment(tuned, name)
    forms = _forms(source)
    for form in forms.values():
        form.check_tasks([task])
    if not isinstance(source.method, MultitaskPromptTuning):
        raise StateError(
            f"The task {task!r} is not all that {source.name!r} trains: {source.method}. Only the prompts of "
            "multitask-prompt-tuning alone can be made plain ones."
        )
    # initial values are drawn and overwritten at once: leave the caller's random numbers alone
    with torch.random.fork_rng(devices=[]):
        method = PromptTuning(length=source.method.length, initialization="uniform", targets=source.method.targets)
        tuned.attach(method, as_name, train_head=bool(source.head_names))
    attachment = tuned.attachments[as_name]
    with torch.no_grad():
        for key, form in forms.items():
            plain = attachment.forms[key]
            assert isinstance(plain, Prompt)
            plain.rows.copy_(form.prompt(task))
        heads = dict(source.selection)
        for key, value in attachment.selection:
            value.copy_(heads[key])


def _attachment(tuned: Tuned, name: str | None) -> Attachment:
    """The attachment of that name, or the only live one that has several tasks."""
    names = [name] if name is not None else [item for item in tuned.active if _forms(tuned.attachments[item])]
    found = [tuned.attachments[item] for item in names if item in tuned.attachments]
    if len(found) == 1 and _forms(found[0]):
        return found[0]
    able = [item for item, attachment in tuned.attachments.items() if _forms(attachment)]
    wanted = f"{name!r} is no attachment with several tasks" if name is not None else "Say which attachment is meant"
    raise StateError(f"{wanted}. Attached by multitask-prompt-tuning are: {', '.join(able) or 'none'}.")


def _forms(attachment: Attachment) -> dict[str, MultitaskPrompt]:
    """Its forms that have several tasks, by key."""
    return {key: form for key, form in attachment.forms.items() if isinstance(form, MultitaskPrompt)}
