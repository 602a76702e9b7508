"""NF4 and double quantisation, against the sheet's numbers and slow twins. Numbers are those of its invariants."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError
from deltune.quantization.nf4 import QuantizedTensor, boundaries, normal_levels, quantize_tensor, scale_levels

#: As published in float32.
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
MIDDLES = [
    *(-0.8480964, -0.6106329, -0.4599953, -0.3396794, -0.2346074, -0.1379117, -0.0455250, 0.0397901),
    *(0.1202552, 0.2035213, 0.2920138, 0.3893125, 0.5016634, 0.6427869, 0.8614784),
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def nearest(value: float, levels: list[float]) -> int:
    """The nearest level in exact arithmetic; of two equally near, the lower."""
    return min(range(len(levels)), key=lambda index: (abs(value - levels[index]), index))


def twin(weight: Tensor, block: int) -> tuple[list[int], list[float]]:
    """Indices and scales, value by value."""
    values = weight.flatten().tolist()
    indices, scales = [], []
    for start in range(0, len(values), block):
        part = values[start : start + block]
        scale = max(abs(value) for value in part)
        scales.append(scale)
        for value in part:
            ratio = torch.tensor(value) / torch.tensor(scale) if scale else torch.tensor(0.0)
            indices.append(nearest(float(ratio), LEVELS))
    return indices, scales


def test_1_levels_are_the_published_ones_bit_for_bit() -> None:
    levels = normal_levels()
    assert levels.dtype == torch.float32
    assert torch.equal(levels, torch.tensor(LEVELS))
    assert (levels[0], levels[7], levels[15]) == (-1, 0, 1)


def test_1_levels_follow_from_the_normal_quantile() -> None:
    quantile = NormalDist().inv_cdf
    delta = 1 - (1 / 32 + 1 / 30) / 2
    positive = [quantile(delta + step * (0.5 - delta) / 8) for step in range(8)]
    negative = [-quantile(delta + step * (0.5 - delta) / 7) for step in range(7)]
    expected = torch.tensor(sorted([*positive, 0.0, *negative])) / max(positive)
    assert (normal_levels() - expected).abs().max() < 3e-7


def test_1_a_value_in_the_middle_takes_the_lower_level() -> None:
    middles = boundaries(normal_levels())
    assert (middles - torch.tensor(MIDDLES)).abs().max() < 1e-7
    # 0 and 1 have an exact middle
    even = boundaries(torch.tensor([0.0, 1.0, 3.0]))
    assert torch.bucketize(torch.tensor([0.5, 0.5000001, 2.0]), even).tolist() == [0, 1, 1]
    ratios = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))])
    found = quantize_tensor(torch.cat([torch.ones(1), ratios]), 64, False).indices()[1:]
    assert found.tolist() == [nearest(float(value), LEVELS) for value in ratios]


def test_the_levels_of_scales() -> None:
    levels = scale_levels()
    assert levels.shape == (256,)
    assert (levels.diff() > 0).all()
    assert levels[127] == 0
    assert levels[255] == 1
    assert float(levels[0]) == pytest.approx(-0.9929687, abs=1e-7)
    # each decade has twice as many as the one below: 1, 2, 4, ..., 64 on either side
    for power in range(7):
        inside = (levels > 10.0 ** (power - 7)) & (levels < 10.0 ** (power - 6) * (1 if power < 6 else 0.9999))
        assert int(inside.sum()) == 2**power


@pytest.mark.parametrize("shape", [(3, 64), (5, 37), (7,), (1, 1), (4, 128)])
@pytest.mark.parametrize("block", [32, 64])
def test_indices_and_scales_equal_a_search_value_by_value(shape: tuple[int, ...], block: int) -> None:
    weight = normal(*shape)
    stored = quantize_tensor(weight, block, double_quantization=False)
    indices, scales = twin(weight, block)
    assert stored.indices().tolist() == indices
    assert stored.scales.tolist() == scales
    values = [LEVELS[index] for index in indices]
    expected = torch.tensor(values) * torch.tensor(scales).repeat_interleave(block)[: len(values)]
    assert torch.equal(stored.dequantize(), expected.view(shape))


def test_chunks_do_not_show() -> None:
    """More values than are quantised at once, and none that divides evenly."""
    weight = normal(1031, 2039)
    stored = quantize_tensor(weight)
    tail = weight.flatten()[1 << 20 :]
    assert torch.equal(stored.indices()[1 << 20 :], quantize_tensor(tail).indices())
    scales = torch.stack([part.abs().max() for part in weight.flatten().split(64)])
    assert torch.equal(quantize_tensor(weight, 64, False).scales, scales)


@pytest.mark.parametrize("shape", [(16, 64), (5, 37)])
def test_2_quantising_again_changes_nothing(shape: tuple[int, ...]) -> None:
    first = quantize_tensor(normal(*shape), 64, double_quantization=False)
    second = quantize_tensor(first.dequantize(), 64, double_quantization=False)
    assert torch.equal(first.packed, second.packed)
    assert torch.equal(first.scales, second.scales)


def test_3_the_error_is_at_most_half_of_the_largest_gap() -> None:
    weight = normal(200, 64)
    error = (weight - quantize_tensor(weight, 64, False).dequantize()).abs()
    scale = weight.abs().amax(1, keepdim=True)
    assert (error <= 0.1520 * scale)[weight < 0].all()
    assert (error <= 0.1386 * scale)[weight > 0].all()
    assert (error / scale).max() > 0.13  # the bar is no empty one


def test_4_the_largest_value_of_a_block_is_reproduced_exactly() -> None:
    weight = normal(200, 64)
    largest = weight.abs().argmax(1, keepdim=True)
    found = quantize_tensor(weight, 64, False).dequantize()
    assert torch.equal(found.gather(1, largest), weight.gather(1, largest))
    assert weight.gather(1, largest).gt(0).any()
    assert weight.gather(1, largest).lt(0).any()


@pytest.mark.parametrize("count", [1, 63, 64, 65, 64 * 256, 64 * 256 + 1, 50_001])
def test_5_sizes(count: int) -> None:
    stored = quantize_tensor(normal(count))
    blocks = math.ceil(count / 64)
    assert (stored.packed.dtype, stored.packed.shape) == (torch.uint8, (math.ceil(count / 2), 1))
    assert (stored.scales.dtype, stored.scales.shape) == (torch.uint8, (blocks,))
    assert stored.second_scales is not None
    assert (stored.second_scales.dtype, stored.second_scales.shape) == (torch.float32, (math.ceil(blocks / 256),))
    meta = quantize_tensor(torch.empty(count, device="meta"))
    assert [(value.shape, value.dtype) for value in meta.tensors] == [
        (value.shape, value.dtype) for value in stored.tensors
    ]


def test_5_the_first_value_is_in_the_high_half_of_its_byte() -> None:
    stored = quantize_tensor(torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
    assert stored.packed.flatten().tolist() == [15 * 16 + 0, 7 * 16 + 15]


@pytest.mark.parametrize("double", [False, True])
def test_6_relative_error_of_normal_values(double: bool) -> None:
    weight = normal(1000, 1024)
    error = (quantize_tensor(weight, 64, double).dequantize() - weight).norm() / weight.norm()
    assert float(error) == pytest.approx(0.0920, abs=0.001)


def test_6_smaller_blocks_have_smaller_errors() -> None:
    weight = normal(1000, 1024)
    for block, expected in ((32, 0.087), (128, 0.096)):
        error = (quantize_tensor(weight, block).dequantize() - weight).norm() / weight.norm()
        assert float(error) == pytest.approx(expected, abs=0.001)


def test_7_double_quantisation_changes_scales_by_less_than_one_percent() -> None:
    weight = normal(1000, 1024)
    plain, double = quantize_tensor(weight, 64, False), quantize_tensor(weight, 64)
    assert torch.equal(plain.packed, double.packed)
    assert ((double.block_scales() - plain.scales) / plain.scales).abs().max() < 0.01


def test_7_scales_equal_a_slow_twin() -> None:
    """The mean is of all scales of the tensor, the second scale of 256 of them."""
    weight = normal(300, 128)
    scales = quantize_tensor(weight, 64, False).scales
    stored = quantize_tensor(weight)
    mean = scales.mean()
    levels = scale_levels().tolist()
    expected = []
    for part in (scales - mean).split(256):
        second = part.abs().max()
        expected += [levels[nearest(float(value / second), levels)] * second for value in part]
    assert torch.equal(stored.block_scales(), torch.stack(expected) + mean)


def test_8_bits_of_a_weight() -> None:
    assert deltune.NF4().bits_per_weight == pytest.approx(4.126953, abs=1e-6)
    assert deltune.NF4(double_quantization=False).bits_per_weight == 4.5
    for double in (False, True):
        stored = quantize_tensor(torch.empty(4096, 4096, device="meta"), 64, double)
        size = sum(value.numel() * value.element_size() for value in stored.tensors)
        expected = deltune.NF4(double_quantization=double).bits_per_weight
        assert 8 * size / 4096**2 == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("double", [False, True])
def test_12_zeros_and_odd_lengths(double: bool) -> None:
    assert torch.equal(quantize_tensor(torch.zeros(5, 7), 64, double).dequantize(), torch.zeros(5, 7))
    weight = normal(4, 64)
    weight[2] = 0
    stored = quantize_tensor(weight, 64, double)
    found = stored.dequantize()
    assert torch.isfinite(found).all()
    assert not found[2].any()
    assert (stored.indices().view(4, 64)[2] == 7).all()
    for count in (1, 3, 65, 127):
        assert quantize_tensor(normal(count), 64, double).dequantize().shape == (count,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_quantised_by_their_float32_values(dtype: torch.dtype) -> None:
    weight = normal(30, 40).to(dtype)
    one, other = quantize_tensor(weight), quantize_tensor(weight.float())
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))
    assert torch.equal(one.dequantize(dtype), other.dequantize().to(dtype))


def test_blocks_run_along_rows() -> None:
    """Of the matrix as it is given, whichever way it lies in memory."""
    weight = normal(64, 96)
    one, other = quantize_tensor(weight.T), quantize_tensor(weight.T.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(one.tensors, other.tensors, strict=True))


@pytest.mark.parametrize(
    "options", [{"block": 48}, {"block": 16}, {"engine": "bitsandbite"}, {"compute_dtype": torch.int8}]
)
def test_impossible_formats_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(MethodError, match="NF4"):
        deltune.NF4(**options)  # type: ignore[arg-type]


# -- bitsandbytes as a reference -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 96), (128, 64), (7, 32)])
def test_equals_bitsandbytes(shape: tuple[int, int]) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = normal(*shape)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    stored = quantize_tensor(weight, 64, double_quantization=False)
    assert torch.equal(state.code.float(), normal_levels())
    assert torch.equal(packed, stored.packed)
    assert torch.equal(state.absmax, stored.scales)
    theirs = functional.dequantize_4bit(packed, state)
    # a fault of bitsandbytes 0.50 on the processor: it takes wrong scales where blocks run over the end of a row
    assert torch.equal(theirs, stored.dequantize()) == (shape[1] % 64 == 0)


def test_double_quantisation_equals_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    weight = normal(512, 256)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    stored = quantize_tensor(weight)
    assert stored.second_scales is not None
    assert stored.mean is not None
    assert torch.equal(state.state2.code, scale_levels())
    assert torch.allclose(state.offset, stored.mean, rtol=1e-6)
    assert torch.allclose(state.state2.absmax, stored.second_scales, rtol=1e-5)
    # its nearest 8-bit level comes from a table of 65,536 cells: some are the neighbour
    different = state.absmax != stored.scales
    assert different.float().mean() < 0.01
    assert (state.absmax.int() - stored.scales.int()).abs().max() <= 1
    same = QuantizedTensor(packed, state.absmax, state.state2.absmax, state.offset, stored.shape, 64)
    assert torch.equal(functional.dequantize_4bit(packed, state), same.dequantize())
