from __future__ import annotations

import subprocess
import sys
import time

import pytest

from deltune.measure import PeakMemory, release_memory, resident_bytes

MEGABYTE = 1_000_000


def fill(size: int) -> bytearray:
    block = bytearray(size)
    block[::4096] = b"x" * len(block[::4096])  # touch every page, or the system keeps none of them
    return block


def test_a_known_block_is_seen():
    with PeakMemory() as memory:
        block = fill(200 * MEGABYTE)
        time.sleep(0.05)
        del block
    grown = memory.use.resident_peak - memory.use.resident_baseline
    assert 190 * MEGABYTE < grown < 240 * MEGABYTE
    assert memory.use.peak == memory.use.resident_peak
    assert memory.use.device_peak is None


def test_a_later_smaller_block_does_not_inherit_the_earlier_peak():
    with PeakMemory() as first:
        block = fill(200 * MEGABYTE)
        del block
    release_memory()
    with PeakMemory() as second:
        block = fill(50 * MEGABYTE)
        time.sleep(0.05)
        del block
    assert second.use.resident_peak < first.use.resident_peak - 100 * MEGABYTE
    assert second.use.resident_peak - second.use.resident_baseline > 45 * MEGABYTE


def test_a_peak_shorter_than_the_interval_is_seen_by_the_kernel():
    program = """
from deltune.measure import PeakMemory
with PeakMemory(interval=60) as memory:
    block = bytearray(300_000_000)
    block[::4096] = b"x" * len(block[::4096])
    del block
print(memory.use.resident_peak - memory.use.resident_baseline)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert 290 * MEGABYTE < int(done.stdout) < 340 * MEGABYTE


def test_use_can_be_read_inside_the_block_and_goes_to_files():
    with PeakMemory() as memory:
        assert memory.use.resident_peak > 0
    values = memory.use.to_dict()
    assert set(values) == {"peak", "resident_peak", "resident_baseline", "device_peak"}
    assert values["peak"] >= values["resident_baseline"] > 0


def test_resident_memory_is_that_of_this_process():
    psutil = pytest.importorskip("psutil")
    assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, rel=0.2)
