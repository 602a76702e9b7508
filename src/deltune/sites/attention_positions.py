"""Positions of the text where an attention function has additional keys: counted over real tokens, or shifted.

Letters: B batch, T tokens.

Additional keys are not rotated, so what a query makes of them depends on the query's position. In stacks with
rotary positions these are therefore counted over real tokens, so that nothing depends on the padding. A shift
lets the text begin at a later position, as if the additional keys had taken those before it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, TokenEntry
from deltune.errors import StateError, TargetError
from deltune.sites.base import Control, Form, Insertion, Site, Tap, named_arguments

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["CountPositions", "PositionShift", "PositionSite", "position_sites"]


@dataclass
class CountPositions:
    """Before a stack: number the real tokens from 0, where padding is given and positions are not.

    One such hook serves all taps of a stack.
    """

    taps: list[Tap]
    names: tuple[str, ...]

    @classmethod
    def install(cls, tap: Tap, entry: nn.Module) -> Iterator[RemovableHandle]:
        """Let the positions of the stack be counted while ``tap`` has a live form; gives the new hook's handle.

        There is none where the stack takes no positions, or another tap has put the hook on.
        """
        present = next((hook for hook in entry._forward_pre_hooks.values() if isinstance(hook, cls)), None)
        if present is not None:
            present.taps.append(tap)
            return
        names = tuple(inspect.signature(entry.forward).parameters)
        if "position_ids" in names:
            yield entry.register_forward_pre_hook(cls([tap], names), with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Give the stack its positions."""
        arguments = named_arguments(self.names, args, kwargs)
        mask, given = arguments.get("attention_mask"), _input(arguments)
        if arguments.get("position_ids") is not None or not _counts(mask) or given is None:
            return None
        if not any(True for tap in self.taps for _ in tap.live()):
            return None
        arguments["position_ids"] = _counted(mask, given.shape[1])
        return (), arguments


class PositionShift(Form):
    """``forward`` returns the number of positions by which the text moves; nothing of it is trained."""

    formula: ClassVar[str] = "P"

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count

    def forward(self) -> int:
        """By how many positions the text moves."""
        return self.count


@dataclass(frozen=True)
class PositionSite(Site):
    """The positions of a stack, which enter at ``tokens.entry``."""

    tokens: TokenEntry

    insertion: ClassVar[Insertion] = Insertion.KEY_VALUE

    @property
    def modified(self) -> str:
        """Where the text stands."""
        return "positions"

    @property
    def key(self) -> str:
        """Stable name of the place: ``decoder.positions``."""
        return f"{self.part.stack}.positions"

    def tap(self, control: Control) -> PositionTap:
        """A tap before the stack."""
        return PositionTap(self, control)


class PositionTap(Tap):
    """A hook before the stack that adds to its positions, or makes them where they are not given."""

    site: PositionSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the entry."""
        entry = modules[self.site.tokens.entry]
        names = tuple(inspect.signature(entry.forward).parameters)
        self._handles.append(entry.register_forward_pre_hook(_ShiftPositions(self, names), with_kwargs=True))


@dataclass
class _ShiftPositions:
    """Before a stack: move the positions of the text."""

    tap: PositionTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = named_arguments(self.names, args, kwargs)
        given = _input(arguments)
        if given is None:
            return None
        shifts = [(int(form()), rows) for form, _, rows in self.tap.changes(given)]
        if not shifts:
            return None
        tokens = self.tap.site.tokens
        counts = [count for count, _ in shifts]
        farthest = sum(counts) if shifts[0][1] is None else max(counts)
        _check_table(tokens, given.shape[1], _cached(arguments), farthest)
        positions = arguments.get("position_ids")
        positions = _usual(tokens, arguments, given) if positions is None else positions
        for count, rows in shifts:
            if rows is None:
                positions = positions + count
            else:
                positions = positions.expand(given.shape[0], -1)
                positions = positions.index_add(0, rows, positions.new_full((len(rows), positions.shape[1]), count))
        arguments["position_ids"] = positions
        return (), arguments


def _input(arguments: Mapping[str, Any]) -> Tensor | None:
    """What the stack reads, (B, T) or (B, T, d)."""
    ids: Tensor | None = arguments.get("input_ids")
    return arguments.get("inputs_embeds") if ids is None else ids


def _cached(arguments: Mapping[str, Any]) -> Any:
    """Number of positions that the cache holds; a tensor in static caches."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else cache.get_seq_length()


def _counts(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def _counted(mask: Any, length: int) -> Tensor:
    """Positions of the last ``length`` tokens, counted over real ones from 0, (B, T)."""
    positions: Tensor = (mask.long().cumsum(1) - 1).clamp(min=0)
    return positions[:, -length:]


def _usual(tokens: TokenEntry, arguments: Mapping[str, Any], given: Tensor) -> Tensor:
    """The positions that the stack has without a shift, where none are given, (B or 1, T)."""
    mask, ids, past = arguments.get("attention_mask"), arguments.get("input_ids"), _cached(arguments)
    if tokens.padding_offset is not None and ids is not None:
        real: Tensor = ids.ne(tokens.padding_offset - 1).long()
        counted: Tensor = real * (real.cumsum(1) + past) + (tokens.padding_offset - 1)
        return counted
    if tokens.positions is None and _counts(mask):
        return _counted(mask, given.shape[1])
    places = torch.arange(given.shape[1], device=given.device) + (tokens.padding_offset or 0)
    return places[None] + past  # type: ignore[no-any-return]


def _check_table(tokens: TokenEntry, length: int, past: Any, count: int) -> None:
    if tokens.positions is not None and isinstance(past, int) and past + length + count > tokens.positions:
        raise StateError(
            f"{past + length} tokens whose positions are shifted by {count} need {past + length + count} positions, "
            f"but the model has {tokens.positions}. Shorten the text to {tokens.positions - count} tokens, or attach "
            "without a shift of positions."
        )


def position_sites(model: nn.Module, anatomy: Anatomy, stacks: Sequence[str]) -> tuple[PositionSite, ...]:
    """The positions of these stacks.

    Raises:
        TargetError: if a stack's positions cannot be given to it.
    """
    sites = []
    for name in stacks:
        tokens = anatomy.stacks[name].tokens
        module = None if tokens is None else model.get_submodule(tokens.entry)
        if tokens is None or module is None or "position_ids" not in inspect.signature(module.forward).parameters:
            raise TargetError(
                f"The positions of the {name} of {anatomy.family} cannot be shifted: it takes no position_ids. Attach "
                "without a shift of positions."
            )
        sites.append(PositionSite(Part("embeddings", name, None, tokens.entry), tokens))
    return tuple(sites)
