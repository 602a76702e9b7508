"""Rows of encoder-decoder models."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from deltune.backbone.families.rows import AttentionRow, Family, FeedForwardRow, StackRow, TokenRow

__all__ = ["ENCODER_DECODERS"]

Sublayer = TypeVar("Sublayer", AttentionRow, FeedForwardRow)


def _t5_attention(index: int, name: str) -> AttentionRow:
    block = f"layer.{index}.{name}"
    return AttentionRow(
        block=block,
        query=f"{block}.q",
        key=f"{block}.k",
        value=f"{block}.v",
        output=f"{block}.o",
        result=f"layer.{index}.dropout",
        norm_before=f"layer.{index}.layer_norm",
    )


def _t5_ffn(index: int, gated: bool) -> FeedForwardRow:
    block = f"layer.{index}.DenseReluDense"
    return FeedForwardRow(
        up=f"{block}.wi_1" if gated else f"{block}.wi",
        gate=f"{block}.wi_0" if gated else None,
        down=f"{block}.wo",
        result=f"layer.{index}.dropout",
        block=block,
        norm_before=f"layer.{index}.layer_norm",
    )


def _t5(gated: bool) -> tuple[StackRow, StackRow]:
    attention = _t5_attention(0, "SelfAttention")
    encoder = StackRow(
        name="encoder",
        layers="encoder.block",
        embeddings="encoder.embed_tokens",
        attention=attention,
        ffn=_t5_ffn(1, gated),
        norms=("layer.0.layer_norm", "layer.1.layer_norm"),
        outer_norms=("encoder.final_layer_norm",),
        final_norm="encoder.final_layer_norm",
        tokens=TokenRow(entry="encoder", exit="encoder", reader="decoder"),
        heads="num_heads",
    )
    decoder = replace(
        encoder,
        name="decoder",
        layers="decoder.block",
        embeddings="decoder.embed_tokens",
        ffn=_t5_ffn(2, gated),
        norms=("layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
        outer_norms=("decoder.final_layer_norm",),
        final_norm="decoder.final_layer_norm",
        cross=_t5_attention(1, "EncDecAttention"),
        tokens=TokenRow(entry="decoder", exit="decoder"),
    )
    return encoder, decoder


def _bart_attention(block: str) -> AttentionRow:
    return AttentionRow(
        block=block,
        query=f"{block}.q_proj",
        key=f"{block}.k_proj",
        value=f"{block}.v_proj",
        output=f"{block}.out_proj",
        result=f"{block}.out_proj",
        norm_after=f"{block}_layer_norm",
    )


# Dropout is a function here, so the results are the linear maps before it. The two first rows of a table of
# positions stand for no position.
_BART_ENCODER = StackRow(
    name="encoder",
    layers="encoder.layers",
    embeddings="encoder.embed_tokens",
    attention=_bart_attention("self_attn"),
    ffn=FeedForwardRow(up="fc1", down="fc2", result="fc2", norm_after="final_layer_norm"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    outer_norms=("encoder.layernorm_embedding",),
    tokens=TokenRow(entry="encoder", exit="encoder", reader="decoder", table="encoder.embed_positions", reserved=2),
    heads="encoder_attention_heads",
)
_BART_DECODER = replace(
    _BART_ENCODER,
    name="decoder",
    layers="decoder.layers",
    embeddings="decoder.embed_tokens",
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    outer_norms=("decoder.layernorm_embedding",),
    cross=_bart_attention("encoder_attn"),
    tokens=TokenRow(entry="decoder", exit="decoder", table="decoder.embed_positions", reserved=2),
    heads="decoder_attention_heads",
)


def _normalised_before(row: Sublayer) -> Sublayer:
    """The same sublayer in a model whose norms, of the same names, come before the sublayers."""
    return replace(row, norm_before=row.norm_after, norm_after=None)


# The encoder reads sound: convolutions make its inputs and positions are added between modules, so no
# module's output could be widened by additional positions.
_WHISPER_ATTENTION = _normalised_before(_bart_attention("self_attn"))
_WHISPER_FFN = _normalised_before(_BART_ENCODER.ffn)
_WHISPER_ENCODER = replace(
    _BART_ENCODER,
    embeddings="encoder.conv1",
    attention=_WHISPER_ATTENTION,
    ffn=_WHISPER_FFN,
    outer_norms=("encoder.layer_norm",),
    tokens=None,
    final_norm="encoder.layer_norm",
    exit="encoder",
)
_WHISPER_DECODER = replace(
    _BART_DECODER,
    attention=_WHISPER_ATTENTION,
    ffn=_WHISPER_FFN,
    cross=_normalised_before(_bart_attention("encoder_attn")),
    outer_norms=("decoder.layer_norm",),
    final_norm="decoder.layer_norm",
    tokens=TokenRow(entry="decoder", exit="decoder", table="decoder.embed_positions"),
)

ENCODER_DECODERS: tuple[Family, ...] = (
    Family("t5", ("t5",), _t5(gated=False) + _t5(gated=True)),
    Family("bart", ("bart",), (_BART_ENCODER, _BART_DECODER)),
    Family("whisper", ("whisper",), (_WHISPER_ENCODER, _WHISPER_DECODER)),
)
