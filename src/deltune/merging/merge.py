"""Merge trained deltas of one model into a new one.

Letters: tau_i what the i-th delta changes, w_i its weight, lambda the scale.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from deltune.attachment import Attachment
from deltune.checkpoints import fill, without_head
from deltune.errors import StateError, suggestion
from deltune.merging.checks import check_alike, initial_values, warn_of_other_starts
from deltune.merging.heads import chosen_head, task_of
from deltune.merging.plan import STRATEGIES, Plan
from deltune.merging.reading import Delta, comparable, read_delta
from deltune.merging.result import Result, as_entries, as_low_rank, named_values, summed_factors
from deltune.merging.vectors import LazyVector
from deltune.switching import check_name, find
from deltune.tuned import Tuned

__all__ = ["STRATEGIES", "Merged", "analogy", "merge_deltas", "negate"]

_MISSING = ("refuse", "zero")


@dataclass(frozen=True)
class Merged:
    """What merging has made.

    Attributes:
        name: of the new delta.
        method: that holds it, as text.
        strategy: how it was made.
        deltas: from which.
        weights: one for each; the scale is in them.
        space: ``changes`` where changes of the model were merged, ``parameters`` where trained tensors were, name by
            name; ``both`` in a sum of such methods.
        discarded: share of the norm of the matrices' changes that compression to a rank has lost; None if nothing was
            compressed.
        heads: whose task head it has, or ``average``; None for none.
        left_out_heads: whether the deltas have heads that it has not.
    """

    name: str
    method: str
    strategy: str
    deltas: tuple[str, ...]
    weights: tuple[float, ...]
    space: str
    discarded: float | None
    heads: str | None
    left_out_heads: bool

    def __str__(self) -> str:
        """Two sentences for people."""
        what = {
            "changes": "changes of weights",
            "parameters": "trained tensors, name by name,",
            "both": "changes of weights, and other trained tensors name by name,",
        }[self.space]
        terms = ", ".join(f"{weight:.3g} {name}" for name, weight in zip(self.deltas, self.weights, strict=True))
        text = f"Merged {what} of {terms} ({self.strategy}) into {self.name}: {self.method}."
        if self.discarded is not None:
            text += f" Compression has lost {self.discarded:.2%} of the norm of the changes."
        if self.heads is not None:
            text += f" Its task head is {'the average' if self.heads == 'average' else f'that of {self.heads}'}."
        elif self.left_out_heads:
            text += " Task heads are left out: choose one of them with heads, or average those of equal labels."
        return text


def merge_deltas(
    tuned: Tuned,
    deltas: Sequence[str],
    name: str = "merged",
    *,
    strategy: str = "linear",
    weights: Sequence[float] | None = None,
    scale: float = 1.0,
    density: float | None = None,
    drop: float | None = None,
    seed: int = 0,
    rank: int | None = None,
    heads: str | None = None,
    initial: str | None = None,
    missing: str = "refuse",
) -> Merged:
    """Merge attached deltas into a new one, attach it and make it live; the others stay as they are.

    Deltas that change weights (LoRA and its kin, KronA, selected parameters, masks) are merged as the changes that they
    are, scales folded in, whatever their ranks and factors: a matrix's change is dW (d_out, d_in), a parameter's the
    difference from its frozen value. Changes of matrices stay low-rank where their sum is: a LoRA whose rank is the sum
    of the ranks. Other results (of TIES, DARE, DoRA, KronA, masks) are changed entries of the model's parameters, or
    with ``rank`` the nearest LoRA of that rank. Of (IA)^3 the vectors are merged, as differences from one: their sum is
    that of the changes. Everything else (adapters, prompts, prefixes, whatever has a gate) is merged tensor by tensor,
    which means something only if all started from the same initial values. All is computed in float32 at least.

    Args:
        tuned: the model with its deltas.
        deltas: their names.
        name: of the new delta.
        strategy: ``linear``: sum_i lambda w_i tau_i. ``ties``: see :func:`deltune.merging.ties`. ``dare``: drop and
            rescale each, then the sum; ``dare-ties``: then TIES without trimming. ``concatenate``: linear, refused
            where it cannot be an exact LoRA. ``svd``: linear, compressed to ``rank``.
        weights: w_i; by default 1/n each, an average; in TIES 1 each, as it averages itself.
        scale: lambda, the factor of the merged change.
        density: share of entries that TIES keeps of each delta, 0.2 by default; all after DARE.
        drop: probability p with which DARE drops an entry, 0.9 by default.
        seed: of DARE's masks.
        rank: of the merged changes of matrices; by default as exact as possible, with ``svd`` the greatest rank that
            one of the deltas has at a matrix.
        heads: the delta whose task head the new one gets, or ``average`` where all have the same labels; by default
            task heads are left out, and the new delta says no task.
        initial: an attached delta with the initial values of what is merged tensor by tensor. A linear merge whose
            weights add up to one does not need it.
        missing: ``zero`` counts a matrix or a parameter that some of the deltas do not change as a change of zero;
            ``refuse`` refuses it.

    Returns:
        What was made; ``str()`` of it says it in two sentences.

    Raises:
        StateError: if the deltas do not fit each other, naming the tensor; if an option does not fit the strategy; if
            initial values are needed; while merged into the model.

    Source:
        Ilharco et al. 2022, arXiv 2212.04089; Yadav et al. 2023, arXiv 2306.01708; Yu et al. 2023, arXiv 2311.03099.
    """
    plan = Plan.of(strategy, len(deltas), weights, scale, density, drop, seed, rank)
    for item in (*deltas, *([] if initial is None else [initial])):
        find(tuned.attachments, item)
    twice = [item for number, item in enumerate(deltas) if item in deltas[:number]]
    if twice:
        raise StateError(f"{twice[0]!r} is named twice. Name each delta once, and give weights.")
    if missing not in _MISSING:
        raise StateError(f"missing cannot be {missing!r}. {suggestion(missing, _MISSING)}")
    check_name(name, tuned.attachments)
    with tuned.disabled():
        for item in (*deltas, *([] if initial is None else [initial])):
            tuned.activate(item)  # where the model was moved meanwhile, it follows
        tuned.activate()
        modules = dict(tuned.model.named_modules(remove_duplicate=False))
        read = comparable([read_delta(tuned.attachments[item], modules) for item in deltas])
        check_alike(read, missing)
        start: Mapping[str, Tensor] = read[0].starts
        if initial is not None:
            start = initial_values(read_delta(find(tuned.attachments, initial), modules), read)
        if read[0].values:
            warn_of_other_starts(read, None if initial is None else start)
        head = chosen_head(read, plan.weights, heads)
        result = _merged(read, plan, start, tuned)
    attachment = _attach(tuned, result, read, head, name)
    attachment.task = task_of(read, heads, headless=not tuned.anatomy.head)
    named = bool(read[0].values) and not result.entries
    changed = result.entries or any(delta.matrices or delta.own for delta in read)
    return Merged(
        name=name,
        method=str(attachment.method),
        strategy=strategy,
        deltas=tuple(deltas),
        weights=tuple(scale * weight for weight in plan.weights),
        space="both" if named and changed else "parameters" if named else "changes",
        discarded=result.discarded,
        heads=heads,
        left_out_heads=heads is None and any(delta.head for delta in read),
    )


def negate(tuned: Tuned, delta: str, name: str, *, scale: float = 1.0, initial: str | None = None) -> Merged:
    """Attach a delta's opposite, -lambda tau, which unlearns what the delta has learned.

    Args:
        tuned: the model with the delta.
        delta: its name.
        name: of the new delta.
        scale: lambda.
        initial: as in :func:`merge_deltas`; needed where tensors are merged name by name.

    Raises:
        StateError: as :func:`merge_deltas`.

    Source:
        Ilharco et al. 2022, arXiv 2212.04089, section 3.
    """
    return merge_deltas(tuned, [delta], name, weights=[-1.0], scale=scale, initial=initial)


def analogy(tuned: Tuned, a: str, b: str, c: str, name: str, *, heads: str | None = None) -> Merged:
    """Attach tau_c + (tau_b - tau_a): a is to b as c is to the new delta.

    Args:
        tuned: the model with the deltas.
        a: a delta; so are ``b`` and ``c``.
        b: what a is to become.
        c: what is to become likewise.
        name: of the new delta.
        heads: as in :func:`merge_deltas`.

    Raises:
        StateError: as :func:`merge_deltas`.

    Source:
        Ilharco et al. 2022, arXiv 2212.04089, section 5.
    """
    return merge_deltas(tuned, [c, b, a], name, weights=[1.0, 1.0, -1.0], heads=heads)


def _merged(deltas: Sequence[Delta], plan: Plan, initial: Mapping[str, Tensor], tuned: Tuned) -> Result:
    """The merged delta, computed on the bare model."""
    matrices = any(delta.matrices for delta in deltas)
    if deltas[0].lifted and (plan.rank is not None or plan.strategy in ("svd", "concatenate")):
        raise StateError(
            f"{deltas[0].method} and the others change the model in different ways, and are merged as changed entries "
            "of its parameters, which have no rank. Use the strategy linear, ties, dare or dare-ties, without rank."
        )
    if not matrices and (plan.rank is not None or plan.strategy in ("svd", "concatenate")):
        raise StateError(
            f"A rank is one of changed matrices, and {deltas[0].method} has no forms that change any, or none that are "
            "merged as changes of matrices. Use the strategy linear, ties, dare or dare-ties, without rank."
        )
    live = [(delta, factor) for delta, factor in zip(deltas, plan.factors, strict=True) if factor]
    exact = plan.sums and plan.strategy != "svd" and plan.rank is None
    products = summed_factors(deltas, plan.factors) if plan.sums and matrices else None
    if plan.strategy == "concatenate" and products is None:
        raise StateError(
            f"The changes of {deltas[0].method} are no products of two thin matrices that could be put side by side. "
            "Use the strategy linear for the exact sum, or svd for the nearest low-rank one."
        )
    if exact and len(live) == 1 and live[0][1] == 1:
        # nothing is calculated: it is that delta, to the bit
        (only, _), *_ = live
        return Result(only.method, {key: value for key, value in only.tensors.items() if key not in only.head})
    one = plan.sums and math.isclose(sum(plan.factors), 1.0, abs_tol=1e-9)
    unknown = next((key for key in deltas[0].values if key not in initial), None)
    if unknown is not None and not one:
        raise StateError(
            f"{unknown} of {deltas[0].method} is merged as a change from its initial value, which "
            "deltas do not hold. Give initial=, an attached delta as it was before training (attach with the seed of "
            "the training, or save it untrained); or merge linearly with weights that add up to one, which needs none."
        )
    by_entries = any(delta.by_entries or delta.lifted or delta.own.keys() != deltas[0].own.keys() for delta in deltas)
    rank = plan.rank
    if plan.strategy == "svd" and rank is None:
        rank = _greatest_rank(deltas)
    if by_entries and rank is not None:
        raise StateError(
            f"{deltas[0].method} changes entries of the model's own parameters, which have no rank. Leave rank out."
        )
    entries = by_entries or (matrices and products is None and rank is None)
    if entries:  # which hold no vectors
        deltas = [delta.unscaled() for delta in deltas]
    vectors = [_vector(delta, deltas, initial) for delta in deltas]
    total = plan.apply(vectors, [delta.name for delta in deltas])
    if entries:
        return as_entries(deltas, total, tuned.model, tuned.anatomy)
    named = named_values(deltas, total, initial)
    if not matrices:
        return Result(deltas[0].method, named)
    return as_low_rank(deltas, total if products is None else products, rank, named, tuned.model, tuned.anatomy)


def _vector(delta: Delta, deltas: Sequence[Delta], initial: Mapping[str, Tensor]) -> LazyVector:
    """What a delta changes, tensor by tensor; zeros where only others change something."""
    makers: dict[str, Callable[[], Tensor]] = {}
    for other in deltas:
        for key, matrix in other.matrices.items():
            makers[key] = delta.matrices[key].dense if key in delta.matrices else partial(_zeros, matrix.dense)
        for key, own in other.own.items():
            makers[key] = delta.own[key].change if key in delta.own else partial(_zeros, own.change)
    for key, value in delta.values.items():
        makers[key] = partial(_change, value, initial.get(key))
    return LazyVector(makers)


def _zeros(make: Callable[[], Tensor]) -> Tensor:
    return torch.zeros_like(make())


def _change(value: Tensor, initial: Tensor | None) -> Tensor:
    """The difference from where it started, in float32 at least; from zero if that is not known."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return (value.double() - (0.0 if initial is None else initial.to(value.device).double())).to(wide)


