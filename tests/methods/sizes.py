"""Models of the published sizes, on the meta device, and what a method would train in them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from deltune.attachment import Attachment
from deltune.backbone import anatomy_of
from deltune.methods import parse
from deltune.summary import Summary

__all__ = ["BERT_BASE", "BERT_LARGE", "LLAMA", "ROBERTA_BASE", "Published"]


class Published:
    """A model of full size without values."""

    def __init__(self, model_class: Any, config: Any) -> None:
        self.model_class, self.config = model_class, config

    @cache  # noqa: B019 - four of them, for the whole session
    def model(self) -> Any:
        with torch.device("meta"):
            return self.model_class(self.config)

    def summary(self, method: str, head: bool = False) -> Summary:
        """What ``method`` trains."""
        model = self.model()
        attachment = Attachment.build("default", parse(method), model, anatomy_of(model), True, head)
        return Summary.of(model, [attachment], sum(value.numel() for value in model.parameters()))

    def count(self, method: str) -> int:
        """Number of values that ``method`` trains, without a head."""
        return self.summary(method).parameters


BERT_BASE = Published(BertForSequenceClassification, BertConfig(num_labels=2))
BERT_LARGE = Published(
    BertForSequenceClassification,
    BertConfig(num_labels=2, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096),
)
ROBERTA_BASE = Published(
    RobertaForSequenceClassification,
    RobertaConfig(num_labels=2, vocab_size=50265, max_position_embeddings=514, type_vocab_size=1),
)
#: The LLaMA-style model of the sheets: 30 layers of 576/1536, 9 heads, 3 key/value heads, tied 49,152 words.
LLAMA = Published(
    LlamaForCausalLM,
    LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    ),
)
