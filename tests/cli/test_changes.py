"""``deltune changes``, and the table and the picture that it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deltune.measure import site_picture, site_table
from tests.cli.conftest import Command, Place

CHANGES = {"encoder.0.attention.query.bias": 1e-3, "encoder.1.attention.query.bias": 3e-3, "encoder.1.ffn.up.bias": 0.5}


def test_the_table_has_means_of_what_is_there() -> None:
    mean = site_table(CHANGES, "change", "{:.1e}".format, "mean", lambda values: sum(values) / len(values))
    assert [line.split() for line in mean.splitlines()] == [
        ["layer", "attention.query.bias", "ffn.up.bias", "mean"],
        ["encoder.0", "1.0e-03", "1.0e-03"],
        ["encoder.1", "3.0e-03", "5.0e-01", "2.5e-01"],
        ["mean", "2.0e-03", "5.0e-01", "1.7e-01"],
    ]
    assert len({len(line) for line in mean.splitlines()}) == 1


def test_the_picture_shows_every_number(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    text = site_picture(CHANGES, "change", tmp_path / "one.svg", "of a test", "{:.1e}".format).read_text()
    for word in ("encoder.0", "ffn.up.bias", "of a test", ">5.0e-01<", ">1.0e-03<"):
        assert word in text
    with pytest.raises(ValueError, match="no numbers"):
        site_picture({}, "change", tmp_path / "none.svg")


def test_cells_of_the_picture_are_as_wide_as_their_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    widths = [
        float(re.findall(r'width="([\d.]+)pt"', picture.read_text())[0])
        for picture in (
            site_picture(CHANGES, "change", tmp_path / f"{name}.svg", "", write)
            for name, write in (("short", "{:.0f}".format), ("long", "{:.6e}".format))
        )
    ]
    layers = len({key.split(".")[1] for key in CHANGES if key.startswith("encoder.")})
    assert widths[1] - widths[0] > 72 * 0.3 * layers


def test_changes_of_a_run(place: Place, deltune: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    tuned = deltune(*place.tune(run, "--method", "u-bitfit(budget=0.1)", "--json"))
    assert tuned.status == 0, tuned.err
    ended = deltune("changes", run, "--model", place.model)
    assert ended.status == 0, ended.err
    assert "attention.value.bias" in ended.out
    assert ended.out.splitlines()[0].split()[-1] == "mean"

    counted = deltune("changes", run, "--model", place.model, "--count", "--json").json
    # 2 layers of 9 biases each, 16 entries in all but one of 16; embeddings and pooler
    assert counted["entries"] == sum(counted["parameters"].values())
    assert 0 < counted["entries"] <= 32
    pytest.importorskip("matplotlib")
    drawn = deltune("changes", run, "--model", place.model, "--picture", tmp_path / "changes.svg")
    assert drawn.status == 0, drawn.err
    assert (tmp_path / "changes.svg").exists()
    wrong = deltune("changes", run, "--model", place.model, "--picture", tmp_path / "changes.txt")
    assert wrong.status == 2
    assert ".svg, .png, .pdf" in wrong.err


def test_a_delta_beside_the_model_is_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert deltune(*place.tune(run, "--method", "prefix-tuning(length=2)", "--json")).status == 0
    ended = deltune("changes", run, "--model", place.model)
    assert ended.status == 2
    assert "not a change of weights" in ended.err
