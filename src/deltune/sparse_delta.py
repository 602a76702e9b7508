"""What tuning changed in a model's parameters, entry by entry: to look at, to calculate with, to write into a model.

Any delta that can be merged is such a change; those of selected entries, masks and biases are small ones. Changes are
differences in float64, in which the difference of two float32 (or shorter) numbers is exact unless one is 2^29 times
the other: a base model and its change give the tuned values to the bit. Zeros of both signs count as equal.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deltune.checkpoints import write_tensors
from deltune.errors import CheckpointError, StateError, nearest

__all__ = ["Entries", "SparseDelta"]

_FILE = "sparse_delta.safetensors"


@dataclass(frozen=True)
class Entries:
    """Changed entries of one parameter.

    Attributes:
        shape: of the whole parameter.
        indices: of the changed entries in the flattened parameter, (k,), int64, ascending.
        changes: tuned value minus original, (k,), float64.
    """

    shape: tuple[int, ...]
    indices: Tensor
    changes: Tensor

    @classmethod
    def between(cls, original: Tensor, tuned: Tensor) -> Entries:
        """What differs."""
        first, second = original.detach().cpu().reshape(-1), tuned.detach().cpu().reshape(-1)
        indices = (first != second).nonzero()[:, 0]
        return cls(tuple(original.shape), indices, second[indices].double() - first[indices].double())

    def plus(self, other: Entries, factor: float) -> Entries:
        """These changes, and ``factor`` times the other ones; entries that cancel out are left out."""
        indices = torch.unique(torch.cat([self.indices, other.indices]))
        changes = torch.zeros(len(indices), dtype=torch.float64)
        changes[torch.searchsorted(indices, self.indices)] += self.changes
        changes[torch.searchsorted(indices, other.indices)] += factor * other.changes
        left = changes != 0
        return Entries(self.shape, indices[left], changes[left])


class SparseDelta:
    """Changes of a model's parameters, of which most entries may stay as they are.

    ``one + other``, ``one - other``, ``2 * one``, ``-one`` calculate with changes, as task vectors do (Ilharco et al.
    2022, arXiv 2212.04089). :meth:`deltune.Tuned.changes` makes one of a delta.

    Args:
        entries: changed entries by the parameter's full name.
    """

    def __init__(self, entries: Mapping[str, Entries]) -> None:
        self.entries = {name: found for name, found in entries.items() if len(found.indices)}

    @property
    def count(self) -> int:
        """Number of changed entries."""
        return sum(len(found.indices) for found in self.entries.values())

    def counts(self) -> dict[str, int]:
        """Number of changed entries of each parameter that has some."""
        return {name: len(found.indices) for name, found in self.entries.items()}

    def means(self) -> dict[str, float]:
        """Mean of the absolute change over all entries of each parameter that has changed ones."""
        return {
            name: float(found.changes.abs().sum()) / max(1, torch.Size(found.shape).numel())
            for name, found in self.entries.items()
        }

    def overlap(self, other: SparseDelta) -> float:
        """Entries that both change, as a share of those that any of them changes; 0 if there are none."""
        both = sum(
            int(torch.isin(found.indices, other.entries[name].indices).sum())
            for name, found in self.entries.items()
            if name in other.entries
        )
        either = self.count + other.count - both
        return both / either if either else 0.0

    def __add__(self, other: SparseDelta) -> SparseDelta:
        return self._plus(other, 1.0)

    def __sub__(self, other: SparseDelta) -> SparseDelta:
        return self._plus(other, -1.0)

    def __mul__(self, factor: float) -> SparseDelta:
        return SparseDelta(
            {
                name: Entries(found.shape, found.indices, factor * found.changes)
                for name, found in self.entries.items()
                if factor != 0
            }
        )

    __rmul__ = __mul__

    def __neg__(self) -> SparseDelta:
        return -1.0 * self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SparseDelta):
            return NotImplemented
        return self.entries.keys() == other.entries.keys() and all(
            found.shape == other.entries[name].shape
            and torch.equal(found.indices, other.entries[name].indices)
            and torch.equal(found.changes, other.entries[name].changes)
            for name, found in self.entries.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"SparseDelta({self.count:,} entries of {len(self.entries)} parameters)"

    def _plus(self, other: SparseDelta, factor: float) -> SparseDelta:
        entries = dict(self.entries)
        for name, found in other.entries.items():
            mine = entries.get(name)
            if mine is not None and mine.shape != found.shape:
                raise StateError(
                    f"The two changes are not of one model: {name} is {mine.shape} in one and {found.shape} in the "
                    "other."
                )
            none = Entries(found.shape, found.indices[:0], found.changes[:0])
            entries[name] = (none if mine is None else mine).plus(found, factor)
        return SparseDelta(entries)

    def apply(self, model: nn.Module) -> Applied:
        """Write the changes into a model's own parameters, in place.

        Returns:
            What takes them out again, to the bit.

        Raises:
            StateError: if the model does not have a parameter, or one of another shape or stored in integers; nothing
                is written then.
        """
        parameters = dict(model.named_parameters(remove_duplicate=False))
        for name, found in self.entries.items():
            _check(name, found, parameters)
        applied = Applied(model, self)
        with torch.no_grad():
            for name, found in self.entries.items():
                flat = parameters[name].data.view(-1)
                places = found.indices.to(flat.device)
                applied.parameters[name] = parameters[name]
                applied.originals[name] = flat[places].clone()
                flat[places] = (flat[places].double() + found.changes.to(flat.device)).to(flat.dtype)
        _applied.setdefault(model, []).append(applied)
        return applied

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[nn.Module]:
        """The changed model inside the block, the original one behind it."""
        applied = self.apply(model)
        try:
            yield model
        finally:
            applied.revert()

    def save(self, path: str | Path) -> Path:
        """Write into a folder: 12 bytes for each entry.

        Raises:
            CheckpointError: if it cannot be written.
        """
        folder = Path(path)
        tensors = {}
        for name, found in self.entries.items():
            small = torch.Size(found.shape).numel() <= torch.iinfo(torch.int32).max
            tensors[f"{name}.indices"] = found.indices.int() if small else found.indices
            tensors[f"{name}.changes"] = found.changes
        shapes = {name: list(found.shape) for name, found in self.entries.items()}
        write_tensors(folder / _FILE, tensors, {"sparse_delta": json.dumps(shapes, sort_keys=True)})
        return folder

    @classmethod
    def load(cls, path: str | Path) -> SparseDelta:
        """Read what :meth:`save` wrote.

        Raises:
            CheckpointError: if there is none, or it is damaged.
        """
        file = Path(path) / _FILE
        if not file.is_file():
            raise CheckpointError(
                f"{path} holds no sparse delta: there is no {_FILE} in it. Give the folder that SparseDelta.save "
                "wrote; deltas of Tuned.save are attached with deltune.load."
            )
        try:
            with safe_open(str(file), framework="pt") as stream:
                shapes: dict[str, Any] = json.loads((stream.metadata() or {})["sparse_delta"])
                return cls(
                    {
                        name: Entries(
                            tuple(shape),
                            stream.get_tensor(f"{name}.indices").long(),
                            stream.get_tensor(f"{name}.changes"),
                        )
                        for name, shape in shapes.items()
                    }
                )
        except Exception as error:
            raise CheckpointError(f"{file} is damaged or cut short ({error}). Save or copy it again.") from error


class Applied:
    """Changes that stand in a model's parameters."""

    def __init__(self, model: nn.Module, delta: SparseDelta) -> None:
        self.model = weakref.ref(model)
        self.delta = delta
        self.parameters: dict[str, Tensor] = {}
        self.originals: dict[str, Tensor] = {}

    def revert(self) -> None:
        """Take the changes out again: every entry has the value that it had before, bit for bit.

        Raises:
            StateError: if others were written on top of them since, they were taken out already, or another parameter
                stands in the place of a changed one.
        """
        model = self.model()
        stack = [] if model is None else _applied.get(model, [])
        if model is None or self not in stack:
            raise StateError("These changes were taken out already.")
        later = stack[stack.index(self) + 1 :]
        if later:
            raise StateError(
                f"{len(later)} more changes were written into the model after these. Take those out first, the last "
                "one before the others."
            )
        present = dict(model.named_parameters(remove_duplicate=False))
        replaced = [name for name, value in self.parameters.items() if present.get(name) is not value]
        if replaced:
            raise StateError(
                f"Another parameter stands in the place of {replaced[0]} since these changes were written: something "
                "was attached, activated or merged. Undo that first."
            )
        stack.pop()
        for name, found in self.delta.entries.items():
            flat = self.parameters[name].data.view(-1)
            flat[found.indices.to(flat.device)] = self.originals[name].to(flat)


#: What stands in which model, in the order in which it was written.
_applied: weakref.WeakKeyDictionary[nn.Module, list[Applied]] = weakref.WeakKeyDictionary()


def _check(name: str, found: Entries, parameters: Mapping[str, Tensor]) -> None:
    value = parameters.get(name)
    if value is None:
        close = nearest(name, list(parameters))
        raise StateError(
            f"The model has no parameter {name}."
            + (f" Nearest: {', '.join(close)}." if close else "")
            + " A bias that "
            "tuning added cannot be written into a model without it: attach the delta instead."
        )
    if tuple(value.shape) != found.shape:
        raise StateError(f"{name} is {tuple(value.shape)} in the model, and {found.shape} in the changes.")
    if not value.is_contiguous():
        raise StateError(f"{name} does not lie in one piece in memory: make it so with value.contiguous() first.")
    if not value.dtype.is_floating_point:
        raise StateError(f"{name} is stored as {value.dtype}: changes cannot be written into it. Dequantise the model.")
