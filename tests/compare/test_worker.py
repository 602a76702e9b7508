from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from sklearn.dummy import DummyClassifier
from typer.testing import CliRunner

from deltune.checkpoints import TENSOR_FILE
from deltune.cli.compare import compare
from deltune.compare import worker
from deltune.compare.content import model_fingerprint, prepare_data
from deltune.compare.worker_job import Job
from deltune.errors import TrainingError


def run(comparison, row: str, folder: Path, seeds=(0,), keep: bool = False) -> list[dict]:
    events: list[dict] = []
    folders = {seed: str(folder / str(seed)) for seed in seeds}
    worker.run_job(Job(comparison.to_dict(), row, folders, 1, keep), events.append)
    return events


def test_majority_is_the_dummy_classifier(comparison, tmp_path):
    (_, done) = run(comparison, "majority", tmp_path)
    data = prepare_data(comparison)
    dummy = DummyClassifier(strategy="most_frequent").fit(data.train["text"], data.train["label"])
    expected = dummy.score(data.evaluation["text"], data.evaluation["label"])
    assert done["result"]["metrics"]["accuracy"] == pytest.approx(expected)
    assert done["result"]["parameters"]["trainable"] == 0


def test_a_run_says_what_it_measured(comparison, tmp_path):
    events = run(comparison, "lora(rank=2)", tmp_path, keep=True)
    assert [event["event"] for event in events[:1] + events[-1:]] == ["start", "done"]
    step = next(event for event in events if event["event"] == "step" and event["step"] == 4)
    assert step["total"] == 4
    result = events[-1]["result"]
    assert result["steps"] == 4
    assert result["examples"] == 32
    assert 0 <= result["metrics"]["accuracy"] <= 1
    assert result["parameters"]["head"] == 16 * 2 + 2
    # one layer, query and value: a rank-2 update of 16 x 16 each
    assert result["parameters"]["trainable"] == 34 + 2 * 2 * (16 + 16)
    assert result["checkpoint_bytes"] == (tmp_path / "0" / TENSOR_FILE).stat().st_size
    assert result["checkpoint_bytes"] >= 4 * result["parameters"]["trainable"]
    assert result["memory"]["peak"] >= result["memory"]["resident_baseline"] > 0
    # two moments of each value, and for each tensor its number of steps
    tensors = 2 * 2 + 2
    assert result["parameters"]["trainable_at_start"] == result["parameters"]["trainable"]
    assert result["memory"]["optimizer_state"] == 4 * (2 * result["parameters"]["trainable"] + tensors)
    assert result["settings"]["keep_best"] is False
    json.dumps(result)


def test_a_method_that_drops_what_it_trains_says_how_much_it_began_with(comparison, tmp_path):
    result = run(comparison, "diff-pruning(ratio=0.01)", tmp_path)[-1]["result"]
    parameters = result["parameters"]
    everything = parameters["model"] - parameters["head"]
    assert parameters["trainable"] == int(0.01 * everything) + parameters["head"]
    # a difference and a gate of each, and a gate of each tensor
    assert parameters["trainable_at_start"] > 2 * everything + parameters["head"]
    assert result["memory"]["optimizer_state"] > 4 * 2 * parameters["trainable_at_start"]


