"""From a merged task vector to a delta: its method, and the values of what it trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.errors import StateError
from deltune.merging.low_rank import Factors, compressed, concatenated, lora_of
from deltune.merging.reading import Delta
from deltune.merging.terms import term_of, terms
from deltune.merging.vectors import TaskVector
from deltune.methods import Method, Sum
from deltune.methods.selective.diff_pruning import DiffPruning
from deltune.sites import entries_site

__all__ = ["Result", "as_entries", "as_low_rank", "named_values", "summed_factors"]


@dataclass
class Result:
    """A merged delta before it is attached.

    Attributes:
        method: that holds it.
        tensors: its values by key, without those of a task head.
        discarded: the share of the change's Frobenius norm that compression has lost; None where nothing was
            compressed.
        dtypes: types of the forms, by key, where they are not those of the matrices.
        entries: whether it is changed entries of the model's own parameters, whatever the deltas were.
    """

    method: Method
    tensors: dict[str, Tensor]
    discarded: float | None = None
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    entries: bool = False


def named_values(deltas: Sequence[Delta], vector: TaskVector, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The values of everything that is merged by name: where it started, plus the change; in its own type.

    Args:
        deltas: alike.
        vector: the merged change.
        initial: the initial values of what the methods add, by key; zeros where there is none.
    """
    tensors: dict[str, Tensor] = {}
    for delta in deltas:
        for key, own in delta.own.items():
            if key not in tensors:
                tensors[key] = _moved(own.start, vector[key], own.tuned)
        for key, value in delta.values.items():
            if key not in tensors:
                start = initial.get(key, torch.zeros_like(value))
                tensors[key] = _moved(start, vector[key], value)
    return {**tensors, **deltas[0].buffers}


def _moved(start: Tensor, change: Tensor, like: Tensor) -> Tensor:
    return (start.to(like.device).double() + change.double()).to(like)


def summed_factors(deltas: Sequence[Delta], weights: Sequence[float]) -> dict[str, Factors] | None:
    """The weighted sum of all changes of matrices as products, by key; None if one of them is no such product."""
    keys = dict.fromkeys(key for delta in deltas for key in delta.matrices)
    found: dict[str, Factors] = {}
    for key in keys:
        terms = [
            (delta.matrices[key], weight)
            for delta, weight in zip(deltas, weights, strict=True)
            if key in delta.matrices
        ]
        terms = [term for term in terms if term[1]] or terms[:1]
        pairs = [change.factors() for change, _ in terms]
        whole = [pair for pair in pairs if pair is not None]
        if len(whole) < len(pairs):
            return None
        found[key] = concatenated(whole, [weight for _, weight in terms])
    return found


def as_low_rank(
    deltas: Sequence[Delta],
    changes: Mapping[str, Factors] | TaskVector,
    rank: int | None,
    named: Mapping[str, Tensor],
    model: nn.Module,
    anatomy: Anatomy,
) -> Result:
    """LoRA in the place of every method that changes matrices; what is merged by name beside it.

    Args:
        deltas: alike.
        changes: of the matrices, by key: products, or dense ones, which are compressed.
        rank: to compress to; None for products as they are.
        named: values of everything else.
        model: the bare model.
        anatomy: its parts.
    """
    first = deltas[0].method
    made: dict[str, Factors] = {}
    for key in dict.fromkeys(key for delta in deltas for key in delta.matrices):
        change = changes[key]
        if isinstance(change, Tensor):
            assert rank is not None
            made[key] = compressed(change, rank)
        else:
            made[key] = change if rank is None else change.cut(rank)
    found = terms(first)
    methods = [term.method for term in found]
    # sums inside of sums, and presets, become terms of one sum
    numbers = {term.path: f"{number}." if len(found) > 1 else "" for number, term in enumerate(found)}

    def anew(key: str) -> str:
        path = term_of(first, key).path
        return numbers[path] + key.removeprefix(path)

    of_forms = {*deltas[0].values, *deltas[0].buffers}
    tensors = {anew(key) if key in of_forms else key: value for key, value in named.items()}
    dtypes: dict[str, torch.dtype] = {}
    for number, term in enumerate(found):
        own = {key: key.removeprefix(term.path) for key in made if key.startswith(term.path)}
        if not own:
            continue
        ranks = {short: made[key].rank for key, short in own.items()}
        sources = [terms(delta.method)[number].method for delta in deltas]
        methods[number], scales = lora_of(ranks, sources, model, anatomy)
        for key, short in own.items():
            changes_here = [delta.matrices[key] for delta in deltas if key in delta.matrices]
            dtype = changes_here[0].dtype
            for source in changes_here[1:]:
                dtype = torch.promote_types(dtype, source.dtype)
            dtypes[anew(key)] = dtype
            tensors[f"{anew(key)}.A"] = made[key].A
            tensors[f"{anew(key)}.B"] = made[key].B / scales[short]
    method = Sum(tuple(methods)) if len(methods) > 1 else methods[0]
    whole, lost = (sum(getattr(item, name) for item in made.values()) for name in ("whole", "lost"))
    discarded = None if rank is None else (lost / whole) ** 0.5 if whole else 0.0
    return Result(method, tensors, discarded, dtypes)


def as_entries(deltas: Sequence[Delta], vector: TaskVector, model: nn.Module, anatomy: Anatomy) -> Result:
    """Changed entries of the model's own parameters, as those that diff pruning stores.

    Raises:
        StateError: if a change is not one of the model's own floating-point parameters.
    """
    first = deltas[0]
    if first.values:
        raise StateError(
            f"{first.method} trains {next(iter(first.values))} beside the model, so that the merged delta cannot be "
            "changed entries of the model alone. "
            + (
                "Merge deltas of one of its parts."
                if first.by_entries
                else "Give rank=, for a low-rank change of the matrices beside it."
            )
        )
    site = entries_site(model, anatomy)
    totals: dict[str, Tensor] = {}
    for delta in deltas:
        added = next((name for name, own in delta.own.items() if own.original is None), None)
        if added is not None:
            raise StateError(
                f"{delta.name!r} ({delta.method}) has added {added}, which the model does not have, so that the merged "
                "delta cannot be changed entries of the model. Give rank=, or merge without it."
            )
    matrices = {key: change for delta in deltas for key, change in delta.matrices.items()}
    for key in vector:
        if key in matrices:
            name, value = matrices[key].parameter, matrices[key].in_parameter(vector[key])
        else:
            name, value = key, vector[key]
        totals[name] = totals[name] + value if name in totals else value
    indices, values = [], []
    for name, total in totals.items():
        if name not in site.starts:
            raise StateError(
                f"{name} cannot be changed entry by entry: it belongs to the task head, or is another name of a "
                "parameter that is tied to it. Give rank=, or leave it out of the targets."
            )
        flat = total.flatten().to(site.device)
        places = flat.nonzero()[:, 0]
        indices.append(places + site.starts[name])
        values.append(flat[places])
    together = torch.cat(indices)
    order = together.argsort()
    method = DiffPruning(kept=len(order))
    prefix = f"{site.key}."
    tensors = {f"{prefix}values": torch.cat(values)[order].to(site.dtype), f"{prefix}indices": together[order]}
    return Result(method, tensors, entries=True)
