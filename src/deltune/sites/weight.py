"""Changes of a weight matrix: ``y <- y + dW x``, in whole matrices or in the rows of a fused one.

Shapes: x (..., in), y (..., out); a delta of weights is (rows, in) whichever way the model stores its matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Rows, Targets
from deltune.errors import TargetError
from deltune.sites.base import Control, Form, Insertion, Site, Tap

__all__ = ["WeightForm", "WeightSite", "weight_sites"]


class WeightForm(Form):
    """A change of a matrix. ``forward`` maps the matrix's input (..., in) to dh (..., rows)."""

    @abstractmethod
    def weight_delta(self) -> Tensor:
        """The change of the matrix, shape (rows, in), in the parameters' own type."""

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``output`` (..., rows) plus ``weight`` times the change; forms may fuse the sum."""
        change: Tensor = self(x)
        return output + (change if weight == 1.0 else weight * change)


@dataclass(frozen=True)
class WeightSite(Site):
    """A linear map. ``transposed`` says that its weight is stored (in, out), as in GPT-2.

    ``module`` is its dotted name; ``in_features`` and ``out_features`` are those of the part that the site
    owns; ``rows`` says which output rows those are, None for all.
    """

    in_features: int
    out_features: int
    transposed: bool
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.WEIGHT

    @property
    def module(self) -> str:
        """Dotted name of the linear map."""
        return self.part.module

    @property
    def rows(self) -> Rows | None:
        """The output rows that this site owns, None for all."""
        return self.part.rows

    def tap(self, control: Control) -> WeightTap:
        """A tap that adds the change to the linear map's output."""
        return WeightTap(self, control)

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The matrix with the change added: computed in float32 at least, stored in the matrix's type."""
        assert isinstance(form, WeightForm)
        name = f"{self.module}.weight"
        stored = modules[self.module].get_parameter("weight")
        wide = torch.promote_types(stored.dtype, torch.float32)
        merged = stored.detach().to(wide, copy=True)
        matrix = merged.T if self.transposed else merged
        delta = form.weight_delta().detach().to(matrix)
        if self.rows is None:
            matrix += delta
        else:
            view = self.rows.view(matrix, 0)
            view += self.rows.split(delta, 0)
        return {name: merged.to(stored.dtype)}


class WeightTap(Tap):
    """A forward hook on the linear map."""

    weighted = True
    site: WeightSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the linear map."""
        self._handles.append(modules[self.site.module].register_forward_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the live changes to ``output``."""
        rows = self.site.rows
        for form, weight in self.live():
            assert isinstance(form, WeightForm)
            if rows is None:
                output = form.add_to(output, args[0], weight)
            else:
                change = form(args[0])
                if weight != 1.0:
                    change = weight * change
                # in place: no linear map keeps its own output for the backward pass
                view = rows.view(output, -1)
                view += rows.split(change, -1)
        return output


def weight_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[WeightSite, ...]:
    """The linear maps that ``targets`` selects.

    Raises:
        TargetError: if a target selects nothing, or something that is not a linear map.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    parts = targets.select(anatomy, tuple(modules), PROJECTION_ROLES)
    sites = []
    for part in parts:
        module = modules[part.module]
        if not _is_linear(module):
            raise TargetError(
                f"The target {part.key!r} is a {type(module).__name__}, not a linear map. "
                f"Linear maps below it: {_linear_names(modules, part.module)}."
            )
        weight = module.get_parameter("weight")
        transposed = hasattr(module, "nf")
        out_features, in_features = (weight.shape[1], weight.shape[0]) if transposed else weight.shape
        if part.rows is not None:
            out_features = part.rows.size
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        sites.append(WeightSite(part, in_features, out_features, transposed, dtype, weight.device))
    return tuple(sites)


def _is_linear(module: nn.Module) -> bool:
    """Whether ``module`` is nn.Linear (or a subclass), or transformers' Conv1D, which has ``nf`` outputs."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _linear_names(modules: Mapping[str, nn.Module], prefix: str) -> str:
    found: Sequence[str] = [
        name for name, module in modules.items() if name.startswith(f"{prefix}.") and _is_linear(module)
    ]
    return ", ".join(found[:6]) + (", ..." if len(found) > 6 else "") if found else "none"
