"""What the tests of routed low-rank changes share: models with many attachments, rows alone, a count of kernels."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import deltune
from tests.laws.test_composition import MODELS
from tests.methods.common import build, output
from tests.zoo import ARCHITECTURES

__all__ = ["Kernels", "batch_of", "each_alone", "many", "routed"]

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")


class Kernels(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    @property
    def products(self) -> int:
        return sum(self.count[name] for name in PRODUCTS)


def many(methods: list[str], name: str = "bert", dtype: torch.dtype = torch.float32, **options: Any) -> deltune.Tuned:
    """Attachments ``a0``, ``a1``, ... of these methods with random values."""
    model = build(name, MODELS[name], dtype=dtype, **options)
    tuned = deltune.attach(model, methods[0], "a0", train_head=False)
    for number, method in enumerate(methods[1:], 1):
        tuned.attach(method, f"a{number}", train_head=False)
    for number, attachment in enumerate(tuned.attachments.values()):
        generator = torch.Generator().manual_seed(number)
        for _, parameter in attachment.form_parameters():
            with torch.no_grad():
                parameter.normal_(std=0.2, generator=generator)
    return tuned


def batch_of(name: str, rows: int, length: int = 7) -> dict[str, Tensor]:
    return ARCHITECTURES[name].batch(batch_size=rows, length=length, head=MODELS[name])  # type: ignore[arg-type]


def each_alone(tuned: deltune.Tuned, batch: dict[str, Tensor], route: list[str | None]) -> Tensor:
    """Every row of the batch as its attachment gives it where it is active for all."""
    results: dict[str | None, Tensor] = {}
    with tuned.disabled():
        results[None] = output(tuned.model, batch)
    for name in dict.fromkeys(name for name in route if name is not None):
        tuned.activate(name)
        results[name] = output(tuned.model, batch)
    times = len(results[None]) // len(route)
    return torch.stack([results[route[row // times]][row] for row in range(len(results[None]))])


def routed(tuned: deltune.Tuned, batch: dict[str, Tensor], route: list[str | None]) -> Tensor:
    with tuned.routed(route):
        return output(tuned.model, batch)
