"""What fused adapters are used for: the attention that each gets, and leaving the least used ones out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltune.errors import MethodError, StateError
from deltune.methods.additive.adapter_fusion import FusedAdapters
from deltune.training.evaluation import measuring
from deltune.tuned import Tuned

__all__ = ["adapter_use", "prune_adapters"]


class _Use:
    """After fused adapters: sum of their weights over real tokens, and the number of tokens."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.total: Tensor | None = None
        self.tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, FusedAdapters)
        h: Tensor = args[0]
        weights = module.weights(h, module.changes(h)).double()
        mask = self.mask
        if mask is not None and mask.shape == h.shape[:2]:
            weights = weights[mask.bool()]
        weights = weights.flatten(0, -2)
        self.total = weights.sum(0) + (0 if self.total is None else self.total)
        self.tokens += len(weights)


def adapter_use(
    tuned: Tuned, batches: Iterable[Mapping[str, Tensor]], name: str | None = None
) -> dict[str, list[float]]:
    """The mean weight that each of the fused adapters gets, in each place: non-negative and 1 in sum.

    Args:
        tuned: with adapter-fusion attached and active.
        batches: of the training data, as the model takes them; padding is left out.
        name: which attachment; by default the live one.

    Returns:
        For each place (``encoder.3.ffn``) the weights of the adapters, in the order of the method's ``adapters``; 0 for
        those that were pruned. :func:`deltune.measure.use_table` and :func:`deltune.measure.use_picture` show them.

    Raises:
        StateError: if nothing fused is attached, or there are no batches.
    """
    forms = _fused(tuned, name)
    hooks = {key: _Use() for key in forms}
    handles = [form.register_forward_hook(hooks[key]) for key, form in forms.items()]
    try:
        with measuring(tuned.model):
            for batch in batches:
                for hook in hooks.values():
                    hook.mask = batch.get("attention_mask")
                tuned.model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    found: dict[str, list[float]] = {}
    for key, form in forms.items():
        total, tokens = hooks[key].total, hooks[key].tokens
        if total is None:
            raise StateError(f"No batch went through the fused adapters at {key}. Give batches of the training data.")
        row = [0.0] * len(form.adapters)
        for index, value in zip(form.kept.nonzero().flatten().tolist(), (total / tokens).tolist(), strict=True):
            row[index] = value
        found[key] = row
    return found


def prune_adapters(tuned: Tuned, use: Mapping[str, Sequence[float]], keep: int, name: str | None = None) -> None:
    """Let only the ``keep`` most used adapters of each place take part; the others' weight goes to them.

    Nothing is lost: keeping as many as there are undoes it. A saved delta remembers what it keeps.

    Source: Rücklé et al. 2021, arXiv 2010.11918, section 5.

    Args:
        tuned: with adapter-fusion attached.
        use: what :func:`adapter_use` found.
        keep: from 1 to the number of adapters.
        name: which attachment; by default the live one.

    Raises:
        StateError: if nothing fused is attached.
        MethodError: if so many adapters are not there, or ``use`` is not of these places.
    """
    forms = _fused(tuned, name)
    if use.keys() != forms.keys():
        raise MethodError("The use is not of these places: measure it with adapter_use(tuned, batches).")
    for key, form in forms.items():
        count = len(form.adapters)
        if not isinstance(keep, int) or not 1 <= keep <= count or len(use[key]) != count:
            raise MethodError(f"1 to {count} adapters can be kept at {key}, not {keep!r}.")
        order = sorted(range(count), key=lambda index: (-use[key][index], index))
        form.keep(order[:keep])


def _fused(tuned: Tuned, name: str | None) -> dict[str, FusedAdapters]:
    if name is None and len(tuned.active) != 1:
        raise StateError(f"Say which attachment: name= one of {', '.join(tuned.attachments)}.")
    forms = tuned.attachments[name or tuned.active[0]].forms
    found = {key: form for key, form in forms.items() if isinstance(form, FusedAdapters)}
    if not found:
        raise StateError(f"{name or tuned.active[0]!r} has no fused adapters. Attach adapter-fusion.")
    return found
