"""A pretrained folder straight into 4 bits: each matrix is quantised when it is read, and then forgotten."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from deltune.backbone import Anatomy, anatomy_of, matrix_shape
from deltune.errors import CheckpointError
from deltune.measure import release_memory
from deltune.quantization.format import NF4, bitsandbytes
from deltune.quantization.model import linear_maps, mark, quantized_layer, replace
from deltune.quantization.saving import packed_layer, stored_format

__all__ = ["load_quantized", "reader"]

_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
#: Bytes of tensors after which memory is given back to the system.
_RELEASED = 2**26
#: What a tensor's name is followed by where bitsandbytes' record of its quantisation stands.
_RECORD = ".quant_state.bitsandbytes__nf4"


def load_quantized(
    path: str | Path,
    model_class: Any,
    format: NF4 | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    """Load a pretrained model with the linear maps of its layers in 4 bits, which never stands unquantised in memory.

    The model is built without values. Then one tensor after the other is read; a matrix is quantised at once. The
    result equals ``deltune.quantize(model_class.from_pretrained(path))``. Folders whose tensors transformers must split
    or join (experts) are refused: load those with ``from_pretrained`` and quantise then. A folder that
    ``save_pretrained`` of a quantised model wrote is read as it is, bit for bit.

    Args:
        path: the folder, with ``config.json`` and safetensors files; or a name on the model hub, whose files are
            downloaded first.
        model_class: ``AutoModelForCausalLM``, or any other class of transformers.
        format: how; by default NF4 with double quantisation by bitsandbytes. Of a folder that is quantised already
            block and double quantisation must be those of the folder.
        dtype: type of all that is not quantised, and of the matrices before; by default as in the files.
        device: where the tensors go, and where they are quantised.
        **options: of the configuration, such as ``num_labels``.

    Returns:
        The model, in evaluation mode. A task head that the folder does not hold has new values.

    Raises:
        CheckpointError: if the folder is not one, does not hold this model's tensors, or cannot be downloaded.
        DeltuneError: if the engine is not installed.
        StateError, TargetError: as :func:`deltune.quantize`.
    """
    from transformers import AutoConfig

    wanted = format or NF4()
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else getattr(torch, dtype.removeprefix("torch."))
    if wanted.engine == "bitsandbytes":
        bitsandbytes()  # before hours of reading
    folder = _folder(path)
    files = _files(folder)
    config = AutoConfig.from_pretrained(folder, **options)
    config._name_or_path = str(path)
    stored = stored_format(config)
    if stored is not None:
        del config.quantization_config
        compute = wanted.compute_dtype or stored.compute_dtype
        wanted = dataclasses.replace(wanted, compute_dtype=compute)
    build = getattr(model_class, "from_config", model_class)
    with _without_values():
        model: Any = build(config)
    model.eval()
    anatomy = anatomy_of(model)
    _Filling(model, wanted, dtype, torch.device(device)).fill(files, anatomy)
    _generation_options(model, folder)
    mark(model)
    return model


def reader(format: NF4 | None) -> Callable[..., Any] | None:
    """What reads a folder into this format, for ``Task.load_model(..., read=...)``; None for no format."""
    return None if format is None else partial(_read, format)


def _read(format: NF4, model_class: Any, path: str, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Not in the files and therefore new")  # a new head is the rule for tasks
        return load_quantized(path, model_class, format, **options)


class _Filling:
    """Gives a model without values those of a folder."""

    def __init__(self, model: Any, format: NF4, dtype: torch.dtype | None, device: torch.device) -> None:
        self.model, self.format, self.dtype, self.device = model, format, dtype, device
        self.matrices = {name: names for names in linear_maps(model) for name in names}
        self.known = set(model.state_dict().keys())
        self.renamed = _renaming(model)
        # every name of every parameter: tied ones have several, and modules are replaced on the way
        self.places: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.places.setdefault(id(parameter), []).append(name)
        self.tied = {name: names for names in self.places.values() for name in names}
        self.missing = set(self.tied)

    def fill(self, files: dict[str, Path], anatomy: Anatomy) -> None:
        read = 0
        for key, file in files.items():
            name = self._name(key)
            if name is None:
                continue  # of another head; what is missing instead is found below
            if read > _RELEASED:
                # unquantised matrices leave gaps between what stays, which the system would count as used
                release_memory()
                read = 0
            try:
                # opened anew each time: a file that is mapped counts as memory as far as it was read
                with safe_open(str(file), framework="pt") as stream:
                    value = stream.get_tensor(key)
                read += value.nbytes
                if f"{key}{_RECORD}" in files:
                    self._put_packed(name, value, _beside(key, files))
                else:
                    self._put(name, value)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read ({error}).") from error
        self._make_head(anatomy)
        release_memory()
        for module in self.model.modules():
            for attribute, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[attribute] = buffer.to(self.device)

    def _name(self, key: str) -> str | None:
        """The model's name of a tensor: a file may have been written with another head, or with none."""
        prefix = f"{self.model.base_model_prefix}."
        key = self.renamed(key)
        return next((name for name in (key, prefix + key, key.removeprefix(prefix)) if name in self.known), None)

    def _put(self, name: str, value: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if owner in self.matrices and attribute == "weight":
            if name not in self.missing:
                return
            self._check(name, module.weight, value)
            weight = value.to(self.device, self._type(name, value))
            names = self.matrices[owner]
            replace(self.model, names, quantized_layer(owner, module, weight, self.format))
            self.missing.difference_update(self.tied[name])
        elif attribute in module._parameters:
            old = module._parameters[attribute]
            self._check(name, old, value)
            new = value.to(self.device, self._type(name, value), copy=True)
            if name not in self.missing:
                if not torch.equal(old.detach(), new):
                    others = " and ".join(other for other in self.tied[name] if other != name)
                    raise CheckpointError(
                        f"The files hold other values for {name} than for {others}, but the configuration ties them. "
                        "Pass tie_word_embeddings=False."
                    )
                return
            self._set(name, nn.Parameter(new, requires_grad=old.requires_grad))
        else:
            self._check(name, module._buffers[attribute], value)
            module._buffers[attribute] = value.to(self.device, copy=True)

    def _put_packed(self, name: str, value: Tensor, parts: dict[str, Tensor]) -> None:
        """A matrix that the files hold in 4 bits."""
        owner = name.rpartition(".")[0]
        names = self.matrices.get(owner)
        if names is None:
            raise CheckpointError(f"{owner} is quantised in the files, but it is none of the layers' linear maps.")
        module = self.model.get_submodule(owner)
        moved = {key: part.to(self.device, copy=True) for key, part in parts.items()}
        shape = matrix_shape(module) or ()
        if name in self.missing:
            weight = value.to(self.device, copy=True)
            replace(self.model, names, packed_layer(owner, weight, moved, module, shape, self.format))
            self.missing.difference_update(self.tied[name])

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for place in self.tied[name]:
            owner, _, attribute = place.rpartition(".")
            self.model.get_submodule(owner)._parameters[attribute] = parameter
        self.missing.difference_update(self.tied[name])

    def _check(self, name: str, present: Tensor, value: Tensor) -> None:
        if present.shape != value.shape:
            raise CheckpointError(
                f"{name} is {tuple(value.shape)} in the files and {tuple(present.shape)} in the model. Is it the right "
                "class, and are the options those of this model?"
            )

    def _type(self, name: str, value: Tensor) -> torch.dtype:
        if self.dtype is None or not value.dtype.is_floating_point:
            return value.dtype
        pieces = set(name.split("."))
        kept = set(self.model._keep_in_fp32_modules_strict or ())
        if self.dtype == torch.float16:
            kept |= set(self.model._keep_in_fp32_modules or ())
        return torch.float32 if kept & pieces and self.dtype.itemsize == 2 else self.dtype

    def _make_head(self, anatomy: Anatomy) -> None:
        """New values for what a task adds; anything else must have been in the files."""
        heads = tuple(f"{module}." for module in anatomy.head)
        new = sorted(name for name in self.missing if name.startswith(heads) or "pooler" in name.split("."))
        lost = sorted(self.missing - set(new))
        if lost:
            raise CheckpointError(
                f"The files lack {len(lost)} tensors of this model: {', '.join(lost[:5])}"
                f"{', ...' if len(lost) > 5 else ''}. If from_pretrained loads them, transformers splits or joins "
                "tensors of this folder: load it so, and call deltune.quantize(model)."
            )
        owners = {name.rpartition(".")[0] for name in new}
        # in the order of the modules, as transformers draws them
        for owner, module in list(self.model.named_modules()):
            if owner not in owners:
                continue
            for attribute, old in module._parameters.items():
                if old is not None and old.is_meta:
                    value = torch.empty(old.shape, dtype=self.dtype or old.dtype, device=self.device)
                    module._parameters[attribute] = nn.Parameter(value)
            self.model._init_weights(module)
        if new:
            warnings.warn(f"Not in the files and therefore new, to be trained: {', '.join(new)}.", stacklevel=4)


def _beside(key: str, files: dict[str, Path]) -> dict[str, Tensor]:
    """What the files hold beside the packed tensor ``key``, by the names of bitsandbytes."""
    parts = {}
    for other, file in files.items():
        if other.startswith(f"{key}."):
            with safe_open(str(file), framework="pt") as stream:
                parts[other.removeprefix(f"{key}.")] = stream.get_tensor(other)
    return parts


@contextmanager
def _without_values() -> Iterator[None]:
    """In this thread, modules are built with parameters on the meta device; their buffers have values."""
    register, thread = nn.Module.register_parameter, get_ident()

    def register_without_values(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None and not parameter.is_meta and get_ident() == thread:
            empty = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            module._parameters[name] = empty

    nn.Module.register_parameter = register_without_values  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def _renaming(model: Any) -> Callable[[str], str]:
    """From names in files to those in the model, as transformers knows them: they change over time."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, rename_source_key

    known = get_model_conversion_mapping(model)
    names = [item for item in known if not isinstance(item, WeightConverter)]
    joins = [item for item in known if isinstance(item, WeightConverter)]

    def renamed(key: str) -> str:
        name, join = rename_source_key(key, names, joins)
        # a tensor that is split or joined is none of the model's
        return str(name) if join is None else ""

    return renamed


def _folder(path: str | Path) -> Path:
    """A local folder as it is; of a name on the model hub, the folder that its files were downloaded to.

    Raises:
        CheckpointError: if there is neither.
    """
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(path), allow_patterns=["*.json", "*.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"There is no folder {str(path)!r}, and no model of that name can be downloaded ({reason}). Give a folder "
            "that holds a saved model, or a name on the model hub."
        ) from error


def _files(folder: Path) -> dict[str, Path]:
    """Every tensor of a folder and the file that holds it.

    Raises:
        CheckpointError: if it holds no safetensors files, or a damaged one.
    """
    index, single = folder / _INDEX, folder / _FILE
    try:
        if index.is_file():
            named = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return {key: folder / file for key, file in named.items()}
        if single.is_file():
            with safe_open(str(single), framework="pt") as stream:
                return dict.fromkeys(stream.keys(), single)
    except Exception as error:
        raise CheckpointError(f"The files in {folder} are damaged ({error}). Copy them again.") from error
    raise CheckpointError(
        f"{folder} holds no {_FILE} or {_INDEX}. Give a folder that save_pretrained wrote; models in other files are "
        "loaded with from_pretrained and quantised by deltune.quantize(model)."
    )


def _generation_options(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file() and model.can_generate():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(folder)
