"""Shapes of linear maps and tables, however a module stores its weight."""

from __future__ import annotations

from typing import TYPE_CHECKING

from deltune.errors import TargetError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["matrix_shape", "out_features"]

#: Names of (outputs, inputs) in modules that say so: nn.Linear and its quantised relatives, transformers'
#: Conv1D (whose weight is transposed), nn.Embedding.
_FEATURES = (("out_features", "in_features"), ("nf", "nx"), ("num_embeddings", "embedding_dim"))


def matrix_shape(module: nn.Module) -> tuple[int, ...] | None:
    """The shape of a module's weight, outputs first; rows and width for a table; None if it has no weight."""
    for names in _FEATURES:
        values = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(value, int) for value in values):
            return tuple(int(value) for value in values if value is not None)
    weight = getattr(module, "weight", None)
    return None if weight is None else tuple(weight.shape)


def out_features(module: nn.Module) -> int:
    """Number of outputs of a linear map.

    Raises:
        TargetError: if the module is none.
    """
    for outputs, _ in _FEATURES[:2]:
        value = getattr(module, outputs, None)
        if isinstance(value, int):
            return value
    raise TargetError(f"{type(module).__name__} is no linear map: it has neither out_features nor nf.")
