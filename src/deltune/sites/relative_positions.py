"""Additional keys that take part in relative positions, as if they were text right before the real one (T5).

Letters: B batch, H heads, Q queries, T keys, P additional keys.

The bias of a stack is made once, by the first of its attention functions, and handed on to the others. While a shift is
live that function makes it wider by P columns in front, for the P positions before the text, and every attention
function of the stack takes from it what its own additional keys need.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part
from deltune.sites.base import Control, Insertion, Site, Tap

__all__ = ["RelativePositionSite", "RelativePositionTap", "relative_position_site", "widened_bias"]

#: Attribute under which an attention module finds the tap of its stack; a plain attribute, not a submodule.
_TAP = "_deltune_relative"
#: The method that makes a bias, and its arguments.
_METHOD = "compute_bias"
_ARGUMENTS = ("query_length", "key_length", "device", "past_seen_tokens")


@dataclass(frozen=True)
class RelativePositionSite(Site):
    """The relative positions of a stack.

    ``sources`` names the modules that make its bias, ``modules`` all attention functions that read it.
    """

    sources: tuple[str, ...]
    modules: tuple[str, ...]

    insertion: ClassVar[Insertion] = Insertion.KEY_VALUE

    @property
    def key(self) -> str:
        """Stable name of the place: ``decoder.positions``."""
        return f"{self.part.stack}.positions"

    def tap(self, control: Control) -> RelativePositionTap:
        """A tap at the functions that make the bias."""
        return RelativePositionTap(self, control)


class RelativePositionTap(Tap):
    """Makes the bias wider while a shift is live."""

    site: RelativePositionSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._on: list[nn.Module] = []

    @property
    def installed(self) -> bool:
        """Whether the model's modules know of this tap at present."""
        return bool(self._on)

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Stand before the functions that make the bias, and let those who read it find us."""
        self._on = [modules[name] for name in self.site.modules]
        for module in self._on:
            module.__dict__[_TAP] = self
        for name in self.site.sources:
            modules[name].__dict__[_METHOD] = _Wider(self, modules[name])

    def uninstall(self) -> None:
        """Leave the model's modules as they were."""
        super().uninstall()
        for module in self._on:
            module.__dict__.pop(_TAP, None)
            module.__dict__.pop(_METHOD, None)
        self._on.clear()

    def counts(self) -> dict[str, int]:
        """By how many positions each live attachment lets the text begin later."""
        counts: dict[str, int] = {}
        for name, form, _ in self._acting():
            counts[name] = counts.get(name, 0) + int(form())
        return counts

    def width(self) -> int:
        """How many positions are before the text: of all live attachments, or of the longest where rows are routed."""
        counts = self.counts().values()
        return max(counts, default=0) if self.control.route else sum(counts)

    def starts(self) -> dict[str, int]:
        """Where among these positions those of each live attachment begin."""
        starts: dict[str, int] = {}
        before = 0
        for name, count in self.counts().items():
            starts[name] = self.width() - count if self.control.route else before
            before += count
        return starts


@dataclass
class _Wider:
    """In the place of a module's method: the bias of the keys, and in front of it that of the positions before them."""

    tap: RelativePositionTap
    module: Any

    def __call__(
        self, query_length: int, key_length: int, device: torch.device | None = None, past_seen_tokens: Any = 0
    ) -> Tensor:
        # a bias depends on distances alone, so that moving queries and keys together changes none of the real keys'
        count = self.tap.width()
        own: Callable[..., Tensor] = getattr(type(self.module), _METHOD)
        return own(
            self.module, query_length, key_length + count, device=device, past_seen_tokens=past_seen_tokens + count
        )


def widened_bias(module: nn.Module, bias: Tensor, keys: int, added: Sequence[tuple[str, int]]) -> Tensor:
    """The bias of an attention function for its additional keys and its own, (1, H, Q, P + T).

    Args:
        module: the attention function.
        bias: (1, H, Q, T), or wider in front where the stack has a tap.
        keys: T.
        added: attachments with the numbers of their additional keys, in the order in which these stand in front.
    """
    tap: RelativePositionTap | None = vars(module).get(_TAP)
    starts = {} if tap is None else tap.starts()
    front, own = bias[..., : bias.shape[-1] - keys], bias[..., bias.shape[-1] - keys :]
    pieces = []
    for name, count in added:
        if name in starts:
            pieces.append(front[..., starts[name] : starts[name] + count])
            starts[name] += count
        else:
            pieces.append(own.new_zeros(*own.shape[:-1], count))
    return torch.cat([*pieces, own], dim=-1)


def relative_position_site(
    modules: Mapping[str, nn.Module], anatomy: Anatomy, stack: str
) -> RelativePositionSite | None:
    """The relative positions of a stack, if its attention functions have such and see what is before them alone.

    Where texts are padded on the left, as encoders' are, distances to what is before them would depend on the padding.
    """
    readers = [part.module for part in anatomy.of("attention", stack)]
    if not all(getattr(modules[name], "is_decoder", False) for name in readers):
        return None
    sources = [name for name in readers if getattr(modules[name], "has_relative_attention_bias", False)]
    known = all(
        tuple(inspect.signature(getattr(modules[name], _METHOD, len)).parameters) == _ARGUMENTS for name in sources
    )
    if not sources or not known:
        return None
    return RelativePositionSite(Part("embeddings", stack, None, sources[0]), tuple(sources), tuple(readers))
