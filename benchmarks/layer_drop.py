"""What dropping adapters of the lowest layers saves at inference: ``python -m benchmarks.layer_drop``.

MiniLM's shape with Pfeiffer adapters. One task with n layers dropped against none, and 8 tasks on one batch in one pass
against 8 passes; all ways in turn, so that a busy moment of the machine meets all of them.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification

import deltune
from benchmarks.sentiment import table

LAYERS = 6


def main() -> None:
    """Measure, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=LAYERS, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config).eval()
    names = [f"task-{number}" for number in range(given.tasks)]
    tuned = deltune.attach(model, "pfeiffer-adapter", names[0])
    for name in names[1:]:
        tuned.attach("pfeiffer-adapter", name)
    batch = {"input_ids": torch.randint(1000, 30000, (given.rows, given.length))}

    def one(dropped: int) -> Callable[[], None]:
        def run() -> None:
            tuned.drop_layers(dropped)
            model(**batch)

        return run

    counts = [0, 1, 2, 3, 4, 5]
    tuned.activate(names[0])
    rows = {}
    for count, ratios in _ratios({count: one(count) for count in counts}, 0, given.rounds).items():
        rows[str(count)] = [_shown(ratios)]
    print(table(["layers dropped", "time of one task, of none dropped"], rows))

    rows = {}
    for count in counts:
        tuned.drop_layers(count)

        def passes() -> None:
            for name in names:
                tuned.activate(name)
                model(**batch)

        _check_equal(tuned, names, batch)
        ratios = _ratios({0: passes, 1: lambda: _one_pass(tuned, names, batch)}, 0, given.rounds)[1]
        rows[str(count)] = [_shown(ratios)]
    print(table(["layers dropped", f"one pass for {given.tasks} tasks, of {given.tasks} passes"], rows))


@torch.no_grad()
def _check_equal(tuned: deltune.Tuned, names: list[str], batch: dict[str, torch.Tensor]) -> None:
    """Both ways must give the same, or there is nothing to compare."""
    with tuned.one_pass(*names):
        together = tuned.model(**batch).logits
    alone = []
    for name in names:
        tuned.activate(name)
        alone.append(tuned.model(**batch).logits)
    if not torch.allclose(together, torch.cat(alone), atol=1e-5):
        raise RuntimeError("One pass and several passes differ.")


def _one_pass(tuned: deltune.Tuned, names: list[str], batch: dict[str, torch.Tensor]) -> None:
    with tuned.one_pass(*names):
        tuned.model(**batch)


@torch.no_grad()
def _ratios(ways: dict[int, Callable[[], object]], reference: int, rounds: int) -> dict[int, list[float]]:
    """Time of each way as a part of the reference's, in every round."""
    for way in ways.values():
        way()
    found: dict[int, list[float]] = {key: [] for key in ways}
    for _ in range(rounds):
        seconds = {}
        for key, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[key] = time.perf_counter() - start
        for key, value in seconds.items():
            found[key].append(value / seconds[reference])
    return found


def _shown(ratios: list[float]) -> str:
    quartiles = statistics.quantiles(ratios, n=4)
    return f"{statistics.median(ratios):.2f} ({quartiles[0]:.2f} to {quartiles[2]:.2f})"


if __name__ == "__main__":
    main()
