"""Changes of a sublayer's result, before it is added to the residual stream: ``h <- h + f(h)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.backbone.matrices import matrix_shape
from deltune.errors import TargetError
from deltune.sites.base import (
    Control,
    Form,
    Insertion,
    Site,
    Tap,
    first_tensor,
    gated,
    rows_of,
    with_change,
    with_first_tensor,
)

__all__ = ["SublayerForm", "SublayerSite", "sublayer_sites", "type_and_device", "widths"]


class SublayerForm(Form):
    """``forward`` maps a sublayer's result (batch, positions, hidden) to a change of the same shape."""


@dataclass(frozen=True)
class SublayerSite(Site):
    """The result of an attention or feed-forward sublayer, of width ``hidden_size``."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    gateable: ClassVar[bool] = True
    reads: ClassVar[str] = "h"

    @property
    def modified(self) -> str:
        """The sublayer's result."""
        return f"{super().modified} result"

    @property
    def result(self) -> str:
        """Dotted name of the module whose output is the sublayer's result."""
        return self.part.result or self.part.module

    def tap(self, control: Control) -> OutputTap:
        """A tap that adds the change to the result."""
        return OutputTap(self, control, self.result)


class OutputTap(Tap):
    """A forward hook on the ``module`` of that name: its output is what forms read and what they change."""

    weighted = True

    def __init__(self, site: Site, control: Control, module: str) -> None:
        super().__init__(site, control)
        self.module = module

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the module."""
        self._handles.append(modules[self.module].register_forward_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the live changes; all of them read the same, unchanged output, unless they are stacked."""
        result = first_tensor(output)
        changed, source, before = result, result, None
        for form, weight, rows in self.changes(result):
            if self.reads_anew(form, before):
                source = changed
            read = rows_of(source, rows)
            changed = with_change(changed, form(read), gated(form, weight, read, rows), rows)
            before = form
        return output if changed is result else with_first_tensor(output, changed)


def sublayer_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[SublayerSite, ...]:
    """The sublayers that ``targets`` selects (roles ``attention`` and ``ffn``, or modules by name).

    Raises:
        TargetError: if a target selects nothing, or a module in which there is no matrix.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, tuple(modules), ("attention", "ffn")):
        _, width = widths(anatomy, modules, part)
        sites.append(SublayerSite(part, width, *type_and_device(modules[part.module])))
    return tuple(sites)


def widths(anatomy: Anatomy, modules: Mapping[str, nn.Module], part: Part) -> tuple[int, int]:
    """Features of what a sublayer or layer reads and of its result.

    Both are the stack's hidden size. For a module chosen by name they are the inputs of its first matrix and the
    outputs of its last.

    Raises:
        TargetError: if there is no matrix in a module that was chosen by name.
    """
    if part.role != "module":
        width = anatomy.stack_of(part).hidden_size
        return width, width
    inside = [child for child in modules[part.module].modules() if not isinstance(child, nn.Embedding)]
    shapes = [shape for child in inside if len(shape := matrix_shape(child) or ()) == 2]
    if not shapes:
        raise TargetError(
            f"The target {part.key!r} is a {type(modules[part.module]).__name__} without a matrix, so it is not known "
            "how wide its result is. Name a whole sublayer or layer."
        )
    return shapes[0][1], shapes[-1][0]


def type_and_device(module: nn.Module) -> tuple[torch.dtype, torch.device]:
    """Type and device for a form at ``module``: those of its weights; float32 where these are quantised."""
    parameter = next(module.parameters())
    return parameter.dtype if parameter.dtype.is_floating_point else torch.float32, parameter.device
