"""Read and write attachments: what was trained, and nothing else."""

from __future__ import annotations

from deltune.checkpoints.files import write_atomically, write_json, write_tensors
from deltune.checkpoints.formats import FORMATS, Format, Saved, format_named, other_formats, recognised
from deltune.checkpoints.native import (
    DESCRIPTION_FILE,
    TENSOR_FILE,
    fill,
    read,
    read_description,
    stored_tensors,
    without_head,
    write,
)

__all__ = [
    "DESCRIPTION_FILE",
    "FORMATS",
    "TENSOR_FILE",
    "Format",
    "Saved",
    "fill",
    "format_named",
    "other_formats",
    "read",
    "read_description",
    "recognised",
    "stored_tensors",
    "without_head",
    "write",
    "write_atomically",
    "write_json",
    "write_tensors",
]