def test_the_same_seed_gives_the_same_result_and_another_does_not(comparison, tmp_path):
    first, second, other = (
        run(comparison, "bitfit", tmp_path / name, seeds=(seed,))[-1]["result"]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    losses = [[entry.get("loss") for entry in item["history"]] for item in (first, second, other)]
    assert first["metrics"] == second["metrics"]
    assert losses[0] == losses[1] != losses[2]


def test_all_methods_start_from_the_same_head(comparison, tmp_path, monkeypatch):
    heads = []

    def stop(tuned, *arguments, **options):
        heads.append(tuned.model.classifier.weight.detach().clone())
        raise TrainingError("seen enough")

    monkeypatch.setattr(worker, "fit", stop)
    for row in ("linear-head", "lora(rank=2)", "bitfit"):
        events = run(comparison, row, tmp_path, seeds=(0, 1))
        assert [event["event"] for event in events] == ["start", "failed"] * 2
        assert events[1]["error"] == "seen enough"
    assert all(torch.equal(heads[seed], heads[seed + 2 * row]) for row in (1, 2) for seed in (0, 1))
    assert not torch.equal(heads[0], heads[1])


def test_nothing_is_left_behind_unless_asked_for(comparison, tmp_path):
    run(comparison, "bitfit", tmp_path)
    assert not (tmp_path / "0").exists()


def test_a_method_that_does_not_fit_fails_alone(comparison, tmp_path):
    big = dataclasses.replace(comparison, methods=("lora(rank=4000)",))
    events = run(big, "lora(rank=4000)", tmp_path, seeds=(0, 1))
    assert [event["event"] for event in events] == ["start", "failed"] * 2
    assert "rank" in events[1]["error"]


def test_the_split_is_fixed_and_shares_no_text(comparison):
    data = prepare_data(comparison)
    again = prepare_data(dataclasses.replace(comparison, methods=("full",), seeds=(7,)))
    assert data.fingerprints() == again.fingerprints()
    assert (len(data.train), len(data.evaluation)) == (64, 40)
    assert not set(data.train["text"]) & set(data.evaluation["text"])
    share = [sum(part["label"]) / len(part) for part in (data.train, data.evaluation)]
    assert share[0] == pytest.approx(share[1], abs=0.03)


def test_a_model_is_known_by_its_content(files, tmp_path):
    original = model_fingerprint(str(files / "model"))
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (files / "model").iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    assert model_fingerprint(str(copy)) == original
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert model_fingerprint(str(copy)) != original
    assert model_fingerprint("organisation/model") != model_fingerprint("organisation/other")


def test_a_killed_run_goes_on_and_ends_in_the_same_numbers(comparison, tmp_path):
    long = dataclasses.replace(comparison, steps=300)
    whole = run(long, "bitfit", tmp_path / "whole")[-1]["result"]
    job = Job(long.to_dict(), "bitfit", {0: str(tmp_path / "killed" / "0")}, 1, False)
    (tmp_path / "job.json").write_text(job.to_json())
    process = subprocess.Popen(
        [sys.executable, "-m", "deltune.compare.worker", str(tmp_path / "job.json")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "step" and event["step"] >= 60:
            process.kill()
            break
    process.wait()
    assert list((tmp_path / "killed" / "0").rglob("checkpoint-*"))
    events = run(long, "bitfit", tmp_path / "killed")
    assert min(event["step"] for event in events if event["event"] == "step") >= 50
    assert events[-1]["result"]["metrics"] == whole["metrics"]


def test_the_command_from_end_to_end(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    app = typer.Typer()
    app.command()(compare)
    arguments = [
        *("--model", str(files / "model"), "--data", str(files / "reviews.csv"), "--output", str(tmp_path / "out")),
        *("--methods", "lora(rank=2, alpha=4)", "--method", "bitfit", "--seeds", "0,1", "--steps", "12"),
        *("--train-size", "64", "--evaluation-size", "40", "--batch-size", "8", "--jobs", "2"),
        *("--learning-rate", "lora(rank=2,alpha=4)=0.01"),
    ]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    for name in ("majority", "linear-head", "lora(rank=2, alpha=4.0)", "bitfit", "peak", "Report: "):
        assert name in result.output
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 7
    assert all(line["status"] == "done" for line in lines), [line.get("error") for line in lines]
    assert {line["provenance"]["versions"]["torch"] for line in lines if line["row"] == "bitfit"} == {torch.__version__}
    assert {line["settings"]["learning_rate"] for line in lines if line["row"].startswith("lora")} == {0.01}
    for name in ("report.html", "report.md", "results.csv"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert not re.search(r"https?://", (tmp_path / "out" / "report.html").read_text(encoding="utf-8"))
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert "7 runs had finished before" in again.output
