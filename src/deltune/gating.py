"""How much of each gated change a model uses on some data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltune.errors import StateError
from deltune.methods import Method, Preset, Sum
from deltune.methods.hybrid.gated import Gated
from deltune.methods.hybrid.gates import CentralGate
from deltune.sites import GateForm
from deltune.training.evaluation import measuring
from deltune.tuned import Tuned

__all__ = ["gate_values"]


class _Values:
    """After a gate: sum of its values over rows, or over real tokens, and their number."""

    def __init__(self) -> None:
        self.mask: Tensor | None = None
        self.total: Tensor | None = None
        self.count = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        values = output.detach().double()
        if self.mask is not None and self.mask.shape == values.shape[:2]:
            values = values[self.mask.bool()]
        values = values.flatten(0, -2)
        self.total = values.sum(0) + (0 if self.total is None else self.total)
        self.count += len(values)

    def mean(self) -> list[float]:
        """Since the last call: one value, or one for each part of a central gate; none if the gate was not asked."""
        found = [] if self.total is None else (self.total / self.count).tolist()
        self.total, self.count = None, 0
        return found


def gate_values(
    tuned: Tuned, batches: Iterable[Mapping[str, Tensor]], name: str | None = None
) -> dict[str, list[float]]:
    """The mean value of each gate for each batch, between 0 and 1.

    Args:
        tuned: with a gated sum, or a method that is made of one such as unipelt, attached and active.
        batches: as the model takes them. Values of gates for each token are means over tokens that are not padding.
        name: which attachment; by default the live one.

    Returns:
        By place and part (``encoder.3.lora attention.projections``, ``encoder.3.pfeiffer-adapter ffn``), a value for
        each batch. :func:`deltune.measure.gate_table` and :func:`deltune.measure.gate_picture` show them.

    Raises:
        StateError: if nothing gated is attached, several attachments are live and none is named, or there are no
            batches.
    """
    if name is None and len(tuned.active) != 1:
        raise StateError(f"Say which attachment: name= one of {', '.join(tuned.attachments)}.")
    attachment = tuned.attachments[name or tuned.active[0]]
    gates = {key: form for key, form in attachment.forms.items() if isinstance(form, GateForm)}
    if not gates:
        raise StateError(f"{attachment.method} has no gates. Attach a gated sum, such as unipelt.")
    parts = dict(_parts(attachment.method))
    hooks = {key: _Values() for key in gates}
    handles = [form.register_forward_hook(hooks[key]) for key, form in gates.items()]
    found: dict[str, list[float]] = {}
    try:
        with measuring(tuned.model):
            for batch in batches:
                for hook in hooks.values():
                    hook.mask = batch.get("attention_mask")
                tuned.model(**batch)
                for key, hook in hooks.items():
                    for label, value in zip(_labels(key, gates[key], parts), hook.mean(), strict=False):
                        found.setdefault(label, []).append(value)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise StateError("No batch went through the gates. Give batches of the data.")
    return found


def _parts(method: Method, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """How keys of a gated sum begin, and the names of its parts."""
    if isinstance(method, Preset):
        yield from _parts(method.whole, prefix)
    elif isinstance(method, Gated):
        yield prefix, tuple(part.name for part in method.methods)
    if isinstance(method, Sum):
        for number, part in enumerate(method.methods):
            yield from _parts(part, f"{prefix}{number}.")


def _labels(key: str, gate: GateForm, parts: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Names for the values of the gate with that key: its layer, the part that it gates, and the place in the layer."""
    prefix = max((known for known in parts if key.startswith(known)), key=len)
    place = key.removeprefix(prefix).removesuffix(".gate")
    names = parts[prefix]
    if not isinstance(gate, CentralGate):
        number, _, place = place.partition(".")
        names = (names[int(number)],)
    stack, layer, *rest = place.split(".")
    where = f" {'.'.join(rest)}" if rest else ""
    return [f"{stack}.{layer}.{part}{where}" for part in names]
