"""Measuring: memory, spread over repetitions, and where a number comes from. Nothing here knows of methods.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from deltune.measure.adapters import use_picture, use_table
from deltune.measure.gates import gate_picture, gate_table
from deltune.measure.memory import MemoryUse, PeakMemory, optimizer_state_bytes, release_memory, resident_bytes
from deltune.measure.provenance import cpu_count, provenance
from deltune.measure.ranks import rank_picture, rank_table
from deltune.measure.saved_tensors import SavedTensors
from deltune.measure.sites import site_picture, site_table
from deltune.measure.statistics import Spread, proportion_interval

__all__ = [
    "MemoryUse",
    "PeakMemory",
    "SavedTensors",
    "Spread",
    "cpu_count",
    "gate_picture",
    "gate_table",
    "optimizer_state_bytes",
    "proportion_interval",
    "provenance",
    "rank_picture",
    "rank_table",
    "release_memory",
    "resident_bytes",
    "site_picture",
    "site_table",
    "use_picture",
    "use_table",
]
