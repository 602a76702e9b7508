from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console

from deltune.compare import Comparison, run_comparison
from deltune.compare.display import Board
from deltune.compare.processes import Workers, file_name
from deltune.compare.worker_job import Job
from deltune.errors import DataError, DeltuneError, StateError

ALL = ["majority 0", *(f"{row} {seed}" for row in ("linear-head", "lora(rank=2)", "bitfit") for seed in (0, 1))]


def results_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_every_run_is_done_once(comparison, fake_workers, tmp_path):
    outcome = run_comparison(comparison, tmp_path / "out")
    assert fake_workers.calls() == ALL
    assert [f"{item['row']} {item['seed']}" for item in outcome.results] == ALL
    assert (outcome.repeated, outcome.others, outcome.interrupted) == (0, 0, False)
    line = results_of(tmp_path / "out")[-1]
    assert line["kind"] == "method"
    assert line["status"] == "done"
    assert line["data"]["train_examples"] == 64
    assert line["data"]["evaluation_examples"] == 40
    assert "--method bitfit" in line["command"]
    assert line["specification"]["learning_rate"] > 0
    again = run_comparison(comparison, tmp_path / "out")
    assert fake_workers.calls() == []
    assert again.repeated == len(ALL)
    assert again.results == outcome.results


def test_jobs_at_a_time_give_the_same_runs(comparison, fake_workers, tmp_path):
    outcome = run_comparison(comparison, tmp_path / "out", jobs=3)
    assert sorted(fake_workers.calls()) == sorted(ALL)
    assert [f"{item['row']} {item['seed']}" for item in outcome.results] == ALL
    assert {item["jobs"] for item in outcome.results} == {3}


def test_a_torn_result_is_done_again(comparison, fake_workers, tmp_path):
    run_comparison(comparison, tmp_path / "out")
    fake_workers.calls()
    file = tmp_path / "out" / "results.jsonl"
    file.write_bytes(file.read_bytes()[:-7])
    text = io.StringIO()
    outcome = run_comparison(comparison, tmp_path / "out", console=Console(file=text, width=200))
    assert fake_workers.calls() == ALL[-1:]
    assert len(outcome.results) == len(ALL)
    assert "was torn" in text.getvalue()


def test_failures_are_rows_and_are_tried_again(comparison, fake_workers, tmp_path):
    fake_workers.behave(FAIL="lora(rank=2)")
    outcome = run_comparison(comparison, tmp_path / "out")
    row = outcome.table.rows[-1]
    assert (row.name, row.done, row.error) == ("lora(rank=2)", False, "it did not fit")
    assert len(outcome.results) == len(ALL)
    fake_workers.calls()
    fake_workers.behave()
    outcome = run_comparison(comparison, tmp_path / "out")
    assert fake_workers.calls() == ["lora(rank=2) 0", "lora(rank=2) 1"]
    assert all(row.done and not row.failures for row in outcome.table.rows)


@pytest.mark.parametrize(("how", "message"), [("KILL", "signal SIGKILL"), ("CRASH", "no such luck")])
def test_a_process_that_dies_is_a_failure_of_all_its_runs(comparison, fake_workers, tmp_path, how, message):
    fake_workers.behave(**{how: "bitfit"})
    outcome = run_comparison(comparison, tmp_path / "out")
    row = outcome.table.rows[-1]
    assert row.name == "bitfit"
    assert len(row.failures) == 2
    assert message in row.error


def test_other_settings_in_the_same_folder_are_kept_apart(comparison, fake_workers, tmp_path):
    run_comparison(comparison, tmp_path / "out")
    fake_workers.calls()
    other = dataclasses.replace(comparison, learning_rates={"bitfit": 0.25}, methods=("bitfit", "full"))
    outcome = run_comparison(other, tmp_path / "out")
    assert fake_workers.calls() == ["bitfit 0", "bitfit 1", "full 0", "full 1"]
    assert outcome.repeated == 3
    assert outcome.others == 4
    assert {item["row"] for item in outcome.results} == {"majority", "linear-head", "bitfit", "full"}
    assert run_comparison(comparison, tmp_path / "out").repeated == len(ALL)


def test_two_comparisons_do_not_share_a_folder(comparison, fake_workers, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    (tmp_path / "out").mkdir()
    with (tmp_path / "out" / ".lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(StateError, match="Another comparison"):
            run_comparison(comparison, tmp_path / "out")
    assert fake_workers.calls() == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_size": 5000}, "5000 training examples are asked for, but there are only"),
        ({"data": "nowhere.csv"}, "no file"),
        ({"task_options": {"text": "sentence"}}, "sentence"),
        ({"model": "no/such/folder"}, "cannot be loaded|No tokenizer"),
    ],
)
def test_unusable_input_is_an_error_before_anything_runs(comparison, fake_workers, tmp_path, values, message):
    with pytest.raises(DeltuneError, match=message):
        run_comparison(dataclasses.replace(comparison, **values), tmp_path / "out")
    assert fake_workers.calls() == []


