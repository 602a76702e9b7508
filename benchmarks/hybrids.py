"""Hybrids against each of their parts alone, at equal parameters: ``python -m benchmarks.hybrids``.

MAM (with the sizes of the authors' scripts for classification, and with its defaults), UniPELT and LoRA + prefix. Each
part is made as wide, long or high in rank as it takes to store as many values as the whole, within 2 %. MiniLM, movie
reviews. Each row is trained once at each of ``--rates``, and with all seeds at the rate that was best then. Every
training is one line of JSON in the output folder, so that a measurement that was stopped goes on; the table is written
beside it in Markdown.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from benchmarks.sentiment import Record, Sentiment, spread, table
from deltune.attachment import Attachment
from deltune.backbone import anatomy_of
from deltune.methods import Method, all_methods, parse
from examples import assets

#: The wholes by the name of their group.
WHOLES = {
    "mam-small": "mam(length=16, width=16, scale=2)",
    "mam": "mam",
    "lora+prefix": "lora(rank=8) + prefix-tuning(length=16)",
    "unipelt": "unipelt",
}
#: What makes a part larger.
SIZES = {
    "lora": "rank",
    "prefix-tuning": "length",
    "p-tuning-v2": "length",
    "parallel-adapter": "width",
    "sequential-adapter": "width",
    "pfeiffer-adapter": "width",
    "residual-adapter": "width",
    "head-adapter": "width",
}
#: How far the number of stored values of a part may be from that of the whole.
TOLERANCE = 0.02


@cache
def bare_model() -> Any:
    """MiniLM without values."""
    with torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(str(assets.get("minilm"))))


def stored(method: Method) -> int:
    """How many values a file of the method holds, without a task head."""
    model = bare_model()
    attachment = Attachment.build("counted", method, model, anatomy_of(model), True, False)
    written = (form.stored() for form in attachment.forms.values())
    own = sum(value.numel() for form in written if form is not None for value in form.parameters())
    return own + sum(value.numel() for _, value in attachment.written())


def of_size(part: Method, target: int) -> Method:
    """The part with the size at which it stores ``target`` values.

    Raises:
        SystemExit: if there is none within the tolerance.
    """
    name = SIZES.get(part.name)
    if name is None:
        raise SystemExit(f"It is not known what makes {part.name} larger. Add it to SIZES.")
    # the number of values grows by the same amount with each step
    first, second = (stored(_resized(part, name, size)) for size in (1, 2))
    found = _resized(part, name, max(1, 1 + round((target - first) / (second - first))))
    count = stored(found)
    if abs(count - target) > TOLERANCE * target:
        raise SystemExit(
            f"{found} stores {count:,} values, not {target:,} within {TOLERANCE:.0%}: another whole, please."
        )
    return found


def _resized(part: Method, name: str, size: int) -> Method:
    changes: dict[str, Any] = {name: size}
    if part.name == "lora":  # so that the scale stays as it is
        changes["alpha"] = part.alpha / part.rank * size  # type: ignore[attr-defined]
    return dataclasses.replace(part, **changes)


def groups(chosen: tuple[str, ...]) -> dict[str, list[Method]]:
    """The whole of each group, and its parts at its size; each kind of part once."""
    found = {}
    for name in chosen:
        text = WHOLES[name]
        if name == "unipelt" and name not in all_methods():
            print("unipelt is not a method of this version, so its rows are left out.", flush=True)
            continue
        whole = parse(text)
        target = stored(whole)
        parts = {part.name: part for part in whole.parts}
        found[name] = [whole, *(of_size(part, target) for part in parts.values())]
    return found


def measured(lesson: Sentiment, method: Method, seed: int, rate: float) -> dict[str, float]:
    """One training: accuracy in percent, seconds, and how many values train with the head."""
    start = time.monotonic()
    tuned = lesson.train(str(method), seed, rate)
    seconds = time.monotonic() - start
    return {"accuracy": lesson.accuracy(tuned), "seconds": seconds, "trained": tuned.summary().parameters}


def report(
    found: dict[str, list[Method]],
    seeds: int,
    best: Callable[[Method], float],
    value: Callable[[Method, int, float], Any],
) -> str:
    """The table in Markdown; ``best`` gives a method's rate, and ``value`` what :func:`measured` does."""
    rows = {}
    for methods in found.values():
        target, whole = stored(methods[0]), None
        for method in methods:
            rate = best(method)
            values = [value(method, seed, rate) for seed in range(seeds)]
            mean = sum(one["accuracy"] for one in values) / seeds
            whole = mean if whole is None else whole
            count = stored(method)
            rows[f"{method}" if method is methods[0] else f"- {method}"] = [
                spread([one["accuracy"] for one in values]),
                "" if method is methods[0] else f"{mean - whole:+.1f}",
                f"{count:,}",
                "" if method is methods[0] else f"{100 * (count / target - 1):+.1f} %",
                f"{values[0]['trained']:,.0f}",
                f"{rate:g}",
                f"{sum(one['seconds'] for one in values) / seeds:.0f} s",
            ]
    header = ["method", "accuracy in %", "against the whole", "stored", "against the whole", "trained, with head"]
    return table([*header, "rate", "time"], rows)


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--groups", default=",".join(WHOLES), help="some of these only, with commas between them")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train-size", type=int, default=2000)
    parser.add_argument("--evaluation-size", type=int, default=1000)
    parser.add_argument("--split-seed", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--rates", default="1e-3,3e-3", help="learning rates to choose from, with commas between them")
    parser.add_argument("--sizes", action="store_true", help="only print what would be measured, with the counts")
    parser.add_argument("--output", type=Path, default=Path(".cache/benchmarks"))
    given = parser.parse_args()
    chosen = tuple(name.strip() for name in given.groups.split(","))
    unknown = [name for name in chosen if name not in WHOLES]
    if unknown:
        parser.error(f"there is no group {unknown[0]!r}; choose from {', '.join(WHOLES)}")
    found = groups(chosen)
    for methods in found.values():
        for method in methods:
            print(f"{method}: {stored(method):,} values stored", flush=True)
    if given.sizes:
        return
    lesson = Sentiment(given.steps, given.train_size, given.split_seed, given.evaluation_size)
    settings = f"{given.train_size}_{given.evaluation_size}_{given.steps}_{given.split_seed}"
    record = Record(given.output / f"hybrids_{settings}.jsonl")

    rates = [float(rate) for rate in given.rates.split(",")]

    def value(method: Method, seed: int, rate: float) -> Any:
        return record.get(f"{method} rate {rate:g} seed {seed}", measured, lesson, method, seed, rate)

    def best(method: Method) -> float:
        return max(rates, key=lambda rate: value(method, 0, rate)["accuracy"])

    text = report(found, given.seeds, best, value)
    (given.output / f"hybrids_{settings}.md").write_text(f"{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
