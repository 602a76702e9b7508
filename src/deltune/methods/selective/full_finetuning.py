"""Full fine-tuning: the reference that every other method is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.registry import register
from deltune.sites import Insertion, ParameterSite

__all__ = ["FullFineTuning"]


@register
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter of the model. Tied tensors are one parameter, trained and saved once.

    Devlin et al. 2019, arXiv 1810.04805, section 4.
    """

    name: ClassVar[str] = "full"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Devlin et al.",
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        2019,
        "1810.04805",
    )
    learning_rate: ClassVar[float] = 5e-5
    weight_decay: ClassVar[float] = 0.01
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Every parameter."""
        for name, _ in model.named_parameters():
            yield Placement(ParameterSite(name))
