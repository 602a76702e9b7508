"""``deltune merge`` with a strategy: deltas in folders become one delta in a folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import deltune as library
from deltune.checkpoints import read
from deltune.cli import main
from deltune.merging import merge_deltas
from tests.cli.conftest import Command, Ended, Place, write_csv
from tests.training import tiny


@pytest.fixture(scope="module")
def runs(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas of three tasks; the second has three labels, and the third is an adapter."""
    folder = tmp_path_factory.mktemp("runs")
    rows = list(tiny.reviews(60, seed=4))
    topics = [{"text": row["text"], "label": ("a", "b", "c")[number % 3]} for number, row in enumerate(rows)]
    colours = write_csv(folder / "topics.csv", topics)
    for name, data, method in (
        ("reviews", place.train, ("--rank", 2)),
        ("topics", colours, ("--rank", 2)),
        ("again", place.test, ("--rank", 3, "--rank-stabilized")),
        ("adapter", place.train, ("--method", "sequential-adapter", "--width", 4)),
        ("other-adapter", place.test, ("--method", "sequential-adapter", "--width", 4)),
    ):
        with pytest.raises(SystemExit) as ended:
            main(
                [
                    *("tune", "--model", str(place.model), "--data", str(data), "--output", str(folder / name)),
                    *("--steps", "4", "--batch-size", "8", "--threads", "1", "--json", *map(str, method)),
                ]
            )
        assert ended.value.code == 0
    return folder


def refused(ended: Ended, *words: str) -> None:
    assert ended.status == 2
    assert all(word in ended.err for word in words), ended.err


