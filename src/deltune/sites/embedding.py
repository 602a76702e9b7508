"""More input positions for a stack: rows put in front of its embedded input.

Letters: B batch, T real positions, P additional positions, d hidden size.

The rows occupy positions 0..P-1 and the text begins at P; their outputs are dropped again before anything
above the stack can see them, so that heads read the positions they always read and losses need no change.
With a cache the rows enter in the first call only and stay in the cache; later calls widen the padding mask
and shift explicit positions.

Where a text is padded on its left, the rows stand between padding and text, so that distances do not depend
on the padding. Dropping the first P outputs is right all the same: what is left before the text is as long
as the padding was, and nobody reads it.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Stack, Targets, TokenEntry
from deltune.errors import StateError, TargetError
from deltune.sites.base import Control, Form, Insertion, Site, Tap, first_tensor, named_arguments, with_first_tensor

__all__ = ["TokenForm", "TokenSite", "token_sites"]


class TokenForm(Form):
    """``forward`` returns rows to put in front of the embedded input, (P, d)."""

    #: P, the number of rows.
    length: int

    @abstractmethod
    def forward(self) -> Tensor:
        """The rows, (P, d)."""


@dataclass(frozen=True)
class TokenSite(Site):
    """The input of a stack. ``embeddings`` names the table of token embeddings, if the stack has one."""

    tokens: TokenEntry
    hidden_size: int
    embeddings: str | None
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.TOKENS

    def tap(self, control: Control) -> TokenTap:
        """A tap that widens the input and drops the additional outputs."""
        return TokenTap(self, control)


class TokenTap(Tap):
    """Hooks at the stack's entry, its exit, and at whatever reads its padding mask."""

    site: TokenSite

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook entry, exit and reader."""
        tokens = self.site.tokens
        entry = modules[tokens.entry]
        names = tuple(inspect.signature(entry.forward).parameters)
        self._handles.append(entry.register_forward_pre_hook(_Entry(self, names), with_kwargs=True))
        if tokens.embeddings is not None:
            self._handles.append(modules[tokens.embeddings].register_forward_hook(_Widen(self)))
        if tokens.exit is not None:
            exit_hook = _Exit(self)
            self._handles.append(modules[tokens.exit].register_forward_hook(exit_hook, with_kwargs=True))
            if tokens.exit != tokens.entry:
                self._handles.append(entry.register_forward_hook(_DropRecorded(self), with_kwargs=True))
        if tokens.reader is not None:
            reader = modules[tokens.reader]
            names = tuple(inspect.signature(reader.forward).parameters)
            self._handles.append(reader.register_forward_pre_hook(_Reader(self, names), with_kwargs=True))

    def length(self) -> int:
        """P, over all live forms."""
        return sum(form.length for form, _ in self.live() if isinstance(form, TokenForm))

    def rows(self, like: Tensor) -> Tensor:
        """The rows of all live forms for a batch shaped and typed ``like`` (B, T, d): (B, P, d)."""
        rows = torch.cat([form() for form, _ in self.live()])
        return rows.to(like).expand(like.shape[0], -1, -1)


def _cached(arguments: Mapping[str, Any]) -> int:
    """Number of positions that the cache among a module's arguments holds."""
    cache = arguments.get("past_key_values")
    return 0 if cache is None else int(cache.get_seq_length())


@dataclass
class _Entry:
    """Before the stack: embed the input, put the rows in front, widen mask, positions and segments."""

    tap: TokenTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        count = self.tap.length()
        if not count:
            return None
        arguments = named_arguments(self.names, args, kwargs)
        if getattr(arguments.get("past_key_values"), "is_compileable", False):
            raise StateError(
                "Prompt rows do not go into a static cache: its size and its masks are fixed before the rows are "
                "known. Generate with the default cache, which grows."
            )
        first = _cached(arguments) == 0
        mask = arguments.get("attention_mask")
        outside = self.tap.site.tokens.embeddings is not None
        if mask is not None:
            arguments["attention_mask"] = _widened_mask(mask, count, in_front=outside)
        if not outside:
            if first:
                self._widen_input(module, arguments, _Order.of(mask, count), count)
            elif arguments.get("position_ids") is not None:
                arguments["position_ids"] = arguments["position_ids"] + count
        return (), arguments

    def _widen_input(self, module: nn.Module, arguments: dict[str, Any], order: _Order, count: int) -> None:
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
        arguments["inputs_embeds"] = order.apply(torch.cat([self.tap.rows(embedded), embedded], dim=1))
        positions = arguments.get("position_ids")
        mask = arguments.get("attention_mask")
        if positions is not None:
            start = tokens.padding_offset or 0
            front = torch.arange(start, start + count, device=positions.device).expand(embedded.shape[0], -1)
            behind = positions.expand(embedded.shape[0], -1) + count
            arguments["position_ids"] = order.apply(torch.cat([front, behind], dim=1))
        elif tokens.padding_offset is not None and mask is not None:
            # such models count positions over real tokens when they see ids, but not when they see embeddings
            real = mask.long()
            arguments["position_ids"] = real.cumsum(1) * real + (tokens.padding_offset - 1)
        segments = arguments.get("token_type_ids")
        if segments is not None:
            front = segments.new_zeros(segments.shape[0], count)
            arguments["token_type_ids"] = order.apply(torch.cat([front, segments], dim=1))


