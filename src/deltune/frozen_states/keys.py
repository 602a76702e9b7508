"""What the states of a text are found again by: a key for each row of a batch, from all that they depend on.

Letters: B rows of a batch, T positions.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["RowKeys", "bytes_of", "row_keys"]

#: Arguments of a model that change nothing in its layers.
_BESIDE = ("labels", "return_dict", "use_cache", "num_items_in_batch")
#: Arguments that have a row for each text, of which one is always given.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
#: Arguments with a value for each position of a text, (B, T, ...).
_BY_POSITION = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")


class RowKeys(NamedTuple):
    """The rows of a batch.

    Attributes:
        keys: one for each row.
        spans: of each row, the positions that are no padding: first, and the one behind the last; None without a mask.
        length: T; None without a mask.
    """

    keys: list[str]
    spans: list[tuple[int, int]] | None
    length: int | None


def row_keys(arguments: Mapping[str, Any], by_length: bool) -> RowKeys | None:
    """The keys of a batch; None if it is not known what its states depend on, or a gradient of the input is wanted.

    Args:
        arguments: of the model's call, by name.
        by_length: whether states depend on T too.
    """
    source = next((arguments[name] for name in _INPUTS if isinstance(arguments.get(name), Tensor)), None)
    given = dict(_flat((name, value) for name, value in sorted(arguments.items()) if name not in _BESIDE))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    if (
        source is None
        or len(plain) + len(tensors) < len(given)
        or any(value.requires_grad for value in tensors.values())
    ):
        return None
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    batch = len(source)
    mask = tensors.get("attention_mask")
    spans, length = None, None
    if mask is not None and mask.dim() == 2:
        length = mask.shape[1]
        spans = [_span(row) for row in mask.bool()]
    kind = source.device.type
    arithmetic = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    shared = f"{plain} {arithmetic} {next(iter(tensors.values())).shape[1:2] if by_length else ''}".encode()
    keys = []
    for row in range(batch):
        digest = hashlib.blake2b(shared, digest_size=16)
        if spans:
            digest.update(f"{spans[row][0]}".encode())
        for name, value in tensors.items():
            own = value[row] if value.dim() and len(value) == batch else value
            if spans and name in _BY_POSITION and value.shape[:2] == (batch, length):
                own = own[slice(*spans[row])]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
            digest.update(bytes_of(own))
        keys.append(digest.hexdigest())
    return RowKeys(keys, spans, length)


def _flat(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Named values with what mappings, tuples and lists hold under names of their own; None is left out."""
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _flat((f"{name}.{key}", value[key]) for key in sorted(value, key=str))
        elif isinstance(value, tuple | list):
            yield from _flat((f"{name}.{index}", item) for index, item in enumerate(value))
        elif value is not None:
            yield name, value


def _span(mask: Tensor) -> tuple[int, int]:
    """First real position and the one behind the last; all where none is real."""
    real = mask.nonzero()
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, len(mask))


def bytes_of(value: Tensor) -> Any:
    """The bytes of a tensor on the CPU, as an array."""
    return value.contiguous().view(-1).view(torch.uint8).numpy()
