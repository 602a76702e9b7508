"""``deltune merge``: fold a delta into its model and write an ordinary model folder."""

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
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise StateError(f"{output} exists already. Choose another folder, or replace it with --overwrite.")
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
