"""Every Python block of the documentation runs; the blocks of a page share their names, from top to bottom."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.markdown import PAGES, ROOT, blocks


def with_code(page: Path) -> bool:
    return any(block.language == "python" and not block.not_run for block in blocks(page))


@pytest.mark.usefixtures("here", "own_registry")
@pytest.mark.parametrize("page", [page for page in PAGES if with_code(page)], ids=lambda page: page.stem)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # annotations of classes are looked up there
    for block in blocks(page):
        if block.language == "python" and not block.not_run:
            # empty lines in front, so that a traceback shows the line of the page
            source = "\n" * (block.line - 1) + block.text
            exec(compile(source, str(page), "exec"), vars(module))


def test_languages_are_those_that_are_checked() -> None:
    for page in PAGES:
        for block in blocks(page):
            assert block.language in ("python", "bash", "text", "yaml"), f"{page.relative_to(ROOT)}:{block.line}"


def test_blocks_that_are_not_run_still_compile() -> None:
    for page in PAGES:
        for block in blocks(page):
            if block.not_run and block.language == "python":
                compile(block.text, str(page), "exec")
