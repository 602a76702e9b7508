"""What may be live together: checks before attachments are switched, scaled, routed or dropped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.errors import StateError, suggestion
from deltune.sites import Insertion, ParameterSite, Site, Tap

__all__ = ["check_dropped", "check_name", "check_replaced", "check_route", "check_together", "check_written", "find"]


def find(attachments: Mapping[str, Attachment], name: str) -> Attachment:
    """The attachment of that name.

    Raises:
        StateError: if there is none; the message names the nearest.
    """
    if name not in attachments:
        raise StateError(f"Nothing is attached under the name {name!r}. {suggestion(name, attachments)}")
    return attachments[name]


def check_name(name: str, attachments: Mapping[str, Attachment]) -> None:
    """Refuse a name that cannot be a submodule's, or is taken.

    Raises:
        StateError: if so.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or hasattr(nn.Module, name):
        raise StateError(f"{name!r} cannot be the name of an attachment: use letters, digits, '-' and '_'.")
    if name in attachments:
        raise StateError(f"The name {name!r} is taken. Detach it first, or choose another name.")


def check_together(
    attachments: Mapping[str, Attachment],
    taps: Mapping[str, Tap],
    names: Sequence[str],
    weights: Sequence[float],
) -> None:
    """Refuse attachments that have their own value of one parameter, and weights where a change cannot be scaled.

    Raises:
        StateError: if so, or if one would learn nothing beside the others.
    """
    check_replaced(attachments[name] for name in names)
    selected: dict[str, str] = {}
    for name, weight in zip(names, weights, strict=True):
        attachment = attachments[name]
        for parameter, _ in attachment.selection:
            if parameter in selected:
                raise StateError(
                    f"{selected[parameter]!r} and {name!r} both have their own value of {parameter}, so they "
                    "cannot be active together."
                )
            selected[parameter] = name
        unscalable = next((key for key, site, form in attachment.sites if not taps[site.identity].scales(form)), "")
        own = [parameter for parameter, _ in attachment.selection if parameter not in attachment.head_names]
        if weight != 1.0 and (unscalable or own):
            raise StateError(
                f"The change of {name!r} at {unscalable or own[0]} cannot be scaled; its weight must be 1."
            )
    for name in names:
        for parameter in attachments[name].selected_names:
            if selected.get(parameter, name) != name:
                raise StateError(
                    f"{selected[parameter]!r} has its own value of {parameter}, and {name!r} of entries of it, so they "
                    "cannot be active together."
                )
    check_written(attachments[name] for name in names)


def check_replaced(attachments: Iterable[Attachment]) -> None:
    """Refuse what would train nothing beside a method that replaces a stack's result.

    Such a method reads the states of the frozen model without a gradient, so that nothing below it can learn.

    Raises:
        StateError: if so.
    """
    several = tuple(attachments)
    sites = [(attachment.method.name, site) for attachment in several for _, site, _ in attachment.sites]
    replacing = next((name for name, site in sites if site.insertion is Insertion.REPLACE), None)
    if replacing is None:
        return
    other = next((site.key for _, site in sites if site.insertion is not Insertion.REPLACE), None)
    other = other or next((name for attachment in several for name in attachment.selected_names), None)
    if other is not None:
        raise StateError(
            f"{replacing} reads the states of the frozen model without a gradient, so what changes {other} would learn "
            f"nothing beside it. Attach {replacing} alone."
        )


def check_written(attachments: Iterable[Attachment]) -> None:
    """Refuse two mechanisms that write into one parameter, as masks and single entries do: neither knows of the other.

    Raises:
        StateError: if so.
    """
    found: dict[str, tuple[type[Site | ParameterSite], str]] = {}
    for attachment in attachments:
        written: list[tuple[str, type[Site | ParameterSite], str]] = [
            (parameter, type(site), key) for key, site, form in attachment.sites for parameter in site.selected(form)
        ]
        written += [(parameter, ParameterSite, parameter) for parameter, _ in attachment.selection]
        for parameter, kind, key in written:
            other, place = found.setdefault(parameter, (kind, key))
            if other is not kind:
                raise StateError(
                    f"{attachment.method.name}: {place} and {key} both write values into {parameter}, so they cannot "
                    "be active together. Choose targets that have no parameter in common."
                )


def check_route(attachments: Mapping[str, Attachment], names: Iterable[str]) -> None:
    """Refuse attachments that cannot act on some rows only.

    Raises:
        StateError: if one is not attached, or trains parameters of the model that all rows go through.
    """
    for name in names:
        own = find(attachments, name).selected_names
        if own:
            raise StateError(
                f"{name!r} has its own value of {own[0]}, which all rows of a batch go through, so that rows cannot be "
                "routed to it. Activate it for the whole batch, or use a method that adds a change, such as lora."
            )


def check_dropped(count: int, anatomy: Anatomy, attachments: Iterable[Attachment]) -> None:
    """Refuse a number of layers that the model does not have, and methods that cannot be dropped layer by layer.

    Raises:
        StateError: if so.
    """
    most = max((len(stack) for stack in anatomy.stacks.values()), default=0)
    if not isinstance(count, int) or isinstance(count, bool) or not 0 <= count <= most:
        raise StateError(f"0 to {most} of the lowest layers can be dropped in this model, not {count!r}.")
    for attachment in attachments:
        own = attachment.selected_names
        if count and own:
            raise StateError(
                f"{attachment.name!r} trains parameters of the model itself, such as {own[0]}, which cannot be dropped "
                "layer by layer. Use a method that adds a change (of sequential-adapter, with train_norms=false)."
            )
