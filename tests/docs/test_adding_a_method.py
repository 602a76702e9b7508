"""The method of docs/adding_a_method.md: one file, and everything else follows without any other edit."""

from __future__ import annotations

import doctest
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import deltune
from deltune.methods import Method
from deltune.methods.page import SECTIONS, docstring_sections, page
from tests.docs.markdown import ROOT, blocks
from tests.laws import test_files as files
from tests.laws import test_unchanged as unchanged
from tests.laws.cases import METHODS, Case
from tests.zoo import ARCHITECTURES

PAGE = ROOT / "docs" / "adding_a_method.md"
SMALL = "vera(rank=5, targets='attention.* ffn.*')"


def write_file(folder: Path) -> Path:
    """The first block of the page, as a file."""
    file = folder / "vera.py"
    file.write_text(next(block.text for block in blocks(PAGE) if block.language == "python"), encoding="utf-8")
    return file


def import_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Run the file, which registers its method in this process."""
    found = importlib.util.spec_from_file_location("vera_of_the_page", file)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    found.loader.exec_module(module)
    return module


@pytest.fixture
def vera(own_registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    """Registered in this process by ``deltune.register``, for the time of the test."""
    module = import_file(write_file(tmp_path), monkeypatch)
    monkeypatch.setitem(METHODS, "vera", SMALL)
    kind: type[Method] = vars(module)["VeRA"]
    return kind


@pytest.mark.usefixtures("vera")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5"])
class TestLaws:
    def test_1_unchanged_at_the_start(self, name: str) -> None:
        unchanged.test_freshly_attached_changes_nothing(Case("vera", ARCHITECTURES[name]))

    def test_2_disabled_and_detached_are_the_bare_model(self, name: str) -> None:
        unchanged.test_disabled_and_detached_are_the_bare_model(Case("vera", ARCHITECTURES[name]))

    def test_3_only_the_trainable_part_moves(self, name: str) -> None:
        unchanged.test_only_the_trainable_part_moves(Case("vera", ARCHITECTURES[name]))

    def test_6_merging(self, name: str) -> None:
        files.test_merged_equals_unmerged_and_comes_apart_exactly(Case("vera", ARCHITECTURES[name]))

    def test_7_saving(self, name: str, tmp_path: Path) -> None:
        files.test_saved_and_loaded_into_a_fresh_model(Case("vera", ARCHITECTURES[name]), tmp_path)


def test_the_form_is_the_formula(vera: type[Method]) -> None:
    """Against the formula written out entry by entry."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.map = torch.nn.Linear(4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x)  # type: ignore[no-any-return]

    model = Network()
    bare = [parameter.detach().clone() for parameter in model.parameters()]
    tuned = deltune.attach(model, vera.from_options({"rank": 2, "targets": "map", "seed": 7}))
    form = tuned.attachments["default"].forms["map"]
    generator = torch.Generator().manual_seed(7)
    a = torch.randn(2, 4, generator=generator) / 2
    b = torch.randn(3, 2, generator=generator) / 2**0.5
    trained = torch.tensor([1.0, -2.0, 3.0])
    with torch.no_grad():
        form.get_parameter("b").copy_(trained)
    x = torch.randn(5, 4)
    expected = torch.empty(5, 3)
    for row in range(5):
        for out in range(3):
            expected[row, out] = bare[0][out] @ x[row] + bare[1][out]
            for place in range(2):
                expected[row, out] += trained[out] * b[out, place] * 0.1 * (a[place] @ x[row])
    assert torch.allclose(model(x), expected, atol=1e-6)
    assert tuned.summary().parameters == 2 + 3


def test_it_has_a_page(vera: type[Method]) -> None:
    assert tuple(docstring_sections(vera)[1]) == SECTIONS
    text = page(vera)
    assert "`--rank`" in text
    assert "random, equal for all matrices" in text
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(vera, "vera", globs={}) if test.examples]
    assert tests
    assert all(doctest.DocTestRunner().run(test).failed == 0 for test in tests)


def test_a_second_method_of_that_name_is_refused(vera: type[Method]) -> None:
    other = type("Other", (vera,), {"name": "vera"})
    with pytest.raises(ValueError, match="Two methods are named 'vera'"):
        deltune.register(other)


_SCRIPT = """
import json, sys
from deltune.cli import main

for words in json.loads(sys.argv[1]):
    print("$", *words)
    try:
        main(words)
    except SystemExit as ended:
        if ended.code:
            raise
"""


def run(file: Path, folder: Path, *commands: list[str]) -> list[str]:
    """What commands print in a process of their own, which knows the file by the environment alone."""
    environment = {**os.environ, "DELTUNE_METHODS": str(file), "PYTHONPATH": str(ROOT / "src"), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(commands)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [printed.partition("\n")[2] for printed in f"\n{done.stdout}".split("\n$ ")[1:]]


def test_the_command_line_knows_it(here: Path) -> None:
    """It is listed, has a page, is tuned, predicts and is merged."""
    model, data = "--model models/encoder", "--data data/reviews.csv"
    commands = [
        "methods vera --json",
        "methods --json",
        "methods vera",
        f"tune {model} {data} --evaluation 0.2 --method vera --rank 4 --steps 3 --threads 1 --output runs/vera --json",
        f"predict {model} --delta runs/vera --text film",
        f"merge {model} --delta runs/vera --output merged --json",
    ]
    printed = run(write_file(here), here, *(command.split() for command in commands))
    described, listed, shown, tuned, predicted, merged = printed
    row = json.loads(described)
    assert row["class"] == "VeRA"
    assert [option["name"] for option in row["options"]] == ["rank", "start", "seed", "targets"]
    assert row in json.loads(listed)
    assert "Vector-based random matrix adaptation" in shown
    assert "--rank" in shown
    result = json.loads(tuned)
    assert result["provenance"]["method"]["rank"] == 4
    # two layers, query and value of 16 each, and the head
    assert result["parameters"]["trainable"] - result["parameters"]["head"] == 2 * 2 * (4 + 16)
    assert json.loads(predicted)["label"] in ("negative", "positive")
    assert json.loads(merged)["drift"]["relative"] < 1e-4


def test_it_is_compared(here: Path) -> None:
    command = "compare --model models/encoder --data data/reviews.csv --output runs/all --methods vera(rank=4)"
    run(write_file(here), here, f"{command} --seeds 0 --steps 2 --evaluation-size 20".split())
    rows = [json.loads(line) for line in (here / "runs" / "all" / "results.jsonl").read_text().splitlines()]
    done = {row["row"]: row["status"] for row in rows}
    assert done == {"majority": "done", "linear-head": "done", "vera(rank=4)": "done"}
