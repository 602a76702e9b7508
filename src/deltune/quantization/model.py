"""Which matrices of a model are quantised, and putting the quantised ones in their places."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from deltune.backbone import anatomy_of, matrix_shape
from deltune.errors import StateError, TargetError
from deltune.quantization.format import NF4
from deltune.quantization.layers import dense_weight, is_quantized, layer_format, make_layer, stored_bytes
from deltune.quantization.saving import SAVE, SavePretrained

__all__ = [
    "Storage",
    "dequantize",
    "dequantize_layers",
    "format_of",
    "linear_maps",
    "mark",
    "parameter_count",
    "quantize",
    "quantized_layer",
    "replace",
    "storage",
]

#: The attribute by which a model knows its handle (deltune.tuned.HANDLE, which stands above this file).
HANDLE = "_deltune_handle"


def quantize(model: nn.Module, format: NF4 | None = None) -> nn.Module:
    """Store the linear maps of the transformer layers in 4 bits, in place.

    Embeddings, norms and heads stay as they are, and so does what transformers marks as to be kept in float32 (T5's
    ``wo``, whose code reads the type of its weight). One matrix after the other is replaced, so that no second copy of
    the model exists meanwhile. To load a model that does not fit into memory unquantised, see
    :func:`deltune.quantization.load_quantized`. Quantise first and attach then: the adapted model starts at the
    quantised one, not at the original. ``save_pretrained`` writes the layout of bitsandbytes from then on, which
    ``load_quantized`` and transformers read.

    Args:
        model: a transformers model with nothing attached.
        format: how; by default NF4 with double quantisation by bitsandbytes.

    Returns:
        The model.

    Raises:
        DeltuneError: if the engine is not installed.
        StateError: if something is attached, the model is quantised already, or weights are not finite numbers.
        TargetError: if the model's layers are not known.
    """
    format = format or NF4()
    _refuse_attached(model, "quantise")
    for names in linear_maps(model):
        module = model.get_submodule(names[0])
        if module._forward_hooks or module._forward_pre_hooks:
            raise StateError(f"{names[0]} has hooks, which would be lost. Remove them first, and quantise then.")
        replace(model, names, quantized_layer(names[0], module, module.get_parameter("weight"), format))
    mark(model)
    return model


def mark(model: nn.Module) -> None:
    """Let ``save_pretrained`` of a model that deltune has quantised write what can be loaded again."""
    if hasattr(model, SAVE):
        model.__dict__[SAVE] = SavePretrained(model)


def dequantize(model: nn.Module) -> nn.Module:
    """Store quantised matrices as floating-point numbers again, in place.

    These are the numbers that the products used, not the original ones. After that a delta that was trained beside the
    quantised model can be merged. The type is that of the model's other matrices, or the one that the layer computes in
    if there are none.

    Returns:
        The model.

    Raises:
        StateError: if something is attached, or nothing is quantised.
    """
    _refuse_attached(model, "dequantise")
    return dequantize_layers(model)


def dequantize_layers(model: nn.Module) -> nn.Module:
    """As :func:`dequantize`, of a model that may have methods attached, which must not be live."""
    places = _places(model, (name for name, module in _named(model) if is_quantized(module)))
    if not places:
        raise StateError("Nothing in this model is quantised.")
    packed = {id(model.get_submodule(names[0])) for names in places}
    plain = (module for module in model.modules() if id(module) not in packed)
    types = (value.dtype for module in plain for value in module._parameters.values() if value is not None)
    own = next((kind for kind in types if kind.is_floating_point), None)
    for names in places:
        old = model.get_submodule(names[0])
        weight = dense_weight(old).to(own or getattr(old, "compute_dtype", None) or torch.float32)
        new = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        new.weight = nn.Parameter(weight, requires_grad=False)
        new.register_parameter("bias", old._parameters.get("bias"))
        replace(model, names, new.train(old.training))
    # what transformers notes of a model that it has quantised itself
    for name in (SAVE, *_NOTES):
        model.__dict__.pop(name, None)
    config: Any = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    return model


@dataclass(frozen=True)
class Storage:
    """What the quantised part of a model takes.

    Attributes:
        parameters: weights in quantised matrices.
        bytes: of these and their scales; the tables of levels, equal everywhere, are not counted.
    """

    parameters: int
    bytes: int

    @property
    def bits_per_parameter(self) -> float:
        """Bits of one weight."""
        return 8 * self.bytes / self.parameters

    def __str__(self) -> str:
        return f"{self.parameters:,} in {self.bytes:,} bytes, {self.bits_per_parameter:.3f} bits each"


def storage(model: nn.Module) -> Storage:
    """Size of the quantised part of ``model``.

    Raises:
        StateError: if nothing is quantised.
    """
    modules = [module for module in model.modules() if is_quantized(module)]
    if not modules:
        raise StateError("Nothing in this model is quantised.")
    shapes = (matrix_shape(module) or () for module in modules)
    return Storage(sum(prod(shape) for shape in shapes), sum(stored_bytes(module) for module in modules))


_NOTES = (
    "hf_quantizer",
    "is_quantized",
    "is_loaded_in_4bit",
    "is_4bit_serializable",
    "quantization_method",
    "_weight_conversions",
)


def format_of(model: nn.Module) -> NF4 | None:
    """How the layers of ``model`` are stored in NF4; None if they are not, or in another format."""
    found = (layer_format(module) for module in model.modules() if is_quantized(module))
    formats = [item for item in found if item is not None]
    # where bitsandbytes cannot store a matrix, deltune's own layer stands in
    return next((item for item in formats if item.engine == "bitsandbytes"), formats[0] if formats else None)


def parameter_count(model: nn.Module) -> int:
    """Values of the model's parameters, tied ones once; those of packed weights are counted before packing."""
    packed = {id(module.weight): prod(matrix_shape(module) or ()) for module in model.modules() if is_quantized(module)}
    return sum(packed.get(id(parameter), parameter.numel()) for parameter in model.parameters())


