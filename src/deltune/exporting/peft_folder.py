"""A delta as a folder of Hugging Face PEFT, for peft itself and for vLLM, which reads such folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from deltune.checkpoints.files import write_json, write_tensors
from deltune.checkpoints.peft.layout import CONFIG_FILE, PREFIX, TENSOR_FILE
from deltune.errors import StateError
from deltune.exporting.comparison import Drift, probe_logits, refuse_drift
from deltune.exporting.factors import Factors, factors_of
from deltune.exporting.folders import write_checked
from deltune.loading import load
from deltune.tuned import Tuned

__all__ = ["VLLM_RANKS", "probe_again", "rank_for_vllm", "write_factors", "write_peft", "write_vllm"]

#: What vLLM's ``--max-lora-rank`` can be: a LoRA must not have a greater rank than the greatest.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


def write_peft(tuned: Tuned, name: str, output: Path) -> Drift:
    """Write an attachment as a PEFT folder, read it again beside the same model and compare.

    Raises:
        StateError: if the folder does not do the same; nothing is left of it.
        CheckpointError: if PEFT has no such method, or it cannot be written.
    """
    return _write(tuned, name, output, lambda folder: None)


def write_vllm(tuned: Tuned, name: str, output: Path) -> Drift:
    """As :func:`write_peft`, within what vLLM takes: one rank and one scale for all matrices, and LoRA alone.

    Where ranks differ, as AdaLoRA leaves them, the thinner factors get rows and columns of zeros.

    Raises:
        StateError: if vLLM would refuse the delta, with what to change; or as :func:`write_peft`.
        CheckpointError: as :func:`write_peft`.
    """
    model: Any = tuned.model
    if model.config.is_encoder_decoder or not model.can_generate():
        raise StateError(
            f"vLLM takes a LoRA beside a decoder that generates text, and {type(model).__name__} is none. Export with "
            "--format peft or merged."
        )
    layers = [f"{layer}." for stack in tuned.anatomy.stacks.values() for layer in stack.layers]
    found = list(factors_of(tuned.attachments[name], "vLLM"))
    outside = [item.module for item in found if not item.module.startswith(tuple(layers))]
    if outside:
        raise StateError(
            f"vLLM takes changes of the linear maps inside the layers, and {outside[0]} lies outside. Leave it out of "
            "the targets and train again, or fold the delta in with --format merged."
        )
    rank_for_vllm(found)
    return _write(tuned, name, output, lambda folder: _make_uniform(folder, found))


def rank_for_vllm(factors: Sequence[Factors]) -> int:
    """The smallest ``--max-lora-rank`` that takes these.

    Raises:
        StateError: if none does.
    """
    rank = max(item.rank for item in factors)
    for limit in VLLM_RANKS:
        if rank <= limit:
            return limit
    raise StateError(
        f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this delta has rank {rank}. Fold it in with --format merged, or "
        "train a smaller rank."
    )


def _write(tuned: Tuned, name: str, output: Path, change: Callable[[Path], None]) -> Drift:
    before = probe_logits(tuned.model)

    def write(folder: Path) -> None:
        tuned.save(folder, name, format="peft")
        change(folder)

    def check(folder: Path) -> Drift:
        drift = Drift.between(before, probe_again(tuned, folder))
        refuse_drift(drift, tuned.model, output)
        return drift

    return write_checked(output, write, check)


def probe_again(tuned: Tuned, folder: Path) -> Tensor:
    """Logits of the model with what a PEFT folder holds, as :func:`probe_logits` gives them; ``tuned`` stays as it is.

    Raises:
        CheckpointError: if the folder cannot be read.
    """
    again = _free_name(tuned)
    with tuned.activated():
        try:
            load(tuned, folder, again, format="peft")
            return probe_logits(tuned.model)
        finally:
            if again in tuned.attachments:
                tuned.detach(again)


def write_factors(factors: Sequence[Factors], folder: Path) -> None:
    """Write the changes of linear maps as a PEFT folder, each with its own rank and scale."""
    write_tensors(folder / TENSOR_FILE, _tensors(factors), {"format": "pt"})
    config = {
        "peft_type": "LORA",
        "r": factors[0].rank,
        "lora_alpha": factors[0].rank * factors[0].scale,
        "target_modules": [item.module for item in factors],
        "rank_pattern": {item.module: item.rank for item in factors},
        "alpha_pattern": {item.module: item.rank * item.scale for item in factors},
    }
    write_json(folder / CONFIG_FILE, config)


def _tensors(factors: Sequence[Factors]) -> dict[str, Tensor]:
    return {
        f"{PREFIX}{item.module}.lora_{side}.weight": value
        for item in factors
        for side, value in (("A", item.A), ("B", item.B))
    }


def _free_name(tuned: Tuned) -> str:
    number = 0
    while f"exported_{number}" in tuned.attachments:
        number += 1
    return f"exported_{number}"


def _make_uniform(folder: Path, found: Sequence[Factors]) -> None:
    """Give all factors in a PEFT folder one rank and one scale; vLLM takes those of the configuration for all."""
    if len({(item.rank, item.scale) for item in found}) == 1:
        return
    most = max(item.rank for item in found)
    uniform = [
        Factors(
            item.module,
            F.pad(item.A, (0, 0, 0, most - item.rank)),
            F.pad(item.scale * item.B, (0, most - item.rank)),
            1.0,
        )
        for item in found
    ]
    tensors = load_file(folder / TENSOR_FILE)
    changed = {key: value.to(tensors[key].dtype) for key, value in _tensors(uniform).items()}
    write_tensors(folder / TENSOR_FILE, tensors | changed, {"format": "pt"})
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    config |= {"r": most, "lora_alpha": most, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    write_json(folder / CONFIG_FILE, config)
