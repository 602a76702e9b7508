"""One DyLoRA training, cut to each rank, against LoRA trained at each rank: ``python -m benchmarks.dylora_ranks``.

All trainings have the same steps, batches and learning rate rule (each method's default).
"""

from __future__ import annotations

from benchmarks.sentiment import Record, Sentiment, options, spread, table

LARGEST = 8
METHODS = {"DyLoRA (nested)": "dylora(update=nested)", "DyLoRA (frozen)": "dylora(update=frozen)"}


def cut(lesson: Sentiment, method: str, seed: int) -> list[float]:
    """Accuracy at ranks 1 to 8 after one training."""
    tuned = lesson.train(method, seed)
    found = []
    for rank in range(1, LARGEST + 1):
        tuned.set_rank(rank)
        found.append(lesson.accuracy(tuned))
    return found


def truncated(lesson: Sentiment, seed: int) -> list[float]:
    """Accuracy at ranks 1 to 8 of a LoRA that was trained at rank 8 and cut afterwards."""
    tuned = lesson.train("lora(rank=8)", seed)
    forms = list(tuned.attachments["default"].forms.values())
    found = []
    for rank in range(LARGEST, 0, -1):
        for form in forms:
            form.A.data[rank:] = 0  # the later components give nothing then
        found.insert(0, lesson.accuracy(tuned))
    return found


def main() -> None:
    """Measure, and print the table."""
    given = options(__doc__)
    lesson = Sentiment(given.steps, given.train_size, given.split_seed)
    record = Record(given.output / f"dylora_ranks_{given.steps}.jsonl")
    seeds = range(given.seeds)
    rows: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        runs = [record.get(f"{method} seed {seed}", cut, lesson, method, seed) for seed in seeds]
        rows[name] = [spread(list(values)) for values in zip(*runs, strict=True)]
    runs = [record.get(f"lora(rank=8) cut seed {seed}", truncated, lesson, seed) for seed in seeds]
    rows["LoRA of rank 8, cut"] = [spread(list(values)) for values in zip(*runs, strict=True)]
    rows["LoRA, trained at each"] = []
    for rank in range(1, LARGEST + 1):
        method = f"lora(rank={rank})"
        values = [record.get(f"{method} seed {seed}", lesson.accuracy_of, method, seed) for seed in seeds]
        rows["LoRA, trained at each"].append(spread(values))
    print(table(["rank", *map(str, range(1, LARGEST + 1))], rows))


if __name__ == "__main__":
    main()
