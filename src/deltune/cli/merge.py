"""``deltune merge``: fold a delta into its model and write an ordinary model folder."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.reporting import plain_number, print_json
from deltune.errors import StateError, suggestion
from deltune.exporting.folders import refuse_existing

__all__ = ["merge"]

_INTO = ("dequantized", "original", "quantized")


def merge(
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    delta: Annotated[Path, typer.Option(help="Folder that deltune tune wrote.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    into: Annotated[
        str,
        typer.Option(
            help="Of a delta that was trained beside a quantised model: fold it into the numbers that training used "
            "(dequantized) or into those of the folder (original); or quantise the merged model again (quantized), "
            "which loses part of the change."
        ),
    ] = "dequantized",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Fold a delta into its model, and write an ordinary model folder with its tokenizer.

    The folder is read again before it is put in its place, and its logits are compared with those of the model
    with the delta beside it, quantised if that is how it was trained.
    """
    if into not in _INTO:
        raise StateError(f"--into cannot be {into!r}. {suggestion(into, _INTO)}")
    refuse_existing(output, overwrite)
    from deltune.exporting import Drift, probe_logits, write_model
    from deltune.quantization import format_of, quantize

    loaded = load_delta(model, delta, "cpu")
    before = probe_logits(loaded.tuned.model)
    method = str(loaded.tuned.attachments[loaded.tuned.active[0]].method)
    stored = format_of(loaded.tuned.model)
    if stored is None and into != "dequantized":
        raise StateError(f"--into {into} is for deltas that were trained beside a quantised model. Leave it out.")
    if stored is not None and into == "original":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that the model is not quantised is what was asked for
            loaded = load_delta(model, delta, "cpu", quantized=False)
    merged = loaded.tuned.merge(reversible=False, dequantize=True)
    if stored is not None and into == "quantized":
        merged = quantize(merged, stored)
    # the original matrices, and those that are rounded anew, are not those of the training
    drift = write_model(merged, loaded.tokenizer, before, output, exact=into == "dequantized")
    again = drift if into == "quantized" else None
    if again is None and stored is not None:
        again = Drift.between(before, probe_logits(quantize(merged, stored)))
    if json:
        found = {"output": str(output), "method": method, "drift": vars(drift)}
        print_json(found if again is None else {**found, "into": into, "drift_if_quantized_again": vars(again)})
        return
    typer.echo(
        f"Merged {method} into {output}. On a probe batch its logits differ by at most {plain_number(drift.largest)} "
        f"({drift.relative:.2g} of the greatest) from those of the model with the delta; "
        f"{drift.agreement:.1%} of the positions prefer the same."
    )
    if into == "quantized":
        typer.echo(
            "It is in 4 bits, and rounding has lost part of the change. Load it with "
            "deltune.quantization.load_quantized, or where bitsandbytes is installed with from_pretrained."
        )
    elif again is not None:
        typer.echo(
            f"It holds floating-point numbers, merged into the {into} matrices. Quantised again as in training its "
            f"logits would differ by {again.relative:.2g} of the greatest, {again.agreement:.1%} preferring the same: "
            "rounding loses part of the change. To stay in 4 bits keep the delta beside the model."
        )
