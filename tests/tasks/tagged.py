"""A vocabulary, rows and a model that the tests of token tagging share."""

from __future__ import annotations

from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForTokenClassification,
    PreTrainedTokenizerFast,
)

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ann", "##a", "met", "bo", "##b", "in", "new", "york", "##er", "s", "x"]
NAMES = ("O", "B-per", "I-per", "B-place", "I-place")
ROWS = [
    {"words": ["Anna", "met", "Bob"], "tags": ["B-per", "O", "B-per"]},
    {"words": ["in", "New", "Yorker", "s", "x"], "tags": ["O", "B-place", "I-place", "O", "O"]},
]
DATA = Dataset.from_list(ROWS)


def piece_tokenizer(**options: Any) -> PreTrainedTokenizerFast:
    """WordPiece as BERT has it: lower case, control characters dropped."""
    vocabulary = {piece: place for place, piece in enumerate(PIECES)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**names, "model_max_length": 64, **options})


def encoder(**options: Any) -> BertForTokenClassification:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = BertConfig(vocab_size=len(PIECES), max_position_embeddings=64, num_labels=len(NAMES), **size, **options)
    return BertForTokenClassification(config).eval()


def tagged(words: Any, tags: Any) -> Dataset:
    return Dataset.from_dict({"words": words, "tags": tags})


def logits_of(rows: list[list[str]], names: tuple[str, ...], width: int) -> torch.Tensor:
    """Logits [B, width, C] whose likeliest tags are ``rows``."""
    logits = torch.zeros(len(rows), width, len(names))
    for number, row in enumerate(rows):
        for place, tag in enumerate(row):
            logits[number, place, names.index(tag)] = 5.0
    return logits
