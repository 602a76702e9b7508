"""``deltune compare``: methods side by side on a model and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["compare"]


def compare(
    model: Annotated[str, typer.Option(help="Folder of a pretrained model, or its name on the hub.")],
    data: Annotated[
        str, typer.Option(help="File (csv, tsv, json, jsonl, parquet, conll), folder, or name of a dataset.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for results.jsonl and the report.")],
    methods: Annotated[
        str, typer.Option(help="Methods, separated by commas: 'full,lora(rank=8, alpha=16),bitfit'.")
    ] = "",
    method: Annotated[list[str] | None, typer.Option(help="One method; may be repeated.")] = None,
    task: Annotated[str, typer.Option(help="Name of the task.")] = "text-classification",
    task_option: Annotated[
        list[str] | None, typer.Option(help="An option of the task, such as text=sentence; may be repeated.")
    ] = None,
    evaluation_data: Annotated[
        str | None, typer.Option(help="Separate data to evaluate on; else they are split off.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; each method runs once with each.")] = "0,1,2",
    steps: Annotated[int | None, typer.Option(help="Steps of each run.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training data of each run.")] = None,
    batch_size: Annotated[int, typer.Option(help="Examples in a step.")] = 16,
    train_size: Annotated[int | None, typer.Option(help="Number of training examples; all by default.")] = None,
    evaluation_size: Annotated[
        int | None, typer.Option(help="Number of evaluation examples; a tenth of the data by default.")
    ] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest text in tokens.")] = None,
    split_seed: Annotated[int, typer.Option(help="Chooses which examples are for training.")] = 0,
    learning_rate: Annotated[
        list[str] | None, typer.Option(help="Another rate for a method, such as lora=3e-4; may be repeated.")
    ] = None,
    head_learning_rate: Annotated[
        float | None, typer.Option(help="Rate of the task head in every row; the row's own if none.")
    ] = None,
    model_dropout: Annotated[
        float | None, typer.Option(help="Probability of every dropout of the model; its own if none.")
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes at a time; more blur the measured times.")] = 1,
    keep: Annotated[bool, typer.Option("--keep", help="Keep what each run trained, in OUTPUT/runs.")] = False,
) -> None:
    """Train several methods on the same examples with the same budget, and report what each costs and reaches.

    The majority class (or tag) and a linear head on the frozen model run besides. Stopping loses nothing: the same
    command goes on.
    """
    from rich.console import Console

    from deltune.compare.engine import run_comparison
    from deltune.compare.plan import Comparison
    from deltune.errors import DeltuneError
    from deltune.methods import split_specifications

    asked = [*split_specifications(methods), *(method or [])]
    if not asked:
        raise DeltuneError(
            "There is no method to compare. Give some: --methods lora,bitfit. `deltune methods` lists all."
        )
    comparison = Comparison(
        model=model,
        data=data,
        methods=tuple(asked),
        task=task,
        task_options=_pairs("--task-option", task_option or []),
        evaluation_data=evaluation_data,
        seeds=_numbers(seeds),
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        train_size=train_size,
        evaluation_size=evaluation_size,
        split_seed=split_seed,
        max_length=max_length,
        learning_rates=_rates(learning_rate or []),
        head_learning_rate=head_learning_rate,
        model_dropout=model_dropout,
    )
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    outcome = run_comparison(comparison, output, jobs=jobs, keep=keep, console=console)
    _print_outcome(console, outcome, output)


def _print_outcome(console: Any, outcome: Any, output: Path) -> None:
    from deltune.compare.report import write_report

    if outcome.results:
        console.print(outcome.table.rich())
        console.print()
    for row in outcome.table.rows:
        if row.failures:
            console.print(f"{row.name} failed: {row.error}", style="red", markup=False, soft_wrap=True)
    if outcome.repeated:
        console.print(f"{outcome.repeated} runs had finished before and were not done again.", style="dim")
    if outcome.others:
        console.print(
            f"{output / 'results.jsonl'} also holds {outcome.others} runs with other settings. They are kept and not "
            "shown here.",
            style="dim",
            markup=False,
            soft_wrap=True,
        )
    if outcome.interrupted:
        planned = len(outcome.comparison.runs)
        finished = sum(len(row.results) for row in outcome.table.rows)
        console.print(f"Stopped with {finished} of {planned} runs finished. The same command goes on from there.")
        raise typer.Exit(130)
    files = write_report(outcome, output)
    console.print(f"Report: {files.html}", markup=False, soft_wrap=True)
    if not files.pictures:
        console.print("It has no pictures. For these, install matplotlib: pip install 'deltune\\[report]'")


def _numbers(text: str) -> tuple[int, ...]:
    from deltune.errors import DeltuneError

    try:
        return tuple(int(piece) for piece in text.split(",") if piece.strip())
    except ValueError as error:
        raise DeltuneError(
            f"--seeds must be whole numbers separated by commas, such as 0,1,2, not {text!r}."
        ) from error


def _pairs(option: str, items: list[str]) -> dict[str, Any]:
    """``name=value`` texts; the last equals sign divides, because a method may hold some itself."""
    from deltune.errors import DeltuneError

    pairs = {}
    for item in items:
        name, equals, value = item.rpartition("=")
        if not equals or not name:
            raise DeltuneError(f"{option} needs name=value, not {item!r}.")
        pairs[name.strip()] = value.strip()
    return pairs


def _rates(items: list[str]) -> dict[str, float]:
    from deltune.errors import DeltuneError

    pairs = _pairs("--learning-rate", items)
    try:
        return {name: float(value) for name, value in pairs.items()}
    except ValueError as error:
        raise DeltuneError(f"--learning-rate needs a method and a number, such as lora=3e-4: {error}.") from error