def linear_maps(model: nn.Module) -> list[tuple[str, ...]]:
    """Names of the linear maps of the transformer layers, in order; each with all its names.

    What transformers marks as to be kept in float32 is left out, as by its own quantisers: such code (T5's ``wo``)
    reads the type of the weight.

    Raises:
        StateError: if some are quantised already.
        TargetError: if the model's layers are not known, or have no linear maps.
    """
    anatomy = anatomy_of(model)
    layers = tuple(f"{layer}." for stack in anatomy.stacks.values() for layer in stack.layers)
    if not layers:
        raise TargetError(
            f"The layers of this {type(model).__name__} are not known, so it cannot be told which matrices to quantise."
        )
    kept = {
        name
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
        for name in getattr(model, attribute, None) or ()
    }
    inside = [(name, module) for name, module in _named(model) if name.startswith(layers)]
    if any(is_quantized(module) for _, module in inside):
        raise StateError("This model is quantised already.")
    # exactly these classes: others may read their weight themselves
    found = [
        name
        for name, module in inside
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D") and not kept & set(name.split("."))
    ]
    if not found:
        raise TargetError(f"The layers of this {type(model).__name__} have no linear maps that could be quantised.")
    return _places(model, found)


def quantized_layer(name: str, module: nn.Module, weight: Tensor, format: NF4) -> nn.Linear:
    """The quantised layer for ``module``, whose ``weight`` is given as the module stores it.

    Raises:
        StateError: if values are not finite.
    """
    if not weight.is_meta and not bool(torch.isfinite(weight).all()):
        raise StateError(f"{name} holds values that are not finite numbers and cannot be quantised.")
    # blocks run along the rows of (d_out, d_in), whichever way the model stores its matrix
    matrix = weight.T if hasattr(module, "nf") else weight
    layer = make_layer(matrix, module._parameters.get("bias"), format)
    return layer.train(module.training)


def replace(model: nn.Module, names: Iterable[str], module: nn.Module) -> None:
    """Put ``module`` in the place of those of these names."""
    for name in names:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, module)


def _named(model: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    yield from model.named_modules(remove_duplicate=False)


def _places(model: nn.Module, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of one module together: a module may have several."""
    places: dict[int, list[str]] = {}
    for name in names:
        places.setdefault(id(model.get_submodule(name)), []).append(name)
    return [tuple(found) for found in places.values()]


def _refuse_attached(model: nn.Module, action: str) -> None:
    if HANDLE in vars(model):
        raise StateError(
            f"Cannot {action} a model with methods attached: they would keep acting on the old matrices. Detach first."
        )
