"""Changes of the residual stream behind a whole layer, or behind a sublayer's sum: ``h <- h + f(h)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import TargetError
from deltune.sites.base import Control, Form, Insertion, Site, Tap, gated, rows_of, with_change
from deltune.sites.sublayer import OutputTap, type_and_device, widths

__all__ = ["LayerForm", "LayerSite", "NormedSumSite", "layer_sites", "residual_sum_sites"]


class LayerForm(Form):
    """``forward`` maps the residual stream (batch, positions, hidden) to a change of the same shape."""


@dataclass(frozen=True)
class LayerSite(Site):
    """The output of a layer, of width ``hidden_size``: what it hands on to the next.

    ``layer`` is the layer's dotted name. It is that of ``part``, or contains it.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    layer: str

    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    gateable: ClassVar[bool] = True
    reads: ClassVar[str] = "h"

    @property
    def modified(self) -> str:
        """The layer's result."""
        return "layer result"

    @property
    def identity(self) -> str:
        """All forms behind one layer share a tap, whichever part of it they were placed at."""
        return f"{self.insertion.value}:{self.layer} output"

    def tap(self, control: Control) -> OutputTap:
        """A tap that adds the change to the layer's output."""
        return OutputTap(self, control, self.layer)


@dataclass(frozen=True)
class NormedSumSite(Site):
    """The sum of a sublayer's result and the residual stream, in models that normalise it afterwards.

    Forms read what ``norm``, the norm of that dotted name, makes of the sum; their changes are added to the sum
    itself, so that the norm is applied twice: z = norm(s), y = norm(s + f(z)).
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    norm: str

    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    gateable: ClassVar[bool] = True
    reads: ClassVar[str] = "LN(h)"

    @property
    def modified(self) -> str:
        """The sum in front of the norm."""
        return f"{super().modified} result + stream"

    @property
    def identity(self) -> str:
        """Apart from that of changes of the sublayer's result, which act before the sum."""
        return f"{super().identity} sum"

    def tap(self, control: Control) -> NormedSumTap:
        """A tap in front of the norm."""
        return NormedSumTap(self, control)


class NormedSumTap(Tap):
    """A hook before the norm, whose own argument is the sum."""

    weighted = True
    site: NormedSumSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the norm."""
        self._handles.append(modules[self.site.norm].register_forward_pre_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add the live changes to the sum; all of them read the norm of the unchanged one, unless stacked."""
        normed, changed, before = None, args[0], None
        for form, weight, rows in self.changes(args[0]):
            if normed is None or self.reads_anew(form, before):
                # not as a call, which would come to this hook again
                normed = module.forward(changed)
            read = rows_of(normed, rows)
            changed = with_change(changed, form(read), gated(form, weight, read, rows), rows)
            before = form
        if normed is None:
            return None
        return (changed, *args[1:])


def layer_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[LayerSite, ...]:
    """The layers that ``targets`` selects (role ``layer``, or modules by name).

    Raises:
        TargetError: if a target selects nothing, or a module in which there is no matrix.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, tuple(modules), ("layer",)):
        _, width = widths(anatomy, modules, part)
        sites.append(LayerSite(part, width, *type_and_device(modules[part.module]), layer=part.module))
    return tuple(sites)


def residual_sum_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[LayerSite | NormedSumSite, ...]:
    """The residual sums behind the feed-forward sublayers that ``targets`` selects (role ``ffn``).

    Where a norm follows the sum, it is read behind that norm and changed before it. Where norms come before the
    sublayers, the sum is the layer's output.

    Raises:
        TargetError: if a target selects nothing, or it is not known where the model's norms are.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: list[LayerSite | NormedSumSite] = []
    for part in targets.select(anatomy, (), ("ffn",)):
        stack = anatomy.stack_of(part)
        facts = (part, stack.hidden_size, *type_and_device(modules[part.module]))
        if part.norm_after is not None:
            sites.append(NormedSumSite(*facts, norm=part.norm_after))
        elif part.norm_before is not None and part.layer is not None:
            sites.append(LayerSite(*facts, layer=stack.layers[part.layer]))
        else:
            raise TargetError(
                f"It is not known whether {anatomy.family} normalises before or after {part.module}, so the residual "
                "sum behind it cannot be read. Choose a method that changes a sublayer's own result, such as "
                "sequential-adapter."
            )
    return tuple(sites)
