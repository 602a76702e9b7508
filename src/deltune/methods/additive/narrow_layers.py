"""Layers of a model's own kind, some times narrower, at their own initial values.

Letters: d hidden size, D width of a head, r the reduction.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Part, Stack
from deltune.backbone.matrices import matrix_shape, out_features
from deltune.errors import TargetError
from deltune.methods.additive.structural_pruning import WideLayer

__all__ = ["narrow_configuration", "narrow_layer", "narrow_norm", "wide_layers"]

#: Sizes that a configuration may hold and that shrink with the width, by the names that transformers gives them.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "head_dim",
    "d_ff",
    "n_inner",
    "hidden_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "query_pre_attn_scalar",
)


#: What of a layer is cut.
_ROLES = ("attention", *PROJECTION_ROLES)


def wide_layers(anatomy: Anatomy, modules: Mapping[str, nn.Module], stack: Stack) -> tuple[WideLayer, ...]:
    """The layers of a stack with their attention sublayers and matrices.

    Raises:
        TargetError: if their kind cannot be made narrower.
    """
    if stack.repeats > 1:
        raise TargetError(
            f"The layers of {anatomy.family} are shared: one runs {stack.repeats} times. A side network has a layer of "
            "its own beside each, so this model has none. Choose another method, such as attention-fusion."
        )
    layers = []
    for name in stack.layers:
        parts = [part for role in _ROLES for part in anatomy.of(role) if f"{part.module}.".startswith(f"{name}.")]
        parts.sort(key=lambda part: part.stack != stack.name)
        module = modules[name]
        if getattr(modules[parts[0].module], "config", None) is None:
            raise TargetError(
                f"The layers of {anatomy.family} do not keep the configuration that they were built from, so narrower "
                "ones cannot be built like them. Choose another method, such as attention-fusion."
            )
        _check_known(name, module, parts, anatomy.family)
        layers.append(WideLayer(name, module, tuple(parts), modules, _rotated(parts, module, modules)))
    return tuple(layers)


def _check_known(name: str, layer: nn.Module, parts: Sequence[Part], family: str) -> None:
    """Refuse a layer with matrices of no known role, which may never run (BLIP's text layers)."""
    known = {part.module for part in parts}
    unknown = [
        path
        for path, module in layer.named_modules()
        if len(matrix_shape(module) or ()) == 2
        and not isinstance(module, nn.Embedding)
        and f"{name}.{path}" not in known
        and "deltune" not in path.split(".")
    ]
    if unknown:
        raise TargetError(
            f"The layers of {family} hold matrices whose role is not known ({', '.join(unknown[:4])}), so a narrow "
            "copy of a layer would have parts of unknown use. Select layers of another stack with "
            "targets='layer stacks=...', or choose another method, such as attention-fusion."
        )


def _rotated(parts: Sequence[Part], layer: nn.Module, modules: Mapping[str, nn.Module]) -> int:
    """How many features of a head are rotated by their position; 0 for none."""
    if "position_embeddings" not in inspect.signature(layer.forward).parameters:
        return 0
    config: Any = modules[parts[0].module].config
    assert parts[0].attention is not None
    share = (getattr(config, "rope_parameters", None) or {}).get("partial_rotary_factor", 1.0)
    return int(parts[0].attention.head_dim * share)


def narrow_configuration(layer: WideLayer, reduction: int, family: str) -> Any:
    """The configuration of a layer that is ``reduction`` times narrower, with as many heads.

    Raises:
        TargetError: if a size cannot be divided.
    """
    attention = layer.parts[0].attention
    assert attention is not None
    sizes = {
        "hidden size": out_features(layer.modules[layer.of("ffn.down")[0].module]),
        "width of the feed-forward layers": layer.rows(layer.of("ffn.up")[0]).numel(),
        "width of a head": attention.head_dim,
    }
    if layer.rotated:
        # positions rotate pairs, so an even number of features must be left of those that are rotated
        sizes["number of rotated pairs in a head"] = layer.rotated // 2
        sizes["number of other features in a head"] = attention.head_dim - layer.rotated
    _check_division(sizes, reduction, family)
    config = copy.deepcopy(layer.modules[layer.parts[0].module].config)
    names: Any = {getattr(config, "attribute_map", {}).get(name, name) for name in _SIZES}
    for name in sorted(names):
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            setattr(config, name, value // reduction)
    return config


def _check_division(sizes: Mapping[str, int], reduction: int, family: str) -> None:
    misfit = next((name for name, size in sizes.items() if size % reduction), None)
    if misfit is None:
        return
    fitting = [r for r in range(1, max(sizes.values()) + 1) if not any(size % r for size in sizes.values())]
    listed = ", ".join(str(r) for r in fitting)
    raise TargetError(
        f"The {misfit} of {family}, {sizes[misfit]}, cannot be divided by reduction={reduction}. Reductions that fit "
        f"this model: {listed}."
    )


def narrow_layer(
    model: nn.Module, layer: WideLayer, config: Any, index: int, first: bool, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """A layer of the same class, at the initial values that the model's class gives its layers.

    Args:
        model: the model.
        layer: the layer whose class is taken.
        config: of the narrow layer.
        index: number of the layer.
        first: whether it is the first, which has the table of relative positions in T5.
        dtype: type of its parameters.
        device: where they are.
    """
    kind = type(layer.module)
    known = {"layer_idx": index, "layer_num": index, "has_relative_attention_bias": first}
    accepted = inspect.signature(kind.__init__).parameters
    with device:
        narrow = kind(config, **{name: value for name, value in known.items() if name in accepted})
    _initialize(narrow, model, config)
    return narrow.to(dtype).train(layer.module.training)


def narrow_norm(model: nn.Module, norm: nn.Module, config: Any, width: int) -> nn.Module:
    """A norm like ``norm`` of ``width`` features, at its initial values."""
    narrow = copy.deepcopy(norm)
    for name, value in norm.named_parameters(recurse=False):
        narrow.register_parameter(name, nn.Parameter(value.detach()[:width].clone()))
    if isinstance(narrow, nn.LayerNorm):
        narrow.normalized_shape = (width,)
    _initialize(narrow, model, config)
    return narrow


def _initialize(module: nn.Module, model: nn.Module, config: Any) -> None:
    """Initial values as the model's class gives them, by a narrower configuration."""
    # the class reads the configuration from the model, so give it a model that has another one
    base: Any = copy.copy(getattr(model, "base_model", model))
    base.config = config
    module.apply(base._init_weights)
