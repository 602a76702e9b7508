"""Small models with several trained deltas, and what these change, read without the code under test."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

import deltune
from deltune.checkpoints import stored_tensors
from tests.merging.reference import Vector
from tests.methods.common import build, train
from tests.zoo import ARCHITECTURES

__all__ = ["batch_of", "changes_of", "head_of", "several", "stored_of", "with_initial"]


def batch_of(architecture: str = "bert", head: str = "classification", seed: int = 0) -> dict[str, Tensor]:
    return ARCHITECTURES[architecture].batch(head=head, seed=seed)  # type: ignore[arg-type]


def several(
    *methods: str,
    names: str = "abc",
    architecture: str = "bert",
    head: str = "classification",
    same_start: bool = True,
    **options: Any,
) -> deltune.Tuned:
    """Deltas on one model, trained on different batches; of one method, or of one for each name."""
    tuned = None
    model = build(architecture, head, **options)
    for number, name in enumerate(names):
        torch.manual_seed(1 if same_start else number)
        method = methods[number % len(methods)]
        if tuned is None:
            tuned = deltune.attach(model, method, name)
        else:
            tuned.attach(method, name)
        # AdamW's default is zero in float16
        train(tuned, batch_of(architecture, head, seed=number), weight_decay=0.0, eps=1e-4)
    assert tuned is not None
    return tuned


def with_initial(tuned: deltune.Tuned, method: str, name: str = "initial") -> deltune.Tuned:
    """Attach what all deltas of :func:`several` have started from."""
    torch.manual_seed(1)
    tuned.attach(method, name)
    return tuned


def changes_of(tuned: deltune.Tuned, name: str, parameters: set[str] | None = None) -> Vector:
    """What a delta changes in each parameter of the model that it can change, as merging it into the model does it."""
    attachment = tuned.attachments[name]
    found = tuned.changes(name)
    with tuned.disabled():
        shapes = {key: tuple(value.shape) for key, value in tuned.model.named_parameters()}
    if parameters is None:
        parameters = set(attachment.selected_names)
        parameters |= {f"{site.part.module}.weight" for _, site, _ in attachment.sites if site.part.module}
    parameters = parameters | set(found.entries)
    vector = {}
    for key in parameters:
        dense = torch.zeros(torch.Size(shapes[key]).numel(), dtype=torch.float64)
        if key in found.entries:
            dense[found.entries[key].indices] = found.entries[key].changes
        vector[key] = dense.view(shapes[key]).numpy()
    return vector


def stored_of(tuned: deltune.Tuned, name: str) -> Vector:
    """All that a delta's file would hold, without its head."""
    attachment = tuned.attachments[name]
    return {
        key: value.detach().double().numpy()
        for key, value in stored_tensors(attachment).items()
        if key not in attachment.head_names
    }


def head_of(tuned: deltune.Tuned, name: str) -> dict[str, Tensor]:
    attachment = tuned.attachments[name]
    return {key: value.detach().clone() for key, value in attachment.selection if key in attachment.head_names}


def largest_difference(one: Vector, other: Vector) -> float:
    assert one.keys() == other.keys()
    return max(float(np.abs(one[key] - other[key]).max()) for key in one)
