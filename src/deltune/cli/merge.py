"""``deltune merge``: fold a delta into its model; or, with a strategy, merge deltas into one delta."""

from __future__ import annotations

import errno
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from deltune.cli.loaded import load_delta
from deltune.cli.merge_deltas import MergeRequest, merge_folders
from deltune.cli.reporting import plain_number, print_json
from deltune.errors import CheckpointError, StateError, suggestion

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Drift", "merge"]

_INTO = ("dequantized", "original", "quantized")
_PROBE_ROWS, _PROBE_TOKENS = 4, 16
#: Merging in float32 drifts by about a millionth; by this much the folder holds something else.
_LARGEST_DRIFT = 0.05
#: A folder in 4 bits is read as it was written, up to the order of sums.
_LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Drift:
    """How far the logits of the merged model are from those of the model with its delta.

    Attributes:
        largest: greatest absolute difference.
        relative: the same as a share of the greatest absolute logit.
        agreement: share of positions where both have the same greatest logit.
    """

    largest: float
    relative: float
    agreement: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Drift:
        """Compare logits."""
        before, after = before.float(), after.float()
        largest = float((before - after).abs().max())
        agreement = float((before.argmax(-1) == after.argmax(-1)).float().mean())
        return cls(largest, largest / max(float(before.abs().max()), 1e-12), agreement)


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
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the folder if it exists.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
) -> None:
    """Fold a delta into its model; or, with --strategy, merge deltas into a new delta.

    Without a strategy there is one delta, and the output is an ordinary model folder with its tokenizer. The folder is
    read  again before it is put in its place, and its logits are compared with those of the model with the delta beside
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
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise StateError(f"{output} exists already. Choose another folder, or replace it with --overwrite.")
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
    from deltune.quantization import format_of, quantize

    loaded = load_delta(model, delta, "cpu")
    before = _logits(loaded.tuned.model)
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
    try:
        # the original matrices, and those that are rounded anew, are not those of the training
        drift = _write(merged, loaded.tokenizer, before, output, exact=into == "dequantized")
    except OSError as error:
        full = error.errno == errno.ENOSPC or "No space left" in str(error)
        raise CheckpointError(
            f"Could not write {output}: {'the disk is full' if full else error}. What stood there before is untouched. "
            "Free some space or choose another folder, and run the same command again."
        ) from error
    again = drift if into == "quantized" else None
    if again is None and stored is not None:
        again = Drift.between(before, _logits(quantize(merged, stored)))
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


def _write(model: Any, tokenizer: Any, before: Tensor, output: Path, *, exact: bool) -> Drift:
    """Write the folder beside its place, read it again, compare, and put it in its place.

    Where the logits have to be those of before, a folder with others is refused; otherwise one that gives others than
    the merged model.
    """
    from deltune.training.snapshot import remove_unfinished

    output.parent.mkdir(parents=True, exist_ok=True)
    remove_unfinished(output.parent, output.name)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.", suffix=".part") as name:
        folder = Path(name) / "model"
        try:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        except Exception as error:
            if "No space left" in str(error) and not isinstance(error, OSError):
                raise OSError(errno.ENOSPC, str(error)) from error
            raise
        found = _logits(_read(model, folder))
        drift = Drift.between(before, found)
        if not exact and not Drift.between(_logits(model), found).relative <= _LARGEST_DIFFERENCE:
            raise StateError(
                f"The folder for {output} was written, but read again it does not do the same. It is gone."
            )
        if exact and not drift.relative <= _LARGEST_DRIFT:
            raise StateError(
                f"The merged model does not do the same: on a probe batch its logits differ by {drift.largest:.3g}, "
                f"{drift.relative:.1%} of the greatest. Nothing was written. Keep the delta beside the model, or merge "
                "in float32."
            )
        if output.exists():
            shutil.rmtree(output)
        folder.rename(output)
    return drift


def _read(model: Any, folder: Path) -> Any:
    """The model that was written, stored as ``model`` is."""
    from deltune.quantization import format_of, load_quantized

    stored = format_of(model)
    if stored is None:
        return type(model).from_pretrained(folder).eval()
    return load_quantized(folder, type(model), stored)


def _logits(model: Any) -> Tensor:
    """Logits for random tokens, the same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    vocabulary = int(model.get_input_embeddings().num_embeddings)
    ids = torch.randint(vocabulary, (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    with torch.no_grad():
        logits: Tensor = model(**batch).logits
    return logits
