"""Changes of a sublayer's result, before it is added to the residual stream: ``h <- h + f(h)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.sites.base import Control, Form, Insertion, Site, Tap, first_tensor, with_first_tensor

__all__ = ["SublayerForm", "SublayerSite", "sublayer_sites"]


class SublayerForm(Form):
    """``forward`` maps a sublayer's result (batch, positions, hidden) to a change of the same shape."""


@dataclass(frozen=True)
class SublayerSite(Site):
    """The result of an attention or feed-forward sublayer, of width ``hidden_size``."""

    hidden_size: int
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL

    @property
    def result(self) -> str:
        """Dotted name of the module whose output is the sublayer's result."""
        return self.part.result or self.part.module

    def tap(self, control: Control) -> SublayerTap:
        """A tap that adds the change to the result."""
        return SublayerTap(self, control)


class SublayerTap(Tap):
    """A forward hook on the module whose output is the sublayer's result."""

    weighted = True
    site: SublayerSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the module."""
        self._handles.append(modules[self.site.result].register_forward_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the live changes; all of them read the same, unchanged result."""
        result = first_tensor(output)
        changed = result
        for form, weight in self.live():
            change: Tensor = form(result)
            changed = changed + (change if weight == 1.0 else weight * change)
        return output if changed is result else with_first_tensor(output, changed)


def sublayer_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[SublayerSite, ...]:
    """The sublayers that ``targets`` selects (roles ``attention`` and ``ffn``, or modules by name).

    Raises:
        TargetError: if a target selects nothing.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, tuple(modules), ("attention", "ffn")):
        parameter = next(modules[part.module].parameters())
        sites.append(SublayerSite(part, _width(anatomy, modules, part), parameter.dtype, parameter.device))
    return tuple(sites)


def _width(anatomy: Anatomy, modules: Mapping[str, nn.Module], part: Any) -> int:
    """Width of the result: the stack's, or for a module chosen by name, of its last matrix."""
    if part.role != "module":
        return anatomy.stack_of(part).hidden_size
    matrices = [module for module in modules[part.module].modules() if hasattr(module, "out_features")]
    return int(matrices[-1].out_features)  # type: ignore[arg-type]
