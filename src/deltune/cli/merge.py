"""``deltune merge``: fold a delta into its model; or, with a strategy, merge deltas into one delta."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.merge_deltas import MergeRequest, merge_folders
from deltune.cli.reporting import plain_number, print_json
from deltune.errors import StateError, suggestion
from deltune.exporting.folders import DELTA_FILES, refuse_existing

__all__ = ["merge"]

_INTO = ("dequantized", "original", "quantized")


def merge(
    model: Annotated[str, typer.Option(help="Folder of the pretrained model.")],
    output: Annotated[Path, typer.Option(help="Folder for the merged model, or with --strategy for the new delta.")],
    deltas: Annotated[
        list[Path] | None, typer.Argument(help="Folders that deltune tune wrote; several with --strategy.")
    ] = None,
    delta: Annotated[Path | None, typer.Option(help="The one delta to fold in, instead of an argument.")] = None,
    strategy: Annotated[
        str | None,
        typer.Option(help="Merge deltas into a delta: linear, ties, dare, dare-ties, concatenate or svd."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Factor of each delta, joined by commas: 1,1,-1. By default an average; in TIES 1 each."),
    ] = None,
    scale: Annotated[float | None, typer.Option(help="Factor of the merged change.")] = None,
    density: Annotated[
        float | None, typer.Option(help="Share of entries that ties keeps; 0.2, and 1 for dare-ties, if none.")
    ] = None,
    drop: Annotated[float | None, typer.Option(help="Probability with which dare drops an entry; 0.9 if none.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of what dare drops; 0 if none.")] = None,
    rank: Annotated[
        int | None, typer.Option(help="Compress merged changes of matrices to a LoRA of this rank.", min=1)
    ] = None,
    heads: Annotated[
        str | None,
        typer.Option(help="The folder whose task head the new delta gets, or average; no head if none."),
    ] = None,
    initial: Annotated[
        Path | None,
        typer.Option(help="A delta as it was before training, for methods that are merged tensor by tensor."),
    ] = None,
    missing: Annotated[
        str | None, typer.Option(help="What a delta does not change at all: refuse (the default), or zero.")
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Of one delta that was trained beside a quantised model: fold it into the numbers that training used "
            "(dequantized) or into those of the folder (original); or quantise the merged model again (quantized), "
            "which loses part of the change. The default is dequantized."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the folder that an earlier merge wrote.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Fold a delta into its model; or, with --strategy, merge deltas into a new delta.

    Without a strategy there is one delta, and the output is an ordinary model folder with its tokenizer. The folder is
    read again before it is put in its place, and its logits are compared with those of the model with the delta beside
    it, quantised if that is how it was trained.

    With a strategy the output is a delta, as deltune tune writes it. Changes of weights are merged as what they change,
    whatever their ranks; adapters, prompts and prefixes tensor by tensor, which needs deltas that were trained from the
    same initial values (--initial).
    """
    given = [*(deltas or []), *([] if delta is None else [delta])]
    options = MergeRequest(
        strategy=strategy,
        weights=weights,
        scale=scale,
        density=density,
        drop=drop,
        seed=seed,
        rank=rank,
        heads=heads,
        initial=initial,
        missing=missing,
    )
    options.check(given, into)
    if into is not None and into not in _INTO:
        raise StateError(f"--into cannot be {into!r}. {suggestion(into, _INTO)}")
    read: list[str | Path] = [model, *given, *([] if initial is None else [initial])]
    refuse_existing(output, overwrite, keep=read, known=() if strategy is None else DELTA_FILES)
    if strategy is not None:
        merged = merge_folders(model, given, output, options)
        if json:
            print_json({"output": str(output), **vars(merged)})
        else:
            typer.echo(f"{merged} It is in {output}.")
        return
    _fold(model, given[0], output, into or "dequantized", json)


def _fold(model: str, delta: Path, output: Path, into: str, json: bool) -> None:
    """Write a model with a delta folded in, and say how far it is from the two side by side."""
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
