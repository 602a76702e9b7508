"""A model with its delta folded in, as an ordinary model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from deltune.errors import StateError
from deltune.exporting.comparison import LARGEST_DIFFERENCE, LARGEST_DRIFT, Drift, probe_logits
from deltune.exporting.folders import write_checked

__all__ = ["write_model"]


def write_model(model: Any, tokenizer: Any, before: Tensor, output: Path, *, exact: bool) -> Drift:
    """Write a merged model, read it again and compare.

    Where the logits have to be those of before, a folder with others is refused; otherwise one that gives others than
    the merged model.

    Args:
        model: merged.
        tokenizer: to be written beside it; None for none.
        before: logits of the model with its delta, as :func:`probe_logits` gives them.
        output: the folder.
        exact: whether they have to be those of before.

    Raises:
        StateError: if the folder does not do the same; nothing is left of it.
        CheckpointError: if it cannot be written.
    """

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)

    def check(folder: Path) -> Drift:
        found = probe_logits(_read(model, folder)).to(before.device)
        drift = Drift.between(before, found)
        if not exact and not Drift.between(probe_logits(model), found).relative <= LARGEST_DIFFERENCE:
            raise StateError(
                f"The folder for {output} was written, but read again it does not do the same. It is gone."
            )
        if exact and not drift.relative <= LARGEST_DRIFT:
            raise StateError(
                f"The merged model does not do the same: on a probe batch its logits differ by {drift.largest:.3g}, "
                f"{drift.relative:.1%} of the greatest. Nothing was written. Keep the delta beside the model, or merge "
                "in float32."
            )
        return drift

    return write_checked(output, write, check)


def _read(model: Any, folder: Path) -> Any:
    """The model that was written, stored as ``model`` is."""
    from deltune.quantization import format_of, load_quantized

    stored = format_of(model)
    if stored is None:
        return type(model).from_pretrained(folder).eval()
    return load_quantized(folder, type(model), stored)
