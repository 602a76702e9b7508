"""The groups of a bound optimizer, where what a method trains changes, or has a rate of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltune.errors import MethodError

__all__ = ["join", "leave", "restore_groups", "split_groups"]

#: Key by which a parameter group is known that exists during one step only.
_OWN_RATE = "deltune_split_from"


def join(optimizer: torch.optim.Optimizer, owners: Sequence[Sequence[Sequence[nn.Parameter]]], method: str) -> None:
    """Let the optimizer train the parameters that it does not know, each in the group of those of its kind.

    They get the places that they would have if the optimizer were made now, because its saved state goes by places:
    a run that goes on from a checkpoint makes its optimizer anew, with all that has grown.

    Args:
        optimizer: its groups change, the states of the others do not.
        owners: for each form the parameters of each kind, all in the order in which they are listed.
        method: whose parameters they are, for messages.

    Raises:
        MethodError: if the optimizer has none of them, so that nothing says where they belong.
    """
    group_of = {id(value): group for group in optimizer.param_groups for value in group["params"]}
    known = [value for kinds in owners for kind in kinds for value in kind if id(value) in group_of]
    for kinds in owners:
        ordered = [value for kind in kinds for value in kind]
        for kind in kinds:
            for value in kind:
                if id(value) in group_of:
                    continue
                relatives = [other for other in (*kind, *ordered, *known) if id(other) in group_of]
                if not relatives:
                    raise MethodError(
                        f"{method}: the optimizer that was bound trains none of the method's parameters, so new ones "
                        "cannot join it. Make it with tuned.trainable_parameters()."
                    )
                group = group_of[id(value)] = group_of[id(relatives[0])]
                for listed in _lists(optimizer, group):
                    listed.insert(_place(value, ordered, listed), value)


def _lists(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[list[nn.Parameter]]:
    """The group's parameters; and those that it will have again, where another attachment has split it."""
    lists = {id(group["params"]): group["params"]}
    for other in optimizer.param_groups:
        if _OWN_RATE in other and other[_OWN_RATE][0] is group:
            lists[id(other[_OWN_RATE][1])] = other[_OWN_RATE][1]
    return list(lists.values())


def _place(value: nn.Parameter, ordered: Sequence[nn.Parameter], listed: Sequence[nn.Parameter]) -> int:
    """Where ``value`` belongs among those that are listed: behind the one before it, or else before the one behind."""
    places = {id(other): place for place, other in enumerate(listed)}
    own = next(place for place, other in enumerate(ordered) if other is value)
    before = next((places[id(other)] for other in reversed(ordered[:own]) if id(other) in places), None)
    if before is not None:
        return before + 1
    return next((places[id(other)] for other in ordered[own:] if id(other) in places), len(listed))


def leave(optimizer: torch.optim.Optimizer, dropped: Iterable[nn.Parameter]) -> None:
    """Let the optimizer forget parameters, and their states."""
    gone = {id(value): value for value in dropped}
    for group in optimizer.param_groups:
        for listed in _lists(optimizer, group):
            listed[:] = [value for value in listed if id(value) not in gone]
    for value in gone.values():
        optimizer.state.pop(value, None)
        value.grad = None


def split_groups(
    optimizer: torch.optim.Optimizer, multipliers: Mapping[int, float], *, present: bool = False, **settings: float
) -> None:
    """For the step to come, give some parameters a rate of their own.

    A scheduler expects the groups that it found at first, so that new ones can exist during the step only.

    Args:
        optimizer: :func:`restore_groups` puts its groups back.
        multipliers: share of the group's initial rate, by ``id`` of the parameter.
        present: whether they are shares of its present rate instead, which a scheduler may have changed.
        **settings: of these parameters, in the place of their group's, such as ``lr`` or ``weight_decay``.

    Raises:
        MethodError: if a group has no rate to take shares of.
    """
    if any(_OWN_RATE in group and id(group["params"][0]) in multipliers for group in optimizer.param_groups):
        # a step that failed has left them
        restore_groups(optimizer)
    for group in list(optimizer.param_groups):
        together: dict[float, list[nn.Parameter]] = {}
        for value in group["params"]:
            if id(value) in multipliers and (present or value.grad is not None):
                together.setdefault(multipliers[id(value)], []).append(value)
        if not together:
            continue
        original = group["params"]
        own = {id(value) for values in together.values() for value in values}
        group["params"] = [value for value in original if id(value) not in own]
        whole: Any = group["lr"] if present else group.get("initial_lr", group["lr"])
        if whole is None and "lr" not in settings:
            raise MethodError(
                f"{type(optimizer).__name__} finds its learning rates by itself, so parts of the model cannot have a "
                "multiple of them. Give it a learning rate, or set the method's own rates to 1."
            )
        for share, values in together.items():
            rate = whole if "lr" in settings else share * whole
            optimizer.param_groups.append(
                {**group, "params": values, "lr": rate, **settings, _OWN_RATE: (group, original)}
            )


def restore_groups(optimizer: torch.optim.Optimizer) -> None:
    """Undo all that :func:`split_groups` did."""
    for group in reversed(optimizer.param_groups):
        if _OWN_RATE in group:
            whole, original = group[_OWN_RATE]
            whole["params"] = original
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if _OWN_RATE not in group]
