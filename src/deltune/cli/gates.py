"""``deltune gates``: how much of each gated change a delta uses on data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.reporting import check_picture, drawing, print_json

__all__ = ["gates"]


def gates(
    delta: Annotated[Path, typer.Argument(help="Folder that deltune tune wrote.")],
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    data: Annotated[str, typer.Option(help="Data of the task: csv, tsv, json, jsonl, parquet, conll, or a name.")],
    split: Annotated[str | None, typer.Option(help="Split of a named dataset.")] = None,
    limit: Annotated[int, typer.Option(help="Use this many rows, from the beginning.", min=1)] = 256,
    batch_size: Annotated[int, typer.Option(help="Rows of a batch.", min=1)] = 32,
    picture: Annotated[Path | None, typer.Option(help="Draw them into this file: .svg, .png or .pdf.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Show how much of each part a gated sum such as unipelt uses, by layer: means of its gates over the data.

    A gate is between 0, where its part is not used in that layer, and 1.
    """
    check_picture(picture)
    loaded = load_delta(model, delta, "cpu")
    import deltune
    from deltune.measure import gate_picture, gate_table
    from deltune.tasks import read_dataset
    from deltune.training.evaluation import batches_of

    rows = read_dataset(data, split, limit)
    values = deltune.gate_values(loaded.tuned, batches_of(loaded.task, rows, loaded.tokenizer, batch_size))
    if picture is not None:
        with drawing(picture):
            gate_picture(values, picture, f"mean gates on {len(rows):,} rows")
    if json:
        print_json({"gates": values, "picture": None if picture is None else str(picture)})
        return
    typer.echo(gate_table(values))
    if picture is not None:
        typer.echo(f"drawn in {picture}")
