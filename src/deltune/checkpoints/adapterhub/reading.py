"""From a configuration of AdapterHub's library and its tensors to a method and ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.checkpoints.adapterhub.bottlenecks import read_bottlenecks
from deltune.checkpoints.adapterhub.loras import read_loras
from deltune.checkpoints.adapterhub.names import Names, Weights, known_model, usable_name
from deltune.checkpoints.adapterhub.pieces import GATES, Piece
from deltune.checkpoints.adapterhub.prefixes import drop_pools, read_prefixes
from deltune.checkpoints.adapterhub.prompts import read_prompts
from deltune.checkpoints.formats import Saved
from deltune.errors import CheckpointError, MethodError, TargetError
from deltune.methods import Method, Sum
from deltune.methods.hybrid.gated import Gated

__all__ = ["read_adapter"]

#: Up to this version the library scaled LoRA by one, whatever alpha and rank were.
_SCALED = (1, 1, 0)
_UNKNOWN = {
    "reft": "interventions on hidden states (ReFT)",
    "mtl_lora": "LoRA with parts for several tasks (MTL-LoRA)",
}


def read_adapter(
    described: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, anatomy: Anatomy
) -> Saved:
    """What an adapter is in deltune's terms.

    Args:
        described: the content of ``adapter_config.json``.
        tensors: those of its file.
        model: the model that it is for.
        anatomy: its parts.

    Raises:
        CheckpointError: if it is not well described, or says what deltune cannot do.
    """
    name, config = str(described.get("name")), described.get("config")
    if not isinstance(config, dict):
        raise CheckpointError(
            f"adapter_config.json says only {config!r} of the method. It is of a version of AdapterHub before "
            "it wrote configurations in full: load it there and save it again."
        )
    names = Names(model, anatomy)
    weights = Weights(tensors, names)
    drop_pools(weights)
    try:
        pieces = _pieces(_corrected(config, described), name, names, weights, old="version" not in described)
    except (MethodError, TargetError) as error:
        raise CheckpointError(f"The method that adapter_config.json describes cannot be built here: {error}") from error
    if not pieces:
        raise CheckpointError("adapter_config.json describes an adapter that acts nowhere in this model.")
    method, values = _joined(pieces)
    notes = [note for piece in pieces for note in piece.notes]
    if any(piece.pooling == "token" for piece in pieces):
        notes.append(GATES)
    return Saved(
        name=usable_name(name),
        method=method,
        # what nobody knew is among the unexpected
        tensors={**values, **weights.left},
        base_model=known_model(described, model),
        notes=tuple(dict.fromkeys(notes)),
    )


def _joined(pieces: Sequence[Piece]) -> tuple[Method, dict[str, Tensor]]:
    """One method for all pieces, and their tensors by its keys; what has gates of one kind is in one gated sum."""
    groups: dict[str | None, list[Piece]] = {}
    for piece in pieces:
        groups.setdefault(piece.pooling, []).append(piece)
    found: list[tuple[Method, dict[str, Tensor]]] = []
    for pooling, several in groups.items():
        if pooling is None:
            found.extend((piece.method, piece.values) for piece in several)
        else:
            gated = Gated(tuple(piece.method for piece in several), pooling=pooling, shared=False)
            found.append((gated, _numbered([piece.values for piece in several])))
    if len(found) == 1:
        return found[0]
    return Sum(tuple(method for method, _ in found)), _numbered([values for _, values in found])


def _numbered(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    return {f"{number}.{key}": value for number, values in enumerate(parts) for key, value in values.items()}


def _corrected(config: dict[str, Any], described: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration, with the scale that an old version of the library really used."""
    version = re.fullmatch(r"adapters\.(\d+)\.(\d+)\.(\d+).*", str(described.get("version", "")))
    if version is None or tuple(map(int, version.groups())) >= _SCALED or config.get("architecture") != "lora":
        return config
    return {**config, "alpha": config.get("r", 8)}


def _pieces(config: Mapping[str, Any], name: str, names: Names, weights: Weights, old: bool) -> list[Piece]:
    """The methods that one configuration describes, with their tensors.

    Raises:
        CheckpointError: if there is none for it.
    """
    architecture = config.get("architecture")
    if architecture == "union":
        return [piece for part in config["configs"] for piece in _pieces(part, name, names, weights, old)]
    if architecture in (None, "bottleneck"):
        return read_bottlenecks(config, name, names, weights, old)
    readers = {"lora": read_loras, "prefix_tuning": read_prefixes, "prompt_tuning": read_prompts}
    if architecture not in readers:
        meaning = _UNKNOWN.get(str(architecture), "unknown here")
        raise CheckpointError(
            f"The adapter's architecture is {architecture!r}: {meaning}. deltune has no method that does this, so it "
            f"cannot be read. Those that can: bottlenecks, {', '.join(readers)} and unions of them."
        )
    return readers[architecture](config, name, names, weights)
