"""Read a model from a GGUF file as plain float32 weights and a plain configuration.

A model that transformers loads from GGUF is ordinary in every tensor, but stays flagged as quantised for
good, and ``save_pretrained`` refuses it. So only its weights and the facts of its configuration are taken.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from pathlib import Path
from typing import TypeVar

import torch
from transformers import PretrainedConfig, PreTrainedModel

from .model_folder import quiet

Config = TypeVar("Config", bound=PretrainedConfig)

_FOREIGN = frozenset({"quantization_config", "_name_or_path", "_model_name_or_path", "transformers_version"})


def read_model(file: Path, model_class: type[PreTrainedModel]) -> tuple[PretrainedConfig, dict[str, torch.Tensor]]:
    """Load a GGUF file and dequantise all of it.

    Args:
        file: The ``.gguf`` file.
        model_class: The class of the model that it holds.

    Returns:
        The configuration, still flagged as quantised, and the float32 weights by parameter name, a tied one
        only once.

    Raises:
        ModuleNotFoundError: If the module ``gguf`` is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModuleNotFoundError("No module named 'gguf'", name="gguf")
    # The reader draws a progress bar of its own; what goes wrong is raised, not printed.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        model = model_class.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model.config, dict(model.named_parameters())


def plain_config(config: PretrainedConfig, config_class: type[Config]) -> Config:
    """Copy a configuration without the traces of the file it came from.

    Args:
        config: A configuration, as :func:`read_model` returns it.
        config_class: Its class.

    Returns:
        An independent configuration that is not flagged as quantised.
    """
    facts = {name: value for name, value in config.to_dict().items() if name not in _FOREIGN}
    plain: Config = config_class.from_dict(facts)
    return plain
