"""Deltas and merged models in the formats of other programs, each compared with the live model before it is kept.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.exporting.comparison import Drift, probe_logits
    from deltune.exporting.formats import Exported, export
    from deltune.exporting.merged import write_model

_MODULES = {
    "Drift": "comparison",
    "Exported": "formats",
    "export": "formats",
    "probe_logits": "comparison",
    "write_model": "merged",
}

#: What ``deltune export --format`` takes.
FORMATS = ("peft", "merged", "gguf", "vllm")

__all__ = ["FORMATS", "Drift", "Exported", "export", "probe_logits", "write_model"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
