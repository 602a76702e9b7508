"""A run that is killed at any moment and started again ends in the same bits as one that never was."""

from __future__ import annotations

import json
import multiprocessing
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import Place
from tests.cli.killed import run

METHOD = "lora(rank=2, dropout=0.1) + prefix-tuning(length=2)"
OPTIONS = ("--method", METHOD, "--save-every", 3, "--evaluate-every", 7, "--patience", 50, "--learning-rate", 5e-3)


def arguments(place: Place, output: Path, steps: int) -> list[str]:
    return [str(item) for item in place.tune(output, *OPTIONS, "--steps", steps)]


def outcome(folder: Path) -> tuple[bytes, Any, Any, Any]:
    result = json.loads((folder / "result.json").read_text())
    return (folder / "delta.safetensors").read_bytes(), result["metrics"], result["history"], result["best_step"]


def test_killed_three_times_on_the_way(place: Place, tmp_path: Path) -> None:
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["tests.cli.killed"])
    log = tmp_path / "log"

    def start(output: Path) -> Any:
        process = processes.Process(target=run, args=(arguments(place, output, 60), str(log)))
        process.start()
        return process

    # the first process waits for the imports
    _finish(start(tmp_path / "warm"), log)
    begun = time.monotonic()
    _finish(start(tmp_path / "whole"), log)
    lasted = time.monotonic() - begun
    draw = random.Random()
    killed = 0
    for _ in range(3):
        process = start(tmp_path / "killed")
        process.join(draw.uniform(0.2, 0.6) * lasted)
        killed += process.is_alive()
        process.kill()
        process.join()
    _finish(start(tmp_path / "killed"), log)
    assert killed
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


def _finish(process: Any, log: Path) -> None:
    process.join(120)
    assert process.exitcode == 0, log.read_text()


@pytest.mark.slow
def test_killed_at_ten_random_moments(place: Place, tmp_path: Path) -> None:
    """Each time another run, in a process of its own that starts from nothing."""

    def start(output: Path) -> subprocess.Popen[bytes]:
        code = "from deltune.cli import main; main()"
        command = [sys.executable, "-c", code, *arguments(place, output, 150)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    begun = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    lasted = time.monotonic() - begun
    expected = outcome(tmp_path / "whole")
    draw = random.Random()
    killed_after: list[tuple[float, str]] = []
    for number in range(10):
        folder = tmp_path / str(number)
        process = start(folder)
        moment = draw.uniform(0, 1) * lasted
        time.sleep(moment)
        process.kill()
        process.wait()
        killed_after.append((moment, _newest(folder)))
        assert start(folder).wait() == 0
        assert outcome(folder) == expected, killed_after
    print(f"\na run of {lasted:.1f} s was killed after: {killed_after}")
    assert any(newest.startswith("checkpoint") for _, newest in killed_after)


def _newest(folder: Path) -> str:
    if (folder / "result.json").is_file():
        return "result"
    number: Callable[[Path], int] = lambda item: int(item.name.rpartition("-")[2])  # noqa: E731
    folders = list((folder / "checkpoints").glob("checkpoint-*"))
    return max(folders, key=number).name if folders else "nothing"
