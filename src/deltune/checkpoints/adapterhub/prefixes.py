"""Prefixes of AdapterHub's library, flat ones and those that a small network makes.

There is one set of prefixes for each kind of attention: ``self_prefix`` (the decoder's in an encoder-decoder),
``encoder_prefix``, ``cross_prefix``. Its tensor is (P, 2 L, K, D): of the L layers that are not left out each has keys
and values. The network is a linear map, a non-linearity and a linear map of P rows; it is applied when it is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN

from deltune.backbone import Part
from deltune.checkpoints.adapterhub.names import Names, Weights, covering
from deltune.checkpoints.adapterhub.pieces import (
    Piece,
    Stored,
    Written,
    by_pooling,
    completed,
    gate_tensors,
    layout,
    take_gate,
    uses_gates,
)
from deltune.errors import CheckpointError, suggestion
from deltune.methods.additive.prefix_forms import Prefix, joined_prefixes, split_prefixes
from deltune.methods.additive.prefix_tuning import PrefixTuning

__all__ = ["drop_pools", "read_prefixes", "write_prefixes"]

_DEFAULTS: dict[str, Any] = {
    "architecture": "prefix_tuning",
    "encoder_prefix": True,
    "cross_prefix": True,
    "leave_out": [],
    "flat": False,
    "prefix_length": 30,
    "bottleneck_size": 512,
    "non_linearity": "tanh",
    "dropout": 0.0,
    "use_gating": False,
    "shared_gating": True,
    "init_weights_seed": None,
}
_POOL = ".prefix_tuning.pool."
#: Those that an option switches off.
_SWITCHED = ("encoder_prefix", "cross_prefix")


def drop_pools(weights: Weights) -> None:
    """Forget the copies of all prefixes that the library writes for each layer."""
    for key in [key for key in weights.left if _POOL in key]:
        weights.drop_copies(key, f"prefix_tuning.{key.partition(_POOL)[2]}")


def read_prefixes(config: Mapping[str, Any], name: str, names: Names, weights: Weights) -> list[Piece]:
    """The methods of one configuration with their tensors.

    Args:
        config: the configuration.
        name: of the adapter.
        names: of the model.
        weights: the file's tensors.

    Raises:
        CheckpointError: if it says what deltune cannot do, or a tensor is not as large as it says.
    """
    config, notes = completed(config, _DEFAULTS)
    _check_family(names)
    if config["use_gating"] and not config["shared_gating"]:
        raise CheckpointError(
            "The prefix was trained with shared_gating=False, a gate for keys and another one for values. deltune's "
            "gates are of both, so it cannot be read."
        )
    left_out = set(config["leave_out"] or ())
    kinds = {
        kind: [part for part in parts if names.index(part) not in left_out]
        for kind, parts in _kinds(names).items()
        if config.get(kind, True)
    }
    values: dict[str, Tensor] = {}
    for kind, parts in kinds.items():
        table = _table(config, f"prefix_tuning.prefix_tunings.{name}.{kind}", weights) if parts else None
        if table is None:
            continue
        shape = parts[0].attention
        assert shape is not None
        wanted = (config["prefix_length"], 2 * len(parts) * shape.key_value_features)
        if table.numel() != wanted[0] * wanted[1]:
            raise CheckpointError(
                f"The {kind} holds {table.numel()} numbers, but {wanted[0]} positions in {len(parts)} layers with "
                f"{shape.key_value_heads} heads of width {shape.head_dim} are {wanted[0] * wanted[1]}."
            )
        pairs = split_prefixes(table.reshape(wanted), shape.key_value_heads, shape.head_dim)
        for part, (keys, heads) in zip(parts, pairs, strict=True):
            values |= {f"{part.key}.keys": keys, f"{part.key}.values": heads}
    everywhere = [part for parts in kinds.values() for part in parts]
    pieces = []
    for pooling, parts in by_pooling(names, everywhere, bool(config["use_gating"])):
        for targets, group in covering(names.anatomy, parts):
            method = PrefixTuning(
                length=config["prefix_length"], reparameterize=False, dropout=config["dropout"], targets=targets
            )
            own = {f"{part.key}.{each}" for part in group for each in ("keys", "values")}
            pieces.append(Piece(method, {key: values[key] for key in values if key in own}, notes, pooling))
            for part in group if config["use_gating"] else ():
                take_gate(pieces[-1].values, part.key, _gate(part, name, names), weights)
    return pieces


def _gate(part: Part, name: str, names: Names) -> str:
    return f"{names.module(part)}.prefix_tuning.prefix_gates.{name}"


def _check_family(names: Names) -> None:
    """Refuse models in which the library's prefixes are others than ours.

    Raises:
        CheckpointError: if they are.
    """
    if names.anatomy.family == "t5":
        raise CheckpointError(
            "In T5 AdapterHub's library lets the prefix shift the distances between tokens by its length; deltune's "
            "prefixes shift nothing. One is not the other there, so it is neither read nor written."
        )


def _kinds(names: Names) -> dict[str, list[Part]]:
    """All attention functions by the kind of their prefixes."""
    found: dict[str, list[Part]] = {}
    for part in names.parts("attention", cross=True):
        found.setdefault(names.prefixes(part), []).append(part)
    return found


def _table(config: Mapping[str, Any], module: str, weights: Weights) -> Tensor | None:
    """All keys and values of one kind; None where a tensor is missing, which is then said of ours."""
    if config["flat"]:
        return weights.take(f"{module}.control_trans")
    names = ("wte.weight", "control_trans.0.weight", "control_trans.0.bias", "control_trans.2.weight")
    found = [weights.take(f"{module}.{name}") for name in (*names, "control_trans.2.bias")]
    tensors = [tensor for tensor in found if tensor is not None]
    if len(tensors) < len(found):
        return None
    rows, first, first_bias, second, second_bias = tensors
    activation = str(config["non_linearity"]).lower()
    if activation not in ACT2FN:
        raise CheckpointError(f"There is no non_linearity {activation!r}. {suggestion(activation, ACT2FN)}")
    with torch.no_grad():
        made: Tensor = F.linear(ACT2FN[activation](F.linear(rows, first, first_bias)), second, second_bias)
    return made


def write_prefixes(methods: Sequence[Stored], name: str, names: Names) -> list[Written]:
    """The configuration of these methods with their tensors, flat.

    Raises:
        CheckpointError: if the library has no form for them.
    """
    _check_family(names)
    acting = [acting for stored in methods for acting in stored.forms if isinstance(acting.form, Prefix)]
    for stored in methods:
        if stored.method.to_dict().get("shift_positions"):
            raise CheckpointError(
                "This prefix shifts the positions of the text (shift_positions), which those of AdapterHub's library "
                "do not. Save it in deltune's own format."
            )
    forms = {each.part.key: each.form for each in acting}
    kinds = _kinds(names)
    lengths = {form.length for form in forms.values()}
    dropouts = {form.dropout for form in forms.values()}
    if len(lengths) > 1 or len(dropouts) > 1:
        raise CheckpointError(
            f"AdapterHub's library has one length for all prefixes; these are {sorted(lengths)} long, with dropout "
            f"{sorted(dropouts)}. Save them in deltune's own format."
        )
    used = {kind: [part for part in parts if part.key in forms] for kind, parts in kinds.items()}
    always = [kind for kind in kinds if kind not in _SWITCHED]
    flags, left_out = layout(names, used, kinds, "prefix", always)
    config = {
        **_DEFAULTS,
        **{kind: flags.get(kind, True) for kind in _SWITCHED},
        "flat": True,
        "leave_out": left_out,
        "prefix_length": lengths.pop(),
        "dropout": dropouts.pop(),
        "use_gating": uses_gates(acting),
    }
    written = Written(config)
    for each in acting:
        written.tensors |= gate_tensors(each.gate, _gate(each.part, name, names))
    for kind, parts in used.items():
        if parts:
            table = joined_prefixes([(forms[part.key].keys, forms[part.key].values) for part in parts])
            written.tensors[f"prefix_tuning.prefix_tunings.{name}.{kind}.control_trans"] = table.flatten()
    return [written]
