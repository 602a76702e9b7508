"""Methods: one file each, found by themselves.

``register`` makes a class known; ``get`` and ``parse`` find methods by name or text.
"""

from __future__ import annotations

from deltune.methods.base import Method, Paper, Placement, Sum
from deltune.methods.options import option
from deltune.methods.preset import Preset
from deltune.methods.registry import all_methods, all_variants, get, parse, register, split_specifications, variant

__all__ = [
    "Method",
    "Paper",
    "Placement",
    "Preset",
    "Sum",
    "all_methods",
    "all_variants",
    "get",
    "option",
    "parse",
    "register",
    "split_specifications",
    "variant",
]
