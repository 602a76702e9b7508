"""Changes beside a sublayer: they read its input x and are added to its result, ``h <- h + f(x)``."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.backbone.matrices import matrix_shape
from deltune.errors import StateError, TargetError
from deltune.sites.base import Control, Form, Insertion, Site, Tap, first_tensor, with_first_tensor

__all__ = ["ParallelForm", "ParallelSite", "parallel_sites"]


class ParallelForm(Form):
    """``forward`` maps a sublayer's input (batch, positions, hidden) to a change of its result, of the same shape."""


@dataclass(frozen=True)
class ParallelSite(Site):
    """An attention or feed-forward sublayer of width ``hidden_size``, from its input to its result.

    The input is what the sublayer's first matrix reads: behind the norm where the model normalises before each
    sublayer (GPT-2, LLaMA, T5), the residual stream itself where it normalises afterwards (BERT, BART). For self
    attention that is the matrix of values, for cross-attention that of queries, for feed-forward layers ``ffn.up``.
    ``reader`` is the dotted name of that module.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    reader: str

    insertion: ClassVar[Insertion] = Insertion.PARALLEL

    @property
    def result(self) -> str:
        """Dotted name of the module whose output is the sublayer's result."""
        return self.part.result or self.part.module

    def tap(self, control: Control) -> ParallelTap:
        """A tap that takes the input and adds the change to the result."""
        return ParallelTap(self, control)


class _Seen(threading.local):
    """The input that one thread waits to use; copies and pickles hold none."""

    input: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Seen], tuple[()]]:
        return _Seen, ()


class ParallelTap(Tap):
    """A hook before the module that reads the sublayer's input, and one behind that whose output is its result."""

    weighted = True
    site: ParallelSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._seen = _Seen()

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook both modules."""
        self._handles.append(modules[self.site.reader].register_forward_pre_hook(self.read, with_kwargs=True))
        self._handles.append(modules[self.site.result].register_forward_hook(self))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input until the result is there."""
        self._seen.input = args[0] if args else next(iter(kwargs.values()))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the live changes to the result.

        Raises:
            StateError: if the model computes the result without the module that reads the input.
        """
        x, self._seen.input = self._seen.input, None
        if x is None:
            raise StateError(
                f"{self.site.result} ran without {self.site.reader}, so that the input of {self.site.key} is not "
                "known. Choose a method with another insertion for this model."
            )
        result = first_tensor(output)
        changed = result
        for form, weight in self.live():
            change: Tensor = form(x)
            changed = changed + (change if weight == 1.0 else weight * change)
        return output if changed is result else with_first_tensor(output, changed)


def parallel_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[ParallelSite, ...]:
    """The sublayers that ``targets`` selects (roles ``attention`` and ``ffn``, or modules by name).

    Raises:
        TargetError: if a target selects nothing, or a module whose result is not as wide as its input.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, tuple(modules), ("attention", "ffn")):
        parameter = next(modules[part.module].parameters())
        dtype = parameter.dtype if parameter.dtype.is_floating_point else torch.float32
        width = _width(modules[part.module], part) if part.role == "module" else anatomy.stack_of(part).hidden_size
        sites.append(ParallelSite(part, width, dtype, parameter.device, _reader(anatomy, part)))
    return tuple(sites)


def _reader(anatomy: Anatomy, part: Part) -> str:
    """The module that reads the sublayer's input; one that runs once, in DeBERTa too."""
    if part.role == "module":
        return part.module
    attention = "attention.value" if part.stack in anatomy.stacks else "attention.query"
    role = "ffn.up" if part.role == "ffn" else attention
    return next(other.module for other in anatomy.of(role, part.stack) if other.layer == part.layer)


def _width(module: nn.Module, part: Part) -> int:
    """Width of a module that was chosen by name: of the input of its first matrix and the output of its last."""
    shapes = [shape for child in module.modules() if len(shape := matrix_shape(child) or ()) == 2]
    if not shapes or shapes[0][1] != shapes[-1][0]:
        raise TargetError(
            f"The target {part.key!r} is a {type(module).__name__} whose result is not as wide as its input, so no "
            "change beside it can be added to it. Name a whole sublayer, such as 'ffn'."
        )
    return int(shapes[-1][0])