@dataclass
class _Order:
    """Where each row of the widened input comes from, (B, P + T); None for rows first, then the text."""

    sources: Tensor | None

    @classmethod
    def of(cls, mask: Tensor | None, count: int) -> _Order:
        """The order that puts ``count`` rows between the padding on the left, if any, and the text."""
        if mask is None:
            return cls(None)
        padding = (mask.cumsum(1) == 0).sum(1, keepdim=True)
        place = torch.arange(mask.shape[1] + count, device=mask.device).expand(mask.shape[0], -1)
        prompt = place - padding
        return cls(torch.where(place < padding, place + count, torch.where(prompt < count, prompt, place)))

    def apply(self, values: Tensor) -> Tensor:
        """``values`` (B, P + T, ...) with rows first, in this order."""
        if self.sources is None:
            return values
        index = self.sources.view(*self.sources.shape, *(1,) * (values.dim() - 2)).expand_as(values)
        return values.gather(1, index)


@dataclass
class _Widen:
    """After an embeddings module that takes no embedded input: put the rows in front of its output."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if not self.tap.length():
            return None
        embedded = first_tensor(output)
        return with_first_tensor(output, torch.cat([self.tap.rows(embedded), embedded], dim=1))


@dataclass
class _Exit:
    """After the stack: drop the additional outputs, in the call that put the rows in."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        count = self.tap.length()
        if not count:
            return None
        hidden = first_tensor(output)
        if not _entered(hidden.shape[1], kwargs):
            return None
        output = with_first_tensor(output, hidden[:, count:])
        return _without_recorded(output, count, hidden.shape[1])


@dataclass
class _DropRecorded:
    """After the whole model: drop the additional rows from recorded hidden states too."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        count = self.tap.length()
        if not count:
            return None
        length = first_tensor(output).shape[1]
        return _without_recorded(output, count, length + count)


@dataclass
class _Reader:
    """Before a decoder: widen the padding mask of the encoder's states, which hold the additional rows."""

    tap: TokenTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        count = self.tap.length()
        arguments = named_arguments(self.names, args, kwargs)
        mask = arguments.get("encoder_attention_mask")
        states = arguments.get("encoder_hidden_states")
        if not count or mask is None or states is None or mask.shape[-1] + count != states.shape[1]:
            return None
        arguments["encoder_attention_mask"] = _widened_mask(mask, count)
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


def _widened_mask(mask: Any, count: int, in_front: bool = False) -> Tensor:
    """A padding mask (B, T) with ``count`` real positions more, before the text or in front of everything."""
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise StateError(
            "Prompt rows need a padding mask of shape (batch, positions), or none; the model was given "
            + (f"one of shape {tuple(mask.shape)}." if isinstance(mask, Tensor) else f"a {type(mask).__name__}.")
        )
    order = _Order.of(None if in_front else mask, count)
    return order.apply(torch.cat([mask.new_ones(mask.shape[0], count), mask], dim=1))


def token_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[TokenSite, ...]:
    """The inputs of the stacks that ``targets`` selects (role ``embeddings``).

    Raises:
        TargetError: if a target selects nothing, or a stack whose input cannot be widened.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites = []
    for part in targets.select(anatomy, (), ("embeddings",)):
        stack = anatomy.stacks[part.stack]
        if stack.tokens is None:
            raise TargetError(
                f"The input of the {part.stack} of {anatomy.family} cannot be widened. Stacks that can: "
                + (", ".join(name for name, other in anatomy.stacks.items() if other.tokens) or "none")
                + "."
            )
        sites.append(_site(part, stack, stack.tokens, modules))
    return tuple(sites)


def _site(part: Part, stack: Stack, tokens: TokenEntry, modules: Mapping[str, nn.Module]) -> TokenSite:
    table = modules[part.module]
    parameter = next(table.parameters())
    embeddings = part.module if isinstance(table, nn.Embedding) else None
    width = tokens.width or stack.hidden_size
    return TokenSite(part, tokens, width, embeddings, parameter.dtype, parameter.device)
