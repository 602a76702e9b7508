"""Every command line of the documentation is one that exists, with options that exist."""

from __future__ import annotations

import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from deltune.backbone import Targets
from deltune.cli import build, main
from deltune.cli.request import TuneRequest
from deltune.methods import get, parse
from examples import assets
from tests.docs.markdown import PAGES, ROOT, Block, blocks

pytestmark = pytest.mark.usefixtures("own_registry")


def commands(block: Block) -> Iterator[list[str]]:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def lines(program: str) -> list[Any]:
    return [
        pytest.param(words, id=f"{page.stem}-{block.line}-{number}")
        for page in PAGES
        for block in blocks(page)
        if block.language == "bash"
        for number, words in enumerate(commands(block))
        if words[0] == program
    ]


class Reached(Exception):  # noqa: N818
    """The command has read all that it was given, and would begin."""


def check(words: list[str]) -> None:
    """Read the words after ``deltune`` as the command line does, and stop before anything is done.

    Raises:
        SystemExit, or an error of the parser: if a command, an option, a method or a value does not exist.
    """
    places = {"tune": ("deltune.cli.tune", "_run"), "compare": ("deltune.compare.engine", "run_comparison")}
    if words[0] in places and "--config" not in words:
        module, function = places[words[0]]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(importlib.import_module(module), function, reached)
            with pytest.raises(Reached):
                main(words)
        return
    group: Any = typer.main.get_command(build())
    command = group.commands.get(words[0])
    assert command is not None, f"there is no command {words[0]}"
    given = command.make_context(words[0], words[1:]).params
    if words[0] == "methods" and given["name"]:
        # with --unified also methods with options, and sums
        (parse if given["unified"] else get)(given["name"])
    if words[0] == "sites" and given["targets"]:
        Targets.parse(given["targets"])


def reached(*given: Any, **named: Any) -> None:
    raise Reached


@pytest.fixture
def toy(own_registry: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The method of the page about adding one, which its command lines name."""
    from tests.docs.test_adding_a_method import import_file, write_file

    import_file(write_file(tmp_path), monkeypatch)


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize("words", lines("deltune"))
def test_deltune_lines_parse(words: list[str]) -> None:
    if words[1] == "methods" and words[2:] == ["NAME"]:
        pytest.skip("a placeholder")
    check(words[1:])


@pytest.mark.parametrize(
    "words",
    [
        ["tune", "--model", "m", "--data", "d.csv", "--output", "o", "--rnak", "3"],
        ["tune", "--model", "m", "--data", "d.csv", "--output", "o", "--rank", "0"],
        ["compare", "--model", "m", "--data", "d.csv", "--output", "o", "--methods", "lorra", "--steps", "3"],
    ],
)
def test_the_check_refuses_what_does_not_exist(words: list[str]) -> None:
    with pytest.raises(SystemExit):
        check(words)


@pytest.mark.parametrize("words", lines("python"))
def test_python_lines_name_what_exists(words: list[str]) -> None:
    assert words[1] == "-m", "modules of this project run with python -m"
    module, rest = words[2], words[3:]
    parts = module.split(".")
    folder = ROOT if parts[0] in ("examples", "benchmarks") else ROOT / "src"
    path = folder.joinpath(*parts)
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    if module == "examples.assets":
        assert set(rest) <= set(assets.names())
    elif module == "examples.demo":
        check(["compare", "--model", "m", "--data", "d.csv", *rest, "--seeds", "0", "--steps", "1"])
    elif parts[0] == "examples":
        from examples.inputs import options

        options("", rest)


@pytest.mark.parametrize("words", lines("make"))
def test_make_lines_name_what_exists(words: list[str]) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(words[1:]) <= set(targets)


def test_yaml_blocks_are_configurations() -> None:
    found = [block for page in PAGES for block in blocks(page) if block.language == "yaml"]
    assert found
    for block in found:
        request = TuneRequest.of(yaml.safe_load(block.text))
        assert request.method == parse("lora(rank=8)")


def test_there_are_lines_to_check() -> None:
    assert len(lines("deltune")) > 20
    assert {words.values[0][1] for words in lines("deltune")} == {
        *("tune", "compare", "eval", "predict", "merge", "ranks", "changes", "gates", "methods", "sites")
    }
