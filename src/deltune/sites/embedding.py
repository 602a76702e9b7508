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
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Stack, Targets, TokenEntry
from deltune.errors import TargetError
from deltune.sites.base import (
    Control,
    Form,
    Insertion,
    Site,
    Tap,
    rows_of,
)
from deltune.sites.embedding_hooks import DropRecordedHook, EntryHook, ExitHook, ReaderHook, WidenHook
from deltune.sites.front import Front

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
    def identity(self) -> str:
        """Rows in front of the embedding module share no tap with rows behind it."""
        return f"{super().identity} behind {self.tokens.embeddings}" if self.tokens.embeddings else super().identity

    @property
    def modified(self) -> str:
        """What the stack reads."""
        return "embedded input"

    def combination(self, factor: str) -> str:
        """Rows in front."""
        return "[dh; h]"

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
        self._handles.append(entry.register_forward_pre_hook(EntryHook(self, names), with_kwargs=True))
        if tokens.embeddings is not None:
            self._handles.append(modules[tokens.embeddings].register_forward_hook(WidenHook(self)))
        if tokens.exit is not None:
            exit_hook = ExitHook(self)
            self._handles.append(modules[tokens.exit].register_forward_hook(exit_hook, with_kwargs=True))
            if tokens.exit != tokens.entry:
                self._handles.append(entry.register_forward_hook(DropRecordedHook(self), with_kwargs=True))
        if tokens.reader is not None:
            reader = modules[tokens.reader]
            names = tuple(inspect.signature(reader.forward).parameters)
            self._handles.append(reader.register_forward_pre_hook(ReaderHook(self, names), with_kwargs=True))

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


def token_sites(model: nn.Module, anatomy: Anatomy, targets: Targets, *, behind: bool = False) -> tuple[TokenSite, ...]:
    """The inputs of the stacks that ``targets`` selects (role ``embeddings``).

    Args:
        model: the model.
        anatomy: its parts.
        targets: which.
        behind: put the rows behind the module that embeds tokens, their positions and segments, and normalises them:
            then they are what the first layer reads, and take no position.

    Raises:
        TargetError: if a target selects nothing, a stack whose input cannot be widened, or with ``behind`` one that
            has no such module.
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
        tokens = _behind(part, stack.tokens, modules, anatomy) if behind else stack.tokens
        sites.append(_site(part, stack, tokens, modules))
    return tuple(sites)


def _behind(part: Part, tokens: TokenEntry, modules: Mapping[str, nn.Module], anatomy: Anatomy) -> TokenEntry:
    """``tokens`` with rows that enter behind the module that holds the table of embeddings.

    Raises:
        TargetError: if the table stands by itself.
    """
    if tokens.embeddings is not None:
        return tokens
    module = part.module.rpartition(".")[0]
    inside = module.startswith(f"{tokens.entry}.") if tokens.entry else bool(module)
    if not inside or module == tokens.entry or not isinstance(modules[part.module], nn.Embedding):
        raise TargetError(
            f"In {anatomy.family} no module embeds tokens and positions together ({part.module} stands by itself), so "
            "rows cannot enter behind it. Leave behind_embeddings out."
        )
    return replace(tokens, embeddings=module)


def _site(part: Part, stack: Stack, tokens: TokenEntry, modules: Mapping[str, nn.Module]) -> TokenSite:
    table = modules[part.module]
    parameter = next(table.parameters())
    embeddings = part.module if isinstance(table, nn.Embedding) else None
    width = tokens.width or stack.hidden_size
    return TokenSite(part, tokens, width, embeddings, parameter.dtype, parameter.device)
