"""The architectures, one entry each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.zoo.architecture import IMAGE, MELS, PATCH, SOUND, VOCABULARY, Architecture, Head

__all__ = ["ALL"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BERT = {**_SIZES, "max_position_embeddings": 64, "pad_token_id": 0}
_BERT_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_DECODER = {**_SIZES, **_SPECIAL, "num_key_value_heads": 2, "max_position_embeddings": 64}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 6,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_SEQUENCES = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 40,
    "image_size": IMAGE,
    "patch_size": PATCH,
}
_CLIP_TEXT = {**_SIZES, **_SPECIAL, "max_position_embeddings": 64}
_BLIP_TEXT = {**_CLIP_TEXT, "sep_token_id": 2, "encoder_hidden_size": 32}
_BLIP = {
    "text_config": _BLIP_TEXT,
    "vision_config": _VISION,
    "projection_dim": 16,
    "image_text_hidden_size": 16,
}


def _text_classes(prefix: str, *heads: Head, language: str = "ForMaskedLM") -> dict[Head, str]:
    names: dict[Head, str] = {
        "base": f"{prefix}Model",
        "classification": f"{prefix}ForSequenceClassification",
        "tokens": f"{prefix}ForTokenClassification",
        "language": f"{prefix}{language}",
    }
    return {head: names[head] for head in heads} if heads else names


def _encoder(name: str, prefix: str, options: Mapping[str, Any], **facts: Any) -> Architecture:
    facts = {"family": name, "takes_positions": True, "dropouts": _BERT_DROPOUTS, **facts}
    return Architecture(
        name=name,
        config=f"{prefix}Config",
        options=options,
        classes=_text_classes(prefix),
        kind="encoder",
        **facts,
    )


def _decoder(name: str, prefix: str, options: Mapping[str, Any], **facts: Any) -> Architecture:
    facts = {"family": name, "has_biases": False, "dropouts": ("attention_dropout",), **facts}
    return Architecture(
        name=name,
        config=f"{prefix}Config",
        options=options,
        classes=_text_classes(prefix, language="LMHeadModel" if prefix == "GPT2" else "ForCausalLM"),
        kind="decoder",
        generates=True,
        **facts,
    )


def _t5(name: str, options: Mapping[str, Any]) -> Architecture:
    return Architecture(
        name=name,
        family="t5",
        config="T5Config",
        options={**_T5, **options},
        classes=_text_classes("T5", "base", "classification", "language", language="ForConditionalGeneration"),
        kind="encoder-decoder",
        dropouts=("dropout_rate", "classifier_dropout"),
        generates=True,
        has_biases=False,
        end_token=1,
    )


ALL = (
    _encoder("bert", "Bert", _BERT),
    _encoder(
        "roberta",
        "Roberta",
        {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1},
        pad_token=1,
        takes_positions=False,
    ),
    _encoder(
        "distilbert",
        "DistilBert",
        {
            "vocab_size": VOCABULARY,
            "dim": 32,
            "n_layers": 3,
            "n_heads": 4,
            "hidden_dim": 48,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
        },
        dropouts=("dropout", "attention_dropout", "seq_classif_dropout"),
    ),
    _encoder("electra", "Electra", {**_BERT, "embedding_size": 20}),
    _encoder(
        "modernbert",
        "ModernBert",
        {
            **_SIZES,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "max_position_embeddings": 64,
            "local_attention": 8,
            "global_attn_every_n_layers": 2,
        },
        has_biases=False,
        takes_positions=False,
        dropouts=("embedding_dropout", "attention_dropout", "mlp_dropout", "classifier_dropout"),
    ),
    _encoder(
        "deberta-v2",
        "DebertaV2",
        {
            **_BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_buckets": 8,
            "position_biased_input": False,
            "type_vocab_size": 0,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
        },
        takes_positions=False,
        dispatches=False,
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob", "pooler_dropout", "cls_dropout"),
    ),
    _encoder(
        "albert",
        "Albert",
        {**_BERT, "embedding_size": 20, "bos_token_id": 2, "eos_token_id": 3},
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout_prob"),
    ),
    _decoder(
        "gpt2",
        "GPT2",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            **_SPECIAL,
        },
        has_biases=True,
        takes_positions=True,
        dropouts=("embd_pdrop", "attn_pdrop", "resid_pdrop", "classifier_dropout"),
    ),
    _decoder(
        "gpt_neox",
        "GPTNeoX",
        {**_SIZES, **_SPECIAL, "max_position_embeddings": 64, "rotary_pct": 0.5},
        has_biases=True,
        dropouts=("attention_dropout", "hidden_dropout", "classifier_dropout"),
    ),
    _decoder("llama", "Llama", _DECODER | {"num_key_value_heads": 4}),
    _decoder("llama-gqa", "Llama", _DECODER, family="llama"),
    _decoder("mistral", "Mistral", {**_DECODER, "sliding_window": 4}),
    _decoder("qwen2", "Qwen2", _DECODER, has_biases=True),
    _decoder("qwen3", "Qwen3", {**_DECODER, "head_dim": 12}),
    _decoder("gemma2", "Gemma2", {**_DECODER, "head_dim": 12, "query_pre_attn_scalar": 12, "sliding_window": 4}),
    _decoder("phi3", "Phi3", _DECODER, dropouts=("attention_dropout", "resid_pdrop", "embd_pdrop")),
    _decoder("smollm3", "SmolLM3", {**_DECODER, "no_rope_layer_interval": 2}),
    _t5("t5", {"feed_forward_proj": "relu"}),
    _t5("t5-gated", {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    Architecture(
        name="bart",
        family="bart",
        config="BartConfig",
        options={**_SEQUENCES, "max_position_embeddings": 64, "forced_eos_token_id": None},
        classes=_text_classes("Bart", "base", "classification", "language", language="ForConditionalGeneration"),
        kind="encoder-decoder",
        dropouts=("dropout", "attention_dropout", "activation_dropout", "classifier_dropout"),
        generates=True,
        left_padding=False,
    ),
    Architecture(
        name="whisper",
        family="whisper",
        config="WhisperConfig",
        options={
            **_SEQUENCES,
            "num_mel_bins": MELS,
            "max_source_positions": SOUND,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "use_cache": True,
        },
        classes={"base": "WhisperModel", "language": "WhisperForConditionalGeneration"},
        kind="encoder-decoder",
        dropouts=("dropout", "attention_dropout", "activation_dropout"),
        generates=True,
        inputs=("sound",),
    ),
    Architecture(
        name="vit",
        family="vit",
        config="ViTConfig",
        options=_VISION,
        classes={"base": "ViTModel", "classification": "ViTForImageClassification"},
        kind="vision",
        dropouts=("hidden_dropout_prob", "attention_probs_dropout_prob"),
        inputs=("image",),
    ),
    Architecture(
        name="clip",
        family="clip",
        config="CLIPConfig",
        options={"text_config": _CLIP_TEXT, "vision_config": _VISION, "projection_dim": 16},
        classes={"base": "CLIPModel"},
        kind="text-vision",
        takes_positions=True,
        inputs=("image", "text"),
    ),
    Architecture(
        name="clip-text",
        family="clip_text",
        config="CLIPTextConfig",
        options=_CLIP_TEXT,
        classes={"base": "CLIPTextModel"},
        kind="decoder",
        dropouts=("attention_dropout",),
        takes_positions=True,
    ),
    Architecture(
        name="clip-vision",
        family="clip_vision",
        config="CLIPVisionConfig",
        options=_VISION,
        classes={"base": "CLIPVisionModel"},
        kind="vision",
        dropouts=("attention_dropout",),
        inputs=("image",),
    ),
    Architecture(
        name="clip-image",
        family="clip",
        config="CLIPConfig",
        options={"text_config": _CLIP_TEXT, "vision_config": _VISION, "projection_dim": 16},
        classes={"classification": "CLIPForImageClassification"},
        kind="vision",
        inputs=("image",),
    ),
    Architecture(
        name="blip",
        family="blip",
        config="BlipConfig",
        options=_BLIP,
        classes={"base": "BlipModel"},
        kind="text-vision",
        takes_positions=True,
        dispatches=False,
        inputs=("image", "text"),
    ),
    Architecture(
        name="blip-caption",
        family="blip",
        config="BlipConfig",
        options=_BLIP,
        classes={"language": "BlipForConditionalGeneration"},
        kind="text-vision",
        generates=True,
        left_padding=False,  # learned positions, and no way to give other ones
        dispatches=False,
        inputs=("image", "text"),
    ),
)
