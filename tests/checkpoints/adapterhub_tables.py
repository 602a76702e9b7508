"""The models and cases of ``make_adapterhub_fixtures.py``, and the batch that each model is given.

As that script, it is used in the environment of AdapterHub's library alone.
"""

from __future__ import annotations

from typing import Any

import adapters
import torch
from torch import Tensor

__all__ = ["CAUSAL", "LABELS", "MODELS", "PICKLED", "WITH_HEAD", "batch", "cases"]

VOCABULARY, LABELS, WIDTH = 40, 3, 16
SMALL = {"flat": True, "prefix_length": 3}
NETWORK = {"prefix_length": 3, "bottleneck_size": 5}

_ENCODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
    "num_labels": LABELS,
}
_SEQUENCES = {"vocab_size": VOCABULARY, "d_model": WIDTH, "pad_token_id": 0, "num_labels": LABELS}

#: Model type, class, class of the configuration, its options.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertForSequenceClassification", "BertConfig", _ENCODER),
    "bert-tokens": ("BertForTokenClassification", "BertConfig", _ENCODER),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", {**_ENCODER, "pad_token_id": 1}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {
            "vocab_size": VOCABULARY,
            "dim": WIDTH,
            "n_layers": 2,
            "n_heads": 2,
            "hidden_dim": 24,
            "max_position_embeddings": 24,
            "num_labels": LABELS,
        },
    ),
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 2,
            "n_positions": 24,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "mistral": (
        "MistralForCausalLM",
        "MistralConfig",
        {**_ENCODER, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    ),
    "electra": (
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**_ENCODER, "embedding_size": WIDTH},
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {**_ENCODER, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0},
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            **_SEQUENCES,
            "d_kv": 6,
            "d_ff": 24,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 2,
            "relative_attention_num_buckets": 8,
            "relative_attention_max_distance": 16,
            "decoder_start_token_id": 0,
        },
    ),
    "bart": (
        "BartForConditionalGeneration",
        "BartConfig",
        {
            **_SEQUENCES,
            "encoder_layers": 2,
            "decoder_layers": 2,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "max_position_embeddings": 24,
        },
    ),
    "vit": (
        "ViTForImageClassification",
        "ViTConfig",
        {
            **{key: value for key, value in _ENCODER.items() if key not in ("vocab_size", "max_position_embeddings")},
            "image_size": 8,
            "patch_size": 4,
        },
    ),
}

_LORA_ALL = {
    "r": 3,
    "alpha": 6,
    "attn_matrices": ["q", "k", "v"],
    "intermediate_lora": True,
    "output_lora": True,
}


def _bottlenecks(*, layers: int) -> dict[str, Any]:
    """Bottlenecks that every model has: placement and scale differ."""
    return {
        "seq_bn": adapters.SeqBnConfig(reduction_factor=4),
        "double_seq_bn": adapters.DoubleSeqBnConfig(reduction_factor=4),
        "par_bn": adapters.ParBnConfig(reduction_factor=4),
        "double_par_bn": adapters.ParBnConfig(reduction_factor=4, mh_adapter=True, scaling="learned"),
        "uneven": adapters.DoubleSeqBnConfig(
            reduction_factor={"0": 8, "default": 2}, leave_out=[layers - 1] if layers > 2 else []
        ),
    }


