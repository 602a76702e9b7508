"""Quantised models in folders: in the layout of bitsandbytes, which transformers reads too."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import CheckpointError, StateError
from deltune.quantization.format import NF4, SCALE_BLOCK, bitsandbytes
from deltune.quantization.layers import NF4Linear, is_quantized, layer_format
from deltune.quantization.nf4 import QuantizedTensor, normal_levels, scale_levels

__all__ = ["SAVE", "SavePretrained", "packed_layer", "stored_format"]

#: The method of transformers models that this file replaces on quantised ones.
SAVE = "save_pretrained"
_RECORD = "quant_state.bitsandbytes__nf4"
#: What a head may be called that the saved model does not have: it must not be taken for a packed matrix.
_HEADS = ("lm_head", "classifier", "score", "qa_outputs", "pooler")
_WORDS = (torch.float16, torch.bfloat16, torch.float32)


class SavePretrained:
    """``model.save_pretrained`` of a quantised model.

    The folder is loaded by :func:`deltune.quantization.load_quantized`, and by ``from_pretrained`` where bitsandbytes
    is installed.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, save_directory: Any, **options: Any) -> None:
        """As ``save_pretrained`` of the model's class.

        Raises:
            StateError: if this layout cannot hold the model; nothing is written then.
        """
        model = self.model
        described = _description(model)
        tensors = options.pop("state_dict", None)
        options["state_dict"] = _packed(model, dict(model.state_dict() if tensors is None else tensors))
        model.config.quantization_config = described
        try:
            type(model).save_pretrained(model, save_directory, **options)
        finally:
            del model.config.quantization_config


def _description(model: nn.Module) -> dict[str, Any]:
    """What ``config.json`` says of the quantisation."""
    from transformers.quantizers.quantizers_utils import should_convert_module

    named = dict(model.named_modules(remove_duplicate=False))
    packed = {name: module for name, module in named.items() if is_quantized(module)}
    found = [layer_format(module) for module in packed.values()]
    formats = {replace(item, engine="torch") for item in found if item is not None}
    if len(formats) != 1 or None in found:
        raise StateError("This model's matrices are quantised in several ways, which one folder cannot hold.")
    (format,) = formats
    for name, module in packed.items():
        inputs = int(module.in_features)
        if inputs % format.block:
            raise StateError(
                f"{name} has {inputs} inputs, which blocks of {format.block} do not divide: bitsandbytes would read "
                "other numbers from the folder on a processor. Quantise with a smaller block, or save the model "
                "dequantised (deltune.quantization.dequantize)."
            )
    plain = [
        name for name, module in named.items() if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]
    skipped = [name for name in plain if name not in packed]
    skipped += [name for name in _HEADS if name not in skipped]
    skipped = [name for name in skipped if all(should_convert_module(other, [name]) for other in packed)]
    lost = [name for name in plain if name not in packed and should_convert_module(name, skipped)]
    if lost:
        raise StateError(f"{lost[0]} is not quantised, but its name cannot be told from those of quantised matrices.")
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": format.double_quantization,
        "bnb_4bit_compute_dtype": str(format.compute_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": skipped,
    }


