"""RXNMapper's ALBERT: a masked language model of chemical reactions written as SMILES."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from tokenizers.processors import TemplateProcessing
from transformers import AlbertConfig, AlbertForMaskedLM

from .model_folder import quiet, write_model, write_tokenizer

# One token of SMILES: an atom in brackets, an element of two letters, a two-digit ring closure, the arrow
# between reactants and products, or any other single character.
_SMILES_TOKEN = r"\[[^\]]+\]|Br|Cl|%[0-9]{2}|>>|\S"


def convert(package: Path, folder: Path) -> None:
    """Write an ``AlbertForMaskedLM`` (12 times one shared layer of 256) and a tokenizer of SMILES.

    Args:
        package: The unpacked wheel of ``rxnmapper``.
        folder: Where the model goes.
    """
    source = package / "rxnmapper" / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    config = AlbertConfig.from_pretrained(source)
    with quiet():
        model = AlbertForMaskedLM.from_pretrained(source, dtype=torch.float32)
    write_model(folder, AlbertForMaskedLM, config, dict(model.named_parameters()))
    write_tokenizer(
        folder,
        _smiles_tokenizer((source / "vocab.txt").read_text(encoding="utf-8").split("\n")),
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _smiles_tokenizer(lines: list[str]) -> Tokenizer:
    vocabulary = {token: number for number, token in enumerate(lines) if token}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Split(Regex(_SMILES_TOKEN), behavior="removed", invert=True)
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    return tokenizer
