"""4-bit NormalFloat and double quantisation in plain PyTorch: the reference, and the engine ``torch``.

A matrix W (d_out, d_in) is read row by row as n values and cut into blocks of b values; the last may be shorter, and a
block may go over the end of a row. In a block, c is the largest absolute value, and each weight is stored as the number
of the level nearest to w / c. With double quantisation the scales c are stored in 8 bits: their mean is taken out, and
the rest is cut into blocks of 256, each with a second scale.

Source: Dettmers et al. 2023, arXiv 2305.14314, section 3; the 8-bit levels: Dettmers 2016, arXiv 1511.04561.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from deltune.quantization.format import SCALE_BLOCK

__all__ = ["QuantizedTensor", "boundaries", "normal_levels", "quantize_tensor", "scale_levels"]

#: Values that are quantised at once: what is needed besides the result stays small. A multiple of every block.
_CHUNK = 1 << 17
_CPU = torch.device("cpu")


@cache
def normal_levels(device: torch.device = _CPU) -> Tensor:
    """The 16 levels (16) in float32, ascending: 7 negative, zero, 8 positive, the last of them 1.

    Those of a side are quantiles of the normal distribution at equally distant probabilities, from one a little below
    1 down to 1/2, which is zero and belongs to neither side. The outermost has 7 decimals and all are rounded to
    float32, as in the authors' code, so that the levels agree to the last bit.
    """
    outermost = round(1 - (1 / 32 + 1 / 30) / 2, 7)

    def side(count: int) -> Tensor:
        probabilities = torch.linspace(outermost, 0.5, count + 1, dtype=torch.float32, device=_CPU)[:count]
        return math.sqrt(2) * torch.erfinv(2 * probabilities.double() - 1)

    # normal tensors, whatever mode the first caller is in: they are kept
    with torch.inference_mode(False), torch.no_grad():
        positive, negative = side(8), side(7)
        levels = torch.cat([-negative, torch.zeros(1, device=_CPU), positive.flip(0)]).float()
        return (levels / levels.max()).to(device)


@cache
def scale_levels(device: torch.device = _CPU) -> Tensor:
    """The 256 levels of a scale (256) in float32, ascending: a dynamic exponent, zero at 127, from -0.993 to 1.

    Of the seven decades from 1e-6 to 1, the i-th is cut into 2^i equal cells, whose middles are levels with both signs.
    """
    with torch.inference_mode(False), torch.no_grad():
        cells = []
        for power in range(7):
            edges = torch.linspace(0.1, 1, 2**power + 1, dtype=torch.float32, device=_CPU)
            cells.append((edges[:-1] + edges[1:]) / 2 * 10.0 ** (power - 6))
        positive = torch.cat(cells)
        return torch.cat([-positive, torch.tensor([0.0, 1.0], device=_CPU), positive]).sort().values.to(device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels (256, 2) that each byte stands for, the first in its high half."""
    with torch.inference_mode(False), torch.no_grad():
        levels = normal_levels()
        both = torch.cartesian_prod(levels, levels)
        return both.to(device)


def boundaries(levels: Tensor) -> Tensor:
    """Up to which value each level but the last is the nearest; a value in the middle takes the lower one.

    The middle of two float32 numbers is rounded down to float32, which decides every float32 value as the exact middle
    would.
    """
    exact = (levels[:-1].double() + levels[1:].double()) / 2
    rounded = exact.float()
    return torch.where(rounded.double() > exact, torch.nextafter(rounded, rounded - 1), rounded)


