"""LoRA of AdapterHub's library, and (IA)^3 and DoRA, which it holds in the same form.

In a fused matrix (GPT-2) the factors of queries, keys and values stand one below the other, in this order and without
those that are not changed. With gates the scale alpha / r is not applied, here the matrices have the scale 1 then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from deltune.backbone import Part
from deltune.checkpoints.adapterhub.names import Names, Weights, covering
from deltune.checkpoints.adapterhub.pieces import (
    Acting,
    Piece,
    Stored,
    Written,
    by_pooling,
    completed,
    layout,
    refuse,
    uses_gates,
    whole,
)
from deltune.errors import CheckpointError
from deltune.methods.additive.ia3 import IA3, InputScale, OutputScale
from deltune.methods.base import Method
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import DecomposedLowRank

__all__ = ["read_loras", "write_loras"]

_DEFAULTS: dict[str, Any] = {
    "architecture": "lora",
    "selfattn_lora": True,
    "intermediate_lora": False,
    "output_lora": False,
    "leave_out": [],
    "r": 8,
    "alpha": 8,
    "dropout": 0.0,
    "attn_matrices": ["q", "v"],
    "composition_mode": "add",
    "init_weights": "lora",
    "init_weights_seed": None,
    "use_gating": False,
    "use_dora": False,
    "vera_d": None,
    "vera_b": None,
    "dtype": None,
}
_ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
_VERA = "random matrices that are shared by all layers, and not stored with them (VeRA)"
#: Our names of a form's tensors, and of its gate's, by the library's.
_LORA = {"lora_A": "A", "lora_B": "B"}
_DORA = {**_LORA, "m.weight": "magnitude"}
_IA3 = {"lora_B": "scale"}
_GATE = {"gate.weight": "gate.linear.weight", "gate.bias": "gate.linear.bias"}
#: Those of them that are columns of width one there.
_COLUMNS = ("magnitude", "scale")


def read_loras(config: Mapping[str, Any], name: str, names: Names, weights: Weights) -> list[Piece]:
    """The methods of one configuration with their tensors.

    Args:
        config: the configuration.
        name: of the adapter.
        names: of the model.
        weights: the file's tensors.

    Raises:
        CheckpointError: if it says what deltune cannot do.
    """
    config, notes = completed(config, _DEFAULTS)
    refuse(config, {"vera_d": _VERA, "vera_b": _VERA})
    _check_gates(bool(config["use_gating"]), ia3=config["composition_mode"] == "scale", dora=bool(config["use_dora"]))
    left_out = set(config["leave_out"] or ())
    locations = _locations(names, config["attn_matrices"])
    everywhere = [
        part
        for location, parts in locations.items()
        for part in (parts if config[location] else ())
        if names.index(part) not in left_out
    ]
    method, found = _method(config, everywhere, names)
    if config["use_gating"]:
        found = {**found, **_GATE}
    pieces = []
    for pooling, parts in by_pooling(names, everywhere, bool(config["use_gating"])):
        for targets, group in covering(names.anatomy, parts):
            pieces.append(Piece(method.from_options({**_given(method), "targets": targets}), {}, notes, pooling))
            values = pieces[-1].values
            for module, fused in _modules(group, names).items():
                _take(values, fused, f"{module}.loras.{name}", found, weights)
            for key in [key for key in values if key.endswith(".scale")]:
                values[key] = config["alpha"] * values[key]
    return pieces


def _given(method: Method) -> dict[str, Any]:
    return {item["name"]: getattr(method, item["name"]) for item in method.options()}


def _method(config: Mapping[str, Any], parts: Sequence[Part], names: Names) -> tuple[Method, dict[str, str]]:
    """The method without its targets, and our names of its tensors by the library's.

    Raises:
        CheckpointError: if deltune's method computes something else.
    """
    if config["composition_mode"] == "scale":
        return IA3(inputs=None), _IA3
    if config["composition_mode"] != "add":
        raise CheckpointError(f"composition_mode is {config['composition_mode']!r}; known are add and scale.")
    if config["use_dora"]:
        _check_dora(config["alpha"] / config["r"], parts, names)
    alpha = config["r"] if config["use_gating"] else config["alpha"]
    dora = bool(config["use_dora"])
    return (
        LoRA(rank=config["r"], alpha=alpha, dropout=config["dropout"], weight_decomposed=dora),
        _DORA if dora else _LORA,
    )


def _check_gates(gating: bool, *, ia3: bool, dora: bool) -> None:
    """Refuse gates of methods in which the library's gates are not factors of the change.

    Raises:
        CheckpointError: if this is one.
    """
    if gating and (ia3 or dora):
        what, done = (
            ("(IA)^3", "multiplies the vector, l g, and not its change, 1 + g (l - 1)")
            if ia3
            else ("DoRA", "multiplies the product of the factors alone, below the magnitudes and norms")
        )
        raise CheckpointError(
            f"A gate of {what} in AdapterHub's library {done}, which is another function than deltune's gate of the "
            "whole change: it is neither read nor written. Save it in deltune's own format."
        )


def _check_dora(scale: float, parts: Iterable[Part], names: Names) -> None:
    """Refuse DoRA where the library's is not that of the paper.

    Raises:
        CheckpointError: if it is not.
    """
    biased = next((part for part in parts if names.has_bias(part)), None)
    if scale != 1 or biased is not None:
        reason = f"{biased.key} has a bias" if biased else f"its scale alpha / r is {scale:g}"
        raise CheckpointError(
            "AdapterHub computes DoRA as in the paper only where the scale is 1 and matrices have no bias: it "
            f"leaves the scale out of the norms, and scales biases too. Here {reason}: it is neither read nor written."
        )


def _locations(names: Names, matrices: Sequence[str]) -> dict[str, list[Part]]:
    """All parts of each location, for these matrices of attention.

    Raises:
        CheckpointError: if there are no such matrices.
    """
    unknown = [matrix for matrix in matrices if matrix not in _ATTENTION]
    if unknown:
        raise CheckpointError(f"attn_matrices names {unknown[0]!r}; known are {', '.join(_ATTENTION)}.")
    # in the order of a fused matrix, whatever the configuration's
    roles = [role for matrix, role in _ATTENTION.items() if matrix in matrices]
    return {
        "selfattn_lora": [part for role in roles for part in names.parts(role, cross=True)],
        "intermediate_lora": names.parts(names.family.intermediate, cross=False),
        "output_lora": names.parts(names.family.output, cross=False),
    }


def _modules(parts: Sequence[Part], names: Names) -> dict[str, list[Part]]:
    """The parts by the module that they stand in: several where it is fused."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(names.module(part), []).append(part)
    return found


