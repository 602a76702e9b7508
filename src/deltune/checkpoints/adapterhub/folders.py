"""The files of AdapterHub's library: a folder for each adapter; a set-up has one for each of its parts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.checkpoints.adapterhub.fusions import read_fusion, written_fusion
from deltune.checkpoints.adapterhub.heads import HEAD_CONFIG, HEAD_WEIGHTS, has_head, read_head, written_head
from deltune.checkpoints.adapterhub.names import Names
from deltune.checkpoints.adapterhub.reading import read_adapter
from deltune.checkpoints.adapterhub.writing import written, written_adapter
from deltune.checkpoints.files import staged, write_json, write_tensors
from deltune.checkpoints.formats import Format, Saved
from deltune.checkpoints.weights import read_config, read_weights
from deltune.errors import CheckpointError
from deltune.methods.additive.adapter_fusion import AdapterFusion

__all__ = ["AdapterHub"]

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter.safetensors", "pytorch_adapter.bin")
_FUSION_CONFIG = "adapter_fusion_config.json"
_FUSION_WEIGHTS = ("model_adapter_fusion.safetensors", "pytorch_model_adapter_fusion.bin")
_SETUP = "adapter_setup.json"
#: What an earlier save may have left in a folder; what says the most of it first.
_STALE = (_SETUP, _FUSION_CONFIG, _CONFIG, HEAD_CONFIG, *_WEIGHTS, *_FUSION_WEIGHTS, *HEAD_WEIGHTS)
#: The version whose format is written.
_VERSION = "adapters.1.3.0"


class AdapterHub(Format):
    """Folders of ``adapters``."""

    name: ClassVar[str] = "adapterhub"
    wanted: ClassVar[str] = f"{_CONFIG} with {_WEIGHTS[0]}"

    def recognises(self, folder: Path) -> bool:
        """By the names of its files; another library has an ``adapter_config.json`` too, but says otherwise."""
        if any((folder / name).is_file() for name in (_SETUP, _FUSION_CONFIG, *_WEIGHTS)):
            return True
        try:
            config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(config, dict) and "config" in config and "peft_type" not in config

    def read(self, folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
        """The adapter, fusion or set-up in ``folder``, with its head."""
        if (folder / _SETUP).is_file():
            saved, with_head = _read_setup(folder, model, anatomy, pickled)
        elif (folder / _FUSION_CONFIG).is_file():
            saved, with_head = _read_fusion(folder, folder.parent, model, anatomy, pickled), folder
        else:
            saved, with_head = _read_single(folder, model, anatomy, pickled), folder
        if not has_head(with_head):
            return saved
        head = read_head(with_head, model, anatomy, pickled)
        return Saved(
            saved.name,
            saved.method,
            {**saved.tensors, **head},
            frozenset(head),
            base_model=saved.base_model,
            notes=saved.notes,
        )

    def write(
        self, attachment: Attachment, model: nn.Module, anatomy: Anatomy, base_model: Mapping[str, Any], folder: Path
    ) -> Path:
        """Write what the library's ``load_adapter`` reads; for a fusion its ``load_adapter_setup``."""
        names = Names(model, anatomy)
        head = written_head(attachment, model)
        with staged(folder, _STALE) as place:
            if isinstance(attachment.method, AdapterFusion):
                _write_fusion(attachment, model, names, place, head is not None)
            else:
                found = written_adapter(attachment, attachment.name, names)
                _write_files(place, {"config": found.config, "name": attachment.name}, found.tensors, model, names)
            if head is not None:
                described, tensors = head
                write_tensors(place / HEAD_WEIGHTS[0], tensors, {"format": "pt"})
                write_json(place / HEAD_CONFIG, {**_model_facts(model), **described})
        return folder


