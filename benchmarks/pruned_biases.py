"""BitFit against searches that leave a tenth of its biases: ``python -m benchmarks.pruned_biases``.

Three passes over sentences of movie reviews. Each search says which biases it kept with the first seed: a table, and a
picture in the output folder.
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.sentiment import Record, Sentiment, options, spread, table
from deltune.measure import site_picture, site_table
from deltune.methods.registry import parse
from deltune.methods.selective.us_bitfit import kept_biases

METHODS = (
    "bitfit",
    "u-bitfit",
    "s-bitfit",
    "u-bitfit(criterion=signed)",
    "u-bitfit(final_rate=1)",
)


def run(lesson: Sentiment, method: str, seed: int) -> dict[str, Any]:
    """Accuracy, and the number of entries that were kept of each bias, after one training."""
    tuned = lesson.train(method, seed)
    summary = tuned.summary()
    kept = kept_biases(tuned.attachments["default"].forms)
    return {
        "accuracy": lesson.accuracy(tuned),
        "entries": summary.parameters - summary.head_parameters,
        "kept": {tuned.anatomy.parameter_key(name): count for name, count in kept.items()},
    }


def main() -> None:
    """Measure, print the tables, draw what was kept."""
    given = options(__doc__, train_size=4000, steps=750, evaluation_size=3000)
    lesson = Sentiment(given.steps, given.train_size, given.split_seed, given.evaluation_size)
    record = Record(given.output / f"pruned_biases_{given.train_size}_{given.steps}.jsonl")
    rows: dict[str, list[str]] = {}
    for method in given.methods.split(";") if given.methods else METHODS:
        # its defaults may change
        key = f"{json.dumps(parse(method).to_dict())} split {given.split_seed} of {given.evaluation_size} seed"
        runs = [record.get(f"{key} {seed}", run, lesson, method, seed) for seed in range(given.seeds)]
        found = [item["accuracy"] for item in runs]
        rows[method] = [spread(found), ", ".join(f"{value:.1f}" for value in found), f"{runs[0]['entries']:,}"]
        if runs[0]["kept"]:
            print(f"\n{method}, seed 0\n{site_table(runs[0]['kept'], 'entries', '{:,.0f}'.format)}\n")
            picture = given.output / (re.sub(r"[^a-z0-9.-]+", "_", method).strip("_") + ".svg")
            site_picture(runs[0]["kept"], "entries", picture, f"entries that {method} kept", "{:,.0f}".format)
    print(table(["method", "accuracy in %", "each seed", "entries, without head"], rows))


if __name__ == "__main__":
    main()
