"""How many cases the laws have, and which are left out for what reason: ``python -m tests.laws.count``."""

from __future__ import annotations

import contextlib
import io
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import pytest

from tests.laws.cases import METHODS, Cases
from tests.zoo import ARCHITECTURES

__all__ = ["report"]


class _Collected:
    """A pytest plugin that keeps what was collected."""

    def __init__(self) -> None:
        self.items: list[Any] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)


def report() -> str:
    """A table of all laws, then the reasons."""
    plugin = _Collected()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", str(Path(__file__).parent)], [plugin])
    assert status == 0, printed.getvalue()
    counts: Counter[tuple[str, str]] = Counter()
    slow: Counter[tuple[str, str]] = Counter()
    grids: dict[tuple[str, str], Cases] = {}
    for item in plugin.items:
        law = (item.path.stem, getattr(item, "originalname", item.name))
        counts[law] += 1
        slow[law] += item.get_closest_marker("slow") is not None
        for mark in item.iter_markers("parametrize"):
            if isinstance(mark.args[1], Cases):
                grids[law] = mark.args[1]
    size = len(METHODS) * len(ARCHITECTURES)
    lines = [f"{len(METHODS)} methods x {len(ARCHITECTURES)} architectures = {size} cases in the full grid", ""]
    reasons: dict[str, Counter[str]] = defaultdict(Counter)
    for (file, name), count in counts.items():
        grid = grids.get((file, name))
        out = "" if grid is None else f", {len(grid.left_out)} of {size} left out"
        marked = f" ({slow[file, name]} slow)" if slow[file, name] else ""
        lines.append(f"{count:5}  {file}::{name}{marked}{out}")
        for _, _, reason in grid.left_out if grid is not None else ():
            reasons[reason][name] += 1
    lines += ["", f"{counts.total()} law cases, {slow.total()} of them slow", "", "Left out, by reason:"]
    for reason, laws in sorted(reasons.items(), key=lambda entry: -entry[1].total()):
        lines.append(f"{laws.total():5}  in {len(laws)} laws: {reason}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.stdout.write(report() + "\n")
