"""Linear maps in 4 bits: deltune's own, and bitsandbytes' as deltune makes and reads them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.errors import StateError
from deltune.quantization.format import NF4, bitsandbytes
from deltune.quantization.nf4 import QuantizedTensor, quantize_tensor

__all__ = ["NF4Linear", "dense_weight", "is_quantized", "make_layer", "stored_bytes"]


class _Product(torch.autograd.Function):
    """F.linear whose matrix is dequantised in either direction, and kept in neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: QuantizedTensor) -> Tensor:
        ctx.weight = weight
        return F.linear(x, weight.dequantize(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        of_x = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = gradient @ ctx.weight.dequantize(gradient.dtype)
        if ctx.needs_input_grad[1]:
            of_bias = gradient.sum(0)
        return of_x, of_bias, None


class NF4Linear(nn.Linear):
    """y = dequantised W x + bias, in plain PyTorch, on every device.

    ``weight`` holds the packed levels, which never train; the scales are buffers, and stay in their types when the
    model's is changed.

    Args:
        quantized: W (d_out, d_in).
        bias: (d_out), or None; kept as it is.
        compute_dtype: type of the product; the output has the type of the input again.
    """

    scales: Tensor
    second_scales: Tensor | None
    mean: Tensor | None

    def __init__(self, quantized: QuantizedTensor, bias: nn.Parameter | None, compute_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = quantized.shape
        self.block = quantized.block
        self.compute_dtype = compute_dtype
        self.weight = nn.Parameter(quantized.packed, requires_grad=False)
        self.register_parameter("bias", bias)
        self.register_buffer("scales", quantized.scales)
        self.register_buffer("second_scales", quantized.second_scales)
        self.register_buffer("mean", quantized.mean)

    @property
    def quantized(self) -> QuantizedTensor:
        """The weight as it is stored."""
        shape = torch.Size((self.out_features, self.in_features))
        return QuantizedTensor(self.weight.detach(), self.scales, self.second_scales, self.mean, shape, self.block)

    def forward(self, input: Tensor) -> Tensor:
        """The output (..., d_out) for (..., d_in)."""
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else self.compute_dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        # as a matrix: the result for more dimensions would be a view, and could then not be changed in place
        product: Any = _Product.apply
        flat: Tensor = product(input.to(dtype).reshape(-1, self.in_features), bias, self.quantized)
        output = flat.view(*input.shape[:-1], self.out_features)
        return output if autocast else output.to(input.dtype)

    def extra_repr(self) -> str:
        """The sizes."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> NF4Linear:
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, value in self._buffers.items():
            old = before[name]
            if value is not None and old is not None and value.dtype != old.dtype:
                self._buffers[name] = old.to(value.device)
        return self


def make_layer(weight: Tensor, bias: nn.Parameter | None, format: NF4) -> nn.Linear:
    """A quantised linear map of ``weight`` (d_out, d_in).

    On the processor it is deltune's own, whichever engine was asked for, where d_in is not a multiple of the block.

    Raises:
        DeltuneError: if the engine is not installed.
        StateError: if the weight has no values, which bitsandbytes needs.
    """
    own = torch.float32 if weight.dtype == torch.float64 and format.engine == "bitsandbytes" else weight.dtype
    dtype = format.compute_dtype or own
    library = bitsandbytes() if format.engine == "bitsandbytes" else None
    if library is not None and weight.is_meta:
        raise StateError("bitsandbytes cannot quantise a model without values (on the meta device).")
    # bitsandbytes on the processor reads wrong scales where a block runs over the end of a row
    crosses = weight.device.type == "cpu" and weight.shape[1] % format.block != 0
    if library is None or crosses:
        return NF4Linear(quantize_tensor(weight, format.block, format.double_quantization), bias, dtype)
    layer: nn.Linear = library.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        compute_dtype=dtype,
        compress_statistics=format.double_quantization,
        quant_type="nf4",
        device="meta",
    )
    values = weight.detach().to(own).contiguous()
    parameter = library.nn.Params4bit(
        values,
        requires_grad=False,
        blocksize=format.block,
        compress_statistics=format.double_quantization,
        quant_type="nf4",
        module=layer,
    )
    layer.weight = parameter.to(weight.device)  # quantises
    # on some processors it would repack the weight when evaluating, after which nothing below gets a gradient
    layer.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    if bias is not None:
        layer.bias = bias
    return layer


def is_quantized(module: nn.Module) -> bool:
    """Whether a module's matrix is stored in 4 bits, by whichever engine."""
    return isinstance(module, NF4Linear) or type(getattr(module, "weight", None)).__name__ == "Params4bit"


def dense_weight(module: nn.Module) -> Tensor:
    """The module's weight as floating-point numbers: itself, or dequantised.

    Raises:
        StateError: if it is stored in a way that deltune does not read.
    """
    if isinstance(module, NF4Linear):
        return module.quantized.dequantize()
    weight: Any = module.get_parameter("weight")
    if is_quantized(module):
        state = weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise StateError(
                "bitsandbytes has repacked this model for inference. Load it anew, or use deltune.quantize."
            )
        value: Tensor = bitsandbytes().functional.dequantize_4bit(weight.data, state)
        return value
    if not weight.dtype.is_floating_point:
        raise StateError(
            f"A {type(module).__name__} stores its weight as {weight.dtype}, which deltune cannot read. Use a method "
            "that does not read the frozen matrix, such as lora, or load the model unquantised."
        )
    dense: Tensor = weight
    return dense


def keep_packing(model: nn.Module) -> None:
    """Never let bitsandbytes repack the weights of ``model`` in evaluation: nothing below would get a gradient then."""
    for module in model.modules():
        if is_quantized(module) and hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def layer_format(module: nn.Module) -> NF4 | None:
    """How a quantised module is stored; None if it is not in NF4."""
    if isinstance(module, NF4Linear):
        return NF4(module.second_scales is not None, module.compute_dtype, module.block, "torch")
    layer: Any = module
    state = layer.weight.quant_state
    if state is None or state.quant_type != "nf4":
        return None
    return NF4(bool(state.nested), layer.compute_dtype, int(state.blocksize), "bitsandbytes")


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a quantised module's weight and scales, without the tables of levels, which are the same everywhere."""
    if isinstance(module, NF4Linear):
        tensors = module.quantized.tensors
    else:
        weight: Any = module.get_parameter("weight")
        state = weight.quant_state
        tensors = (weight, state.absmax, *((state.state2.absmax, state.offset) if state.nested else ()))
    return sum(value.numel() * value.element_size() for value in tensors)
