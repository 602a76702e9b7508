"""Every wrong input ends with exit status 2 and a message that says what to do; no traceback."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.conftest import Command, Ended, Place, write_csv


def refused(ended: Ended, *words: str) -> None:
    assert ended.status == 2, ended
    assert "Traceback" not in ended.err
    for word in words:
        assert word in ended.err, ended.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--method", "lorra"], ["no method 'lorra'", "Did you mean 'lora'", "deltune methods"]),
        (["--rnk", 4], ["no option --rnk", "Did you mean 'rank'", "deltune methods lora"]),
        (["--method", "lora(rnk=4)"], ["no option 'rnk'", "Did you mean 'rank'"]),
        (["--epoch", 4], ["--epoch", "'epochs'"]),
        (["--targets", "attention.quary"], ["attention.quary", "attention.query"]),
        (["--targets", "no.such.module.*"], ["no.such.module"]),
        (["--rank", 0], ["rank must be at least 1, not 0"]),
        (["--rank", 99], ["Rank 99 exceeds", "at most 16"]),
        (["--rank", "many"], ["rank must be a whole number, not 'many'"]),
        (["--rank", 4, "--method", "lora(rank=2)"], ["rank is given twice"]),
        (["--rank", 4, "--method", "lora+bitfit"], ["lora(rank=...) + bitfit"]),
        (["stray"], ["'stray' belongs to no option"]),
        (["--learning-rate", "fast"], ["learning_rate must be a number", "'fast'"]),
        (["--batch-size", 0], ["batch_size must be at least 1"]),
        (["--text", "sentence"], ["column 'sentence'", "Columns present: text, label"]),
        (["--label", "lable"], ["column 'lable'", "Did you mean 'label'"]),
        (["--task", "classification"], ["no task 'classification'", "text-classification"]),
        (["--data", "missing.csv"], ["no file missing.csv"]),
        (["--model", "no-such-folder"], ["No tokenizer can be loaded from 'no-such-folder'", "Give a folder"]),
        (["--max-length", 2], ["max_length 2 leaves no room for text"]),
        (["--config", "missing.yaml"], ["missing.yaml cannot be read"]),
        (["--evaluation", 1.5], ["a share between 0 and 1"]),
        (["--device", "mps"], ["no device 'mps' here", "cpu"]),
        (["--device", "gpu"], ["Choose cpu, cuda or mps"]),
        (["--limit", "few"], ["--limit must be a whole number"]),
        (["--model-dropout", "few"], ["--model-dropout must be a number"]),
        (["--model-dropout", 1.5], ["at least 0 and less than 1, not 1.5"]),
        (
            ["--method", "full", "--learning-rate", 1e30, "--schedule", "constant", "--warmup-ratio", 0],
            ["learning rate", "last good training checkpoint is kept"],
        ),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) and str(value[0]).startswith("-") else "",
)
def test_tune_refuses(options: list[object], words: list[str], place: Place, deltune: Command, tmp_path: Path) -> None:
    refused(deltune(*place.tune(tmp_path / "out", *options)), *words)


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("lora", ["below which no layer is frozen", "attention.* layers=4:"]),
        ("freeze(layers=1)", ["embeddings.dropout drops values", "--model-dropout 0"]),
    ],
)
def test_states_that_cannot_be_kept(
    method: str, words: list[str], place: Place, deltune: Command, tmp_path: Path
) -> None:
    options = ("--method", method, "--frozen-states", tmp_path / "states")
    refused(deltune(*place.tune(tmp_path / "out", *options)), *words)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([{"text": "good", "label": "a"}, {"text": "bad", "label": "a"}], ["same class 'a'", "at least two classes"]),
        ([{"text": "good", "label": "a"}, {"text": " ", "label": "b"}], ["row 2", "gives no tokens"]),
        (
            [{"text": "good", "label": "positive"}, {"text": "\u200b", "label": "negative"}],
            ["row 2", "no tokens", "Remove the row"],
        ),
        ([{"text": "good", "label": "a"}, {"text": "bad", "label": ""}], ["Row 2 has no label"]),
        ([{"words": "good", "label": "a"}, {"words": "bad", "label": "b"}], ["column 'text'", "words, label"]),
    ],
    ids=["one class", "blank text", "text of no tokens", "no label", "missing column"],
)
def test_tune_refuses_data(
    rows: list[dict[str, str]], words: list[str], place: Place, deltune: Command, tmp_path: Path
) -> None:
    data = write_csv(tmp_path / "data.csv", rows)
    refused(deltune(*place.tune(tmp_path / "out", "--data", data)), *words)


def test_tune_refuses_an_empty_file(place: Place, deltune: Command, tmp_path: Path) -> None:
    (tmp_path / "empty.csv").write_text("")
    refused(deltune(*place.tune(tmp_path / "out", "--data", tmp_path / "empty.csv")), "empty")
    (tmp_path / "header.csv").write_text("text,label\n")
    refused(deltune(*place.tune(tmp_path / "out", "--data", tmp_path / "header.csv")), "no rows")


@pytest.mark.parametrize("label", ["3", "neutral"])
def test_tune_refuses_labels_out_of_range(label: str, place: Place, deltune: Command, tmp_path: Path) -> None:
    rows = [{"text": "good", "label": "0"}, {"text": "bad", "label": "1"}]
    train = write_csv(tmp_path / "train.csv", rows)
    test = write_csv(tmp_path / "test.csv", [*rows, {"text": "fine", "label": label}])
    ended = deltune(*place.tune(tmp_path / "out", "--data", train, "--evaluation", test))
    refused(ended, "Row 3", label, "out of range" if label == "3" else "not one of the classes")


def test_a_configuration_with_unknown_names_is_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("learning_rat: 1\n")
    refused(deltune(*place.tune(tmp_path, "--config", file)), "learning_rat", "learning_rate")
    file.write_text("- a\n- b\n")
    refused(deltune(*place.tune(tmp_path, "--config", file)), "must hold lines like")
    file.write_text("a: [\n")
    refused(deltune(*place.tune(tmp_path, "--config", file)), "not valid YAML")


def test_needed_options_are_asked_for(deltune: Command) -> None:
    refused(deltune("tune"), "Say --model")


def test_another_run_in_the_folder_is_refused(place: Place, delta: Path, deltune: Command) -> None:
    ended = deltune(*place.tune(delta, "--rank", 3))
    refused(ended, "method.rank was 2 and is 3 now", "--restart")


def test_a_delta_of_another_model_is_refused(place: Place, delta: Path, deltune: Command) -> None:
    for command in (["eval", "--data", place.test], ["predict", "--text", "good"], ["merge", "--output", "x"]):
        ended = deltune(*command, "--model", place.other_model, "--delta", delta)
        refused(ended, "trained on another bert", "Load the model that it was trained on")


def test_a_truncated_delta_is_refused(place: Place, delta: Path, deltune: Command, tmp_path: Path) -> None:
    copy = shutil.copytree(delta, tmp_path / "copy")
    file = copy / "delta.safetensors"
    for size in (file.stat().st_size - 10, 100, 0):
        file.write_bytes((delta / "delta.safetensors").read_bytes()[:size])
        ended = deltune("eval", "--model", place.model, "--delta", copy, "--data", place.test)
        refused(ended, "damaged or cut short", "copy it again")
    ended = deltune(*place.tune(copy, "--rank", 2))
    refused(ended, "damaged")


def test_a_folder_without_a_delta_is_refused(place: Place, delta: Path, deltune: Command) -> None:
    ended = deltune("eval", "--model", place.model, "--delta", f"{delta}s", "--data", place.test)
    refused(ended, "does not exist", "Did you mean delta")


def test_merging_what_cannot_be_merged_is_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    assert deltune(*place.tune(tmp_path / "out", "--method", "prefix-tuning(length=2)")).status == 0
    ended = deltune("merge", "--model", place.model, "--delta", tmp_path / "out", "--output", tmp_path / "merged")
    refused(ended, "cannot be merged")
    assert not (tmp_path / "merged").exists()


def test_sites_refuses(place: Place, deltune: Command, tmp_path: Path) -> None:
    refused(deltune("sites", tmp_path), "No model configuration", "config.json")
    refused(deltune("sites", place.model, "--targets", "attention.quary"), "attention.query")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for almost nothing."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs the rights of root")
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told(place: Place, deltune: Command, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(150_000))
    arguments = place.tune(small_disk / "out", "--method", "prefix-tuning(length=8)", "--save-every", 1)
    ended = deltune(*arguments)
    refused(ended, "the disk is full", "Free some space", "run the same command again")
    assert not list((small_disk / "out").rglob("*.part"))
    (small_disk / "ballast").unlink()
    again = deltune(*arguments, "--method", "lora(rank=2)", "--restart")
    assert again.status == 0, again.err


def test_merging_on_a_full_disk_is_told(place: Place, delta: Path, deltune: Command, small_disk: Path) -> None:
    (small_disk / "ballast").write_bytes(bytes(190_000))
    ended = deltune("merge", "--model", place.model, "--delta", delta, "--output", small_disk / "merged")
    refused(ended, "the disk is full", "choose another folder")
    assert [item.name for item in small_disk.iterdir()] == ["ballast"]
