"""What a comparison shows, in words, and how far it can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING

from deltune.compare import units
from deltune.compare.table import TableRow
from deltune.measure import proportion_interval

if TYPE_CHECKING:
    from deltune.compare.engine import Outcome

__all__ = ["Fact", "facts", "limits", "subtitle", "title"]


@dataclass(frozen=True)
class Fact:
    """A row that stands out: in what, which, and by which value."""

    label: str
    row: str
    value: str


def title(outcome: Outcome) -> str:
    """How many methods, on which model."""
    count = len(outcome.comparison.methods)
    return f"{count} {'method' if count == 1 else 'methods'} on {_last_part(outcome.comparison.model)}"


def subtitle(outcome: Outcome) -> str:
    """Task, data, budget and seeds in one sentence."""
    comparison, data = outcome.comparison, outcome.data
    if comparison.steps is not None:
        budget = f"{comparison.steps:,} steps of {comparison.batch_size}"
    else:
        budget = f"{comparison.epochs:g} {'epoch' if comparison.epochs == 1 else 'epochs'} in batches of "
        budget += str(comparison.batch_size)
    seeds = len(comparison.seeds)
    return (
        f"{comparison.task.replace('-', ' ').capitalize()} of {_last_part(comparison.data)}: "
        f"{data['train_examples']:,} training and {data['evaluation_examples']:,} evaluation examples, {budget}, "
        f"{seeds} {'seed' if seeds == 1 else 'seeds'}. Every method gets the same."
    )


def facts(outcome: Outcome) -> list[Fact]:
    """Which methods stand out in quality, size, time and memory."""
    table = outcome.table
    rows = [row for row in table.rows if row.done and not row.baseline]
    if not rows:
        return []
    best = rows[0]
    tolerance = best.quality.deviation or 0.0
    close = [row for row in rows if abs(row.quality.mean - best.quality.mean) <= tolerance]
    smallest = min(close, key=lambda row: row.trainable)
    fastest = min(rows, key=lambda row: row.seconds.mean)
    least = min(rows, key=lambda row: row.peak_memory)
    metric = table.metric.replace("_", " ")
    better = "Highest" if table.greater_is_better else "Lowest"
    return [
        Fact(f"{better} {metric}", best.name, units.quality(table.metric, best.quality)),
        Fact(
            "Smallest within that spread",
            smallest.name,
            f"{units.count(smallest.trainable)}, {units.share(smallest.share)} of the model",
        ),
        Fact("Shortest training", fastest.name, f"{units.duration(fastest.seconds.mean)} a run"),
        Fact("Least memory", least.name, units.size(least.peak_memory)),
    ]


def limits(outcome: Outcome) -> list[str]:
    """What the numbers mean and do not mean, a sentence or two each."""
    table = outcome.table
    rows = [row for row in table.rows if row.done]
    trained = [row for row in rows if row.trainable]
    found = [_interval(outcome, next((row for row in trained if not row.baseline), None))]
    if len(outcome.comparison.seeds) > 1:
        found.append(
            "± is the standard deviation over the seeds. A seed decides the initial head, the method's initial "
            "values and the order of the examples; which examples are for training is the same in all runs."
        )
    else:
        found.append("There is one seed, so nothing is known of the spread between runs. Use at least three.")
    found.append(
        "Each method trained with its own default learning rate unless another was given; none was searched for "
        "here. With more steps or another rate the order can change."
    )
    found.append(
        "The score is that of the weights after the last step, not of the best step, because choosing by the "
        "evaluation examples would flatter every method."
    )
    if trained:
        first = trained[0].results[0]
        threads = first["provenance"]["threads"]
        jobs = first["jobs"]
        found.append(
            "Training time leaves out loading, evaluation and writing files. It was measured with "
            f"{_counted(jobs, 'process', 'processes')} at a time and {_counted(threads, 'thread', 'threads')} each; "
            "other work on the machine lengthens it."
        )
        found.append(_memory(trained))
        heads = {row.results[0]["parameters"]["head"] for row in trained}
        if len(heads) == 1:
            found.append(
                f"Every trained row includes the same task head of {heads.pop():,} parameters, in its parameters as "
                "in its checkpoint."
            )
    return found


def _interval(outcome: Outcome, best: TableRow | None) -> str:
    count = outcome.data["evaluation_examples"]
    if best is None or outcome.table.metric != "accuracy":
        return f"Quality was measured on {count:,} examples; other examples of the same kind would give other values."
    share = best.quality.mean
    low, high = (units.quality_number("accuracy", end) for end in proportion_interval(share, count))
    mean = units.quality_number("accuracy", share)
    return (
        f"Quality was measured on {count:,} examples. By that number alone, {mean} % means {low} to {high} % on all "
        "texts of this kind (95 % interval). Do not rank methods that are closer than that."
    )


def _memory(trained: list[TableRow]) -> str:
    uses = [result["memory"] for row in trained for result in row.results]
    if any(use["device_peak"] is not None for use in uses):
        return "Peak memory is the most that tensors took on the accelerator."
    baseline = max(use["resident_baseline"] for use in uses)
    return (
        "Peak memory is the highest resident memory of the process that trained, the writing of training checkpoints "
        f"included; each method had a process of its own. Up to {units.size(baseline)} of it were the interpreter, "
        "the libraries and the data, before any model was loaded."
    )


def _counted(count: int, one: str, several: str) -> str:
    return f"{count} {one if count == 1 else several}"


def _last_part(path: str) -> str:
    """Folder or file without what leads there."""
    return PurePath(path).name or path