def _read_single(folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
    described = read_config(folder / _CONFIG)
    return read_adapter(described, read_weights(folder, *_WEIGHTS, pickled), model, anatomy)


def _read_setup(folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> tuple[Saved, Path]:
    """One adapter, or adapters and their fusion, and the folder in which their head would be.

    Raises:
        CheckpointError: if it is another composition.
    """
    setup = read_config(folder / _SETUP)
    block, head = setup.get("adapter_setup") or {}, setup.get("head_setup")
    names = _children(block)
    with_head = folder / _plain(head) if isinstance(head, str) else folder
    if block.get("type") == "Fuse":
        return _read_fusion(folder / ",".join(names), folder, model, anatomy, pickled), with_head
    if len(names) == 1:
        return _read_single(folder / names[0], model, anatomy, pickled), with_head
    raise CheckpointError(
        f"{folder} holds the composition {block.get('type')} of {', '.join(names)}. Of the library's compositions "
        "deltune reads Fuse; load the folders of the adapters one by one and combine them."
    )


def _children(block: Mapping[str, Any]) -> list[str]:
    """The names of the adapters in a block.

    Raises:
        CheckpointError: if there are blocks inside of it.
    """
    found = []
    for child in block.get("children", ()):
        inner = child.get("children", ()) if isinstance(child, dict) else (child,)
        if len(inner) != 1 or not isinstance(inner[0], str):
            raise CheckpointError(
                f"{_SETUP} nests compositions ({block.get('type')} of {child.get('type')}), which are not read."
            )
        found.append(_plain(inner[0]))
    return found


def _plain(name: str) -> str:
    """The name of a folder in a folder.

    Raises:
        CheckpointError: if it leads elsewhere.
    """
    if name in ("", ".", "..") or any(mark in name for mark in "/\\:\0"):
        raise CheckpointError(f"{name!r} is no name of an adapter: it would be a folder elsewhere. Nothing was loaded.")
    return name


def _read_fusion(folder: Path, around: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
    """The fusion in ``folder`` of adapters whose folders, of their names, are in it or in ``around``.

    Raises:
        CheckpointError: if an adapter is not there.
    """
    described = read_config(folder / _FUSION_CONFIG)
    names = described.get("adapter_names") or str(described.get("name")).split(",")
    adapters = []
    for name in map(_plain, names if isinstance(names, list) else names.split(",")):
        place = next((place / name for place in (folder, around) if (place / name).is_dir()), None)
        if place is None:
            raise CheckpointError(
                f"{folder} is a fusion of {', '.join(names)}, but there is no folder {name} in it or beside it. Save "
                "it with the library's save_adapter_setup, which writes the adapters too."
            )
        adapters.append(_read_single(place, model, anatomy, pickled))
    return read_fusion(described, read_weights(folder, *_FUSION_WEIGHTS, pickled), adapters, model, anatomy)


def _write_fusion(attachment: Attachment, model: nn.Module, names: Names, folder: Path, head: bool) -> None:
    described, tensors, adapters = written_fusion(attachment, names)
    ready = {name: written([stored], name, names) for name, stored in adapters.items()}
    for name, found in ready.items():
        _write_files(folder / name, {"config": found.config, "name": name}, found.tensors, model, names)
    place = folder / described["name"]
    write_tensors(place / _FUSION_WEIGHTS[0], _prefixed(tensors, names), {"format": "pt"})
    write_json(place / _FUSION_CONFIG, {**_model_facts(model), **described})
    children = [{"type": "single", "children": [name]} for name in adapters]
    block = {"type": "Fuse", "children": children}
    write_json(folder / _SETUP, {"adapter_setup": block, "head_setup": head or None, "version": _VERSION})


def _write_files(
    folder: Path, described: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, names: Names
) -> None:
    write_tensors(folder / _WEIGHTS[0], _prefixed(tensors, names), {"format": "pt"})
    write_json(folder / _CONFIG, {**_model_facts(model), **described})


def _prefixed(tensors: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    return {f"{names.prefix}{key}": value for key, value in tensors.items()}


def _model_facts(model: nn.Module) -> dict[str, Any]:
    """What the library writes of the model."""
    config: Any = model.config
    return {
        "hidden_size": getattr(config, "hidden_size", None),
        "model_class": type(model).__name__,
        "model_name": getattr(config, "_name_or_path", "") or None,
        "model_type": config.model_type,
        "version": _VERSION,
    }
