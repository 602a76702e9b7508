"""The batches of a run, in the order in which it reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import DataLoader

from deltune.tasks import LengthBucketSampler
from deltune.training.settings import TrainingSettings

__all__ = ["EpochLoader", "planned_batches"]


class EpochLoader(DataLoader[Any]):
    """Loads the batches of one epoch; draws no random numbers but those of the sampler.

    Args:
        rows: encoded rows.
        sampler: says which rows meet in a batch, anew in each epoch.
        collate: makes a batch of rows.
    """

    def __init__(self, rows: Any, sampler: LengthBucketSampler, collate: Callable[[Any], Any]) -> None:
        # with a generator of its own, PyTorch's loader leaves the global one alone
        options: dict[str, Any] = {"batch_sampler": sampler, "collate_fn": collate, "generator": torch.Generator()}
        super().__init__(rows, **options)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, counting from 0."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def planned_batches(sampler: LengthBucketSampler, settings: TrainingSettings, steps: int) -> list[list[int]]:
    """Row positions of every batch that a run of that many steps reads."""
    per_epoch = settings.steps_per_epoch(len(sampler))
    batches: list[list[int]] = []
    for epoch in range(-(-steps // per_epoch)):
        rest = min(per_epoch, steps - epoch * per_epoch)
        batches.extend(sampler.batches(epoch)[: rest * settings.gradient_accumulation])
    return batches
