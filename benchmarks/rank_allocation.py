"""Which ranks AdaLoRA and IncreLoRA choose, and what that gains: ``python -m benchmarks.rank_allocation``.

LoRA changes the same matrices with the same rank everywhere, so that all three end with the same number of ranks.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.sentiment import Record, Sentiment, options, spread, table
from deltune.checkpoints import read
from deltune.measure import rank_picture, rank_table

METHODS = {
    "LoRA": "lora(rank={rank}, alpha=16, targets=attention.* ffn.*)",
    "AdaLoRA": "adalora(initial_rank={initial}, target_rank={rank})",
    "IncreLoRA": "increlora(target_rank={rank})",
}


def run(lesson: Sentiment, method: str, seed: int) -> dict[str, Any]:
    """Accuracy, ranks and size of what is saved, after one training."""
    tuned = lesson.train(method, seed)
    with tempfile.TemporaryDirectory() as folder:
        _, tensors = read(tuned.save(Path(folder) / "delta"))
    factors = {key: value for key, value in tensors.items() if key.endswith((".A", ".B"))}
    return {
        "accuracy": lesson.accuracy(tuned),
        "ranks": {key.removesuffix(".A"): value.shape[0] for key, value in factors.items() if key.endswith(".A")},
        "parameters": sum(value.numel() for value in factors.values()),
    }


def main() -> None:
    """Measure, print the table, draw the ranks."""
    given = options(__doc__)
    lesson = Sentiment(given.steps, given.train_size, given.split_seed)
    record = Record(given.output / f"rank_allocation_{given.steps}.jsonl")
    rows: dict[str, list[str]] = {}
    for rank in (2, 8):
        for name, pattern in METHODS.items():
            method = pattern.format(rank=rank, initial=rank * 3 // 2)
            runs = [record.get(f"{method} seed {seed}", run, lesson, method, seed) for seed in range(given.seeds)]
            sizes = [item["parameters"] for item in runs]
            rows[f"{name}, {rank} on average"] = [
                spread([item["accuracy"] for item in runs]),
                str(sum(runs[0]["ranks"].values())),
                f"{sum(sizes) / len(sizes):,.0f}",
            ]
            if name != "LoRA":
                print(f"\n{method}, seed 0\n{rank_table(runs[0]['ranks'])}\n")
                file = given.output / f"{name.lower()}_{rank}.svg"
                rank_picture(runs[0]["ranks"], file, f"{name}, {rank} ranks on average")
    print(table(["method", "accuracy in %", "ranks at the end", "parameters saved, without head"], rows))


if __name__ == "__main__":
    main()
