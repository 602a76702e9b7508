"""From an attachment to the configuration and the tensors that AdapterHub's library reads."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

from deltune.attachment import Attachment, Placed
from deltune.checkpoints.adapterhub.bottlenecks import write_bottlenecks
from deltune.checkpoints.adapterhub.loras import write_loras
from deltune.checkpoints.adapterhub.names import Names
from deltune.checkpoints.adapterhub.pieces import GATES, Acting, Stored, Written
from deltune.checkpoints.adapterhub.prefixes import write_prefixes
from deltune.checkpoints.adapterhub.prompts import write_prompts
from deltune.errors import CheckpointError
from deltune.methods import Method, Sum
from deltune.methods.additive.bottleneck import BottleneckMethod
from deltune.methods.additive.ia3 import IA3
from deltune.methods.additive.prefix_method import PrefixMethod
from deltune.methods.additive.prompt_tuning import PromptTuning
from deltune.methods.hybrid.gated import Gated
from deltune.methods.hybrid.gates import InputGate
from deltune.methods.preset import Preset
from deltune.methods.reparameterized.lora import LoRA
from deltune.sites import GateForm

__all__ = ["written", "written_adapter"]

_WRITERS: dict[type[Method], Callable[[Sequence[Stored], str, Names], list[Written]]] = {
    PrefixMethod: write_prefixes,
    BottleneckMethod: write_bottlenecks,  # type: ignore[type-abstract]
    LoRA: write_loras,
    IA3: write_loras,
    PromptTuning: write_prompts,
}


def written_adapter(attachment: Attachment, name: str, names: Names) -> Written:
    """One configuration for all that the attachment does, and its tensors.

    Raises:
        CheckpointError: if the library has no form for it.
    """
    others = [key for key, _ in attachment.written() if key not in attachment.head_names]
    if others:
        raise CheckpointError(
            f"{attachment.method} trains parameters of the model itself ({', '.join(others[:2])}, ...), which "
            "AdapterHub's library does not store. Save it in deltune's own format."
        )
    methods = _stored(attachment.method.stored(attachment.forms), attachment.placed)
    found = written(methods, name, names)
    _warn_of_gates(methods)
    return found


def written(methods: Sequence[Stored], name: str, names: Names) -> Written:
    """One configuration for all of these methods, and their tensors.

    Raises:
        CheckpointError: if the library has no form for them.
    """
    kinds: dict[type[Method], list[Stored]] = {}
    for stored in methods:
        kind = next((kind for kind in _WRITERS if isinstance(stored.method, kind)), None)
        if kind is None:
            raise CheckpointError(
                f"AdapterHub's library has no form for {stored.method.name}. It has one for adapters, LoRA, prefixes, "
                "prompts, adapter-fusion and sums of them; deltune's own format holds every method."
            )
        kinds.setdefault(kind, []).append(stored)
    pieces = [piece for kind, several in kinds.items() for piece in _WRITERS[kind](several, name, names)]
    if len(pieces) == 1:
        return pieces[0]
    _check_union(pieces)
    joined = Written({"architecture": "union", "configs": [piece.config for piece in pieces]})
    for piece in pieces:
        joined.tensors |= piece.tensors
    return joined


def _check_union(pieces: Sequence[Written]) -> None:
    """Refuse two configurations of one kind, which the library tells apart by their places alone.

    Raises:
        CheckpointError: if there are such.
    """
    bottlenecks = [piece for piece in pieces if "architecture" not in piece.config]
    if len(bottlenecks) > 1:
        raise CheckpointError(
            "The adapters have different options; AdapterHub's library has one kind of adapter in one file. Save them "
            "in deltune's own format."
        )


def _stored(method: Method, placed: Mapping[str, Placed]) -> list[Stored]:
    """Each method with its forms as they are stored, with their gates.

    Raises:
        CheckpointError: if there are gates that the library does not have.
    """
    if isinstance(method, Preset):
        return _stored(method.whole, placed)
    if not isinstance(method, Sum):
        return [Stored(method, [acting for item in placed.values() for acting in _acting(item)])]
    if isinstance(method, Gated) and method.gate != "input":
        raise CheckpointError(
            f"AdapterHub has gates that read the input, not those of gate={method.gate}. Save it in deltune's "
            "own format."
        )
    found = []
    for number, part in enumerate(method.methods):
        own = {key.removeprefix(f"{number}."): item for key, item in placed.items() if key.startswith(f"{number}.")}
        found.extend(_stored(part, own))
    return found


def _acting(placed: Placed) -> Iterator[Acting]:
    """What is to be written of a form: nothing of gates, which stand with what they gate, and of what trains only."""
    form = placed.form.stored()
    if form is None or placed.site is None or isinstance(form, GateForm):
        return
    gate = placed.form.gated_by[0] if placed.form.gated_by else None
    assert gate is None or isinstance(gate, InputGate)
    yield Acting(placed.site.part, form, gate)


def _warn_of_gates(methods: Sequence[Stored]) -> None:
    """Say where the library's gates are others than ours."""
    gates = [acting.gate for stored in methods for acting in stored.forms if acting.gate is not None]
    if any(gate.pooling == "token" for gate in gates):
        warnings.warn(f"Where it is read again, {GATES}.", UserWarning, stacklevel=5)
    elif any(gate.pooling == "mean" for gate in gates):
        warnings.warn(
            "Gates of AdapterHub's library count padding; these do not (pooling=mean), so that outputs for padded rows "
            "differ there.",
            UserWarning,
            stacklevel=5,
        )
