"""Tiny tokenizers and models for the tests of tasks."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

torch.set_num_threads(1)

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "good",
    "bad",
    "fine",
    "film",
    "plot",
    "acting",
    "the",
    "a",
    "was",
    "is",
    "very",
    "not",
    "and",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message.role + '|>' + message.content + '<end>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def word_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """Words and BERT's special tokens, with types for pairs."""
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{
            "pad_token": "[PAD]",
            "unk_token": "[UNK]",
            "cls_token": "[CLS]",
            "sep_token": "[SEP]",
            "model_max_length": 64,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            **options,
        },
    )


def byte_tokenizer(
    *, merges: list[tuple[str, str]] | None = None, start: bool = False, ends: bool = False, **options: Any
) -> PreTrainedTokenizerFast:
    """Bytes, special tokens of a chat, and perhaps merges; ``<end>`` is the only token that could pad."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges or []
    specials = ["<end>", "<start>", "<|system|>", "<|user|>", "<|assistant|>"]
    pieces = specials + alphabet + [first + second for first, second in merges]
    model = models.BPE(vocab={piece: place for place, piece in enumerate(pieces)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.add_special_tokens(specials)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if start or ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{'<start> ' if start else ''}$A{' <end>' if ends else ''}",
            special_tokens=[("<start>", 1), ("<end>", 0)],
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<end>", bos_token="<start>", **{"model_max_length": 4096, **options}
    )


def encoder(vocabulary: int = len(WORDS), **options: Any) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        **options,
    )
    return BertForSequenceClassification(config)


def decoder(vocabulary: int = 300) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=256,
        pad_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def encoder_decoder(vocabulary: int = 300) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=vocabulary, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config).eval()
