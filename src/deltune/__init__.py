"""Every parameter-efficient way to fine-tune a pretrained model, behind one interface, measured side by side.

Importing this package loads neither torch nor transformers: each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_NAMES = {
    "NF4": "deltune.quantization",
    "PromptEnsemble": "deltune.prompting",
    "SparseDelta": "deltune.sparse_delta",
    "Targets": "deltune.backbone",
    "Tuned": "deltune.tuned",
    "adapter_use": "deltune.fusing",
    "anatomy_of": "deltune.backbone",
    "attach": "deltune.tuned",
    "fit": "deltune.training",
    "gate_values": "deltune.gating",
    "gated": "deltune.methods.hybrid.gated",
    "load": "deltune.loading",
    "merge_deltas": "deltune.merging",
    "mix_prompts": "deltune.prompting",
    "prompt_similarity": "deltune.prompting",
    "prune_adapters": "deltune.fusing",
    "quantize": "deltune.quantization",
    "register": "deltune.methods",
}

__all__ = [
    "NF4",
    "PromptEnsemble",
    "SparseDelta",
    "Targets",
    "Tuned",
    "__version__",
    "adapter_use",
    "anatomy_of",
    "attach",
    "fit",
    "gate_values",
    "gated",
    "load",
    "merge_deltas",
    "mix_prompts",
    "prompt_similarity",
    "prune_adapters",
    "quantize",
    "register",
]


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        return getattr(importlib.import_module(_NAMES[name]), name)
    if not name.startswith("_") and name[:1].isupper():
        methods = importlib.import_module("deltune.methods").all_methods()
        by_class = {method.__name__: method for method in methods.values()}
        if name in by_class:
            return by_class[name]
    raise AttributeError(f"module 'deltune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
