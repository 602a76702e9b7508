"""Small models and steps that the methods' tests share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import deltune
from deltune.backbone import Part
from deltune.sites import WeightSite
from tests.zoo import ARCHITECTURES

__all__ = [
    "attached",
    "bits",
    "build",
    "loss_of",
    "matrix_site",
    "output",
    "relative_error",
    "singular_values",
    "train",
]


def build(name: str, head: str | None = None, **options: Any) -> Any:
    """A random model; with the language head of those that have one, else for classification."""
    architecture = ARCHITECTURES[name]
    default = "language" if architecture.generates else "classification"
    return architecture.build(head or default, **options)  # type: ignore[arg-type]


def attached(
    name: str, method: str, head: str | None = None, **options: Any
) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """``method`` on a random model, from a fixed seed, and a batch for it."""
    model = build(name, head, **options)
    torch.manual_seed(1)
    architecture = ARCHITECTURES[name]
    chosen = head or ("language" if architecture.generates else "classification")
    return deltune.attach(model, method), architecture.batch(head=chosen)  # type: ignore[arg-type]


def output(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits, or the last hidden state, without a graph."""
    with torch.no_grad():
        result = model(**batch)
    value: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return value


def train(tuned: deltune.Tuned, batch: dict[str, Tensor], steps: int = 3, **options: Any) -> None:
    """AdamW with decay on a fixed random direction of the output."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()


def loss_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """A loss in which every output has its own weight."""
    result = model(**batch)
    value: Tensor = result.logits if hasattr(result, "logits") else result.last_hidden_state
    return (value * torch.randn(value.shape, generator=torch.Generator().manual_seed(3)).to(value)).mean()


def bits(model: Any) -> dict[str, Tensor]:
    """Every value of the model, copied."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def relative_error(one: Tensor, other: Tensor) -> float:
    """Largest difference, relative to the largest value of ``other``."""
    return float((one - other).abs().max() / other.abs().max().clamp(min=1e-12))


def singular_values(matrix: Tensor) -> Tensor:
    return torch.linalg.svdvals(matrix.double())


def matrix_site(in_features: int, out_features: int, **options: Any) -> WeightSite:
    """The site of a linear map that belongs to no model."""
    part = Part("module", "", None, "matrix")
    return WeightSite(part, in_features, out_features, False, torch.float32, torch.device("cpu"), **options)