def _take(
    values: dict[str, Tensor], fused: Sequence[Part], module: str, found: Mapping[str, str], weights: Weights
) -> None:
    """Move the tensors of one module, cut for its parts.

    Raises:
        CheckpointError: if one cannot be cut.
    """
    for theirs, ours in found.items():
        tensor = weights.take(f"{module}.{theirs}")
        if tensor is None:
            continue
        if tensor.shape[0] % len(fused):
            raise CheckpointError(
                f"{module}.{theirs} has {tensor.shape[0]} rows, which cannot be those of {len(fused)} matrices."
            )
        for part, rows in zip(fused, tensor.chunk(len(fused)), strict=True):
            values[f"{part.key}.{ours}"] = rows.flatten() if ours in _COLUMNS else rows


def write_loras(methods: Sequence[Stored], name: str, names: Names) -> list[Written]:
    """The configuration of these methods, with their tensors.

    Raises:
        CheckpointError: if the library has no form for them.
    """
    forms = [acting for stored in methods for acting in stored.forms]
    kind = type(methods[0].method).name
    config, found = _scales(forms) if isinstance(methods[0].method, IA3) else _low_ranks(forms, names)
    if uses_gates(forms):
        _check_gates(True, ia3=isinstance(methods[0].method, IA3), dora=bool(config["use_dora"]))
        config["use_gating"] = True
        found = {**found, **_GATE}
    parts = [acting.part for acting in forms]
    matrices = [matrix for matrix, role in _ATTENTION.items() if any(part.role == role for part in parts)]
    available = _locations(names, matrices)
    used: dict[str, list[Part]] = {location: [] for location in available}
    for part in parts:
        location = next((place for place, others in available.items() if part in others), None)
        if location is None:
            known = ", ".join([*_ATTENTION.values(), names.family.intermediate, names.family.output])
            raise CheckpointError(
                f"AdapterHub has no {kind} at {part.key}; it changes {known}. Save it in deltune's own format, "
                "or as peft."
            )
        used[location].append(part)
    flags, left_out = layout(names, used, available, kind)
    config |= flags | {"leave_out": left_out, "attn_matrices": matrices}
    written = Written(config)
    own = {acting.part.key: _tensors(acting, bool(config["use_gating"])) for acting in forms}
    ordered = [part for others in available.values() for part in others if part.key in own]
    for module, fused in _modules(ordered, names).items():
        for theirs, ours in found.items():
            joined = torch.cat([own[part.key][ours] for part in fused])
            written.tensors[f"{module}.loras.{name}.{theirs}"] = joined[:, None] if ours in _COLUMNS else joined
    return [written]


