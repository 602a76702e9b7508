"""``deltune predict``: labels, numbers or texts from a tuned model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.reporting import print_json
from deltune.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from deltune.tasks import Task

__all__ = ["predict"]


def predict(
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    delta: Annotated[Path, typer.Option(help="Folder that deltune tune wrote.")],
    data: Annotated[
        str | None, typer.Option(help="Data without labels: csv, tsv, json, jsonl, parquet, conll.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSON lines file for the predictions; printed if none.")] = None,
    text: Annotated[
        list[str] | None, typer.Option(help="A text to predict for; as often as the task reads columns.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Split of a named dataset.")] = None,
    limit: Annotated[int | None, typer.Option(help="Predict for this many rows, from the beginning.", min=1)] = None,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 32,
    precision: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or mps; the best that is present if none.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest generated text, in tokens.", min=1)] = 128,
) -> None:
    """Predict for a text or a file, for the task that the delta was trained for.

    Each prediction is one line of JSON: a label with its probabilities, a number, tags of words, or a
    generated text.
    """
    from deltune.training.settings import TrainingSettings

    TrainingSettings(precision=precision, device=device)
    if (data is None) == (not text):
        raise DataError("Say what to predict for: either --data FILE or --text TEXT.")
    loaded = load_delta(model, delta, device)
    from deltune.tasks import read_dataset
    from deltune.training import predict as predictions_of

    rows = read_dataset(data, split, limit) if data is not None else _typed(loaded.task, text or [])
    predictions = predictions_of(
        loaded.tuned,
        loaded.task,
        rows,
        loaded.tokenizer,
        batch_size=batch_size,
        precision=precision,
        max_new_tokens=max_new_tokens,
    )
    if output is None:
        for prediction in predictions:
            print_json(prediction)
        return
    _write(output, predictions)
    typer.echo(f"Wrote {len(predictions):,} predictions to {output}.")


def _typed(task: Task, texts: list[str]) -> Dataset:
    """One row of what was typed, in the columns that the task reads."""
    from datasets import Dataset

    columns = task.required_texts(labelled=False)
    if len(columns) != len(texts):
        raise DataError(
            f"The task reads {len(columns)} texts ({', '.join(columns)}), but --text was given {len(texts)} times."
            if columns
            else "This task reads whole conversations. Put them into a file and use --data."
        )
    others = [name for name in task.columns(labelled=False) if name not in columns]
    return Dataset.from_list([{**dict.fromkeys(others, ""), **dict(zip(columns, texts, strict=True))}])


def _write(path: Path, predictions: list[dict[str, Any]]) -> None:
    import json

    from deltune.checkpoints import write_atomically

    lines = "".join(json.dumps(item, ensure_ascii=False, sort_keys=True) + "\n" for item in predictions)

    def write(temporary: Path) -> None:
        temporary.write_text(lines, encoding="utf-8")

    write_atomically(path, write)
