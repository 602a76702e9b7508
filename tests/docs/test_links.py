"""Links lead somewhere, and names of methods and classes exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import deltune
from deltune.methods import get
from tests.docs.markdown import PAGES, ROOT, anchors, links, prose

_RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}$|github\.com/[\w-]+/[\w-]+$)", link), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if _RESULTS in target.parents and not _RESULTS.exists():
            continue  # measured results come with a run of the demo
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_are_named_exist(page: Path) -> None:
    for name in re.findall(r"`((?:src|tests|docs|examples|benchmarks)/[\w/.-]+)`", prose(page)):
        assert (ROOT / name).exists(), name


def test_every_page_can_be_reached_from_the_front() -> None:
    seen: set[Path] = set()
    waiting = [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        if page in seen or not page.is_file():
            continue
        seen.add(page)
        local = [link.partition("#")[0] for link in links(page) if not link.startswith("https://")]
        waiting += [(page.parent / link).resolve() for link in local if link.endswith(".md")]
    assert set(PAGES) <= seen


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_names_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bdeltune\.([A-Za-z]\w*)\(", text):
        assert getattr(deltune, name), name
    for name in re.findall(r"methods/([a-z][a-z-]+)\.md", text):
        assert get(name).name == name


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    package = ROOT / "src" / "deltune"
    rows = re.findall(r"^\| (`[^|]+`) \| ", text.split("## Files")[1].split("## ")[0], flags=re.MULTILINE)
    assert len(rows) > 15
    for row in rows:
        names = re.findall(r"`([^`]+)`", row)
        folder = names[0].rpartition("/")[0]
        for name in names:
            assert (package / name).exists() or (package / folder / name).exists(), name


def test_no_paths_of_one_machine() -> None:
    for page in PAGES:
        assert not re.search(r"(?<![\w.])/(home|root|work|tmp|Users)/", page.read_text(encoding="utf-8")), page
