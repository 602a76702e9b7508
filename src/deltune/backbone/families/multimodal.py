"""Rows of vision transformers and of models of text and images, whole and in parts."""

from __future__ import annotations

from dataclasses import replace

from deltune.backbone.families.encoders import BERT
from deltune.backbone.families.rows import AttentionRow, Family, FeedForwardRow, Fused, StackRow, TokenRow

__all__ = ["MULTIMODAL"]

# Dropout after both sublayers is one module that runs twice, so the results are what goes into it.
_VIT = StackRow(
    name="vision",
    layers="layers",
    embeddings="embeddings.patch_embeddings.projection",
    attention=AttentionRow(
        block="attention",
        query="attention.q_proj",
        key="attention.k_proj",
        value="attention.v_proj",
        output="attention.o_proj",
        result="attention.o_proj",
        norm_before="layernorm_before",
    ),
    ffn=FeedForwardRow(up="mlp.fc1", down="mlp.fc2", result="mlp", block="mlp", norm_before="layernorm_after"),
    norms=("layernorm_before", "layernorm_after"),
    outer_norms=("layernorm",),
    final_norm="layernorm",
    tokens=TokenRow(exit="layernorm", embeddings="embeddings"),
)

_CLIP_ATTENTION = AttentionRow(
    block="self_attn",
    query="self_attn.q_proj",
    key="self_attn.k_proj",
    value="self_attn.v_proj",
    output="self_attn.out_proj",
    result="self_attn.out_proj",
    norm_before="layer_norm1",
)
_CLIP_FFN = FeedForwardRow(up="mlp.fc1", down="mlp.fc2", result="mlp", block="mlp", norm_before="layer_norm2")
_CLIP_NORMS = ("layer_norm1", "layer_norm2")


def _clip_text(model: str) -> StackRow:
    """CLIP's text stack in the module ``model.`` (``""`` for a model that is nothing else)."""
    return StackRow(
        name="text",
        layers=f"{model}encoder.layers",
        embeddings=f"{model}embeddings.token_embedding",
        attention=_CLIP_ATTENTION,
        ffn=_CLIP_FFN,
        norms=_CLIP_NORMS,
        outer_norms=(f"{model}final_layer_norm",),
        final_norm=f"{model}final_layer_norm",
        # The pooled output is read at the position of the end token in the ids, so additional positions
        # go before that; the model takes no embeddings.
        tokens=TokenRow(entry=model.rstrip("."), exit=f"{model}final_layer_norm", embeddings=f"{model}embeddings"),
        config="text_config",
    )


def _clip_vision(model: str) -> StackRow:
    return StackRow(
        name="vision",
        layers=f"{model}encoder.layers",
        embeddings=f"{model}embeddings.patch_embedding",
        attention=_CLIP_ATTENTION,
        ffn=_CLIP_FFN,
        norms=_CLIP_NORMS,
        outer_norms=(f"{model}pre_layrnorm", f"{model}post_layernorm"),
        tokens=TokenRow(entry=model.rstrip("."), exit=f"{model}encoder", embeddings=f"{model}embeddings"),
        config="vision_config",
    )


def _blip_vision(model: str) -> StackRow:
    return replace(
        _clip_vision(model),
        attention=AttentionRow(
            block="self_attn",
            query=Fused("self_attn.qkv", "blocks", 0),
            key=Fused("self_attn.qkv", "blocks", 1),
            value=Fused("self_attn.qkv", "blocks", 2),
            output="self_attn.projection",
            result="self_attn.projection",
            dispatches=False,
            norm_before="layer_norm1",
        ),
        outer_norms=(f"{model}post_layernorm",),
    )


def _blip_text(name: str, model: str, cross_name: str | None) -> StackRow:
    """BLIP's text stack; ``cross_name`` is None where no image is read although its modules are there."""
    return replace(
        BERT,
        name=name,
        layers=f"{model}encoder.layer",
        embeddings=f"{model}embeddings.word_embeddings",
        attention=replace(BERT.attention, dispatches=False),
        norms=BERT.norms if cross_name else (BERT.norms[0], BERT.norms[-1]),
        outer_norms=(f"{model}embeddings.LayerNorm",),
        cross=replace(BERT.cross, dispatches=False) if cross_name and BERT.cross else None,
        cross_name=cross_name or "",
        tokens=TokenRow(
            entry=model.rstrip("."), exit=f"{model}encoder", table=f"{model}embeddings.position_embeddings"
        ),
        config="text_config",
    )


MULTIMODAL: tuple[Family, ...] = (
    Family("vit", ("vit",), (_VIT,), pretrained=("decoder",)),
    Family("clip", ("clip",), (_clip_text("text_model."), _clip_vision("vision_model."))),
    Family("clip_text", ("clip_text_model",), (_clip_text(""),), pretrained=("text_projection",)),
    Family("clip_vision", ("clip_vision_model",), (_clip_vision(""),), pretrained=("visual_projection",)),
    Family(
        "blip",
        ("blip",),
        (
            _blip_vision("vision_model."),
            _blip_text("text", "text_model.", None),
            _blip_text("text", "text_encoder.", "text_cross"),
            _blip_text("decoder", "text_decoder.bert.", "cross"),
        ),
        language_model_head="text_decoder.cls.predictions.decoder",
    ),
    Family("blip_text", ("blip_text_model",), (_blip_text("text", "", "cross"),)),
    Family("blip_vision", ("blip_vision_model",), (_blip_vision(""),)),
)
