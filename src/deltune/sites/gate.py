"""Where gates of changes stand: in the layer whose padding they leave out.

Letters: B batch, b rows of it, T positions, d features.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.errors import StateError
from deltune.sites.base import Control, Form, Insertion, Seen, Site, Tap, named_arguments, rows_of

__all__ = ["GateForm", "GateSite", "Pooling", "causal_at", "gate_site"]

#: What a gate makes of the values of a row's positions: their mean over real ones, over all, or one for each.
Pooling = Literal["mean", "all", "token"]
#: Stacks whose positions all read each other, unless the model is configured as a decoder.
_BIDIRECTIONAL = ("encoder", "vision")
#: What attention modules call their mask.
_MASKS = ("attention_mask", "mask")


class GateForm(Form):
    """A gate: how much of a change each row, or each position, uses. It stands beside the form that it gates.

    Args:
        pooling: how the values of a row's positions become one.
    """

    def __init__(self, pooling: Pooling) -> None:
        super().__init__()
        self.pooling: Pooling = pooling
        self._mask = Seen()

    @property
    def observes(self) -> bool:
        """Whether it has to be told of what attention reads before it is asked for a value."""
        return self.pooling == "mean"

    def observe(self, hidden: Tensor, mask: Tensor | None) -> None:
        """Take note of what attention reads, (B, T, d), and of the real positions, (B, T) boolean; None for all."""
        self._mask.inputs[:] = [] if mask is None else [mask]

    def forget(self) -> None:
        """End what :meth:`observe` began.

        Where checkpointing computes a layer again nothing follows that would; what is left is replaced by the next
        call, and is in no copy.
        """
        self._mask.inputs.clear()

    @abstractmethod
    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """G, (b, 1, 1) or (b, T, 1), for what the gated form reads, (b, T, d), in these rows of the batch."""

    def pooled(self, values: Tensor, rows: Tensor | None) -> Tensor:
        """``values`` (b, T, k) of positions as those of rows, (b, 1, k); themselves if pooling is ``token``."""
        if self.pooling == "token":
            return values
        if self.pooling == "all" or not self._mask.inputs:
            return values.mean(1, keepdim=True)
        real = rows_of(self._mask.inputs[0], rows)[..., None].to(values.dtype)
        # a row without a real position has no mean, and nothing reads it
        return (values * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp_min(1)


@dataclass(frozen=True)
class GateSite(Site):
    """The place of a gate.

    Attributes:
        name: its key.
        layer: dotted name of the layer that holds it; None outside of the layers.
        observed: dotted name of the module whose input and padding it is told of: the layer's self-attention, which is
            called again where gradient checkpointing computes the layer again; the layer where it has none.
    """

    name: str
    layer: str | None
    observed: str | None

    insertion: ClassVar[Insertion] = Insertion.PARALLEL

    @property
    def key(self) -> str:
        """Stable name of the place: ``encoder.3.attention.gate``."""
        return self.name

    @property
    def order(self) -> int:
        """Last, so that a layer's call is over for all changes when gates forget it."""
        return len(Insertion)

    def tap(self, control: Control) -> GateTap:
        """A tap that tells gates of the layer's call."""
        return GateTap(self, control)


class GateTap(Tap):
    """Hooks before the attention and behind the layer, where a gate has to be told of a call."""

    weighted = True
    site: GateSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook both, if a gate here observes."""
        forms = [form for several in self.forms.values() for form in several]
        if self.site.layer is None or not any(isinstance(form, GateForm) and form.observes for form in forms):
            return
        assert self.site.observed is not None
        observed = modules[self.site.observed]
        names = tuple(inspect.signature(observed.forward).parameters)
        # before a hook that asks for values
        handle = observed.register_forward_pre_hook(_Observe(self, names), with_kwargs=True, prepend=True)
        self._handles.append(handle)
        self._handles.append(modules[self.site.layer].register_forward_hook(self))

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let the gates forget the call."""
        for form, _ in self.live():
            assert isinstance(form, GateForm)
            form.forget()


@dataclass
class _Observe:
    """Before the attention: its input and padding, for the gates."""

    tap: GateTap
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        arguments = named_arguments(self.names, args, kwargs)
        hidden = args[0] if args else kwargs["hidden_states"]
        mask = _real(next((arguments[name] for name in _MASKS if name in arguments), None), module)
        mask = None if mask is None else mask.expand(hidden.shape[0], -1)
        for form, _ in self.tap.live():
            assert isinstance(form, GateForm)
            form.observe(hidden, mask)


def _real(mask: Any, module: nn.Module) -> Tensor | None:
    """Which positions are real, (B, T) boolean, from the mask that a module is given; None for all.

    A position is real if any query sees it.

    Raises:
        StateError: if the mask is of a kind that does not say it.
    """
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise StateError(
            f"Gates leave padding out, but {type(module).__name__} is given a mask of type {type(mask).__name__}, "
            "which does not say where it is. Load the model with attn_implementation='sdpa' or 'eager'."
        )
    if mask.dim() == 2:
        return mask.bool()
    # DeBERTa's is of whole numbers
    seen = mask > torch.finfo(mask.dtype).min / 2 if mask.dtype.is_floating_point else mask.bool()
    return seen.any(dim=(1, 2))


def gate_site(site: Site, name: str, anatomy: Anatomy) -> GateSite:
    """The place for a gate of the change at ``site``.

    Args:
        site: what is gated.
        name: key of the gate.
        anatomy: the model's parts.
    """
    holding = anatomy.layer_of(site.part.module)
    if holding is None:
        return GateSite(site.part, name, None, None)
    stack, layer = holding
    attention = (
        part.module for part in anatomy.of("attention", stack.name) if anatomy.layer_of(part.module) == holding
    )
    return GateSite(site.part, name, layer, next(attention, layer))


def causal_at(site: Site, anatomy: Anatomy, model: nn.Module) -> bool:
    """Whether a position there may not know of later ones, so that no mean over a row's positions can be taken."""
    holding = anatomy.layer_of(site.part.module)
    decoder = bool(getattr(getattr(model, "config", None), "is_decoder", False)) and len(anatomy.stacks) == 1
    return holding is None or holding[0].name not in _BIDIRECTIONAL or decoder
