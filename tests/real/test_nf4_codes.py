"""The reference of NF4 stores real pretrained matrices as bitsandbytes does."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from deltune.quantization.nf4 import boundaries, normal_levels, quantize_tensor, scale_levels
from tests.assets import asset

#: A last digit of a float32 near one.
DIGIT = 2**-23
#: Cells of the table in which bitsandbytes looks for the 8-bit code of a number from -1 to 1.
CELL = 2 / 65536


@dataclass
class Differences:
    """Codes that differ between the two, and how many there are."""

    levels: int = 0
    of_levels: int = 0
    scales: int = 0
    of_scales: int = 0

    def add(self, weight: Tensor) -> None:
        """Compare the codes of one matrix; what differs must be as near to the one as to the other."""
        functional = pytest.importorskip("bitsandbytes").functional
        packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
        ours = quantize_tensor(weight, 64, True)
        theirs = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], dim=1).flatten().int()
        mine = torch.stack([ours.packed.flatten() >> 4, ours.packed.flatten() & 15], dim=1).flatten().int()
        (differing,) = torch.where(theirs != mine)
        blocks = weight.flatten().double().view(-1, 64)
        values = (blocks / blocks.abs().amax(1, keepdim=True)).flatten()[differing]
        lower = torch.minimum(theirs, mine)[differing]
        assert bool(((theirs - mine)[differing].abs() == 1).all())
        assert bool(((values - boundaries(normal_levels()).double()[lower]).abs() < DIGIT).all())
        self.levels += len(differing)
        self.of_levels += weight.numel()

        one, other = state.absmax.int(), ours.scales.int()
        levels = scale_levels()
        apart = (levels[one] - levels[other]).abs()
        assert bool((((one - other).abs() <= 1) | (apart < CELL)).all())
        self.scales += int((one != other).sum())
        self.of_scales += one.numel()


@pytest.mark.parametrize("name", ["minilm", pytest.param("smollm2-135m", marks=pytest.mark.slow)])
def test_only_codes_on_the_border_of_two_levels_differ(name: str) -> None:
    """bitsandbytes finds 8-bit codes in a table, so that some scales take the neighbour; levels hardly ever differ."""
    found = Differences()
    with safe_open(str(asset(name) / "model.safetensors"), framework="pt") as stream:
        for key in sorted(stream.keys()):
            if "layer" in key and len(stream.get_slice(key).get_shape()) == 2:
                found.add(stream.get_tensor(key).float())
    print(name, found)
    # measured: 2 of 10,616,832 (MiniLM), 4 of 106,168,320 (SmolLM2)
    assert found.of_levels > 10_000_000
    assert found.levels / found.of_levels < 1e-6
    # measured: 0.23 % and 0.22 %
    assert found.scales / found.of_scales < 0.004
