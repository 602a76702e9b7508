"""The hooks by which additional input positions enter a stack and leave it again; see :mod:`deltune.sites.embedding`.

Letters: B batch, T real positions, P additional positions, d hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.errors import StateError
from deltune.sites.base import first_tensor, named_arguments, with_first_tensor
from deltune.sites.front import Front, Order, widened_mask

if TYPE_CHECKING:
    from deltune.sites.embedding import TokenTap

__all__ = ["DropRecordedHook", "EntryHook", "ExitHook", "ReaderHook", "WidenHook"]


def _cached(arguments: Mapping[str, Any]) -> int:
    """Number of positions that the cache among a module's arguments holds."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


@dataclass
class EntryHook:
    """Before the stack: embed the input, put the rows in front, widen mask, positions and segments."""

    tap: TokenTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Widen what the stack is given.

        Raises:
            StateError: if there is a static cache, too few positions, or no way to tell rows of different lengths.
        """
        arguments = named_arguments(self.names, args, kwargs)
        first = ("input_ids", "inputs_embeds", *self.names)
        given = [arguments[name] for name in first if isinstance(arguments.get(name), Tensor)]
        front = self.tap.front(given[0]) if given else Front(0)
        if not front.count:
            return None
        if getattr(arguments.get("past_key_values"), "is_compileable", False):
            raise StateError(
                "Prompt rows do not go into a static cache: its size and its masks are fixed before the rows are "
                "known. Generate with the default cache, which grows."
            )
        cached = _cached(arguments)
        outside = self.tap.site.tokens.embeddings is not None
        if front.lengths is not None:
            self._prepare_lengths(arguments, front, cached, given[0])
        mask = arguments.get("attention_mask")
        if mask is not None:
            arguments["attention_mask"] = widened_mask(mask, front, in_front=outside)
        if not outside:
            if cached == 0:
                self._widen_input(module, arguments, mask, front)
            elif arguments.get("position_ids") is not None:
                shift = front.count if front.lengths is None else front.lengths[:, None]
                arguments["position_ids"] = arguments["position_ids"] + shift
            elif front.lengths is not None and "position_ids" in self.names:
                new = torch.arange(cached, cached + given[0].shape[1], device=given[0].device)
                arguments["position_ids"] = new - front.missing
        return (), arguments

    def _prepare_lengths(self, arguments: dict[str, Any], front: Front, cached: int, x: Tensor) -> None:
        """See to a padding mask, where rows of the batch have prompts of different lengths.

        Raises:
            StateError: if the model cannot tell them apart.
        """
        tokens = self.tap.site.tokens
        counted = tokens.positions is None or "position_ids" in self.names
        if tokens.embeddings is not None or "attention_mask" not in self.names or not counted:
            raise StateError(
                f"The {self.tap.site.part.stack} cannot take prompts of different lengths in one batch, nor rows "
                "without one, because it has no mask or no positions to tell. Route rows to prompts of one length."
            )
        if arguments.get("attention_mask") is None:
            length = x.shape[1] + (cached - front.count if cached else 0)
            arguments["attention_mask"] = torch.ones(x.shape[0], length, dtype=torch.long, device=x.device)

    def _widen_input(self, module: nn.Module, arguments: dict[str, Any], given: Tensor | None, front: Front) -> None:
        """Widen all but the mask, which was ``given`` without the rows."""
        count = front.count
        order = Order.of(given, count)
        embedded = arguments.get("inputs_embeds")
        ids = arguments.get("input_ids")
        if embedded is None:
            if ids is None:
                raise StateError(f"{type(module).__name__} was given neither input_ids nor inputs_embeds.")
            embedded = module.get_input_embeddings()(ids)  # type: ignore[operator]
        length = embedded.shape[1]
        tokens = self.tap.site.tokens
        if tokens.positions is not None and length + count > tokens.positions:
            raise StateError(
                f"{count} prompt rows and {length} tokens need {length + count} positions, but the model has "
                f"{tokens.positions}. Shorten the text to {tokens.positions - count} tokens or the prompt."
            )
        arguments["input_ids"] = None
        arguments["inputs_embeds"] = order.apply(torch.cat([self.tap.rows(embedded, given, count), embedded], dim=1))
        positions = arguments.get("position_ids")
        mask = arguments.get("attention_mask")
        if positions is not None:
            start = tokens.padding_offset or 0
            before = torch.arange(start, start + count, device=positions.device).expand(embedded.shape[0], -1)
            if front.lengths is not None:
                before = (before - front.missing).clamp(min=start)
            behind = positions.expand(embedded.shape[0], -1) + (
                count if front.lengths is None else front.lengths[:, None]
            )
            arguments["position_ids"] = order.apply(torch.cat([before, behind], dim=1))
        elif tokens.padding_offset is not None and mask is not None:
            # such models count positions over real tokens when they see ids, but not when they see embeddings
            real = mask.long()
            arguments["position_ids"] = real.cumsum(1) * real + (tokens.padding_offset - 1)
        elif front.lengths is not None and "position_ids" in self.names:
            # those that each row would have alone, where no padding stands in front of its prompt but its own
            assert given is not None
            padding = (given.cumsum(1) == 0).sum(1, keepdim=True)
            place = torch.arange(length + count, device=embedded.device).expand(embedded.shape[0], -1)
            shifted = torch.maximum(place - front.missing, padding)
            arguments["position_ids"] = torch.where(place < padding, place, shifted)
        segments = arguments.get("token_type_ids")
        if segments is not None:
            zeros = segments.new_zeros(segments.shape[0], count)
            arguments["token_type_ids"] = order.apply(torch.cat([zeros, segments], dim=1))


@dataclass
class WidenHook:
    """After an embeddings module that takes no embedded input: put the rows in front of its output."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put them in front."""
        embedded = first_tensor(output)
        front = self.tap.front(embedded)
        if not front.count:
            return None
        return with_first_tensor(output, torch.cat([self.tap.rows(embedded, None, front.count), embedded], dim=1))


