"""A LoRA for llama.cpp: one GGUF file that its programs take with ``--lora``, beside the model's own GGUF file.

Tensors are named as llama.cpp names the matrices that they change, ``blk.0.attn_q.weight.lora_a`` (r, d_in) and
``.lora_b`` (d_out, r); the change is alpha / r times their product, r being the rank of each. llama.cpp turns pairs of
neighbouring features where transformers turns the two halves of a head, so the rows of queries and keys have another
order there.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deltune.errors import StateError
from deltune.exporting.comparison import Drift, probe_logits, refuse_drift
from deltune.exporting.factors import Factors, factors_of
from deltune.exporting.folders import write_checked
from deltune.exporting.peft_folder import probe_again, write_factors
from deltune.tuned import Tuned

__all__ = ["FILE", "write_gguf"]

FILE = "adapter.gguf"
#: Kinds of models (``config.model_type``) whose names and order of rows are known, and llama.cpp's name for each.
_ARCHITECTURES = {"llama": "llama"}


def write_gguf(tuned: Tuned, name: str, output: Path) -> Drift:
    """Write an attachment as a LoRA for llama.cpp, read the file again and compare.

    Args:
        tuned: the handle.
        name: which attachment; the only live one.
        output: the folder; the file in it is called ``adapter.gguf``.

    Returns:
        The drift of the model with the factors in the file.

    Raises:
        StateError: if the model is none of the known kinds, or the method is no LoRA; or if the file
            does not do the same. Nothing is left of it then.
        CheckpointError: if it cannot be written.
    """
    _check_model(tuned.model)
    found = list(factors_of(tuned.attachments[name], "GGUF"))
    before = probe_logits(tuned.model)

    def write(folder: Path) -> None:
        folder.mkdir()
        _write(found, tuned.model, name, folder / FILE)

    def check(folder: Path) -> Drift:
        with tempfile.TemporaryDirectory() as plain:
            write_factors(list(read_factors(folder / FILE, tuned.model)), Path(plain))
            drift = Drift.between(before, probe_again(tuned, Path(plain)))
        refuse_drift(drift, tuned.model, output)
        return drift

    return write_checked(output, write, check)


def _check_model(model: Any) -> None:
    kind = getattr(model.config, "model_type", type(model).__name__)
    if kind not in _ARCHITECTURES:
        raise StateError(
            f"A LoRA for llama.cpp can be written for models of the kinds {', '.join(_ARCHITECTURES)}, not for {kind}: "
            "the names and the order of rows of others are not known here. Export with --format peft, and convert that "
            "with llama.cpp's convert_lora_to_gguf.py."
        )
    if importlib.util.find_spec("gguf") is None:
        raise StateError("Writing GGUF needs the package gguf, which is not installed: pip install gguf.")


def _write(factors: list[Factors], model: Any, name: str, file: Path) -> None:
    import gguf

    names = _names(model)
    # one alpha is for all, but each tensor has its own rank: what differs goes into B
    alpha = factors[0].scale * factors[0].rank
    writer = gguf.GGUFWriter(file, _ARCHITECTURES[model.config.model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for item in factors:
        if item.module not in names:
            raise StateError(
                f"llama.cpp takes no change of {item.module} in a LoRA beside this model. Leave it out of the targets, "
                "or fold the delta in with --format merged."
            )
        ratio = item.scale * item.rank / alpha
        B = item.B if ratio == 1.0 else item.B * ratio
        heads = _rotated_heads(names[item.module], model.config)
        if heads:
            B = B.view(heads, 2, -1, item.rank).transpose(1, 2).reshape(B.shape)
        for suffix, value in (("lora_a", item.A), ("lora_b", B)):
            writer.add_tensor(f"{names[item.module]}.{suffix}", np.ascontiguousarray(value.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _names(model: Any) -> dict[str, str]:
    """llama.cpp's name of the weight of every linear map that a LoRA may change, by the module's name here."""
    import gguf

    architectures = {value: key for key, value in gguf.MODEL_ARCH_NAMES.items()}
    architecture = architectures[_ARCHITECTURES[model.config.model_type]]
    table = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    tied = model.get_output_embeddings()
    found = {}
    for module, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        if layer is tied and layer.weight is model.get_input_embeddings().weight:
            continue  # the file of such a model has no matrix of that name
        known = table.get_name(f"{module}.weight", try_suffixes=(".weight",))
        if known is not None:
            found[module] = f"{known}.weight" if not known.endswith(".weight") else known
    return found


def _rotated_heads(name: str, config: Any) -> int:
    """Number of heads whose rows llama.cpp has in its own order; 0 for matrices whose rows it leaves alone."""
    if name.endswith(".attn_q.weight"):
        return int(config.num_attention_heads)
    if name.endswith(".attn_k.weight"):
        return int(config.num_key_value_heads or config.num_attention_heads)
    return 0


def read_factors(file: Path, model: Any) -> Iterator[Factors]:
    """What such a file changes in ``model``.

    Args:
        file: a LoRA in GGUF.
        model: the model, for the names of its modules and its number of heads.

    Raises:
        StateError: if the file is no LoRA for this model.
    """
    import gguf

    reader = gguf.GGUFReader(file)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    architecture = _ARCHITECTURES[model.config.model_type]
    wanted = {"general.type": "adapter", "general.architecture": architecture, "adapter.type": "lora"}
    for key, value in wanted.items():
        if fields.get(key) != value:
            raise StateError(f"{file.name} is no LoRA for {architecture}: its {key} is {fields.get(key)!r}.")
    tensors = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in reader.tensors}
    modules = {known: module for module, known in _names(model).items()}
    for name in [name.removesuffix(".lora_a") for name in tensors if name.endswith(".lora_a")]:
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        heads = _rotated_heads(name, model.config)
        if heads:
            B = B.view(heads, -1, 2, B.shape[1]).transpose(1, 2).reshape(B.shape)
        yield Factors(modules[name], A, B, fields["adapter.lora.alpha"] / A.shape[0])