def test_ties_of_tasks_with_other_labels(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    output = tmp_path / "all"
    deltas = [runs / name for name in ("reviews", "topics", "again")]
    ended = deltune("merge", *deltas, "--model", place.model, "--strategy", "ties", "--output", output)
    assert ended.status == 0, ended.err
    assert "Merged changes of weights of 1 reviews, 1 topics, 1 again (ties) into merged: diff-pruning(" in ended.out
    assert "Task heads are left out: choose one of them with heads" in ended.out
    assert sorted(item.name for item in output.iterdir()) == ["delta.safetensors", "deltune.json"]
    description, tensors = read(output)
    assert description["task"] is None
    assert description["head"] == []
    assert set(tensors) == {"entries.indices", "entries.values"}
    refused(deltune("eval", "--model", place.model, "--delta", output, "--data", place.test), "does not say for which")

    model = tiny.task().load_model(str(place.model))
    tuned = None
    for delta in deltas:
        tuned = library.load(model, delta, delta.name, head=False)
    assert tuned is not None
    merge_deltas(tuned, [delta.name for delta in deltas], strategy="ties")
    entries = dict(tuned.attachments["merged"].forms)["entries"]
    assert torch.equal(entries.get_parameter("values"), tensors["entries.values"])
    assert torch.equal(entries.get_buffer("indices"), tensors["entries.indices"])


def test_a_merged_delta_with_a_head_is_measured_and_folded_in(
    place: Place, runs: Path, deltune: Command, tmp_path: Path
) -> None:
    output, folder = tmp_path / "both", tmp_path / "model"
    options = ["--model", place.model, "--strategy", "linear", "--weights", "0.9,0.4", "--heads", runs / "topics"]
    ended = deltune("merge", runs / "reviews", runs / "topics", *options, "--output", output, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["method"] == "lora(rank=4, alpha=4.0)"
    assert ended.json["weights"] == [0.9, 0.4]
    assert ended.json["heads"] == "topics"
    assert ended.json["discarded"] is None
    assert not ended.json["left_out_heads"]
    measured = deltune("eval", "--model", place.model, "--delta", output, "--data", runs / "topics.csv", "--json")
    assert measured.status == 0, measured.err
    assert 0 <= measured.json["metrics"]["accuracy"] <= 1
    # one delta without a strategy is folded into its model, as an argument too
    ended = deltune("merge", output, "--model", place.model, "--output", folder, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["drift"]["relative"] < 1e-4
    assert (folder / "config.json").is_file()


def test_weights_one_and_zero_give_the_first_delta(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    deltas = [runs / "again", runs / "reviews"]
    options = ["--model", place.model, "--strategy", "linear", "--weights", "1,0", "--heads", "again"]
    assert deltune("merge", *deltas, *options, "--output", tmp_path / "one").status == 0
    (expected, tensors), (found, values) = read(runs / "again"), read(tmp_path / "one")
    assert found["method"] == expected["method"]
    assert found["task"] == expected["task"]
    assert values.keys() == tensors.keys()
    assert all(torch.equal(value, tensors[key]) for key, value in values.items())


def test_svd_says_what_it_has_lost(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    deltas = [runs / "reviews", runs / "again"]
    options = ["--model", place.model, "--strategy", "svd", "--rank", 1, "--heads", "average"]
    ended = deltune("merge", *deltas, *options, "--output", tmp_path / "small")
    assert ended.status == 0, ended.err
    assert "Compression has lost " in ended.out
    assert "Its task head is the average." in ended.out
    assert json.loads((tmp_path / "small" / "deltune.json").read_text())["method"]["rank"] == 1


def test_adapters_need_their_initial_values(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    deltas = [runs / "adapter", runs / "other-adapter"]
    options = ["--model", place.model, "--output", tmp_path / "out"]
    refused(deltune("merge", *deltas, *options, "--strategy", "ties"), "merged as a change from its initial value")
    assert deltune("merge", *deltas, *options, "--strategy", "linear").status == 0
    refused(deltune("merge", *deltas, *options, "--strategy", "linear"), "exists already", "--overwrite")
    with_initial = ["--strategy", "ties", "--initial", runs / "adapter", "--overwrite"]
    assert deltune("merge", *deltas, *options, *with_initial).status == 0


def test_what_makes_no_sense_is_refused(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    one, two = runs / "reviews", runs / "topics"
    options = ["--model", place.model, "--output", tmp_path / "out"]
    linear = [*options, "--strategy", "linear"]
    cases: list[tuple[list[object], str]] = [
        ([*options], "Name the folder of a delta"),
        ([one, two, *options], "2 deltas were given"),
        ([one, "--delta", two, *options], "2 deltas were given"),
        ([one, *options, "--density", 0.3], "--density is for merging deltas into a delta"),
        ([one, two, *linear, "--into", "original"], "--into says how a delta is folded into its model"),
        ([one, two, *linear, "--weights", "1,two"], "--weights are numbers joined by commas"),
        ([one, two, *linear, "--weights", "1"], "2 deltas but 1 weights"),
        ([one, one, *linear], "is named twice"),
        ([one, two, *linear, "--heads", runs / "topic"], "is none of the deltas"),
        ([one, two, *linear, "--heads", "average"], "does not fit this model"),
        ([one, two, *options, "--strategy", "tie"], "Did you mean 'ties'"),
        ([one, runs / "adapter", *linear], "means something else in"),
        ([one, runs / "nothing", *linear], "does not exist"),
    ]
    for given, words in cases:
        refused(deltune("merge", *given), words)
    assert not (tmp_path / "out").exists()


def test_overwriting_replaces_the_whole_folder(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    arguments = ("merge", runs / "reviews", runs / "foreign", "--model", place.model, "--strategy", "linear")
    output = tmp_path / "out"
    output.mkdir()
    (output / "adapter_config.json").write_text("{}")
    (output / "adapter_model.safetensors").touch()
    tuned = library.load(AutoModelForSequenceClassification.from_pretrained(place.model), runs / "again", head=False)
    tuned.save(runs / "foreign", format="peft")
    refused(deltune(*arguments, "--output", output), "exists already")
    ended = deltune(*arguments, "--output", output, "--overwrite")
    assert ended.status == 0, ended.err
    assert sorted(item.name for item in output.iterdir()) == ["delta.safetensors", "deltune.json"]
    assert "Task heads are left out" in ended.out
    (output / "notes.md").touch()
    refused(deltune(*arguments, "--output", output, "--overwrite"), "notes.md", "would be lost")


def test_folders_of_one_name_are_told_apart(place: Place, runs: Path, deltune: Command, tmp_path: Path) -> None:
    copies = [tmp_path / place_ / "half" for place_ in ("one", "two")]
    for copy, name in zip(copies, ("reviews", "again"), strict=True):
        copy.mkdir(parents=True)
        for file in ("delta.safetensors", "deltune.json"):
            (copy / file).write_bytes((runs / name / file).read_bytes())
    options = ["--model", place.model, "--strategy", "linear", "--heads", copies[1], "--output", tmp_path / "out"]
    ended = deltune("merge", *copies, *options, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["deltas"] == ["delta-half", "delta-half-2"]
    assert ended.json["heads"] == "delta-half-2"
