"""Which deltas can be merged with each other: the same tensors, of the same shapes, with the same meaning."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltune.errors import StateError
from deltune.merging.reading import Delta
from deltune.merging.terms import term_of

__all__ = ["check_alike", "initial_values", "warn_of_other_starts"]

#: Options that say nothing about what a trained tensor means.
_OF_TRAINING = ("dropout",)
#: Two random tensors of so many entries have a cosine of 0.03, give or take; alike ones have one near 1.
_LEAST_ENTRIES = 1024
_LEAST_COSINE = 0.1


def check_alike(deltas: Sequence[Delta], missing: str) -> None:
    """Refuse deltas that do not change the same things in the same way.

    Args:
        deltas: of one model.
        missing: ``refuse``, or ``zero`` to let a matrix or parameter that a delta does not change count as a change of
            zero.

    Raises:
        StateError: naming the tensor.
    """
    first = deltas[0]
    for other in deltas[1:]:
        if not first.lifted and first.kinds() != other.kinds():
            raise _of_other_methods(first, other)
        _check_keys(first, other, first.values, other.values, "")
        _check_keys(first, other, first.buffers, other.buffers, "")
        for key, value in first.values.items():
            _check_shape(first, other, key, value, other.values[key])
        for key, value in first.buffers.items():
            _check_shape(first, other, key, value, other.buffers[key])
            if not torch.equal(value, other.buffers[key]):
                raise StateError(
                    f"{key} is not trained, and has other values in {other.name!r} than in {first.name!r}: what was "
                    "trained on top of them cannot be merged."
                )
        hint = " To count what one of them does not change as a change of zero, pass missing='zero'."
        if missing == "refuse":
            _check_keys(first, other, first.matrices, other.matrices, hint)
            if not (first.by_entries or other.by_entries):
                _check_keys(first, other, first.own, other.own, hint)
        _check_options(first, other)


def initial_values(initial: Delta, deltas: Sequence[Delta]) -> dict[str, Tensor]:
    """What the deltas' tensors that are merged by name have started from.

    Args:
        initial: a delta that holds it, where it is not known anyway.
        deltas: alike.

    Raises:
        StateError: if they have none, or others; naming the tensor.
    """
    first = deltas[0]
    if not first.values.keys() - first.starts.keys():
        raise StateError(
            f"{first.method} needs no initial values: the model itself holds what it changes. Leave initial out."
        )
    _check_keys(first, initial, first.values, initial.values, "")
    for key, value in first.values.items():
        _check_shape(first, initial, key, value, initial.values[key])
    return {**initial.values, **first.starts}


def _of_other_methods(first: Delta, other: Delta) -> StateError:
    mine, its = ({*delta.matrices, *delta.own, *delta.values} for delta in (first, other))
    key = min(mine ^ its, default=min(mine, default="nothing"))
    holder, lacks = (first, other) if key in mine else (other, first)
    return StateError(
        f"{first.name!r} is {first.method}, and {other.name!r} is {other.method}: {key}, which {holder.name!r} has, "
        f"means something else in {lacks.name!r}, or is not in it. Merge deltas of one method, or of methods that all "
        "change weights, such as lora and krona."
    )


def _check_keys(first: Delta, other: Delta, mine: Iterable[str], its: Iterable[str], hint: str) -> None:
    different = sorted({*mine} ^ {*its})
    if different:
        holder, lacks = (first, other) if different[0] in {*mine} else (other, first)
        more = f", and {len(different) - 1} more" if different[1:] else ""
        raise StateError(
            f"{holder.name!r} ({holder.method}) changes {different[0]}, which {lacks.name!r} ({lacks.method}) does not"
            f"{more}. Only deltas at the same places can be merged.{hint}"
        )


def _check_shape(first: Delta, other: Delta, key: str, mine: Tensor, its: Tensor) -> None:
    if mine.shape != its.shape:
        raise StateError(
            f"{key} is {tuple(mine.shape)} in {first.name!r} ({first.method}) and {tuple(its.shape)} in "
            f"{other.name!r} ({other.method}). Only tensors of equal shapes can be merged."
        )


def _check_options(first: Delta, other: Delta) -> None:
    """Options of a method whose tensors are merged by name say what these mean."""
    keys: dict[str, str] = {}
    for key in first.values:
        keys.setdefault(term_of(first.method, key).path, key)
    for key in keys.values():
        one, two = term_of(first.method, key).method, term_of(other.method, key).method
        for name, mine, its in _differences(one.to_dict(), two.to_dict()):
            raise StateError(
                f"{key} and all of {one.name} mean other things in {first.name!r} and in {other.name!r}: {name} is "
                f"{mine} in one and {its} in the other. Merge deltas of equal options."
            )


def _differences(mine: Mapping[str, Any], its: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Options that differ, those of the parts of a gated sum included: name and both values."""
    for name, value in mine.items():
        other = its.get(name)
        if name in _OF_TRAINING or value == other:
            continue
        if name == "methods" and isinstance(other, list) and len(value) == len(other):
            for one, two in zip(value, other, strict=True):
                yield from ((f"{option} of {one['name']}", *both) for option, *both in _differences(one, two))
        else:
            yield name, value, other


def warn_of_other_starts(deltas: Sequence[Delta], initial: Mapping[str, Tensor] | None) -> None:
    """Warn where deltas whose tensors are merged by name have evidently started from different random values.

    Matrices that began alike still resemble each other after training; those of different draws have a cosine near
    zero.

    Args:
        deltas: alike.
        initial: the initial values that all shall have started from, if they are given.
    """
    known = deltas[0].starts
    keys = [key for key, value in deltas[0].values.items() if value.dim() >= 2 and key not in known]
    if not keys:
        return

    def flat(values: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([values[key].double().flatten().cpu() for key in keys])

    reference = flat(deltas[0].values if initial is None else initial)
    if len(reference) < _LEAST_ENTRIES:
        return
    for delta in deltas if initial is not None else deltas[1:]:
        cosine = float(torch.nn.functional.cosine_similarity(reference, flat(delta.values), dim=0))
        if cosine < _LEAST_COSINE:
            than = f"{deltas[0].name!r}" if initial is None else "the initial values that were given"
            warnings.warn(
                f"{delta.name!r} does not resemble {than} (cosine {cosine:.2f} of all matrices): it has started from "
                f"other random values, or gone far. Tensors of {delta.method} are merged one by one, which means "
                "something only between deltas that were trained from the same initial values: attach with the same "
                "seed, or save one untrained delta and load it before each training.",
                UserWarning,
                stacklevel=4,
            )
            return
