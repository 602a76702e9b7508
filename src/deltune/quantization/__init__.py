"""The frozen model in four bits: NF4 with double quantisation (QLoRA), in memory and straight from a folder."""

from __future__ import annotations

from deltune.quantization.format import NF4
from deltune.quantization.layers import NF4Linear, dense_weight, is_quantized
from deltune.quantization.load import load_quantized, reader
from deltune.quantization.model import Storage, dequantize, format_of, quantize, storage

__all__ = [
    "NF4",
    "NF4Linear",
    "Storage",
    "dense_weight",
    "dequantize",
    "format_of",
    "is_quantized",
    "load_quantized",
    "quantize",
    "reader",
    "storage",
]
