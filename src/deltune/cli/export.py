"""``deltune export``: a delta in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.merge import merge
from deltune.cli.reporting import plain_number, print_json
from deltune.errors import StateError, suggestion
from deltune.exporting import FORMATS
from deltune.exporting.folders import refuse_existing

__all__ = ["export"]


def export(
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    delta: Annotated[Path, typer.Option(help="Folder that deltune tune wrote.")],
    format: Annotated[
        str,
        typer.Option(
            help="peft: a folder of Hugging Face PEFT; vllm: the same within vLLM's limits; gguf: a LoRA for "
            "llama.cpp; merged: the model with the delta folded in."
        ),
    ],
    output: Annotated[Path, typer.Option(help="Folder to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder that an earlier export wrote.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Write a delta in the format of another program.

    What was written is read again before it is put in its place, and its logits are compared with those of the model
    with the delta. What does not do the same is not kept.

    --format merged is what deltune merge does, which has more to choose from for quantised models.
    """
    if format not in FORMATS:
        raise StateError(f"--format cannot be {format!r}. {suggestion(format, FORMATS)}")
    refuse_existing(output, overwrite, keep=[model, delta])
    if format == "merged":
        merge(model=model, delta=delta, output=output, overwrite=overwrite, json=json)
        return
    loaded = load_delta(model, delta, "cpu")
    import deltune

    found = deltune.export(loaded.tuned, output, format, overwrite=overwrite)
    method = str(loaded.tuned.attachments[loaded.tuned.active[0]].method)
    if json:
        print_json({"output": str(output), "format": format, "method": method, "drift": vars(found.drift)})
        return
    drift = found.drift
    typer.echo(
        f"Exported {method} to {output} ({format}). Read again, its logits on a probe batch differ by at most "
        f"{plain_number(drift.largest)} ({drift.relative:.2g} of the greatest) from those of the model with the delta; "
        f"{drift.agreement:.1%} of the positions prefer the same. {found.use}"
    )
