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
from deltune.sites.base import (
    Control,
    Form,
    Insertion,
    Site,
    Tap,
    first_tensor,
    named_arguments,
    rows_of,
    with_first_tensor,
)
from deltune.sites.front import Front, Order, widened_mask

__all__ = ["ReadingTokenForm", "TokenForm", "TokenSite", "token_sites"]


class TokenForm(Form):
    """``forward`` returns rows to put in front of the embedded input, (P, d)."""

    #: P, the number of rows.
    length: int

    @abstractmethod
    def forward(self) -> Tensor:
        """The rows, (P, d)."""


class ReadingTokenForm(Form):
    """As :class:`TokenForm`, but ``forward`` sees the text, and each row of the batch may have rows of its own.

    They are made in the call in which they enter; with a cache that is the first, whose text is the prompt alone.
    """

    #: P, the number of rows.
    length: int

    @abstractmethod
    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """The rows, (B, P, d), or (P, d) where all rows of the batch have the same.

        Args:
            embedded: the embedded input, (B, T, d), without the rows of any form.
            mask: the padding mask as the model was given it, (B, T), 1 or True at real tokens; None where there is
                none, or where the model embeds the text out of its sight (:attr:`TokenSite.sees_padding`).
        """


@dataclass(frozen=True)
class TokenSite(Site):
    """The input of a stack. ``embeddings`` names the table of token embeddings, if the stack has one."""

    tokens: TokenEntry
    hidden_size: int
    embeddings: str | None
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.TOKENS

    @property
    def sees_padding(self) -> bool:
        """Whether the padding mask is known where the rows are made; images and the like have no padding."""
        return self.tokens.embeddings is None or self.embeddings is None

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

    def front(self, x: Tensor) -> Front:
        """What is put in front of each row of a batch like ``x``."""
        lengths: dict[str | None, int] = {}
        for name, form, _ in self._acting():
            assert isinstance(form, TokenForm | ReadingTokenForm)
            lengths[name] = lengths.get(name, 0) + form.length
        if not lengths or not self.control.route:
            return Front(sum(lengths.values()))
        each = [lengths.get(name, 0) for name in self.control.routes(x.shape[0])]
        count = max(each)
        return Front(count, None if min(each) == count else torch.tensor(each, device=x.device))

    def rows(self, embedded: Tensor, mask: Tensor | None, count: int) -> Tensor:
        """The rows for the embedded input (B, T, d) and its padding mask (B, T): (B, P, d), ``count`` being P.

        Where a row of the batch has fewer, they are its last ones.
        """
        joined = embedded.new_zeros(embedded.shape[0], count, embedded.shape[2])
        places: dict[tuple[int, ...] | None, list[Tensor]] = {}
        for form, _, batch in self.changes(embedded):
            own = rows_of(embedded, batch)
            reads = isinstance(form, ReadingTokenForm)
            made = form(own, None if mask is None else rows_of(mask, batch)) if reads else form()
            key = None if batch is None else tuple(batch.tolist())
            places.setdefault(key, []).append(made.to(embedded).expand(own.shape[0], -1, -1))
        for batch_rows, made in places.items():
            rows = torch.cat(made, dim=1)
            if batch_rows is None:
                return rows
            joined[list(batch_rows), count - rows.shape[1] :] = rows
        return joined


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
        arguments = named_arguments(self.names, args, kwargs)
        given = [arguments[name] for name in self.names if isinstance(arguments.get(name), Tensor)]
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
class _Widen:
    """After an embeddings module that takes no embedded input: put the rows in front of its output."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        embedded = first_tensor(output)
        front = self.tap.front(embedded)
        if not front.count:
            return None
        return with_first_tensor(output, torch.cat([self.tap.rows(embedded, None, front.count), embedded], dim=1))


@dataclass
class _Exit:
    """After the stack: drop the additional outputs, in the call that put the rows in."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = first_tensor(output)
        count = self.tap.front(hidden).count
        if not count:
            return None
        if not _entered(hidden.shape[1], kwargs):
            return None
        output = with_first_tensor(output, hidden[:, count:])
        return _without_recorded(output, count, hidden.shape[1])


@dataclass
class _DropRecorded:
    """After the whole model: drop the additional rows from recorded hidden states too."""

    tap: TokenTap

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = first_tensor(output)
        count = self.tap.front(hidden).count
        if not count:
            return None
        length = hidden.shape[1]
        return _without_recorded(output, count, length + count)


@dataclass
class _Reader:
    """Before a decoder: widen the padding mask of the encoder's states, which hold the additional rows."""

    tap: TokenTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
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
