"""Every method's own file says all that its page needs, and the pages that are committed are those."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

from deltune.methods import Method
from deltune.methods.page import SECTIONS, TERMS, docstring_sections, own_methods, page, table, write_pages
from tests.cli.conftest import Command, deltune
from tests.docs import tables
from tests.docs.markdown import ROOT

__all__ = ["deltune"]

FOLDER = ROOT / "docs" / "methods"
methods = pytest.mark.parametrize("kind", own_methods(), ids=lambda kind: kind.name)


@methods
def test_the_docstring_has_all_sections(kind: type[Method]) -> None:
    lead, sections = docstring_sections(kind)
    assert lead
    assert tuple(sections) == SECTIONS
    assert all(sections.values())
    for title, names in (("Terms", TERMS), ("Cost", ("Parameters", "Memory", "Time", "Inference"))):
        assert tuple(re.findall(r"^([A-Z]\w+): ", sections[title], flags=re.MULTILINE)) == names
    assert kind.paper.arxiv in sections["Source"]
    assert str(kind.paper.year) in sections["Source"]


@methods
def test_the_example_runs_and_gives_what_it_says(kind: type[Method]) -> None:
    module = importlib.import_module(kind.__module__)
    tests = [
        test for test in doctest.DocTestFinder(recurse=False).find(kind, kind.name, module=module) if test.examples
    ]
    assert tests
    for test in tests:
        assert any(example.want for example in test.examples), "an example shows a result"
        outcome = doctest.DocTestRunner().run(test)
        assert outcome.failed == 0
    assert f"--method {kind.name}" in " ".join(docstring_sections(kind)[1]["Example"].split())


@methods
def test_the_page_says_everything(kind: type[Method]) -> None:
    text = page(kind)
    for row in kind.options():
        assert f"`--{row['name'].replace('_', '-')}`" in text
        assert row["help"] in text
    for word in (kind.name, f"deltune.{kind.__name__}", f"`{kind.learning_rate:g}`", kind.paper.title):
        assert word in text
    for term in (*TERMS, "Insertion"):
        assert f"- **{term}**: " in text
    assert "``" not in re.sub(r"^```\w*$", "", text, flags=re.MULTILINE)


def test_committed_pages_are_current(tmp_path: Path) -> None:
    others = [tmp_path / "README.md"]
    others[0].write_text((ROOT / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    write_pages(tmp_path / "docs" / "methods", others)
    advice = "run `make pages`, or python -m deltune.methods.page docs/methods README.md"
    written = {file.name: file.read_text(encoding="utf-8") for file in (tmp_path / "docs" / "methods").iterdir()}
    committed = {file.name: file.read_text(encoding="utf-8") for file in FOLDER.iterdir()}
    assert written == committed, advice
    assert others[0].read_text(encoding="utf-8") == (ROOT / "README.md").read_text(encoding="utf-8"), advice


def test_a_file_without_marks_is_refused(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("nothing")
    with pytest.raises(ValueError, match="no place for the table"):
        write_pages(tmp_path / "docs", [tmp_path / "README.md"])


def test_the_number_of_methods_is_written_too(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("has <!-- count -->7<!-- end count -->.\n<!-- methods --><!-- end methods -->")
    write_pages(tmp_path / "docs", [tmp_path / "README.md"])
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert text.startswith(f"has <!-- count -->{len(own_methods())}<!-- end count -->.\n")
    assert f"<!-- count -->{len(own_methods())}<!--" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_table_lists_every_method() -> None:
    lines = table(own_methods()).splitlines()
    assert len(lines) == 2 + len(own_methods())


@methods
def test_the_terminal_shows_the_page(kind: type[Method], deltune: Command) -> None:
    shown = " ".join(deltune("methods", kind.name).out.split())
    for title in ("When to use", "Cost", "In five terms", "Options", "Example", "Differs from the paper", "Source"):
        assert title in shown
    for row in kind.options():
        assert f"--{row['name'].replace('_', '-')}" in shown


def test_a_page_needs_no_sections() -> None:
    class Bare(own_methods()[0]):  # type: ignore[misc]
        """Does something."""

    text = page(Bare)
    assert "Does something." in text
    assert "## Options" in text
    assert "## Cost" not in text


def test_the_table_of_settings_is_current() -> None:
    assert tables.current() == tables.settings_table(), "run python -m tests.docs.tables"
