"""Batches of rows of similar length, so that little is padded."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

from deltune.errors import DataError


class LengthBucketSampler:
    """Batches of row positions, alike in length inside a batch, in random order.

    Every epoch all rows are shuffled and divided into pools of ``pool_batches`` batches; a pool is sorted by
    length and cut into batches; then the batches of all pools are shuffled. Every row occurs exactly once. An
    incomplete batch comes last.

    The order depends only on the lengths, the options, ``seed`` and the epoch. Nothing has to be saved to
    resume: skip the batches that were done. Use it as ``batch_sampler`` of a ``torch.utils.data.DataLoader``.

    Args:
        lengths: Tokens of each row.
        batch_size: Rows of a batch.
        seed: Any whole number; 0 by default.
        drop_last: Whether to leave out the incomplete batch; false by default.
        pool_batches: Batches of a pool; 50 by default. More means less padding and less randomness in which
            rows meet; 1 means plain shuffling.

    Raises:
        DataError: There are no rows, or an option is not positive.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int = 0,
        drop_last: bool = False,
        pool_batches: int = 50,
    ) -> None:
        self._lengths = [int(length) for length in lengths]
        if not self._lengths:
            raise DataError("There are no rows to make batches of. Give at least one length.")
        for option, value in (("batch_size", batch_size), ("pool_batches", pool_batches)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise DataError(f"{option} must be a whole number of at least 1, not {value!r}.")
        if drop_last and batch_size > len(self._lengths):
            raise DataError(
                f"drop_last leaves no batch: there are {len(self._lengths)} rows and batch_size is "
                f"{batch_size}. "
                "Lower batch_size or keep the last batch."
            )
        self.batch_size = batch_size
        self.seed = seed
        self.drop_last = drop_last
        self.pool_batches = pool_batches
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch, counting from 0, whose batches iteration gives."""
        self.epoch = epoch

    def batches(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch, as lists of row positions."""
        # A generator seeded by text gives the same stream on every machine and Python version.
        generator = random.Random(f"{self.seed}:{epoch}")
        order = list(range(len(self._lengths)))
        generator.shuffle(order)
        complete: list[list[int]] = []
        incomplete: list[list[int]] = []
        pool_size = self.pool_batches * self.batch_size
        for start in range(0, len(order), pool_size):
            # Longest first, so that the incomplete batch of the last pool holds the shortest rows.
            pool = sorted(order[start : start + pool_size], key=self._lengths.__getitem__, reverse=True)
            for first in range(0, len(pool), self.batch_size):
                batch = pool[first : first + self.batch_size]
                (complete if len(batch) == self.batch_size else incomplete).append(batch)
        generator.shuffle(complete)
        return complete if self.drop_last else complete + incomplete

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches(self.epoch))

    def __len__(self) -> int:
        complete, rest = divmod(len(self._lengths), self.batch_size)
        return complete if self.drop_last or not rest else complete + 1


def padding_share(lengths: Sequence[int], batches: Iterable[Sequence[int]]) -> float:
    """The share of padding among all tokens, when each batch is padded to its longest row.

    Args:
        lengths: Tokens of each row.
        batches: Row positions of each batch.

    Returns:
        0 (no padding) to less than 1.
    """
    tokens = padded = 0
    for batch in batches:
        rows = [int(lengths[row]) for row in batch]
        tokens += sum(rows)
        padded += max(rows) * len(rows)
    if not padded:
        raise DataError("There are no tokens in these batches. Give at least one batch of rows that are not empty.")
    return 1 - tokens / padded
