"""Arithmetic on task vectors: what training changed, as tensors by name, whatever they are of.

Letters: tau_i the i-th task vector, w_i its weight, N the number of entries of all its tensors together.

Everything is computed in float32 at least. Vectors may be lazy, so that of a large one only one tensor is held at a
time; the tensors are then made anew in each pass over them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from deltune.errors import StateError

__all__ = ["LazyVector", "TaskVector", "dare", "ties", "trim", "weighted_sum"]

#: Changes by name.
TaskVector = Mapping[str, Tensor]


class LazyVector(Mapping[str, Tensor]):
    """A task vector whose tensors are made when they are read.

    Args:
        makers: what makes each tensor, by its name.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tensor]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, key: str) -> Tensor:
        return self._makers[key]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


def weighted_sum(vectors: Sequence[TaskVector], weights: Sequence[float]) -> LazyVector:
    """sum_i w_i tau_i.

    Averages (w_i = 1 / n), task arithmetic (w_i = lambda, or -lambda to unlearn) and analogies (1, 1, -1) are such
    sums.

    Args:
        vectors: with the same names and shapes.
        weights: one for each.

    Raises:
        StateError: if names or shapes differ, naming the tensor; if there are not as many weights.

    Source:
        Ilharco et al. 2022, arXiv 2212.04089, section 2.
    """
    _check(vectors, weights)

    def summed(key: str) -> Tensor:
        terms = [weight * value for weight, value in zip(weights, _tensors(vectors, key), strict=True)]
        return sum(terms[1:], terms[0])

    return _lazily(vectors[0], summed)


def trim(vector: TaskVector, density: float) -> LazyVector:
    """The entries of greatest magnitude of all tensors together; the others are zero.

    The bound is the magnitude of rank N - floor(density N), counted from the least, and what reaches it stays: one
    entry more than floor(density N), and all that tie with it. A density of one keeps everything.

    Args:
        vector: tau.
        density: the share to keep, above 0 and at most 1.

    Raises:
        StateError: if the density is none.

    Source:
        Yadav et al. 2023, arXiv 2306.01708, section 4; authors' code: prateeky2806/ties-merging.
    """
    if not 0 < density <= 1:
        raise StateError(f"The density is the share of entries to keep, above 0 and at most 1, not {density}.")
    count = sum(value.numel() for value in vector.values())
    rank = count - int(density * count)
    if rank == 0:
        return _lazily(vector, lambda key: _wide(vector[key]))
    magnitudes = torch.cat([_wide(value).abs().flatten().cpu() for value in vector.values()])
    bound = float(magnitudes.kthvalue(rank).values)

    def trimmed(key: str) -> Tensor:
        value = _wide(vector[key])
        return torch.where(value.abs() >= bound, value, torch.zeros_like(value))

    return _lazily(vector, trimmed)


def ties(vectors: Sequence[TaskVector], density: float = 0.2, weights: Sequence[float] | None = None) -> LazyVector:
    """Trim, elect a sign for each entry, and average the entries that have it.

    The sign of an entry is that of sum_i w_i tau_i after trimming; where the sum is zero, that which most entries have.
    The mean is over the non-zero w_i tau_i of that sign, however many these are.

    Args:
        vectors: with the same names and shapes.
        density: see :func:`trim`.
        weights: one for each, which act before the election; ones by default, as in the paper.

    Raises:
        StateError: as :func:`weighted_sum` and :func:`trim`.

    Source:
        Yadav et al. 2023, arXiv 2306.01708, section 4; authors' code: prateeky2806/ties-merging.
    """
    factors = [1.0] * len(vectors) if weights is None else list(weights)
    _check(vectors, factors)
    trimmed = [trim(vector, density) for vector in vectors]
    total = weighted_sum(trimmed, factors)
    majority = sum(float(value.sign().sum(dtype=torch.float64)) for value in total.values())

    def merged(key: str) -> Tensor:
        terms = [weight * value for weight, value in zip(factors, _tensors(trimmed, key), strict=True)]
        mass = sum(terms[1:], terms[0])
        positive = torch.where(mass == 0, torch.full_like(mass, majority), mass) > 0
        kept = [torch.where(torch.where(positive, term > 0, term < 0), term, torch.zeros_like(term)) for term in terms]
        counts = sum((term != 0).to(mass.dtype) for term in kept)
        assert isinstance(counts, Tensor)
        return sum(kept[1:], kept[0]) / counts.clamp_min(1)

    return _lazily(vectors[0], merged)


def dare(vector: TaskVector, drop: float, seed: int = 0, name: str = "") -> LazyVector:
    """Drop each entry with the probability p and divide the others by 1 - p, so that tau is the expectation.

    The mask of a tensor depends on the seed, the vector's name and the tensor's, and on nothing else: neither on the
    order of tensors or vectors nor on the device.

    Args:
        vector: tau.
        drop: p, at least 0, where all stays as it is, and below 1.
        seed: of the masks.
        name: which of several vectors it is, so that each has masks of its own.

    Raises:
        StateError: if ``drop`` is no such probability.

    Source:
        Yu et al. 2023, arXiv 2311.03099, section 3; authors' code: yule-BUAA/MergeLM.
    """
    if not 0 <= drop < 1:
        raise StateError(f"drop is the probability to drop an entry, at least 0 and below 1, not {drop}.")

    def masked(key: str) -> Tensor:
        value = _wide(vector[key])
        if drop == 0:
            return value
        number = hashlib.sha256(f"{seed}\0{name}\0{key}".encode()).digest()[:8]
        generator = torch.Generator().manual_seed(int.from_bytes(number, "big") >> 1)
        kept = (torch.rand(value.shape, generator=generator) >= drop).to(value.device)
        return torch.where(kept, value / (1 - drop), torch.zeros_like(value))

    return _lazily(vector, masked)


def _lazily(names: TaskVector, make: Callable[[str], Tensor]) -> LazyVector:
    return LazyVector({key: partial(make, key) for key in names})


def _wide(value: Tensor) -> Tensor:
    """In float32 at least, without a graph."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def _tensors(vectors: Sequence[TaskVector], key: str) -> list[Tensor]:
    """The tensors of one name.

    Raises:
        StateError: if their shapes differ.
    """
    values = [_wide(vector[key]) for vector in vectors]
    for number, value in enumerate(values):
        if value.shape != values[0].shape:
            raise StateError(
                f"{key} is {tuple(values[0].shape)} in the first vector and {tuple(value.shape)} in vector "
                f"{number + 1}. Only vectors of equal shapes can be merged."
            )
    return values


def _check(vectors: Sequence[TaskVector], weights: Sequence[float]) -> None:
    """Refuse vectors with other names than the first, and a wrong number of weights.

    Raises:
        StateError: if so.
    """
    if not vectors:
        raise StateError("There is nothing to merge: give one vector at least.")
    if len(weights) != len(vectors):
        raise StateError(f"{len(vectors)} vectors but {len(weights)} weights were given.")
    for number, vector in enumerate(vectors):
        other = sorted(vectors[0].keys() ^ vector.keys())
        if other:
            raise StateError(
                f"{other[0]} is only in one of the first vector and vector {number + 1}. Only vectors of the same "
                "tensors can be merged."
            )
