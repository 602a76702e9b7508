"""Several forms of one kind computed together: the rows of a routed batch in a few kernels, however many forms.

Letters: G forms, B rows of a batch, T positions of a row; x (B, ..., in), y (B, ..., out).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor

from deltune.sites.base import Form, Tap
from deltune.sites.routed_rows import Blocks, RoutedRows

__all__ = ["Group", "GroupableForm", "GroupedForms", "Plan", "Together", "blocks_for", "in_blocks"]


class GroupedForms(ABC):
    """G forms with their values stacked, that map blocks of rows, the i-th block with the i-th form.

    Attributes:
        rank: how many numbers a form holds for each entry of a row; what it costs to give each block a copy.
    """

    rank: int

    @abstractmethod
    def gathered(self, owners: Tensor) -> Self:
        """The forms of these indices, of which some may come several times."""

    @abstractmethod
    def change(self, x: Tensor) -> Tensor:
        """The changes (G, T, out) for x (G, T, in)."""

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """``output`` (G, T, out) plus the changes; the sum may be fused."""
        return output + self.change(x).to(output.dtype)


class GroupableForm(Form):
    """A form that may say how several of its kind are computed together; by default each is computed alone."""

    def groups_with(self) -> Hashable | None:
        """What forms at one site share that :meth:`stack` computes together; None for alone."""
        return None

    @classmethod
    def stack(cls, forms: Sequence[Self], dtype: torch.dtype) -> GroupedForms:
        """Forms that agree in :meth:`groups_with`, to be computed together for input of type ``dtype``."""
        raise NotImplementedError(f"{cls.__name__} does not say how several are computed together.")

    @classmethod
    def state(cls, forms: Sequence[Self]) -> Hashable | None:
        """Something that differs once the change of one of them does, so that a stack can be kept; None for unknown."""
        return None


_Form = TypeVar("_Form", bound=GroupableForm)


@dataclass(frozen=True)
class Group(Generic[_Form]):
    """Forms of one kind, two at least, and the names of their attachments."""

    kind: Hashable
    names: tuple[str, ...]
    forms: tuple[_Form, ...]


@dataclass(frozen=True)
class Plan(Generic[_Form]):
    """What is computed together under one route; it holds while the modes of all forms and the dropped layers do.

    Attributes:
        route: the route.
        dropped: numbers of dropped layers, in evaluation and in training.
        forms: all live ones of the site.
        modes: whether each of them is training.
        groups: what is computed together.
        together: the forms in these groups.
        whole: whether no other form acts.
    """

    route: tuple[str | None, ...]
    dropped: tuple[int, int]
    forms: tuple[Form, ...]
    modes: tuple[bool, ...]
    groups: tuple[Group[_Form], ...]
    together: frozenset[Form]
    whole: bool


class Together(Generic[_Form]):
    """The forms of one site that are computed together, worked out once for each route, and their stacks.

    A stack is kept for the next call while nothing is trained and the forms' values stay the same. Copies and pickles
    are empty.

    Args:
        tap: of the site.
    """

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        self._plan: Plan[_Form] | None = None
        self._kept: dict[Hashable, tuple[Hashable, GroupedForms, list[Tensor]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"tap": self.tap, "_plan": None, "_kept": {}}

    def stack(self, group: Group[_Form], dtype: torch.dtype) -> GroupedForms:
        """The forms of a group, for input of that type."""
        form = type(group.forms[0])
        if torch.compiler.is_compiling():
            return form.stack(group.forms, dtype)
        if torch.is_grad_enabled():
            # gradients must reach the forms, and the optimizer that follows changes them, not always noticeably
            self._kept = {}
            return form.stack(group.forms, dtype)
        state = form.state(group.forms)
        if state is None:
            return form.stack(group.forms, dtype)
        key = group, dtype
        kept = self._kept.get(key)
        if kept is None or kept[0] != state:
            values = [value for one in group.forms for value in (*one.parameters(), *one.buffers())]
            # held, so that no other tensor comes to stand where these were
            held = [*values, *(value.detach() for value in values)]
            kept = self._kept[key] = (state, form.stack(group.forms, dtype), held)
        return kept[1]

    def clear(self) -> None:
        """Keep nothing."""
        self._plan, self._kept = None, {}

    def plan(self) -> Plan[_Form]:
        """What is computed together under the present route."""
        compiling = torch.compiler.is_compiling()
        control, plan = self.tap.control, None if compiling else self._plan
        dropped = control.dropped, control.dropped_in_training
        if plan is not None and plan.route is control.route and plan.dropped == dropped:
            modes = tuple([form.training for form in plan.forms])
            if modes == plan.modes:
                return plan
        forms = tuple(form for name in control.live for form in self.tap.forms.get(name, ()))
        acting = list(self.tap._acting())
        groups = tuple(_groups(acting))
        together = frozenset(form for group in groups for form in group.forms)
        modes = tuple([form.training for form in forms])
        plan = Plan(control.route, dropped, forms, modes, groups, together, len(together) == len(acting))
        if not compiling:
            self._plan = plan
        return plan


def _groups(acting: Iterable[tuple[str, Any, float]]) -> Iterator[Group[Any]]:
    found: dict[Hashable, dict[str, Any]] = {}
    for name, form, weight in acting:
        # what a gate or another number than one scales is computed alone
        kind = form.groups_with() if weight == 1.0 and not form.gated_by else None
        if kind is None:
            continue
        number = 0  # a second one of the same attachment belongs to another group
        while name in found.setdefault((kind, number), {}):
            number += 1
        found[kind, number][name] = form
    return (Group(key, tuple(own), tuple(own.values())) for key, own in found.items() if len(own) > 1)


def blocks_for(routed: RoutedRows, names: tuple[str, ...], x: Tensor, rank: int) -> Blocks:
    """The rows of ``x`` that take these attachments, laid out so that the least is copied.

    Either rows stay where they are and blocks get copies of the forms, or rows move, so that each form has one block:
    better where rows are short and ranks high, as in generation.
    """
    batch, device = x.shape[0], x.device
    stay = routed.in_order(names, batch, device)
    if stay.owners is None:
        return stay
    moved = x[..., 0].numel() // len(routed.route) * routed.longest_share(names) * len(names)
    return routed.by_owner(names, batch, device) if moved < stay.count * rank else stay


def in_blocks(x: Tensor, count: int) -> Tensor:
    """``x`` (P, ..., d) as (count, P / count, d), what lies between taken as further rows."""
    return x.reshape(count, x.shape[:-1].numel() // count, x.shape[-1])