def test_separate_evaluation_data(comparison, files, fake_workers, tmp_path):
    separate = dataclasses.replace(comparison, evaluation_data=str(files / "reviews.csv"), train_size=None)
    outcome = run_comparison(separate, tmp_path / "out")
    assert (outcome.data["train_examples"], outcome.data["evaluation_examples"]) == (160, 40)


def test_texts_without_tokens_are_refused_at_once(comparison, fake_workers, tmp_path):
    data = tmp_path / "empty.csv"
    data.write_text("text,label\n" + "".join(f'"{"good" if row % 2 else ""}",{row % 2}\n' for row in range(40)))
    with pytest.raises(DataError):
        run_comparison(
            dataclasses.replace(comparison, data=str(data), train_size=None, evaluation_size=4), tmp_path / "out"
        )
    assert fake_workers.calls() == []


PROGRAM = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from deltune.compare import Comparison, processes, run_comparison
processes.WORKER_COMMAND = (sys.executable, sys.argv[2])
outcome = run_comparison(Comparison.from_dict(json.loads(sys.argv[1])), sys.argv[3])
print(outcome.interrupted, len(outcome.results))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sends POSIX signals")
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_stopping_keeps_what_is_done_and_leaves_no_process(comparison, fake_workers, tmp_path, sent):
    fake_workers.behave(HANG="lora(rank=2)")
    script = tmp_path / "fake_worker.py"
    out = tmp_path / "out"
    arguments = [json.dumps(comparison.to_dict()), str(script), str(out)]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, *arguments], stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out / "logs" / "lora_rank_2.json").exists():
        time.sleep(0.1)
    time.sleep(0.5)
    process.send_signal(sent)
    text, _ = process.communicate(timeout=30)
    assert text.split() == ["True", "3"]
    assert not _processes_with(str(script))
    fake_workers.calls()
    fake_workers.behave()
    outcome = run_comparison(comparison, out)
    assert outcome.repeated == 3
    assert fake_workers.calls() == ALL[3:]


def _processes_with(text: str) -> list[int]:
    psutil = pytest.importorskip("psutil")
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if text in " ".join(process.info["cmdline"] or ())
    ]


def test_workers_get_their_share_of_threads(fake_workers, tmp_path, monkeypatch):
    script = tmp_path / "threads.py"
    script.write_text("import json, os; print(json.dumps({'event': 'n', 'n': os.environ['OMP_NUM_THREADS']}))")
    monkeypatch.setattr("deltune.compare.processes.WORKER_COMMAND", (sys.executable, str(script)))
    workers = Workers([Job({}, "row", {}, threads=3)], 1, tmp_path / "logs")
    assert workers.next_event() == ("row", {"event": "n", "n": "3"})
    assert workers.next_event() == ("row", {"event": "ended", "status": 0, "reason": ""})
    assert workers.next_event() is None


def test_names_become_paths():
    assert file_name("lora(rank=2) + bitfit") == "lora_rank_2_bitfit"
    assert file_name("../../etc") == "......etc".replace("......", ".._.._")
    assert os.sep not in file_name("a/b")


def test_the_board_shows_waiting_steps_and_results():
    console = Console(file=io.StringIO(), width=120, record=True)
    board = Board(console, {"lora": 2, "bitfit": 1}, "accuracy")
    board.update("lora", {"event": "start", "seed": 0})
    board.update("lora", {"event": "step", "seed": 0, "step": 3, "total": 9, "loss": 0.61})
    console.print(board.render())
    text = console.export_text()
    assert "seed 0, step 3 of 9, loss 0.610" in text
    assert "waiting" in text
    assert "0 of 3 runs" in text
    board.update("lora", {"event": "done", "seed": 0, "result": {"metrics": {"accuracy": 0.5}, "seconds": 2}})
    board.update("bitfit", {"event": "failed", "seed": 0, "error": "[red]too big"})
    console.print(board.render())
    text = console.export_text()
    assert "1 of 2 runs done" in text
    assert "failed: [red]too big" in text


def test_a_comparison_from_a_file_runs(comparison, fake_workers, tmp_path):
    copy = Comparison.from_dict(json.loads(json.dumps(comparison.to_dict())))
    assert run_comparison(copy, tmp_path / "out").comparison == comparison
