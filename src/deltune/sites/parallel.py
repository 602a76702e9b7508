"""Changes beside a sublayer: they read its input x and are added to its result, ``h <- h + f(x)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.backbone.matrices import matrix_shape
from deltune.errors import StateError, TargetError
from deltune.sites.base import (
    Control,
    Form,
    Insertion,
    Seen,
    Site,
    Tap,
    first_tensor,
    gated,
    rows_of,
    with_change,
    with_first_tensor,
)
from deltune.sites.sublayer import type_and_device, widths

__all__ = ["ParallelForm", "ParallelSite", "parallel_sites"]


class ParallelForm(Form):
    """``forward`` maps a sublayer's input (batch, positions, hidden) to a change (batch, positions, out)."""


@dataclass(frozen=True)
class ParallelSite(Site):
    """An attention or feed-forward sublayer, from its input to its result.

    Attributes:
        hidden_size: features of the input.
        dtype: type of the weights.
        device: where they are.
        reader: dotted name of the module whose input is read.
        changed: dotted name of the module that is changed.
        out_features: features of what is changed.
        side: what of that module is changed: its ``output``, the sublayer's result, as wide as the input; or its
            ``input``, the joined heads of attention in front of their matrix.
    """

    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    reader: str
    changed: str
    out_features: int
    side: Literal["input", "output"] = "output"

    insertion: ClassVar[Insertion] = Insertion.PARALLEL
    gateable: ClassVar[bool] = True

    @property
    def modified(self) -> str:
        """The sublayer's result, or the joined heads."""
        return f"{super().modified} {'result' if self.side == 'output' else 'heads, joined'}"

    @property
    def identity(self) -> str:
        """Forms share a tap that read the same and change the same."""
        return f"{super().identity} from {self.reader} to {self.changed} {self.side}"

    def tap(self, control: Control) -> ParallelTap:
        """A tap that takes the input and adds the change."""
        return ParallelTap(self, control)


class ParallelTap(Tap):
    """A hook before the module that reads the sublayer's input, and one at the module that is changed."""

    weighted = True
    site: ParallelSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._seen = Seen()

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook both modules."""
        self._handles.append(modules[self.site.reader].register_forward_pre_hook(self.read, with_kwargs=True))
        changed = modules[self.site.changed]
        if self.site.side == "output":
            self._handles.append(changed.register_forward_hook(self))
        else:
            self._handles.append(changed.register_forward_pre_hook(self.before))

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the input until the module that is changed runs."""
        self._seen.inputs[:] = [args[0] if args else next(iter(kwargs.values()))]

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Add the live changes to what the module is given."""
        return (self._changed(args[0]), *args[1:])

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Add the live changes to the result."""
        result = first_tensor(output)
        changed = self._changed(result)
        return output if changed is result else with_first_tensor(output, changed)

    def _changed(self, h: Tensor) -> Tensor:
        """``h`` with the live changes.

        Raises:
            StateError: if the model makes it without the module that reads the input.
        """
        if not self._seen.inputs:
            raise StateError(
                f"{self.site.changed} ran without {self.site.reader}, so that the input of {self.site.key} is not "
                "known. Choose a method with another insertion for this model."
            )
        x = self._seen.inputs.pop()
        for form, weight, rows in self.changes(h):
            read = rows_of(x, rows)
            h = with_change(h, form(read), gated(form, weight, read, rows), rows)
        return h


def parallel_sites(
    model: nn.Module,
    anatomy: Anatomy,
    targets: Targets,
    *,
    stream: bool = False,
    heads: bool = False,
) -> tuple[ParallelSite, ...]:
    """The sublayers that ``targets`` selects (roles ``attention`` and ``ffn``, or modules by name).

    Args:
        model: the model.
        anatomy: its parts.
        targets: which.
        stream: read the residual stream. By default it is what the sublayer's first matrix reads, which is behind the
            norm where the model normalises before its sublayers (GPT-2, LLaMA, T5). Both are the same where it
            normalises afterwards (BERT, BART).
        heads: change the joined heads of attention before the matrix ``attention.output``, not the result behind it.
            Modules by name are changed in their result.

    Raises:
        TargetError: if a target selects nothing, a module whose result is not as wide as its input, or a sublayer
            whose norm is to be read and is not known.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, tuple(modules), ("attention", "ffn")):
        width, out_features = widths(anatomy, modules, part)
        if width != out_features:
            raise TargetError(
                f"The target {part.key!r} is a {type(modules[part.module]).__name__} whose result is not as wide as "
                "its input, so no change beside it can be added to it. Name a whole sublayer, such as 'ffn'."
            )
        facts = (part, width, *type_and_device(modules[part.module]))
        reader = _stream_reader(anatomy, part) if stream else _reader(anatomy, part)
        if part.role == "attention" and heads:
            output = _module_of(anatomy, "attention.output", part)
            shape = matrix_shape(modules[output])
            assert shape is not None
            sites.append(ParallelSite(*facts, reader, output, shape[1], "input"))
        else:
            sites.append(ParallelSite(*facts, reader, part.result or part.module, width))
    return tuple(sites)


def _module_of(anatomy: Anatomy, role: str, sublayer: Part) -> str:
    """The module that plays ``role`` in the sublayer."""
    return next(part.module for part in anatomy.of(role, sublayer.stack) if part.layer == sublayer.layer)


def _reader(anatomy: Anatomy, part: Part) -> str:
    """The module that reads the sublayer's input; one that runs once, in DeBERTa too.

    For self-attention the matrix of values, for cross-attention that of queries.
    """
    if part.role == "module":
        return part.module
    attention = "attention.value" if part.stack in anatomy.stacks else "attention.query"
    return _module_of(anatomy, "ffn.up" if part.role == "ffn" else attention, part)


def _stream_reader(anatomy: Anatomy, part: Part) -> str:
    """The module that reads the residual stream in front of the sublayer."""
    if part.norm_before is not None:
        return part.norm_before
    if part.norm_after is None:
        raise TargetError(
            f"It is not known where the residual stream in front of {part.key} is read. Let the method read what the "
            "sublayer itself reads: reads=sublayer."
        )
    return _reader(anatomy, part)
