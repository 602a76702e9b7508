"""What the readers and writers of this format share: one method with its tensors, and how options are refused."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from deltune.backbone import Part
from deltune.checkpoints.adapterhub.names import Names, Weights
from deltune.errors import CheckpointError
from deltune.methods import Method
from deltune.methods.hybrid.gates import InputGate

__all__ = [
    "GATES",
    "Acting",
    "Piece",
    "Stored",
    "Written",
    "by_pooling",
    "completed",
    "gate_tensors",
    "layout",
    "refuse",
    "take_gate",
    "uses_gates",
    "whole",
]

#: What is said where a gate of the library is not quite ours.
GATES = (
    "a gate of AdapterHub is a mean over all positions of a text, later ones too; in stacks whose positions do "
    "not read later ones, deltune's is of each position, so that outputs differ"
)


@dataclass
class Piece:
    """One method that was read.

    Attributes:
        method: the method.
        values: its tensors, by key of the site and name, with those of its gates.
        notes: what a user should know of it.
        pooling: how its gates make one value of those of a row's positions; None if it has no gates.
    """

    method: Method
    values: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    pooling: str | None = None


@dataclass
class Acting:
    """A form as it is stored, the part that it acts at, and its gate, if it has one."""

    part: Part
    form: Any
    gate: InputGate | None = None


@dataclass
class Stored:
    """One method that is to be written, with its forms."""

    method: Method
    forms: list[Acting]


@dataclass
class Written:
    """A configuration as the library writes it, and the tensors that go with it, by relative name."""

    config: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


def completed(
    config: Mapping[str, Any], defaults: Mapping[str, Any], required: Collection[str] = ()
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A configuration with the defaults of what it leaves out, and what a user should know of the options in it.

    Args:
        config: as it was read.
        defaults: every option that is known, with its default.
        required: those without one.
    """
    unknown = [name for name, value in config.items() if value and name not in defaults and name not in required]
    notes = tuple(f"the option {name}={config[name]!r} is not known to deltune and was ignored" for name in unknown)
    return {**defaults, **config}, notes


def refuse(config: Mapping[str, Any], refused: Mapping[str, str]) -> None:
    """Refuse options that deltune has nothing for.

    Args:
        config: the configuration.
        refused: what is done by the options that are set, in words.

    Raises:
        CheckpointError: if one of them is set.
    """
    for option, meaning in refused.items():
        if config.get(option):
            raise CheckpointError(
                f"The adapter was trained with {option}={config[option]}: {meaning}. deltune has no method that does "
                "this, so it cannot be read."
            )


def by_pooling(names: Names, parts: Iterable[Part], gating: bool) -> Iterator[tuple[str | None, list[Part]]]:
    """The parts in groups whose gates are of one kind; all in one, with None, where there are no gates.

    The library takes the mean over all positions, padding among them. Where that would let a position know of later
    ones, each has its own gate.
    """
    groups: dict[str | None, list[Part]] = {}
    for part in parts:
        pooling = None if not gating else "token" if names.causal(part) else "all"
        groups.setdefault(pooling, []).append(part)
    yield from groups.items()


def take_gate(values: dict[str, Tensor], key: str, module: str, weights: Weights) -> None:
    """Move the tensors of the gate ``module`` of the change at the site ``key``."""
    weights.take_into(values, {f"{key}.gate.linear.{name}": f"{module}.{name}" for name in ("weight", "bias")})


def gate_tensors(gate: InputGate | None, module: str) -> dict[str, Tensor]:
    """The tensors of a gate by the library's names; none if there is none."""
    if gate is None:
        return {}
    return {f"{module}.{name}": value for name, value in gate.linear.named_parameters()}


def uses_gates(forms: Iterable[Acting]) -> bool:
    """Whether these forms have gates.

    Raises:
        CheckpointError: if some have and some have not.
    """
    found = {acting.gate is not None for acting in forms}
    if len(found) > 1:
        raise CheckpointError(
            "AdapterHub's library has gates at all places of a method or at none; here some have gates. Save it in "
            "deltune's own format."
        )
    return True in found


def whole(value: float) -> float | int:
    """The number as the library writes it: without a fraction where there is none."""
    return int(value) if float(value).is_integer() else float(value)


def layout(
    names: Names,
    used: Mapping[str, Sequence[Part]],
    available: Mapping[str, Sequence[Part]],
    what: str,
    always: Collection[str] = (),
) -> tuple[dict[str, bool], list[int]]:
    """Which locations are used, and which layers are left out: all that the library can say.

    Args:
        names: of the model.
        used: the parts that are changed, by location.
        available: all parts of each location.
        what: the method, for the message.
        always: locations that no option switches off.

    Raises:
        CheckpointError: if the parts are not those of some locations in some layers.
    """
    layers = {names.index(part) for parts in used.values() for part in parts}
    flags = {location: bool(used.get(location)) or location in always for location in available}
    candidates = {location: parts for location, parts in available.items() if flags[location]}
    left_out = sorted({names.index(part) for parts in candidates.values() for part in parts} - layers)
    for location, parts in candidates.items():
        wanted = {part.key for part in parts if names.index(part) in layers}
        missing = sorted(wanted - {part.key for part in used.get(location, ())})
        if missing:
            raise CheckpointError(
                f"AdapterHub leaves out whole layers, so it has no form for a {what} that acts at some places "
                f"of a layer and not at {', '.join(missing[:4])}. Save it in deltune's own format."
            )
    return flags, left_out
