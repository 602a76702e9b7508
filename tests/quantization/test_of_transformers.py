"""Models that transformers itself has quantised by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import deltune
from deltune.quantization import format_of

pytest.importorskip("bitsandbytes")
IDS = torch.arange(4, 24).view(2, 10)


def quantised(folder: Path, kind: str) -> Any:
    if not folder.exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
        )
        LlamaForCausalLM(config).save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.float32)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_training_goes_on_after_an_evaluation(kind: str, tmp_path: Path) -> None:
    """On some processors bitsandbytes would repack the weights, after which nothing below them gets a gradient."""
    model = quantised(tmp_path / "model", kind)
    assert (format_of(model) is not None) == (kind == "nf4")
    tuned = deltune.attach(model, "lora(rank=2)")
    model.eval()
    with torch.no_grad():
        model(IDS)
    model.train()
    model(IDS, labels=IDS).loss.backward()
    found = [value.grad for name, value in tuned.named_trainable_parameters() if name.endswith("B")]
    assert found
    assert all(gradient is not None and float(gradient.abs().max()) > 0 for gradient in found)


def test_what_is_merged_is_an_ordinary_model(tmp_path: Path) -> None:
    tuned = deltune.attach(quantised(tmp_path / "model", "nf4").eval(), "lora(rank=2)")
    with torch.no_grad():
        for name, value in tuned.named_trainable_parameters():
            if name.endswith("B"):
                value.normal_(std=0.1)
        expected = tuned.model(IDS).logits
        merged = tuned.merge(reversible=False, dequantize=True)
        merged.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert torch.allclose(again(IDS).logits, expected, atol=1e-5)
    assert getattr(again.config, "quantization_config", None) is None
