"""How much of each gated change a model uses on some data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from deltune.attachment import Placed
from deltune.errors import StateError
from deltune.methods import Method, Preset, Sum
from deltune.methods.hybrid.gated import Gated
from deltune.methods.hybrid.gates import CentralGate
from deltune.sites import GateForm
from deltune.switching import find
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
        batches: as the model takes them. Values of gates for each token are means over tokens that are not padding; of
            cross-attention over all.
        name: which attachment, a live one; by default the only one.

    Returns:
        By place and part (``encoder.3.lora attention.projections``, ``encoder.3.pfeiffer-adapter ffn``), a value for
        each batch. :func:`deltune.measure.gate_table` and :func:`deltune.measure.gate_picture` show them.

    Raises:
        StateError: if nothing gated is attached, it is not active for whole batches, several attachments are live and
            none is named, or there are no batches.
    """
    if name is None and len(tuned.active) != 1:
        raise StateError(f"Say which attachment: name= one of {', '.join(tuned.attachments)}.")
    attachment = find(tuned.attachments, name or tuned.active[0])
    if attachment.name not in tuned.active or tuned.control.route:
        raise StateError(f"Gates are measured of what acts on whole batches: call activate({attachment.name!r}) first.")
    gates = {key: form for key, form in attachment.forms.items() if isinstance(form, GateForm)}
    if not gates:
        raise StateError(f"{attachment.method} has no gates. Attach a gated sum, such as unipelt.")
    labels = _labels(gates, dict(_parts(attachment.method)))
    masks = {key: _mask_name(attachment.placed[key], tuned) for key in gates}
    hooks = {key: _Values() for key in gates}
    handles = [form.register_forward_hook(hooks[key]) for key, form in gates.items()]
    found: dict[str, list[float]] = {}
    try:
        with measuring(tuned.model):
            for batch in batches:
                for key, hook in hooks.items():
                    hook.mask = batch.get(masks[key])
                tuned.model(**batch)
                for key, hook in hooks.items():
                    for label, value in zip(labels[key], hook.mean(), strict=False):
                        found.setdefault(label, []).append(value)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise StateError("No batch went through the gates. Give batches of the data.")
    return found


def _mask_name(placed: Placed, tuned: Tuned) -> str:
    """Which argument of the model says where the padding of a gate's positions is; "" for none."""
    if not getattr(getattr(tuned.model, "config", None), "is_encoder_decoder", False):
        return "attention_mask"
    assert placed.site is not None
    # of cross-attention, queries are the decoder's positions, and keys the encoder's
    return {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}.get(placed.site.part.stack, "")


def _parts(method: Method, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """How keys of a gated sum begin, and the names of its parts; equal names are numbered."""
    if isinstance(method, Preset):
        yield from _parts(method.whole, prefix)
    elif isinstance(method, Gated):
        names = [part.name for part in method.methods]
        yield (
            prefix,
            tuple(
                f"{name} {names[:place].count(name) + 1}" if names.count(name) > 1 else name
                for place, name in enumerate(names)
            ),
        )
    if isinstance(method, Sum):
        for number, part in enumerate(method.methods):
            yield from _parts(part, f"{prefix}{number}.")


def _labels(gates: Mapping[str, GateForm], parts: Mapping[str, tuple[str, ...]]) -> dict[str, list[str]]:
    """Names for the values of each gate: its layer, the part that it gates, and the place in the layer."""
    found = {key: _labels_of(key, gate, parts) for key, gate in gates.items()}
    counts = Counter(label for labels in found.values() for label in labels)
    # two gated sums in one sum may gate the same place by parts of the same name
    return {
        key: [f"{label} ({key})" if counts[label] > 1 else label for label in labels] for key, labels in found.items()
    }


def _labels_of(key: str, gate: GateForm, parts: Mapping[str, tuple[str, ...]]) -> list[str]:
    prefix = max((known for known in parts if key.startswith(known)), key=len)
    place = key.removeprefix(prefix).removesuffix(".gate")
    names = parts[prefix]
    if not isinstance(gate, CentralGate):
        number, _, place = place.partition(".")
        names = (names[int(number)],)
    layer = re.fullmatch(r"(?P<layer>\w+\.\d+)(\.(?P<where>.+))?", place)
    if layer is None:
        return [f"{part} {place}" for part in names]
    where = f" {layer['where']}" if layer["where"] else ""
    return [f"{layer['layer']}.{part}{where}" for part in names]