def _tensors(acting: Acting, gating: bool) -> dict[str, Tensor]:
    """The tensors of a form and of its gate; with gates the scale is in B."""
    found: dict[str, Tensor] = {name: value.detach() for name, value in acting.form.named_parameters()}
    if gating and "B" in found and acting.form.scale != 1:
        found["B"] = acting.form.scale * found["B"]
    if acting.gate is not None:
        found |= {f"gate.linear.{name}": value for name, value in acting.gate.linear.named_parameters()}
    return found


def _low_ranks(forms: Sequence[Acting], names: Names) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of low-rank forms, but for their places, and our names of their tensors.

    Raises:
        CheckpointError: if they differ.
    """
    kinds = {
        (form.rank, form.scale, form.dropout, isinstance(form, DecomposedLowRank))
        for form in (acting.form for acting in forms)
    }
    if len(kinds) > 1:
        said = ", ".join(f"rank {rank}, scale {scale:g}" for rank, scale, *_ in sorted(kinds))
        raise CheckpointError(
            f"AdapterHub's library has one rank and one scale for all matrices; this LoRA has {len(kinds)} ({said}). "
            "Save it in deltune's own format, or as peft."
        )
    ((rank, scale, dropout, dora),) = kinds
    if dora:
        _check_dora(scale, [acting.part for acting in forms], names)
    config = {**_DEFAULTS, "r": rank, "alpha": whole(scale * rank), "dropout": dropout, "use_dora": dora}
    return config, _DORA if dora else _LORA


def _scales(forms: Sequence[Acting]) -> tuple[dict[str, Any], dict[str, str]]:
    """The configuration of (IA)^3, but for its places, and our names of its tensors.

    Raises:
        CheckpointError: if it scales inputs.
    """
    inner = next((acting.part for acting in forms if isinstance(acting.form, InputScale)), None)
    if inner is not None:
        raise CheckpointError(
            f"This ia3 scales the input of {inner.key}, and AdapterHub only outputs. Train it with inputs=none "
            "and targets=attention.key,attention.value,ffn.up for that, or save it in deltune's own format, or as peft."
        )
    assert all(isinstance(acting.form, OutputScale) for acting in forms)
    changed = {"r": 1, "alpha": 1, "composition_mode": "scale", "init_weights": "ia3"}
    return {**_DEFAULTS, **changed}, _IA3
