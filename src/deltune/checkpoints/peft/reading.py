"""From a folder of peft to a method of deltune with the same outputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.checkpoints.formats import Saved
from deltune.checkpoints.peft.contents import Contents
from deltune.checkpoints.peft.ia3 import IA3_OPTIONS, read_ia3
from deltune.checkpoints.peft.kronecker import LOKR_OPTIONS, read_lokr
from deltune.checkpoints.peft.layout import CONFIG_FILE, PICKLE_FILE, TENSOR_FILE, Options
from deltune.checkpoints.peft.lora import ADALORA_OPTIONS, LORA_OPTIONS, read_adalora, read_lora
from deltune.checkpoints.peft.prompts import (
    P_TUNING_OPTIONS,
    PREFIX_OPTIONS,
    PROMPT_OPTIONS,
    read_prefix,
    read_prompt,
)
from deltune.checkpoints.peft.selected import read_selected
from deltune.checkpoints.weights import read_config, read_weights
from deltune.errors import CheckpointError, suggestion
from deltune.methods import Method, Sum

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["read"]

_OPTIONS: Mapping[str, Options] = {
    "LORA": LORA_OPTIONS,
    "ADALORA": ADALORA_OPTIONS,
    "IA3": IA3_OPTIONS,
    "LOKR": LOKR_OPTIONS,
    "PREFIX_TUNING": PREFIX_OPTIONS,
    "PROMPT_TUNING": PROMPT_OPTIONS,
    "P_TUNING": P_TUNING_OPTIONS,
}


def read(folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
    """What ``folder`` holds for ``model``.

    Raises:
        CheckpointError: if it is damaged, does not fit the model, or says what deltune cannot do.
    """
    config = read_config(folder / CONFIG_FILE)
    kind = str(config.get("peft_type"))
    if kind not in _OPTIONS:
        raise CheckpointError(
            f"{folder / CONFIG_FILE} says no peft_type. peft writes one: copy the folder again."
            if "peft_type" not in config
            else f"{folder} holds an adapter of the type {kind!r}, which deltune does not read. "
            f"{suggestion(kind, _OPTIONS)} Nothing was loaded."
        )
    notes = [*_class_note(config, model), *_OPTIONS[kind].check(config, folder)]
    contents = Contents(folder, config, read_weights(folder, TENSOR_FILE, PICKLE_FILE, pickled), model, anatomy)
    added: dict[str, Tensor] = {}
    parts: list[tuple[Method, dict[str, Tensor]]]
    if kind in ("LORA", "ADALORA"):
        method, tensors, added = (read_lora if kind == "LORA" else read_adalora)(contents)
        parts = [(method, tensors)]
    elif kind == "LOKR":
        parts = read_lokr(contents)
    else:
        reader = {"IA3": read_ia3, "PREFIX_TUNING": read_prefix}.get(kind, read_prompt)
        parts = [reader(contents)]
    selecting, values, head = read_selected(contents, added)
    methods = [method for method, _ in parts] + selecting
    if len(methods) == 1:
        return Saved("default", methods[0], {**parts[0][1], **values}, head, notes=(*notes, *contents.notes))
    tensors = {f"{number}.{key}": value for number, (_, own) in enumerate(parts) for key, value in own.items()}
    return Saved("default", Sum(tuple(methods)), {**tensors, **values}, head, notes=(*notes, *contents.notes))


def _class_note(config: Mapping[str, object], model: nn.Module) -> list[str]:
    """Whether the configuration says another class of model."""
    mapping = config.get("auto_mapping")
    said = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if said is None or said == type(model).__name__:
        return []
    return [f"it was trained on a {said}, and this model is a {type(model).__name__}."]