def cases(kind: str) -> dict[str, Any]:
    """The configurations of one kind of model, by the case's name."""
    layers = 4 if kind in ("t5", "bart") else 2
    prefix = adapters.PrefixTuningConfig(**SMALL)
    network = adapters.PrefixTuningConfig(**NETWORK)
    common = {
        **_bottlenecks(layers=layers),
        "lora": adapters.LoRAConfig(r=4, alpha=8),
        "lora_all": adapters.LoRAConfig(**_LORA_ALL),
        "ia3": adapters.IA3Config(),
        "prefix_flat": prefix,
        "prefix": network,
        "mam": adapters.MAMConfig(network, adapters.ParBnConfig(reduction_factor=4)),
        "unipelt": adapters.UniPELTConfig(
            network, adapters.SeqBnConfig(reduction_factor=4), adapters.LoRAConfig(r=2, alpha=6)
        ),
    }
    if kind in ("t5", "bart"):
        common["cross"] = adapters.DoubleSeqBnConfig(reduction_factor=4, cross_adapter=True)
    if kind == "bart":
        common["prefix_decoder"] = adapters.PrefixTuningConfig(**SMALL, encoder_prefix=False, cross_prefix=False)
    if kind == "t5":
        # in T5 the library's prefixes shift the distances between tokens: one example is enough
        common = {name: common[name] for name in common if name not in ("prefix", "mam", "unipelt")}
    if kind == "llama":
        common["dora"] = adapters.DoRAConfig(r=2, alpha=2)
    if kind == "bert":
        common |= {
            "channel": adapters.ParBnConfig(reduction_factor=4, scaling="channel"),
            "norm_before": adapters.SeqBnConfig(reduction_factor=4, ln_before=True),
            "norm_after": adapters.DoubleSeqBnConfig(reduction_factor=4, ln_after=True),
            "residual": adapters.SeqBnConfig(reduction_factor=4, residual_before_ln=False, original_ln_after=False),
            "lora_left_out": adapters.LoRAConfig(r=2, alpha=4, leave_out=[0], selfattn_lora=False, output_lora=True),
            "prefix_left_out": adapters.PrefixTuningConfig(**NETWORK, leave_out=[0], non_linearity="relu"),
            "compacter": adapters.CompacterPlusPlusConfig(reduction_factor=4),
            "invertible": adapters.SeqBnInvConfig(reduction_factor=4),
            "reft": adapters.LoReftConfig(),
            "dora": adapters.DoRAConfig(r=2, alpha=4),
            "vera": adapters.VeraConfig(r=2),
            "unipelt_ap": adapters.ConfigUnion(
                adapters.PrefixTuningConfig(**SMALL, use_gating=True, shared_gating=False),
                adapters.SeqBnConfig(reduction_factor=4, use_gating=True),
            ),
        }
    if kind == "bert-tokens":
        return {"prompt": adapters.PromptTuningConfig(prompt_length=3)}
    if kind in ("roberta", "electra", "mistral"):
        return {name: common[name] for name in ("double_seq_bn", "lora_all", "prefix_flat")}
    if kind == "vit":
        return {name: common[name] for name in common if name not in ("uneven", "prefix_flat", "unipelt")}
    return {name: common[name] for name in common if name != "lora"} if kind in ("t5", "llama") else common


#: Models with gates that look at later positions: of these the logits of the first position alone are recorded.
CAUSAL = ("gpt2", "llama", "bart")
#: Cases whose head is saved with them.
WITH_HEAD = {
    ("bert", "double_seq_bn"),
    ("bert", "lora"),
    ("distilbert", "seq_bn"),
    ("vit", "lora"),
    ("gpt2", "lora"),
    ("bart", "seq_bn"),
}
#: Cases that are saved as pickles: by need, since tensors that are shared stop safetensors, or for the tests.
PICKLED = ("prefix", "mam", "unipelt", "norm_before", "compacter")


def batch(kind: str) -> dict[str, Tensor]:
    """Three rows of different lengths, padded on the right; images for a vision model."""
    generator = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=generator)}
    lengths = torch.tensor([9, 6, 4])
    mask = (torch.arange(9)[None] < lengths[:, None]).long()
    pad = 1 if kind == "roberta" else 0
    ids = torch.randint(4, VOCABULARY, (3, 9), generator=generator)
    ids = ids.masked_fill(mask == 0, pad)
    given = {"input_ids": ids, "attention_mask": mask}
    if kind in ("t5", "bart"):
        given["decoder_input_ids"] = torch.randint(4, VOCABULARY, (3, 5), generator=generator)
    return given
