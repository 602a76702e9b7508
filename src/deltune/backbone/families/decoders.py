"""Rows of decoders without an encoder: causal language models."""

from __future__ import annotations

from dataclasses import replace

from deltune.backbone.families.rows import AttentionRow, Family, FeedForwardRow, Fused, StackRow, TokenRow

__all__ = ["DECODERS"]

_LLAMA = StackRow(
    name="decoder",
    layers="layers",
    embeddings="embed_tokens",
    attention=AttentionRow(
        block="self_attn",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        result="self_attn.o_proj",
        norm_before="input_layernorm",
    ),
    ffn=FeedForwardRow(
        up="mlp.up_proj",
        gate="mlp.gate_proj",
        down="mlp.down_proj",
        result="mlp",
        block="mlp",
        norm_before="post_attention_layernorm",
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    outer_norms=("norm",),
    final_norm="norm",
    tokens=TokenRow(),
)

# Query and key have norms of their own, one weight per feature of a head.
_QWEN3 = replace(
    _LLAMA,
    norms=("input_layernorm", "self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm"),
)

# Gemma 2 has a norm before and after each sublayer. The result is what the residual sum adds, and that is
# the output of the norm after the sublayer: what is added to it reaches the residual stream unchanged,
# as it does in every other family.
_GEMMA2 = replace(
    _LLAMA,
    attention=replace(_LLAMA.attention, result="post_attention_layernorm"),
    ffn=replace(_LLAMA.ffn, result="post_feedforward_layernorm", norm_before="pre_feedforward_layernorm"),
    norms=(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
)

_PHI3 = replace(
    _LLAMA,
    attention=AttentionRow(
        block="self_attn",
        query=Fused("self_attn.qkv_proj", "blocks", 0),
        key=Fused("self_attn.qkv_proj", "blocks", 1),
        value=Fused("self_attn.qkv_proj", "blocks", 2),
        output="self_attn.o_proj",
        result="resid_attn_dropout",
        norm_before="input_layernorm",
    ),
    ffn=FeedForwardRow(
        gate=Fused("mlp.gate_up_proj", "halves", 0),
        up=Fused("mlp.gate_up_proj", "halves", 1),
        down="mlp.down_proj",
        result="resid_mlp_dropout",
        block="mlp",
        norm_before="post_attention_layernorm",
    ),
)

_GPT2 = StackRow(
    name="decoder",
    layers="h",
    embeddings="wte",
    attention=AttentionRow(
        block="attn",
        query=Fused("attn.c_attn", "blocks", 0),
        key=Fused("attn.c_attn", "blocks", 1),
        value=Fused("attn.c_attn", "blocks", 2),
        output="attn.c_proj",
        result="attn.resid_dropout",
        norm_before="ln_1",
    ),
    ffn=FeedForwardRow(up="mlp.c_fc", down="mlp.c_proj", result="mlp.dropout", block="mlp", norm_before="ln_2"),
    norms=("ln_1", "ln_2"),
    outer_norms=("ln_f",),
    final_norm="ln_f",
    tokens=TokenRow(table="wpe"),
)

# Attention and feed-forward may read the same input (`use_parallel_residual`); both results are added to it.
_GPT_NEOX = StackRow(
    name="decoder",
    layers="layers",
    embeddings="embed_in",
    attention=AttentionRow(
        block="attention",
        query=Fused("attention.query_key_value", "heads", 0),
        key=Fused("attention.query_key_value", "heads", 1),
        value=Fused("attention.query_key_value", "heads", 2),
        output="attention.dense",
        result="post_attention_dropout",
        norm_before="input_layernorm",
    ),
    ffn=FeedForwardRow(
        up="mlp.dense_h_to_4h",
        down="mlp.dense_4h_to_h",
        result="post_mlp_dropout",
        block="mlp",
        norm_before="post_attention_layernorm",
    ),
    norms=("input_layernorm", "post_attention_layernorm"),
    outer_norms=("final_layer_norm",),
    final_norm="final_layer_norm",
    tokens=TokenRow(),
)

DECODERS: tuple[Family, ...] = (
    Family("gpt2", ("gpt2",), (_GPT2,)),
    Family("gpt_neox", ("gpt_neox",), (_GPT_NEOX,)),
    Family("llama", ("llama",), (_LLAMA,)),
    Family("mistral", ("mistral",), (_LLAMA,)),
    Family("qwen2", ("qwen2",), (_LLAMA,)),
    Family("qwen3", ("qwen3",), (_QWEN3,)),
    Family("gemma2", ("gemma2",), (_GEMMA2,)),
    Family("phi3", ("phi3",), (_PHI3,)),
    Family("smollm3", ("smollm3",), (_LLAMA,)),
)
