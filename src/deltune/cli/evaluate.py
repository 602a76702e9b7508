"""``deltune eval``: measure a delta on data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.loaded import Loaded, load_delta
from deltune.cli.reporting import plain_number, print_json
from deltune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["evaluate"]


def evaluate(
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    delta: Annotated[Path, typer.Option(help="Folder that deltune tune wrote.")],
    data: Annotated[str, typer.Option(help="Data with labels: csv, tsv, json, jsonl, parquet, conll, or a name.")],
    split: Annotated[str | None, typer.Option(help="Split of a named dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Measure on this many rows, from the beginning.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 32,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best that is present if none.")] = None,
    generate: Annotated[bool, typer.Option("--generate", help="Also generate texts and compare them.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated text, in tokens.", min=1)] = 128,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Measure a delta on data, on the terms of the task that it was trained for."""
    from deltune.training.settings import TrainingSettings

    TrainingSettings(precision=precision, device=device)
    loaded = load_delta(model, delta, device)
    from deltune.tasks import read_dataset
    from deltune.training import evaluate as measure

    rows = read_dataset(data, split, limit)
    metrics = measure(loaded.tuned, loaded.task, rows, loaded.tokenizer, batch_size=batch_size, precision=precision)
    if generate:
        metrics.update(_generated(loaded, rows, batch_size, precision, max_new_tokens))
    if json:
        print_json({"metrics": metrics, "rows": len(rows), "method": str(_method_of(loaded))})
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("metric", "value")
    for name, value in metrics.items():
        table.add_row(name, plain_number(value))
    console = Console()
    console.print(f"{_method_of(loaded)} on {len(rows):,} rows", markup=False, highlight=False)
    console.print(table)


def _method_of(loaded: Loaded) -> Any:
    return loaded.tuned.attachments[loaded.tuned.active[0]].method


def _generated(loaded: Loaded, rows: Dataset, batch_size: int, precision: str, length: int) -> dict[str, float]:
    """Generated texts against the true ones, for tasks that have them."""
    from deltune.tasks.generative import GenerativeTask
    from deltune.training import predict

    task = loaded.task
    answers = task.answers(rows) if isinstance(task, GenerativeTask) else None
    if not isinstance(task, GenerativeTask) or answers is None:
        raise DataError(f"The task {task.name!r} has no true texts to compare generated ones with: omit --generate.")
    predictions = predict(
        loaded.tuned,
        task,
        rows,
        loaded.tokenizer,
        batch_size=batch_size,
        precision=precision,
        max_new_tokens=length,
    )
    return task.generation_metrics([item["text"] for item in predictions], answers)
