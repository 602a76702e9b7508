"""Bottlenecks of AdapterHub's library: the configurations without an architecture (seq_bn, double_seq_bn, par_bn).

At a sublayer with result h, input x of the residual sum and, where the model normalises afterwards, the norm LN, the
library computes LN(x + r + f(z)), with z and r by its options:

* ``is_parallel``: z = x, r = h;
* ``original_ln_before=False``: z = r = h;
* ``original_ln_before``: z = LN(x + h), r = h with ``residual_before_ln``;
* that and neither ``residual_before_ln`` nor ``original_ln_after``: the result is z + f(z), without sum and norm.

Where the model normalises before its sublayers LN is not there. These are our :class:`ParallelAdapter`,
:class:`SequentialAdapter`, :class:`PfeifferAdapter` and :class:`ResidualAdapter`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from deltune.backbone import Part, Targets
from deltune.checkpoints.adapterhub.names import Names, Weights, covering, other_parts
from deltune.checkpoints.adapterhub.pieces import (
    Piece,
    Stored,
    Written,
    by_pooling,
    completed,
    gate_tensors,
    layout,
    refuse,
    take_gate,
    uses_gates,
    whole,
)
from deltune.errors import CheckpointError
from deltune.methods.additive.bottleneck import Bottleneck, BottleneckMethod
from deltune.methods.additive.parallel_adapter import ParallelAdapter
from deltune.methods.additive.pfeiffer_adapter import PfeifferAdapter
from deltune.methods.additive.residual_adapter import ResidualAdapter
from deltune.methods.additive.sequential_adapter import SequentialAdapter

__all__ = ["read_bottlenecks", "write_bottlenecks"]

#: What the library's configuration holds, with its defaults.
_DEFAULTS: dict[str, Any] = {
    "original_ln_before": False,
    "original_ln_after": True,
    "ln_before": False,
    "ln_after": False,
    "init_weights": "bert",
    "init_weights_seed": None,
    "is_parallel": False,
    "scaling": 1.0,
    "use_gating": False,
    "residual_before_ln": True,
    "adapter_residual_before_ln": False,
    "inv_adapter": None,
    "inv_adapter_reduction_factor": None,
    "cross_adapter": False,
    "leave_out": [],
    "dropout": 0.0,
    "phm_layer": False,
    "phm_dim": 4,
    "factorized_phm_W": True,
    "shared_W_phm": False,
    "shared_phm_rule": True,
    "factorized_phm_rule": False,
    "phm_c_init": "normal",
    "phm_init_range": 0.0001,
    "learn_phm": True,
    "hypercomplex_nonlinearity": "glorot-uniform",
    "phm_rank": 1,
    "phm_bias": True,
    "stochastic_depth": 0.0,
}
_REQUIRED = ("architecture", "mh_adapter", "output_adapter", "reduction_factor", "non_linearity")
_REFUSED = {
    "phm_layer": "its matrices are sums of Kronecker products (Compacter)",
    "ln_after": "a norm behind the bottleneck",
    "inv_adapter": "invertible adapters behind the embeddings",
    "stochastic_depth": "adapters that are left out at random",
}
#: Our name of an activation, where the library's is another; and what versions without a number meant by theirs.
_ACTIVATIONS = {"leakyrelu": "leaky_relu"}
_OLD_ACTIVATIONS = {"gelu": "gelu_new", "gelu_orig": "gelu"}
_INITIALIZATIONS = {"bert": "normal", "mam_adapter": "kaiming", "houlsby": "truncated"}
#: What the library's options that place an adapter are for each of our methods.
_PLACEMENTS: dict[type[BottleneckMethod], dict[str, Any]] = {
    ParallelAdapter: {"is_parallel": True},
    SequentialAdapter: {},
    PfeifferAdapter: {"original_ln_before": True},
    ResidualAdapter: {"original_ln_before": True, "original_ln_after": False, "residual_before_ln": False},
}
_LOCATIONS = ("mh_adapter", "output_adapter", "cross_adapter")


def read_bottlenecks(config: Mapping[str, Any], name: str, names: Names, weights: Weights, old: bool) -> list[Piece]:
    """The methods of one configuration with their tensors: one method for each width.

    Args:
        config: the configuration.
        name: of the adapter.
        names: of the model.
        weights: the file's tensors.
        old: whether the library was of a version that wrote no number.

    Raises:
        CheckpointError: if it says what deltune cannot do.
    """
    config, unknown = completed(config, _DEFAULTS, _REQUIRED)
    refuse(config, _REFUSED)
    kind = _kind(config)
    places = _places(names, config)
    left_out = set(config["leave_out"] or ())
    widths: dict[int, list[Part]] = {}
    for location in _LOCATIONS:
        for part in places[location] if config[location] else ():
            if names.index(part) not in left_out:
                widths.setdefault(_width(config["reduction_factor"], names, part), []).append(part)
    gating = bool(config["use_gating"])
    dropout = ("in training its dropout acts inside of the bottleneck, not behind it",) if config["dropout"] else ()
    notes = (*unknown, *dropout)
    pieces = []
    for width, everywhere in widths.items():
        for pooling, parts in by_pooling(names, everywhere, gating):
            acts_at = other_parts(names.anatomy, parts, "layer") if kind is ResidualAdapter else parts
            slots = {own.key: names.slot(part) for own, part in zip(acts_at, parts, strict=True)}
            for targets, group in covering(names.anatomy, acts_at):
                method = _method(kind, config, width, group, old, targets)
                pieces.append(Piece(method, {}, notes, pooling))
                for part in group:
                    module = f"{slots[part.key]}.adapters.{name}"
                    _take(pieces[-1].values, part.key, module, config, weights)
                    if gating:
                        take_gate(pieces[-1].values, part.key, f"{module}.gate", weights)
    return pieces


def _kind(config: Mapping[str, Any]) -> type[BottleneckMethod]:
    """The method that does what the options say.

    Raises:
        CheckpointError: if none does.
    """
    before, after = config["original_ln_before"], config["original_ln_after"]
    residual = config["residual_before_ln"]
    if config["is_parallel"] and after:
        return ParallelAdapter
    if not config["is_parallel"] and after and not before:
        return SequentialAdapter
    alone = not config["mh_adapter"] and not config["cross_adapter"]
    if not config["is_parallel"] and before and after and residual is True and alone:
        return PfeifferAdapter
    if not config["is_parallel"] and before and not after and residual is False and alone:
        return ResidualAdapter
    given = ("is_parallel", "original_ln_before", "original_ln_after", "residual_before_ln", "mh_adapter")
    said = ", ".join(f"{option}={config[option]}" for option in given)
    raise CheckpointError(f"deltune has no adapter that is placed as this one is ({said}), so it cannot be read.")


def _places(names: Names, config: Mapping[str, Any]) -> dict[str, list[Part]]:
    """All parts of each location."""
    attention = names.parts("attention", cross=True)
    return {
        "mh_adapter": [part for part in attention if not names.is_cross(part)],
        "output_adapter": names.parts("ffn", cross=False),
        "cross_adapter": [part for part in attention if names.is_cross(part)],
    }


def _width(factor: Any, names: Names, part: Part) -> int:
    if isinstance(factor, Mapping):
        factor = factor.get(str(names.index(part)), factor.get("default"))
    if not isinstance(factor, int | float) or factor <= 0:
        raise CheckpointError(f"The reduction_factor of layer {names.index(part)} is {factor!r}, which is no number.")
    return max(1, int(names.anatomy.stack_of(part).hidden_size // factor))


def _method(
    kind: type[BottleneckMethod],
    config: Mapping[str, Any],
    width: int,
    parts: Sequence[Part],
    old: bool,
    targets: Targets,
) -> BottleneckMethod:
    activation = str(config["non_linearity"]).lower()
    if old:
        activation = _OLD_ACTIVATIONS.get(activation, activation)
    options: dict[str, Any] = {
        "width": width,
        "activation": _ACTIVATIONS.get(activation, activation),
        "initialization": _INITIALIZATIONS.get(config["init_weights"], "normal"),
        "scale": config["scaling"],
        "dropout": config["dropout"],
        "layer_norm": bool(config["ln_before"]),
        "targets": targets,
    }
    if kind is SequentialAdapter:
        options["train_norms"] = False
    if kind is ParallelAdapter:
        options["attention_changes"] = "result"
        options["reads"] = "stream" if any(part.norm_before for part in parts) else "sublayer"
    return kind(**options)


def _tensor_names(config: Mapping[str, Any]) -> dict[str, str]:
    """The library's name of each of a bottleneck's tensors, by ours."""
    # the norm, where there is one, is the first of the modules in front of the non-linearity
    down = f"adapter_down.{int(bool(config['ln_before']))}"
    found = {
        "down.weight": f"{down}.weight",
        "down.bias": f"{down}.bias",
        "up.weight": "adapter_up.weight",
        "up.bias": "adapter_up.bias",
    }
    if config["ln_before"]:
        found |= {"norm.weight": "adapter_norm_before.weight", "norm.bias": "adapter_norm_before.bias"}
    if isinstance(config["scaling"], str):
        found["scale"] = "scaling"
    return found


def _take(values: dict[str, Tensor], key: str, module: str, config: Mapping[str, Any], weights: Weights) -> None:
    if config["ln_before"]:
        for name in ("weight", "bias"):
            weights.drop_copies(f"{module}.adapter_down.0.{name}", f"{module}.adapter_norm_before.{name}")
    found = {f"{key}.{ours}": f"{module}.{theirs}" for ours, theirs in _tensor_names(config).items()}
    weights.take_into(values, found)
    scale = values.get(f"{key}.scale")
    if config["scaling"] == "learned" and scale is not None and scale.shape == (1,):
        values[f"{key}.scale"] = scale[0]


def write_bottlenecks(methods: Sequence[Stored], name: str, names: Names) -> list[Written]:
    """The configurations of these methods, one for each set of options, with their tensors.

    Raises:
        CheckpointError: if the library has no form for them.
    """
    groups: dict[str, list[Stored]] = {}
    for stored in methods:
        groups.setdefault(str(_options(stored.method)), []).append(stored)
    return [_written(group, name, names) for group in groups.values()]


def _options(method: Any) -> dict[str, Any]:
    """The configuration of a method, but for its width and its places.

    Raises:
        CheckpointError: if the library has no such method.
    """
    kind = type(method)
    if kind not in _PLACEMENTS or (kind is SequentialAdapter and method.train_norms):
        hint = " that trains norms besides; train it with train_norms=false" if kind in _PLACEMENTS else ""
        raise CheckpointError(f"AdapterHub's library has no form for {method.name}{hint}.")
    theirs = {ours: other for other, ours in _INITIALIZATIONS.items()}
    activations = {ours: other for other, ours in _ACTIVATIONS.items()}
    return {
        **_DEFAULTS,
        **_PLACEMENTS[kind],
        "non_linearity": activations.get(method.activation, method.activation),
        "init_weights": theirs[method.initialization],
        "scaling": method.scale,
        "dropout": method.dropout,
        "ln_before": method.layer_norm,
    }


def _written(methods: Sequence[Stored], name: str, names: Names) -> Written:
    config = _options(methods[0].method)
    places = _places(names, config)
    used: dict[str, list[Part]] = {location: [] for location in _LOCATIONS}
    widths: dict[int, set[int]] = {}
    written = Written(config)
    config["use_gating"] = uses_gates(acting for stored in methods for acting in stored.forms)
    for stored in methods:
        _check_placement(stored)
        for acting in stored.forms:
            part, form = acting.part, acting.form
            assert isinstance(form, Bottleneck)
            sublayer = other_parts(names.anatomy, [part], "ffn")[0] if part.role == "layer" else part
            location = next((place for place, parts in places.items() if sublayer in parts), None)
            if location is None:
                raise CheckpointError(f"AdapterHub's library has no place for an adapter at {part.key}.")
            used[location].append(sublayer)
            widths.setdefault(names.index(sublayer), set()).add(form.down.out_features)
            module = f"{names.slot(sublayer)}.adapters.{name}"
            own = form.state_dict()  # those of fused adapters are buffers
            for ours, theirs in _tensor_names(config).items():
                written.tensors[f"{module}.{theirs}"] = own[ours].reshape(-1) if ours == "scale" else own[ours]
            written.tensors |= gate_tensors(acting.gate, f"{module}.gate")
            for kind in ("weight", "bias") if config["ln_before"] else ():
                written.tensors[f"{module}.adapter_down.0.{kind}"] = own[f"norm.{kind}"]
    flags, left_out = layout(names, used, places, methods[0].method.name)
    hidden = next(iter(names.anatomy.stacks.values())).hidden_size
    config |= flags | {"leave_out": left_out, "reduction_factor": _factor(widths, hidden)}
    return written


def _check_placement(stored: Stored) -> None:
    """Refuse what the library computes otherwise.

    Raises:
        CheckpointError: if it does.
    """
    method = stored.method
    if not isinstance(method, ParallelAdapter):
        return
    if method.reads == "sublayer" and any(acting.part.norm_before for acting in stored.forms):
        raise CheckpointError(
            "This parallel-adapter reads behind the norm in front of its sublayer; in AdapterHub it reads the "
            "residual stream. Train it with reads=stream for that, or save it in deltune's own format."
        )
    if method.attention_changes == "heads" and any(acting.part.role == "attention" for acting in stored.forms):
        raise CheckpointError(
            "This parallel-adapter changes the joined heads of attention; in AdapterHub's library it changes the "
            "result. Train it with attention_changes=result for that, or save it in deltune's own format."
        )


def _factor(widths: Mapping[int, set[int]], hidden: int) -> Any:
    """The reduction factor from which the library finds these widths, by layer.

    Raises:
        CheckpointError: if a layer has several.
    """
    for layer, several in widths.items():
        if len(several) > 1:
            raise CheckpointError(
                f"Layer {layer} has adapters of the widths {', '.join(map(str, sorted(several)))}; AdapterHub "
                "has one for each layer. Save it in deltune's own format."
            )
    factors = {layer: _one_factor(width, hidden) for layer, (width,) in widths.items()}
    if len(set(factors.values())) == 1:
        return next(iter(factors.values()))
    return {str(layer): factor for layer, factor in factors.items()}


def _one_factor(width: int, hidden: int) -> float | int:
    # half a unit more keeps the library's rounding down away from the edge
    return hidden // width if hidden % width == 0 else whole(hidden / (width + 0.5))
