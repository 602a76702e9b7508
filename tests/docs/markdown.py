"""The parts of a Markdown page that tests look at: code blocks, links, headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "ROOT", "Block", "anchors", "blocks", "links"]

ROOT = Path(__file__).resolve().parents[2]

#: Every page of the documentation, but for measured results.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(page for page in (ROOT / "docs").rglob("*.md") if "results" not in page.relative_to(ROOT).parts),
]

_NOT_RUN = re.compile(r"<!-- not run: (\S.*) -->")
_LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, the line it begins on, and why it is not run, if it is not."""

    language: str
    text: str
    line: int
    not_run: str = ""


def blocks(page: Path) -> list[Block]:
    """The fenced code blocks of a page."""
    found: list[Block] = []
    inside: list[str] | None = None
    language, start, reason, before = "", 0, "", ""
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if inside is None and line.startswith("```"):
            mark = _NOT_RUN.fullmatch(before)
            inside, language, start, reason = [], line[3:].strip(), number + 1, mark[1] if mark else ""
        elif inside is not None and line.startswith("```"):
            found.append(Block(language, "\n".join(inside) + "\n", start, reason))
            inside = None
        elif inside is not None:
            inside.append(line)
        before = line
    assert inside is None, f"{page} has a code block without an end"
    return found


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of all links and pictures."""
    return _LINK.findall(prose(page))


def anchors(page: Path) -> set[str]:
    """The anchors that headings give."""
    headings = re.findall(r"^#+ (.*)$", prose(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
