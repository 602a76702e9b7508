"""Five prompts trained in one batch, against one: ``python -m benchmarks.prompt_ensemble``.

MiniLM and sentences of movie reviews. Two things are measured: the time of a training step and of a prediction, as a
part of what the prompts would take one after the other, in rounds in which both alternate; and the accuracy of the
vote, of each prompt, and of the best.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median, quantiles
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader

from benchmarks.sentiment import BATCH_SIZE, HEAD_LEARNING_RATE, Sentiment
from deltune.methods.registry import get
from deltune.prompting import PromptEnsemble


def batches(lesson: Sentiment, rows: Any, size: int, shuffle: bool) -> list[dict[str, Any]]:
    """The rows in batches."""
    collate = lesson.task.collator(lesson.tokenizer)
    generator = torch.Generator().manual_seed(0)
    loader = DataLoader(rows, size, shuffle=shuffle, collate_fn=collate, generator=generator)
    return [dict(batch) for batch in loader]


def seconds(work: Callable[[], Any]) -> float:
    """Processor time of one call."""
    start = time.process_time()
    work()
    return time.process_time() - start


def ratio(together: list[float], apart: list[float]) -> str:
    """Median and quartiles of the ratios of each round."""
    found = [one / other for one, other in zip(together, apart, strict=True)]
    low, _, high = quantiles(found, n=4)
    return f"{median(found):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=5)
    parser.add_argument("--length", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    lesson = Sentiment(given.steps, given.steps * BATCH_SIZE)
    transformers.set_seed(0)
    model = lesson.task.load_model(lesson.model, tokenizer=lesson.tokenizer, dropout=0.0)
    ensemble = PromptEnsemble(model, f"prompt-tuning(length={given.length})", given.count)
    train = batches(lesson, lesson.train_rows, BATCH_SIZE, shuffle=True)
    test = batches(lesson, lesson.evaluation_rows, BATCH_SIZE, shuffle=False)

    heads = {
        id(value)
        for name in ensemble.names
        for key, value in ensemble.tuned.attachments[name].parameters()
        if key in ensemble.tuned.attachments[name].head_names
    }
    groups = [
        {"params": [value for value in ensemble.parameters() if id(value) not in heads]},
        {"params": [value for value in ensemble.parameters() if id(value) in heads], "lr": HEAD_LEARNING_RATE},
    ]
    optimizer = torch.optim.AdamW(groups, lr=get("prompt-tuning").learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / given.steps)

    def alone(name: str, batch: dict[str, Any], learns: bool) -> None:
        ensemble.tuned.route([name])
        if learns:
            ensemble.tuned.model(**batch).loss.backward()
            return
        with torch.no_grad():
            ensemble.tuned.model(**{key: value for key, value in batch.items() if key != "labels"})

    together: dict[bool, list[float]] = {True: [], False: []}
    apart: dict[bool, list[float]] = {True: [], False: []}
    one: dict[bool, list[float]] = {True: [], False: []}
    for number in range(given.rounds):
        for learns in (True, False):
            batch = train[number]
            work = (lambda b=batch: ensemble.loss(b).backward()) if learns else (lambda b=batch: ensemble.predict(b))
            together[learns].append(seconds(work))
            each = [seconds(lambda n=name, b=batch, t=learns: alone(n, b, t)) for name in ensemble.names]
            apart[learns].append(sum(each))
            one[learns].append(sum(each) / len(each))
    ensemble.tuned.route(None)
    ensemble.activate()
    for learns, name in ((True, "training step"), (False, "prediction")):
        print(
            f"{name}: {given.count} prompts in one batch take {ratio(together[learns], apart[learns])} of as many "
            f"passes, {ratio(together[learns], one[learns])} of one"
        )
    parameters = sum(value.numel() for value in ensemble.parameters())
    print(f"parameters: {parameters:,} of all prompts and heads; {sum(v.numel() for v in model.parameters()):,} in all")

    model.train()
    optimizer.zero_grad(set_to_none=True)
    for batch in train[: given.steps]:
        ensemble.loss(batch).backward()
        torch.nn.utils.clip_grad_norm_(ensemble.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    model.eval()
    report = ensemble.evaluate(test)
    print({name: round(100 * value, 1) for name, value in report.single.items()})
    print(f"vote {100 * report.vote:.1f}, best {100 * report.single[report.best]:.1f}, mean {100 * report.mean:.1f}")


if __name__ == "__main__":
    main()
