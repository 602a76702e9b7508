"""Read the weights of an int8 ONNX graph back as float32, named and laid out as PyTorch modules hold them.

The graphs were exported from PyTorch and quantised with ONNX Runtime, which leaves two habits to undo:

* a quantised tensor ``X`` is kept as ``X_quantized``, ``X_scale`` and ``X_zero_point``, and stands for
  ``(quantized - zero_point) * scale``;
* the export folds the transposition of a linear layer into the constant and calls that ``onnx::MatMul_123``.
  Which layer it belongs to is told only by the name of the node that multiplies with it, and its shape is
  (inputs, outputs) where ``nn.Linear.weight`` is (outputs, inputs).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import numpy_helper

_QUANTIZED = "_quantized"
_ANONYMOUS = "onnx::"
_MULTIPLICATIONS = frozenset({"MatMul", "MatMulInteger"})

Value = TypeVar("Value")


def dequantize(
    quantized: NDArray[np.integer], scale: NDArray[np.floating], zero_point: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Turn integers back into the numbers they stand for.

    Args:
        quantized: int8 or uint8, any shape (..., columns).
        scale: The step between two neighbours: a scalar, or one per column.
        zero_point: The integer that stands for 0: a scalar, or one per column.

    Returns:
        ``(quantized - zero_point) * scale`` in float32, of the shape of ``quantized``.
    """
    # Widened before subtracting: the difference of two uint8 wraps around.
    difference = quantized.astype(np.float32) - zero_point.astype(np.float32)
    return difference * scale.astype(np.float32)


def module_name(node: str) -> str:
    """Name the PyTorch module that an exported node came from.

    Args:
        node: The node's name, a path of modules and at last the operation, such as
            ``/model/layers.0/mlp/up_proj/MatMul``.

    Returns:
        The module's name, ``model.layers.0.mlp.up_proj``; empty where the node lies outside every module.
    """
    return ".".join(node.strip("/").split("/")[:-1])


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read all weights of a graph.

    Args:
        path: The ``.onnx`` file.

    Returns:
        float32 tensors by the names they have in the PyTorch model the graph was exported from. Single
        numbers, such as the scales of activations, are left out.

    Raises:
        ValueError: If a constant of a matrix product cannot be traced to one layer.
    """
    graph = onnx.load(path).graph
    constants = {constant.name: numpy_helper.to_array(constant) for constant in graph.initializer}
    layers = _layers_by_constant(graph.node)

    weights: dict[str, torch.Tensor] = {}
    for name, array in constants.items():
        original = name.removesuffix(_QUANTIZED)
        if original != name:
            array = dequantize(array, constants[f"{original}_scale"], constants[f"{original}_zero_point"])
        elif array.ndim == 0 or array.dtype != np.float32:
            continue
        if original.startswith(_ANONYMOUS):
            found = layers.get(name, set())
            if len(found) != 1:
                raise ValueError(f"{path.name}: {name} belongs to {sorted(found) or 'no layer'}, not to exactly one")
            (layer,) = found
            original, array = f"{layer}.weight", array.T
        weights[original] = torch.from_numpy(np.array(array, order="C"))  # a copy: ONNX arrays are read-only
    return weights


def _layers_by_constant(nodes: Iterable[onnx.NodeProto]) -> dict[str, set[str]]:
    """Trace each constant to the modules that multiply with it, directly or once dequantised."""
    source: dict[str, str] = {}
    layers: dict[str, set[str]] = {}
    for node in nodes:  # ONNX keeps nodes in the order of execution
        if node.op_type == "DequantizeLinear":
            source[node.output[0]] = node.input[0]
        elif node.op_type in _MULTIPLICATIONS:
            constant = source.get(node.input[1], node.input[1])
            layers.setdefault(constant, set()).add(module_name(node.name))
    return layers


def rename(weights: Mapping[str, Value], prefixes: Mapping[str, str]) -> dict[str, Value]:
    """Give weights the prefixes that a model expects.

    Args:
        weights: Anything by name.
        prefixes: New prefixes by old ones; the first that fits is replaced, other names stay as they are.

    Returns:
        The same values under their new names, in the same order.
    """
    renamed: dict[str, Value] = {}
    for name, value in weights.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + name[len(old) :]] = value
    return renamed
