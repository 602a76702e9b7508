"""Made-up results and outcomes, and a worker that pretends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deltune.compare import Comparison, ComparisonTable, Outcome
from deltune.measure import provenance

FAKE_WORKER = """
import json, os, sys, time
job = json.loads(open(sys.argv[1]).read())
for seed in job["folders"]:
    seed = int(seed)
    print(json.dumps({"event": "start", "seed": seed}), flush=True)
    print(json.dumps({"event": "step", "seed": seed, "step": 1, "total": 2, "loss": 0.5}), flush=True)
    if job["row"] == os.environ.get("KILL"):
        os.kill(os.getpid(), 9)
    if job["row"] == os.environ.get("CRASH"):
        raise SystemExit("no such luck")
    if job["row"] == os.environ.get("HANG"):
        time.sleep(600)
    if job["row"] == os.environ.get("FAIL"):
        print(json.dumps({"event": "failed", "seed": seed, "error": "it did not fit"}), flush=True)
        continue
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(f"{job['row']} {seed}\\n")
    result = json.loads(os.environ["RESULT"])
    result["metrics"]["accuracy"] += seed / 100
    print("a library prints something that is no event", flush=True)
    print(json.dumps({"event": "done", "seed": seed, "result": result}), flush=True)
"""


def measured(accuracy: float = 0.8, trainable: int = 1000, **values: Any) -> dict[str, Any]:
    """What a worker says of a finished run."""
    result = {
        "parameters": {"trainable": trainable, "head": 34, "share": trainable / 100_000, "model": 100_000},
        "metrics": {"accuracy": accuracy, "macro_f1": accuracy},
        "seconds": 12.5,
        "steps": 20,
        "examples": 320,
        "memory": {"peak": 700_000_000, "resident_peak": 700_000_000, "resident_baseline": 5e8, "device_peak": None},
        "checkpoint_bytes": 4 * trainable + 600,
        "history": [{"step": step, "epoch": 0.1, "loss": 1 / step} for step in range(1, 21)],
        "settings": {"learning_rate": 1e-3, "weight_decay": 0.0},
        "provenance": provenance(seed=0, threads=1),
    }
    return {**result, **values}


def finished(row: str, seed: int, accuracy: float, trainable: int, **values: Any) -> dict[str, Any]:
    """A line of the results file."""
    return {
        **measured(accuracy, trainable),
        "format": 1,
        "hash": f"{row} {seed}",
        "row": row,
        "seed": seed,
        "kind": "baseline" if row in ("majority", "linear-head") else "method",
        "status": "done",
        "jobs": 1,
        "command": f"deltune compare --method '{row}'",
        "specification": {
            "model": "f" * 64,
            "task": {"task": "text-classification", "loss": "cross entropy", "encoding": {"train": {"rows": 3}}},
        },
        **values,
    }


def failed(row: str, seed: int, error: str) -> dict[str, Any]:
    """A line of the results file for a run that ended in an error."""
    line = finished(row, seed, 0.0, 0, status="failed", error=error)
    for name in ("metrics", "parameters", "memory", "seconds", "history", "settings"):
        del line[name]
    return line


def outcome(results: Sequence[dict[str, Any]], **values: Any) -> Outcome:
    """An outcome with these results."""
    rows = dict.fromkeys(result["row"] for result in results if result["kind"] == "method")
    options: dict[str, Any] = {
        "model": "models/tiny",
        "data": "reviews.csv",
        "methods": tuple(row for row in rows if "<" not in row),
        "seeds": tuple(dict.fromkeys(result["seed"] for result in results)),
        "steps": 20,
        **values,
    }
    return Outcome(
        comparison=Comparison(**options),
        results=tuple(results),
        table=ComparisonTable.of(results, "accuracy"),
        data={"train": "a" * 64, "evaluation": "b" * 64, "train_examples": 1600, "evaluation_examples": 1000},
        repeated=0,
        others=0,
        interrupted=False,
    )


def usual_results() -> list[dict[str, Any]]:
    """Two baselines, four methods with three seeds, one of them with a failure, and one that failed wholly."""
    rows = [
        ("majority", 0.5, 0),
        ("linear-head", 0.61, 34),
        ("lora(rank=8)", 0.83, 74_000),
        ("bitfit", 0.81, 30_000),
        ("full", 0.84, 22_000_000),
        ("prompt-tuning", 0.7, 8_000),
    ]
    lines = [
        finished(row, seed, accuracy + seed / 100, trainable)
        for row, accuracy, trainable in rows
        for seed in ((0,) if row == "majority" else (0, 1, 2))
    ]
    return [*lines[:-1], failed("prompt-tuning", 2, "the loss is not a number"), failed("lora(rank=2)", 0, "too big")]
