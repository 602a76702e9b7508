"""A tiny model, a tiny tokenizer and reviews that are easy to tell apart."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import normalizers
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

import deltune
from deltune.tasks import TextClassification
from deltune.training import TrainingSettings
from deltune.tuned import Tuned
from tests.tasks.tiny import WORDS, word_tokenizer
from tests.zoo import randomize

torch.set_num_threads(1)

NEUTRAL = ("film", "plot", "acting", "the", "a", "was", "is", "very", "and")
#: Fast to run, and with everything in it that a checkpoint must hold.
SETTINGS = TrainingSettings(epochs=2, batch_size=8, learning_rate=5e-3, threads=1, seed=3)


def config(dropout: float = 0.1, **options: Any) -> BertConfig:
    return BertConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )


def reviews(rows: int, seed: int = 0) -> Dataset:
    draw = random.Random(seed)
    found = []
    for _ in range(rows):
        good = draw.random() < 0.5
        words = [draw.choice(NEUTRAL) for _ in range(draw.randint(2, 10))]
        words.insert(draw.randrange(len(words)), draw.choice(("good", "fine")) if good else "bad")
        found.append({"text": " ".join(words), "label": "positive" if good else "negative"})
    return Dataset.from_list(found)


def task() -> TextClassification:
    return TextClassification(label_names=("negative", "positive"))


def tokenizer() -> PreTrainedTokenizerFast:
    """Also drops a character, so that there are texts of no tokens."""
    made = word_tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Replace("\u200b", "")
    return made


def classifier(method: str = "lora(rank=2, dropout=0.2)", *, dropout: float = 0.1, seed: int = 0) -> Tuned:
    torch.manual_seed(seed)
    model = BertForSequenceClassification(config(dropout, num_labels=2, problem_type="single_label_classification"))
    randomize(model.bert, 5)
    return deltune.attach(model, method)


def write_model(folder: Path, seed: int = 5) -> Path:
    """A pretrained model without a head, and its tokenizer."""
    torch.manual_seed(seed)
    model = BertModel(config())
    randomize(model, seed)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def weights(tuned: Tuned) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in tuned.named_trainable_parameters()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
