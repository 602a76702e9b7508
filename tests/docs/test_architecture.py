"""The floors of docs/architecture.md are those of the code: each uses what stands below it, never above."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.docs.markdown import ROOT, blocks

PACKAGE = ROOT / "src" / "deltune"


def floors() -> dict[str, int]:
    """Height of each module or package, as the page draws it: the last line is the ground.

    What stands on one line, or beside the tower, must not use each other.
    """
    page = ROOT / "docs" / "architecture.md"
    (drawing,) = [block.text for block in blocks(page) if block.language == "text" and "cli/" in block.text]
    lines = [
        re.findall(r"\b([a-z_]+)(?:/|\.py)", line.split("   ")[0].strip() or line) for line in drawing.splitlines()
    ]
    heights = {}
    for height, names in enumerate(reversed([names for names in lines if names])):
        heights.update(dict.fromkeys(names, height))
    return heights


def uses(file: Path) -> set[str]:
    """The modules and packages right below ``deltune`` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [node.module]
        found.update(name.split(".")[1] for name in names if name.startswith("deltune."))
    return found


def owner(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if owner(file) != "__init__"]


def test_every_part_has_a_floor() -> None:
    assert floors().keys() == {owner(file) for file in FILES}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(PACKAGE).as_posix())
def test_nothing_uses_what_stands_above_it(file: Path) -> None:
    heights = floors()
    mine = owner(file)
    for used in uses(file) - {mine}:
        assert heights[used] < heights[mine], f"{mine} uses {used}"


def test_a_form_of_a_method_touches_no_module_of_a_model() -> None:
    for file in (PACKAGE / "methods").rglob("*.py"):
        assert not re.search(r"register_\w*hook", file.read_text(encoding="utf-8")), file
