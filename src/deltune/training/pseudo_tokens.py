"""Whether the live methods make the pseudo tokens that a task's template has."""

from __future__ import annotations

from deltune.errors import StateError
from deltune.sites import PseudoTokenSite, TokenForm
from deltune.tasks import Cloze, Task
from deltune.tuned import Tuned

__all__ = ["check_pseudo_tokens"]


def check_pseudo_tokens(tuned: Tuned, task: Task) -> None:
    """Refuse a task whose pseudo tokens nothing makes, and methods that make such as the task does not have.

    A model without a method for them would fail at their ids with an error that says nothing to people.

    Raises:
        StateError: if so.
    """
    wanted = task.pseudo_tokens if isinstance(task, Cloze) else 0
    made = {
        name: sum(
            form.length
            for _, site, form in tuned.attachments[name].sites
            if isinstance(site, PseudoTokenSite) and isinstance(form, TokenForm)
        )
        for name in tuned.active
    }
    # rows that are routed have one attachment each
    counts = set(made.values()) if tuned.control.route else {sum(made.values())}
    if counts <= {wanted}:
        return
    made_now = " or ".join(map(str, sorted(counts)))
    if not wanted:
        raise StateError(
            f"The live method makes {made_now} pseudo tokens for a template, but the task {task.name!r} has none here. "
            f"Use the task cloze with a template that has [P{max(counts)}]; or attach p-tuning with placement=front."
        )
    raise StateError(
        f"The task's template has {wanted} pseudo token{'s' * (wanted != 1)}, but the live methods make "
        f"{made_now if max(counts) else 'none'}. Attach p-tuning(placement=template, length={wanted}), or change the "
        "template."
    )
