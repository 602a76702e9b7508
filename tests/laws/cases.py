"""Every law is tested over every method and every architecture; each exclusion has a reason here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import deltune
from deltune.methods import parse
from tests.zoo import ARCHITECTURES, Architecture

#: Small versions of every method: the laws do not depend on size.
METHODS: dict[str, str] = {
    "full": "full",
    "freeze": "freeze(layers=1)",
    "bitfit": "bitfit(missing=add)",
    "lora": "lora(rank=2, alpha=4, targets='attention.* ffn.*')",
    "sequential-adapter": "sequential-adapter(width=4, standard_deviation=0.1)",
    "prefix-tuning": "prefix-tuning(length=3, width=6)",
    "prompt-tuning": "prompt-tuning(length=3)",
}

#: (method, condition, reason) for cases that cannot be.
EXCLUSIONS: list[tuple[str, Callable[[Architecture], bool], str]] = [
    (
        "prefix-tuning",
        lambda architecture: not architecture.dispatches,
        "its attention does not go through transformers' attention interface; attach refuses it",
    ),
]


@dataclass(frozen=True)
class Case:
    """One method on one architecture."""

    method: str
    architecture: Architecture
    tested_head: str | None = None

    @property
    def head(self) -> Any:
        """The head to test with: the one that generates, else a task head, else none."""
        if self.tested_head is not None:
            return self.tested_head
        if self.architecture.generates:
            return "language"
        return "classification" if "classification" in self.architecture.heads else self.architecture.heads[0]

    def build(self, **options: Any) -> Any:
        """A random model."""
        return self.architecture.build(self.head, **options)

    def attach(self, model: Any, **options: Any) -> deltune.Tuned:
        """The method on ``model``, with its initial values drawn from a fixed seed."""
        torch.manual_seed(1)
        return deltune.attach(model, METHODS[self.method], **options)

    def batch(self, **options: Any) -> dict[str, torch.Tensor]:
        """Inputs for the model."""
        return self.architecture.batch(head=self.head, **options)

    def output(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Logits or last hidden state, without a graph: kernels may differ with what requires a gradient."""
        with torch.no_grad():
            return self.architecture.output(model(**batch))

    def loss(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """A loss that depends on every output: a fixed random direction."""
        output = self.architecture.output(model(**batch))
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(3)).to(output)
        return (output * direction).mean()


def excluded(method: str, architecture: Architecture) -> str | None:
    """Why the case cannot be, None if it can."""
    for name, condition, reason in EXCLUSIONS:
        if name == method and condition(architecture):
            return reason
    return None


def cases(
    methods: Callable[[Any], bool] = lambda method: True,
    architectures: Callable[[Architecture], bool] = lambda architecture: True,
) -> Iterator[Any]:
    """Parameters for pytest: every case whose method and architecture satisfy the conditions."""
    for name, specification in METHODS.items():
        if not methods(parse(specification)):
            continue
        for architecture in ARCHITECTURES.values():
            if not architectures(architecture) or excluded(name, architecture):
                continue
            yield pytest.param(Case(name, architecture), id=f"{name}-{architecture.name}")


def take_steps(tuned: deltune.Tuned, case: Case, batch: dict[str, torch.Tensor], steps: int = 3) -> None:
    """Train a little, with weight decay, as a user would."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tuned.bind(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        case.loss(tuned.model, batch).backward()
        optimizer.step()