@dataclass
class ExitHook:
    """After the stack: drop the additional outputs, in the call that put the rows in."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Drop them, if this call put them in."""
        hidden = first_tensor(output)
        count = self.tap.front(hidden).count
        if not count:
            return None
        if not _entered(hidden.shape[1], kwargs):
            return None
        output = with_first_tensor(output, hidden[:, count:])
        return _without_recorded(output, count, hidden.shape[1])


@dataclass
class DropRecordedHook:
    """After the whole model: drop the additional rows from recorded hidden states too."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Drop them."""
        hidden = first_tensor(output)
        count = self.tap.front(hidden).count
        if not count:
            return None
        length = hidden.shape[1]
        return _without_recorded(output, count, length + count)


@dataclass
class ReaderHook:
    """Before a decoder: widen the padding mask of the encoder's states, which hold the additional rows."""

    tap: TokenTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Widen the mask."""
        arguments = named_arguments(self.names, args, kwargs)
        mask = arguments.get("encoder_attention_mask")
        states = arguments.get("encoder_hidden_states")
        front = Front(0) if states is None else self.tap.front(states)
        if not front.count or states is None:
            return None
        if mask is None and front.lengths is not None:
            length = states.shape[1] - front.count
            mask = torch.ones(states.shape[0], length, dtype=torch.long, device=states.device)
        if mask is None or mask.shape[-1] + front.count != states.shape[1]:
            return None
        arguments["encoder_attention_mask"] = widened_mask(mask, front)
        return (), arguments


def _entered(length: int, arguments: Mapping[str, Any]) -> bool:
    """Whether the rows entered in this call: there is no cache, or all that it holds is of this call."""
    cached = _cached(arguments)
    return cached in (0, length)


def _without_recorded(output: Any, count: int, length: int) -> Any:
    """``output`` with its recorded hidden states of ``length`` rows without the first ``count`` of them."""
    recorded = output.get("hidden_states") if hasattr(output, "get") else None
    if recorded is not None:
        output["hidden_states"] = tuple(state[:, count:] if state.shape[1] == length else state for state in recorded)
    return output
