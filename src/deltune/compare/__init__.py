"""Methods side by side: one model, one task, the same examples, seeds and budget; measured, not quoted.

Example:
    >>> from deltune.compare import Comparison, run_comparison, write_report
    >>> comparison = Comparison(
    ...     model="models/encoder", data="reviews.csv", methods=("lora(rank=8)", "bitfit"), steps=100
    ... )
    >>> outcome = run_comparison(comparison, "out", jobs=2)  # doctest: +SKIP
    >>> write_report(outcome, "out")  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltune.compare.engine import Outcome, run_comparison
    from deltune.compare.pareto import pareto_front
    from deltune.compare.plan import LINEAR_HEAD, MAJORITY, Comparison, Run
    from deltune.compare.report import ReportFiles, write_report
    from deltune.compare.table import ComparisonTable, TableRow

_MODULES = {
    "LINEAR_HEAD": "plan",
    "MAJORITY": "plan",
    "Comparison": "plan",
    "ComparisonTable": "table",
    "Outcome": "engine",
    "ReportFiles": "report",
    "Run": "plan",
    "TableRow": "table",
    "pareto_front": "pareto",
    "run_comparison": "engine",
    "write_report": "report",
}

__all__ = [
    "LINEAR_HEAD",
    "MAJORITY",
    "Comparison",
    "ComparisonTable",
    "Outcome",
    "ReportFiles",
    "Run",
    "TableRow",
    "pareto_front",
    "run_comparison",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return list(__all__)
