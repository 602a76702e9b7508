"""What each reparameterised method reaches with its own defaults: ``python -m benchmarks.reparameterized``.

Three passes over the sentences, as a training without further settings does; the means over the seeds are compared with
full fine-tuning's. ``--methods`` measures some only; what is known stays in the file of the output folder.
"""

from __future__ import annotations

from benchmarks.sentiment import Record, Sentiment, options, spread, table

METHODS = (
    "full",
    "lora",
    "adalora",
    "krona",
    "increlora",
    "dylora",
    "krona-b",
    "krona-b(residual=true)",
    "fact",
    "lorta",
    "qlora",
    "freeze(layers=0)",
)


def main() -> None:
    """Measure, and print the table."""
    given = options(__doc__, train_size=4000, steps=750, evaluation_size=3000)
    lesson = Sentiment(given.steps, given.train_size, given.split_seed, given.evaluation_size)
    record = Record(given.output / f"reparameterized_{given.train_size}_{given.steps}.jsonl")
    methods = given.methods.split(";") if given.methods else METHODS
    found = {
        method: [record.get(f"{method} seed {seed}", lesson.accuracy_of, method, seed) for seed in range(given.seeds)]
        for method in methods
    }
    reference = found.get("full")
    rows = {}
    for method, values in found.items():
        distance = "" if reference is None else f"{_mean(values) - _mean(reference):+.1f}"
        rows[method] = [spread(values), distance]
    print(table(["method", "accuracy in %", "against full"], rows))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
