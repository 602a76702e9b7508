"""Which rows of a batch take which attachment: worked out once for each route, not at each site.

Letters: n entries of a route; B rows of a batch, a multiple of n; P rows in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor

from deltune.errors import StateError

__all__ = ["Blocks", "RoutedRows"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Blocks:
    """Rows of a batch in blocks of equal length, such that all rows of a block take the same attachment.

    Attributes:
        count: how many blocks there are.
        rows: indices (P) of the rows in the order of the blocks; None for all rows of the batch in their own order.
        owners: which attachment each block takes (count); None where the i-th block takes the i-th.
        kept: positions among the P without those that only fill up a block; None where nothing does.
        targets: indices of the rows at these positions; None for all rows of the batch in their own order.
    """

    count: int
    rows: Tensor | None
    owners: Tensor | None
    kept: Tensor | None = None
    targets: Tensor | None = None


class RoutedRows:
    """The rows of batches under one route, with indices on the device, kept for the next site and the next call.

    Args:
        route: which attachment each row takes, None for none. A batch that is a multiple as long repeats each entry.
    """

    def __init__(self, route: tuple[str | None, ...]) -> None:
        self.route = route
        self._kept: dict[Any, Any] = {}

    def __reduce__(self) -> tuple[type[RoutedRows], tuple[tuple[str | None, ...]]]:
        """Copies and pickles work their indices out anew."""
        return RoutedRows, (self.route,)

    def names(self, batch: int) -> tuple[str | None, ...]:
        """The attachment of each of ``batch`` rows.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        times = self._times(batch)
        return tuple(name for name in self.route for _ in range(times))

    def rows(self, name: str, batch: int, device: torch.device) -> Tensor | None:
        """Indices of the rows of that attachment, of none if there are none; None where all rows are.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        times = self._times(batch)

        def work_out() -> Tensor | None:
            entries = [entry for entry, other in enumerate(self.route) if other == name]
            return None if len(entries) == len(self.route) else _index(_repeated(entries, times), device)

        return self._once(("rows", name, batch, device), work_out)

    def in_order(self, names: tuple[str, ...], batch: int, device: torch.device) -> Blocks:
        """The rows of these attachments in their own order, in the longest blocks that this allows.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        times = self._times(batch)

        def work_out() -> Blocks:
            owners = {name: number for number, name in enumerate(names)}
            entries = [entry for entry, name in enumerate(self.route) if name in owners]
            taken = [owners[self.route[entry]] for entry in entries]  # type: ignore[index]
            length = math.gcd(*(len(list(run)) for _, run in groupby(taken)))
            each = taken[::length]
            rows = None if len(entries) == len(self.route) else _index(_repeated(entries, times), device)
            plain = each == list(range(len(names)))
            return Blocks(len(each), rows, None if plain else _index(each, device), targets=rows)

        return self._once(("in order", names, batch, device), work_out)

    def by_owner(self, names: tuple[str, ...], batch: int, device: torch.device) -> Blocks:
        """The rows of these attachments in a block for each, the shorter ones filled up with rows of their own.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        times = self._times(batch)

        def work_out() -> Blocks:
            each = [[entry for entry, other in enumerate(self.route) if other == name] for name in names]
            longest = max(map(len, each))
            filled = [entry for own in each for entry in own + own[-1:] * (longest - len(own))]
            kept = [place * longest + number for place, own in enumerate(each) for number in range(len(own))]
            rows, whole = _repeated(filled, times), len(kept) == len(filled)
            kept = _repeated(kept, times)
            index = _index(rows, device)
            targets = index if whole else _index([rows[place] for place in kept], device)
            return Blocks(len(names), index, None, None if whole else _index(kept, device), targets)

        return self._once(("by owner", names, batch, device), work_out)

    def longest_share(self, names: tuple[str, ...]) -> int:
        """The largest number of entries that one of these attachments has."""
        return self._once(("share", names), lambda: max(self.route.count(name) for name in names))

    def _times(self, batch: int) -> int:
        if batch % len(self.route):
            raise StateError(
                f"The rows of a batch are routed to {len(self.route)} attachments, but something in the model has "
                f"{batch} rows. Give batches of {len(self.route)} rows, or of a multiple of it, or another route."
            )
        return batch // len(self.route)

    def _once(self, key: Any, work_out: Callable[[], _T]) -> _T:
        if torch.compiler.is_compiling():  # a compiled graph holds its own indices
            return work_out()
        if key not in self._kept:
            self._kept[key] = work_out()
        found: _T = self._kept[key]
        return found


def _repeated(entries: Sequence[int], times: int) -> list[int]:
    """The rows of these entries of a route, in a batch that is ``times`` as long."""
    return [entry * times + number for entry in entries for number in range(times)]


def _index(rows: Sequence[int], device: torch.device) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.tensor(rows, dtype=torch.long, device=device)
    # kept for later calls, which may have gradients
    with torch.inference_mode(False):
        return torch.tensor(rows, dtype=torch.long, device=device)
