"""Tiny random models of every architecture, and batches for them: the animals of all tests.

    architecture = ARCHITECTURES["bert"]
    model = architecture.build("classification", seed=0)
    batch = architecture.batch(3, 7, padding="right")
    output = architecture.output(model(**batch))      # logits, or the last hidden state
    real = architecture.real(batch)                   # which positions of it are no padding

Weights are random at a size at which attention, biases and norms matter: with the usual initialisation a
tiny model is close to a linear one, and wrong places go unnoticed.
"""

from __future__ import annotations

from tests.zoo.architecture import VOCABULARY, Architecture, Head, Kind, Padding, randomize
from tests.zoo.table import ALL

__all__ = ["ARCHITECTURES", "VOCABULARY", "Architecture", "Head", "Kind", "Padding", "randomize"]

#: Every architecture by name.
ARCHITECTURES: dict[str, Architecture] = {architecture.name: architecture for architecture in ALL}