def _greatest_rank(deltas: Sequence[Delta]) -> int:
    """Of the changes of matrices.

    Raises:
        StateError: if some have none.
    """
    ranks = []
    for delta in deltas:
        for key, change in delta.matrices.items():
            factors = change.factors()
            if factors is None:
                raise StateError(f"The change of {key} by {delta.method} has no rank of its own to keep: give rank=.")
            ranks.append(len(factors[0]))
    return max(ranks)


def _attach(tuned: Tuned, result: Result, deltas: Sequence[Delta], head: dict[str, Tensor], name: str) -> Attachment:
    """Attach the merged delta and fill it; if that fails all is as before."""
    # inside, the caller's state is kept, for the case that it fails; routing and stacking included
    with tuned.activated():
        # initial values are drawn and overwritten at once: leave the caller's random numbers alone
        with torch.random.fork_rng(devices=[]):
            tuned.attach(result.method, name, train_head=bool(head))
        attachment = tuned.attachments[name]
        try:
            for key, dtype in result.dtypes.items():
                attachment.placed[key].form.to(dtype)
            left_out = {key for delta in deltas for key in delta.head}
            tensors = {**result.tensors, **head} if head else without_head(attachment, result.tensors, left_out)
            fill(attachment, tensors, set(head), True, "The merged delta")
        except Exception:
            tuned.detach(name)
            raise
    tuned.activate(name)
    return attachment
