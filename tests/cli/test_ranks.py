"""``deltune ranks``, and the table and the picture that it shows."""

from __future__ import annotations

from pathlib import Path

import pytest

from deltune.measure import rank_picture, rank_table
from tests.cli.conftest import Command, Place

RANKS = {
    "encoder.0.attention.query": 1,
    "encoder.0.ffn.up": 4,
    "encoder.1.attention.query": 12,
    "encoder.1.attention.value": 0,
    "encoder.1.ffn.up": 3,
}


def test_the_table_has_layers_kinds_and_sums() -> None:
    assert rank_table(RANKS).splitlines() == [
        "layer      attention.query  attention.value  ffn.up    sum",
        "encoder.0                1                        4      5",
        "encoder.1               12                0       3     15",
        "sum                     13                0       7     20",
    ]


def test_the_picture_shows_every_rank_and_is_the_same_file_each_time(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    first = rank_picture(RANKS, tmp_path / "one.svg", "of a test").read_bytes()
    assert rank_picture(RANKS, tmp_path / "two.svg", "of a test").read_bytes() == first
    text = first.decode()
    for word in ("encoder.0", "attention.value", "of a test", ">12<", ">0<"):
        assert word in text


def test_the_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="no ranks"):
        rank_picture({}, tmp_path / "none.svg")


def test_ranks_of_a_run(place: Place, deltune: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pattern = "attention.value -> 3"
    tuned = deltune(*place.tune(run, "--method", f"lora(rank=2, rank_pattern={pattern}) + bitfit", "--json"))
    assert tuned.status == 0, tuned.err

    ended = deltune("ranks", run)
    assert ended.status == 0, ended.err
    assert "attention.query" in ended.out

    found = deltune("ranks", run, "--json").json["ranks"]
    assert {key.rpartition(".")[2]: rank for key, rank in found.items()} == {"query": 2, "value": 3}
    assert len(found) == 4


def test_ranks_are_drawn(place: Place, deltune: Command, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = tmp_path / "run"
    assert deltune(*place.tune(run, "--method", "lora", "--rank", 2)).status == 0
    ended = deltune("ranks", run, "--picture", tmp_path / "ranks.png")
    assert ended.status == 0, ended.err
    assert (tmp_path / "ranks.png").stat().st_size > 1000
    refused = deltune("ranks", run, "--picture", tmp_path / "ranks.doc")
    assert refused.status == 2
    assert ".svg" in refused.err
    refused = deltune("ranks", run, "--picture", tmp_path / "absent" / "ranks.svg")
    assert refused.status == 2
    assert "another place" in refused.err


def test_a_method_without_ranks_is_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert deltune(*place.tune(run, "--method", "krona")).status == 0
    ended = deltune("ranks", run)
    assert ended.status == 2
    assert "krona" in ended.err


def test_factors_of_other_methods_in_a_sum_are_no_ranks(place: Place, deltune: Command, tmp_path: Path) -> None:
    assert deltune(*place.tune(tmp_path, "--method", "krona + lora(rank=2)")).status == 0
    found = deltune("ranks", tmp_path, "--json").json["ranks"]
    assert set(found.values()) == {2}
    assert all(key.startswith("1.") for key in found)