@cache
def _boundaries(name: str, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return boundaries(normal_levels() if name == "normal" else scale_levels()).to(device)


@dataclass(frozen=True)
class QuantizedTensor:
    """A tensor of n values in 4 bits.

    Attributes:
        packed: two numbers of levels in a byte, the first in the high half: uint8 (ceil(n / 2), 1).
        scales: of each block: float32 (ceil(n / b)), or uint8 with double quantisation.
        second_scales: of each 256 scales, float32; None without double quantisation.
        mean: of all scales, float32 (); None without double quantisation.
        shape: of the tensor.
        block: b.
    """

    packed: Tensor
    scales: Tensor
    second_scales: Tensor | None
    mean: Tensor | None
    shape: torch.Size
    block: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that is stored."""
        return tuple(value for value in (self.packed, self.scales, self.second_scales, self.mean) if value is not None)

    def indices(self) -> Tensor:
        """The number of each value's level, uint8 (n)."""
        return torch.cat([self.packed >> 4, self.packed & 15], dim=1).flatten()[: self.shape.numel()]

    def block_scales(self) -> Tensor:
        """The scale of each block, float32 (ceil(n / b)), with the error of double quantisation."""
        if self.second_scales is None or self.mean is None:
            return self.scales
        values = F.embedding(self.scales.int(), scale_levels(self.scales.device)[:, None])
        return _times(values.flatten(), self.second_scales, SCALE_BLOCK) + self.mean

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values, computed in float32."""
        count = self.shape.numel()
        if self.packed.is_meta:
            return torch.empty(self.shape, dtype=dtype, device="meta")
        values = F.embedding(self.packed.flatten().int(), _pairs(self.packed.device)).flatten()[:count]
        return _times(values, self.block_scales(), self.block).to(dtype).view(self.shape)


def quantize_tensor(weight: Tensor, block: int = 64, double_quantization: bool = True) -> QuantizedTensor:
    """The values of ``weight`` in 4 bits."""
    flat = weight.detach().reshape(-1)
    blocks = math.ceil(flat.numel() / block)
    packed = torch.empty(math.ceil(flat.numel() / 2), 1, dtype=torch.uint8, device=flat.device)
    scales = torch.empty(blocks, dtype=torch.float32, device=flat.device)
    if not flat.is_meta:
        for start, part in _chunks(flat):
            scaled, found = _scaled(part.float(), block)
            scales[start // block :][: len(found)] = found
            codes = torch.bucketize(scaled, _boundaries("normal", flat.device), out_int32=True).to(torch.uint8)
            # what pads the last pair is not a value of the tensor
            codes = codes.flatten()[: 2 * math.ceil(len(part) / 2)]
            packed[start // 2 :, 0][: len(codes) // 2] = (codes[0::2] << 4) | codes[1::2]
    if not double_quantization:
        return QuantizedTensor(packed, scales, None, None, weight.shape, block)
    if flat.is_meta:
        short = torch.empty(blocks, dtype=torch.uint8, device="meta")
        second = torch.empty(math.ceil(blocks / SCALE_BLOCK), dtype=torch.float32, device="meta")
        return QuantizedTensor(packed, short, second, second.new_empty(()), weight.shape, block)
    mean = scales.mean()
    scaled, second = _scaled(scales - mean, SCALE_BLOCK)
    short = torch.bucketize(scaled, _boundaries("scale", flat.device), out_int32=True).to(torch.uint8)
    return QuantizedTensor(packed, short.flatten()[:blocks].clone(), second, mean, weight.shape, block)


def _chunks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, flat.numel(), _CHUNK):
        yield start, flat[start : start + _CHUNK]


def _scaled(values: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values in blocks (blocks, b), each divided by its largest absolute value, and these; zeros fill the last."""
    padded = F.pad(values, (0, -len(values) % block)).view(-1, block)
    largest = padded.abs().amax(1)
    # a block of zeros has the scale zero and stays zero
    return padded / largest.where(largest > 0, 1.0)[:, None], largest


def _times(values: Tensor, scales: Tensor, block: int) -> Tensor:
    """Each value times the scale of its block."""
    padded = F.pad(values, (0, missing)) if (missing := -len(values) % block) else values
    return (padded.view(-1, block) * scales[:, None]).flatten()[: len(values)]
