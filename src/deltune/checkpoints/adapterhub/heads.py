"""Task heads of AdapterHub's library: those of transformers' classes, and its flexible ones where they are the same.

A flexible head is a run of dropout, linear map and non-linearity for each layer; its linear maps are numbered 1, 4, 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.checkpoints.weights import read_config, read_weights

__all__ = ["HEAD_CONFIG", "HEAD_WEIGHTS", "has_head", "read_head", "written_head"]

HEAD_CONFIG = "head_config.json"
HEAD_WEIGHTS = ("model_head.safetensors", "pytorch_model_head.bin")

#: Flexible heads that compute what a class of transformers does: type, layers, activation, whether the pooler is read;
#: and the modules of that class that its linear maps are.
_POOLED = ("classification", 1, None, True)
_TANH = ("classification", 2, "tanh", False)
_TAGGING = ("tagging", 1, None, False)
_EQUAL: dict[str, tuple[tuple[str, int, str | None, bool], tuple[str, ...]]] = {
    "BertForSequenceClassification": (_POOLED, ("classifier",)),
    "RobertaForSequenceClassification": (_TANH, ("classifier.dense", "classifier.out_proj")),
    "XLMRobertaForSequenceClassification": (_TANH, ("classifier.dense", "classifier.out_proj")),
    "DistilBertForSequenceClassification": (
        ("classification", 2, "relu", False),
        ("pre_classifier", "classifier"),
    ),
    "BertForTokenClassification": (_TAGGING, ("classifier",)),
    "RobertaForTokenClassification": (_TAGGING, ("classifier",)),
    "XLMRobertaForTokenClassification": (_TAGGING, ("classifier",)),
    "DistilBertForTokenClassification": (_TAGGING, ("classifier",)),
}


def has_head(folder: Path) -> bool:
    """Whether there is a head in ``folder``."""
    return any((folder / name).is_file() for name in (HEAD_CONFIG, *HEAD_WEIGHTS))


def read_head(folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> dict[str, Tensor]:
    """The tensors of the head in ``folder``, by the names of the model's parameters where they are its own.

    What is not part of a task head, such as the map to the vocabulary, is frozen in deltune. It is passed over where
    the model has the same values.

    Args:
        folder: with a head.
        model: the model.
        anatomy: its parts.
        pickled: whether pickled weights may be read.

    Raises:
        CheckpointError: if it is damaged.
    """
    config = read_config(folder / HEAD_CONFIG)
    tensors = read_weights(folder, *HEAD_WEIGHTS, pickled)
    if isinstance(config.get("config"), dict):
        tensors = _renamed(tensors, config["config"], str(config.get("name")), type(model).__name__)
    heads = ((module, model.get_submodule(module)) for module in anatomy.head)
    trained = {f"{module}.{name}" for module, head in heads for name, _ in head.named_parameters()}
    present = model.state_dict()
    return {
        key: value
        for key, value in tensors.items()
        if key in trained or not (key in present and _same(value, present[key]))
    }


def _same(value: Tensor, present: Tensor) -> bool:
    return value.shape == present.shape and bool(value.to(present).equal(present))


def _renamed(tensors: Mapping[str, Tensor], config: Mapping[str, Any], name: str, model: str) -> dict[str, Tensor]:
    """A flexible head in the names of the model's class where it computes the same; else in its own ones."""
    wanted, modules = _EQUAL.get(model, (None, ()))
    given = (
        config.get("head_type"),
        config.get("layers"),
        config.get("activation_function") if config.get("layers", 1) > 1 else None,
        bool(config.get("use_pooler")),
    )
    if given != wanted:
        return dict(tensors)
    maps = {f"heads.{name}.{3 * number + 1}": module for number, module in enumerate(modules)}
    renamed = {}
    for key, value in tensors.items():
        owner, _, attribute = key.rpartition(".")
        renamed[f"{maps[owner]}.{attribute}" if owner in maps else key] = value
    return renamed


def written_head(attachment: Attachment, model: nn.Module) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """What is said of the head that ``attachment`` trained, and its tensors; None if it trained none."""
    if not attachment.head_names:
        return None
    config: Any = getattr(model, "config", None)
    values = dict(attachment.selection)
    described = {
        "config": None,
        "name": None,
        "label2id": getattr(config, "label2id", None),
        "num_labels": getattr(config, "num_labels", None),
    }
    return described, {name: values[name] for name in attachment.head_names}
