from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from deltune.compare import pictures, write_report
from tests.compare.samples import failed, finished, outcome, usual_results

VOID = {"meta", "br", "wbr", "link", "img", "input", "hr"}


class Reader(HTMLParser):
    """Collects elements, text and attributes, and checks that what is opened is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def read(html: str) -> Reader:
    reader = Reader()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    return reader


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    return write_report(outcome(usual_results()), folder)


def test_the_page_needs_nothing_else(written):
    html = written.html.read_text(encoding="utf-8")
    assert not re.findall(r"https?://", html)
    assert "@import" not in html
    assert all(address.startswith("#") for address in re.findall(r"url\(['\"]?([^)'\"]*)", html))
    reader = read(html)
    assert not {"link", "img", "iframe", "object", "embed"} & set(reader.tags)
    assert "src" not in {name for name, _ in reader.attributes}
    assert "default-src 'none'" in html


def test_the_page_shows_every_row_and_both_pictures(written):
    reader = read(written.html.read_text(encoding="utf-8"))
    assert written.pictures
    assert reader.tags.count("svg") == 4  # two pictures, wide and narrow
    for text in ("lora(rank=8)", "bitfit", "full", "prompt-tuning", "majority", "linear-head", "lora(rank=2)"):
        assert text in reader.text
    for text in ("84.0 ± 1.0 %", "22 M", "too big", "the loss is not a number", "95 % interval", "SHA-256"):
        assert text in reader.text
    assert "18 of" not in reader.text
    assert "2 failed" in reader.text


def test_identifiers_are_used_once(written):
    reader = read(written.html.read_text(encoding="utf-8"))
    for picture in written.html.read_text(encoding="utf-8").split("<svg")[1:]:
        identifiers = re.findall(r' id="([^"]+)"', picture.split("</svg>")[0])
        assert len(identifiers) == len(set(identifiers))
    assert "main" in reader.tags


def test_pictures_take_their_colours_from_the_page(written):
    html = written.html.read_text(encoding="utf-8")
    pictures_only = "".join(part.split("</svg>")[0] for part in html.split("<svg")[1:])
    assert not re.findall(r"#[0-9a-fA-F]{6}\b", pictures_only)
    assert "var(--accent)" in pictures_only


def test_everything_from_outside_is_escaped(tmp_path):
    hostile = "<script>alert('x')</script>"
    results = [
        *usual_results(),
        finished(f"lora{hostile}", 0, 0.7, 10, command=hostile),
        failed(f"bad{hostile}", 0, hostile),
    ]
    files = write_report(outcome(results, model=f"m{hostile}", data=f'd"{hostile}'), tmp_path)
    html = files.html.read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert read(html).tags.count("script") == 1


def test_without_matplotlib_everything_else_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "pictures_available", lambda: False)
    files = write_report(outcome(usual_results()), tmp_path)
    assert not files.pictures
    html = files.html.read_text(encoding="utf-8")
    assert "<svg" not in html
    assert "lora(rank=8)" in html
    assert files.markdown.read_text(encoding="utf-8").startswith("# 5 methods on tiny")
    assert files.csv.exists()


def test_only_failures_still_make_a_report(tmp_path):
    files = write_report(outcome([failed("bitfit", 0, "too big"), finished("majority", 0, 0.5, 0)]), tmp_path)
    assert "too big" in files.html.read_text(encoding="utf-8")
    assert "**bitfit** failed: too big" in files.markdown.read_text(encoding="utf-8")


def test_one_seed_and_one_method(tmp_path):
    files = write_report(outcome([finished("majority", 0, 0.5, 0), finished("lora", 0, 0.8, 10)]), tmp_path)
    text = read(files.html.read_text(encoding="utf-8")).text
    assert "1 method on tiny" in text
    assert "There is one seed" in text


def test_the_same_results_give_the_same_page(tmp_path):
    results = usual_results()
    pages = [
        write_report(outcome(results), tmp_path / name).html.read_text(encoding="utf-8") for name in ("one", "two")
    ]
    assert pages[0] == pages[1]


def test_markdown_has_table_failures_and_command(written):
    text = written.markdown.read_text(encoding="utf-8")
    assert "| lora(rank=8) | 84.0 ± 1.0 % | 74 K |" in text
    assert "- **prompt-tuning** failed: the loss is not a number" in text
    assert "```sh\ndeltune compare --model models/tiny" in text