def _packed(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """``tensors`` with deltune's own layers as bitsandbytes names and describes them; its own are so already."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, NF4Linear):
            for buffer in ("scales", "second_scales", "mean"):
                tensors.pop(f"{name}.{buffer}", None)
            tensors.update({f"{name}.weight.{key}": value for key, value in _parts(module).items()})
    return tensors


def _parts(module: NF4Linear) -> dict[str, Tensor]:
    """What stands beside the packed weight, under the names of bitsandbytes."""
    stored, device = module.quantized, module.weight.device
    dtype = module.compute_dtype if module.compute_dtype in _WORDS else torch.float32
    record: dict[str, Any] = {
        "quant_type": "nf4",
        "blocksize": stored.block,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(stored.shape),
    }
    # copies, as safetensors refuses tensors that share memory
    parts = {"absmax": stored.scales, "quant_map": normal_levels(device).clone()}
    if stored.second_scales is not None and stored.mean is not None:
        offset = float(stored.mean)
        record |= {"nested_blocksize": SCALE_BLOCK, "nested_dtype": "float32", "nested_offset": offset}
        parts |= {"nested_absmax": stored.second_scales, "nested_quant_map": scale_levels(device).clone()}
    parts[_RECORD] = torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8, device=device)
    return parts


def stored_format(config: Any) -> NF4 | None:
    """How the folder of this configuration holds its matrices; None if as floating-point numbers.

    The block is told by the tensors alone and stands at its default here.

    Raises:
        CheckpointError: if they are quantised in another way.
    """
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    values: dict[str, Any] = found if isinstance(found, dict) else found.to_dict()
    if not values.get("load_in_4bit") or values.get("bnb_4bit_quant_type") != "nf4":
        raise CheckpointError(
            f"This folder is quantised ({values.get('quant_method')}), but not in NF4. Load it with from_pretrained, "
            "or give the folder of the unquantised model."
        )
    dtype = getattr(torch, str(values.get("bnb_4bit_compute_dtype", "float32")).removeprefix("torch."))
    return NF4(bool(values.get("bnb_4bit_use_double_quant")), dtype)


def packed_layer(
    name: str, weight: Tensor, parts: Mapping[str, Tensor], module: nn.Module, shape: tuple[int, ...], format: NF4
) -> nn.Linear:
    """The layer that a folder holds.

    Args:
        name: of the module, for messages.
        weight: two levels in a byte.
        parts: what stands beside it, by the names of bitsandbytes.
        module: in whose place it comes; gives the bias.
        shape: of the matrix, outputs first.
        format: how it should be stored.

    Raises:
        CheckpointError: if it is stored in another way or has another shape.
    """
    try:
        record = json.loads(bytes(parts[_RECORD].tolist()))
        double = "nested_absmax" in parts
        stored_shape = torch.Size(record["shape"])
        found = replace(format, block=int(record["blocksize"]), double_quantization=double)
        levels = [torch.equal(parts["quant_map"].cpu(), normal_levels())]
        if double:
            levels.append(torch.equal(parts["nested_quant_map"].cpu(), scale_levels()))
            levels.append(record["nested_blocksize"] == SCALE_BLOCK)
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name} is quantised, but not in NF4, or its record is damaged ({error}).") from error
    if tuple(stored_shape) != tuple(shape):
        raise CheckpointError(f"{name} is {tuple(stored_shape)} in the files and {tuple(shape)} in the model.")
    if not all(levels):
        raise CheckpointError(f"{name} is quantised with other levels than those of NF4.")
    if not found.same_levels(format):
        raise CheckpointError(
            f"The folder is quantised already, with block={found.block} and double_quantization="
            f"{found.double_quantization}, which differs from the wanted format. Ask for these, or give the folder of "
            "the unquantised model."
        )
    dtype = format.compute_dtype or getattr(torch, record["dtype"])
    bias = module._parameters.get("bias")
    if format.engine == "torch":
        mean = torch.tensor(record["nested_offset"], dtype=torch.float32, device=weight.device) if double else None
        second = parts["nested_absmax"] if double else None
        layer = NF4Linear(
            QuantizedTensor(weight, parts["absmax"], second, mean, stored_shape, found.block), bias, dtype
        )
        return layer.train(module.training)
    library = bitsandbytes()
    made: nn.Linear = library.nn.Linear4bit(
        shape[1],
        shape[0],
        bias=bias is not None,
        compute_dtype=dtype,
        compress_statistics=double,
        quant_type="nf4",
        device="meta",
    )
    made.weight = library.nn.Params4bit.from_prequantized(
        weight, {f"weight.{key}": value for key, value in parts.items()}, device=weight.device, module=made
    )
    made.support_avx512bf16_for_cpu = False  # type: ignore[assignment] # see make_layer
    if bias is not None:
        made.bias = bias
    return made.train(module.training)
