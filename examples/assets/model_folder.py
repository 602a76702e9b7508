"""Write a folder that ``from_pretrained`` loads, and prove at once that it does so without losing a bit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and notices of transformers, and put things back as they were."""
    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def write_model(
    folder: Path,
    model_class: type[PreTrainedModel],
    config: PretrainedConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    stated: Mapping[str, object] | None = None,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and, where a model generates, ``generation_config.json``.

    The weights are written as they are, never through a model that might tie, convert or drop some of them.
    The folder is then loaded, and each tensor of the model is compared with what was meant.

    Args:
        folder: An existing folder.
        model_class: The class the folder is for, written into the configuration.
        config: The model's configuration. Its ``architectures`` and ``dtype`` are set here.
        weights: Tensors in float32 by parameter name; a tied tensor only once.
        stated: Entries for ``config.json`` that the configuration class would not write itself.

    Raises:
        ValueError: If the loaded model misses a tensor, does not know one, or holds another value.
    """
    config.architectures = [model_class.__name__]
    config.dtype = torch.float32
    config.save_pretrained(folder)
    if stated:
        file = folder / "config.json"
        entries = json.loads(file.read_text(encoding="utf-8")) | dict(stated)
        file.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    contiguous = {name: tensor.contiguous() for name, tensor in weights.items()}
    save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})

    with quiet():
        model, report = model_class.from_pretrained(folder, output_loading_info=True)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    complaints = [f"{kind}: {found}" for kind, found in sorted(report.items()) if found]
    loaded = model.state_dict()
    changed = [name for name, tensor in weights.items() if name in loaded and not torch.equal(loaded[name], tensor)]
    if changed:
        complaints.append(f"not the values that were written: {changed}")
    if complaints:
        raise ValueError(f"{model_class.__name__} does not load what was written: {'; '.join(complaints)}")


def write_tokenizer(folder: Path, tokenizer: Tokenizer, **settings: Any) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``.

    Packages bake the truncation and padding of their own use into ``tokenizer.json``; both are taken out, so
    that texts keep their length until the caller says otherwise.

    Args:
        folder: An existing folder.
        tokenizer: The tokenizer.
        **settings: Special tokens, ``model_max_length``, ``chat_template`` and the like, as
            ``PreTrainedTokenizerFast`` takes them.
    """
    tokenizer.no_truncation()
    tokenizer.no_padding()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **settings).save_pretrained(folder)
