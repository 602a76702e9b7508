"""One call for all formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltune.errors import StateError, suggestion
from deltune.exporting import FORMATS
from deltune.exporting.comparison import Drift, probe_logits
from deltune.exporting.folders import refuse_existing
from deltune.quantization import format_of
from deltune.tuned import Tuned

__all__ = ["Exported", "export"]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where it is.
        drift: how far its logits, read again, are from those of the live model.
        use: how to use it, in one sentence.
    """

    folder: Path
    drift: Drift
    use: str


def export(
    tuned: Tuned,
    path: str | Path,
    format: str,
    *,
    name: str | None = None,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> Exported:
    """Write a delta in the format of another program, and compare what was written with the live model.

    Args:
        tuned: the handle; it is as before afterwards.
        path: the folder.
        format: ``peft``, a folder of Hugging Face PEFT; ``vllm``, the same within vLLM's limits; ``gguf``, a LoRA for
            llama.cpp; ``merged``, an ordinary model folder with the delta folded in.
        name: which attachment; by default the only live one. It is made the live one while it is written.
        tokenizer: written beside a merged model, if there is one.
        overwrite: replace the folder if it exists and holds nothing but what is written here.

    Raises:
        StateError: if the format has no place for this delta, or what was written does not do the same; nothing is
            left of it then. Or if the place is not to be replaced.
        CheckpointError: if it cannot be written.
    """
    if format not in FORMATS:
        raise StateError(f"There is no export format {format!r}. {suggestion(format, FORMATS)}")
    output = Path(path)
    base = str(getattr(getattr(tuned.model, "config", None), "_name_or_path", "") or "")
    refuse_existing(output, overwrite, "overwrite", keep=[base] if base else [])
    if name is None and len(tuned.active) != 1:
        raise StateError(f"Say which attachment to export: name= one of {', '.join(tuned.attachments)}.")
    chosen = name or tuned.active[0]
    with tuned.activated(chosen):
        drift, use = _WRITERS[format](tuned, chosen, output, tokenizer)
    return Exported(output, drift, use)


def _peft(tuned: Tuned, name: str, output: Path, tokenizer: Any) -> tuple[Drift, str]:
    from deltune.exporting.peft_folder import write_peft

    return write_peft(tuned, name, output), "Load it with peft.PeftModel.from_pretrained(model, folder)."


def _vllm(tuned: Tuned, name: str, output: Path, tokenizer: Any) -> tuple[Drift, str]:
    from deltune.exporting.factors import factors_of
    from deltune.exporting.peft_folder import rank_for_vllm, write_vllm

    drift = write_vllm(tuned, name, output)
    rank = rank_for_vllm(list(factors_of(tuned.attachments[name], "vLLM")))
    return drift, f"Serve it with --enable-lora --max-lora-rank {rank} --lora-modules {name}={output}."


def _gguf(tuned: Tuned, name: str, output: Path, tokenizer: Any) -> tuple[Drift, str]:
    from deltune.exporting.gguf import FILE, write_gguf

    drift = write_gguf(tuned, name, output)
    return drift, f"Give it to llama.cpp's programs with --lora {output / FILE}, beside the model's own GGUF file."


def _merged(tuned: Tuned, name: str, output: Path, tokenizer: Any) -> tuple[Drift, str]:
    from deltune.exporting.merged import write_model

    if format_of(tuned.model) is not None:
        raise StateError(
            "This model is quantised, and merging makes it a floating-point one for good. Merge a copy with deltune "
            "merge, which says how to fold the delta in, or with tuned.merge(dequantize=True, reversible=False)."
        )
    before = probe_logits(tuned.model)
    tuned.merge()
    try:
        drift = write_model(tuned.model, tokenizer, before, output, exact=True)
    finally:
        tuned.unmerge()
    return drift, "Load it with from_pretrained; llama.cpp's convert_hf_to_gguf.py makes a GGUF file of it."


_WRITERS = {"peft": _peft, "vllm": _vllm, "gguf": _gguf, "merged": _merged}
