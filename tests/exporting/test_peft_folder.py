"""Folders for peft and for vLLM, read by peft itself and as vLLM reads them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

import deltune
from deltune.errors import CheckpointError, StateError
from deltune.exporting import Drift, probe_logits
from deltune.exporting.factors import Factors
from deltune.exporting.peft_folder import rank_for_vllm
from tests.exporting.test_gguf import EVERY, ROUNDING, model, tuned_with
from tests.zoo import ARCHITECTURES

RANKS = f"lora(rank=4, targets='{EVERY}', rank_pattern='ffn.up -> 2; attention.query layers=0 -> 3')"


def in_peft(folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(model(), str(folder)).eval().base_model.model


def as_vllm_reads(folder: Path) -> Any:
    """A fresh model with the factors merged in, every one with the scale of the configuration."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["bias"] == "none"
    assert not config["use_dora"]
    assert not config["modules_to_save"]
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(folder / "adapter_model.safetensors")
    made = model()
    for key in [key for key in tensors if key.endswith(".lora_A.weight")]:
        A, B = tensors[key], tensors[key.replace("lora_A", "lora_B")]
        assert len(A) == config["r"]
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        with torch.no_grad():
            made.get_submodule(module).weight += scale * (B @ A)
    return made


@pytest.mark.parametrize("method", ["lora(rank=4)", RANKS, "adalora(initial_rank=4, target_rank=2)", "ia3"])
def test_peft_reads_what_is_exported_for_it(method: str, tmp_path: Path) -> None:
    tuned = tuned_with(method)
    expected = probe_logits(tuned.model)
    found = deltune.export(tuned, tmp_path / "out", "peft")
    assert Drift.between(expected, probe_logits(in_peft(tmp_path / "out"))).relative < ROUNDING
    assert found.drift.relative < ROUNDING
    assert tuned.active == ("default",)
    assert list(tuned.attachments) == ["default"]
    assert torch.equal(probe_logits(tuned.model), expected)


@pytest.mark.parametrize(
    "method",
    [
        f"lora(rank=4, alpha=2, targets='{EVERY}')",
        "lora(rank=4, rank_stabilized=true)",
        RANKS,
        "lora(rank=4, rank_stabilized=true, rank_pattern='attention.query -> 2')",
        "adalora(initial_rank=4, target_rank=2)",
    ],
)
def test_vllm_has_one_rank_and_one_scale_for_all(method: str, tmp_path: Path) -> None:
    tuned = tuned_with(method)
    expected = probe_logits(tuned.model)
    found = deltune.export(tuned, tmp_path / "out", "vllm")
    assert Drift.between(expected, probe_logits(as_vllm_reads(tmp_path / "out"))).relative < ROUNDING
    assert Drift.between(expected, probe_logits(in_peft(tmp_path / "out"))).relative < ROUNDING
    assert found.drift.relative < ROUNDING
    assert "--max-lora-rank 8 " in found.use


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("lora(rank=2, weight_decomposed=true)", "no sum with a product of two thin matrices"),
        ("lora(rank=2, targets=embeddings)", "is an embedding"),
        ("lora(rank=2, targets='lm_head')", "lm_head lies outside"),
        ("lora(rank=2) + freeze(layers=1)", "it changes model"),
        ("prefix-tuning(length=2)", "no sum with a product of two thin matrices"),
    ],
)
def test_what_vllm_would_refuse_is_refused_with_what_to_change(method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=message):
        deltune.export(tuned_with(method), tmp_path / "out", "vllm")
    assert list(tmp_path.iterdir()) == []


def test_vllm_takes_decoders_that_generate(tmp_path: Path) -> None:
    for name, head in (("bert", "classification"), ("t5", "language"), ("llama", "classification")):
        tuned = deltune.attach(ARCHITECTURES[name].build(head), "lora(rank=2)")
        with pytest.raises(StateError, match="beside a decoder that generates text"):
            deltune.export(tuned, tmp_path / "out", "vllm")


def test_the_smallest_rank_that_vllm_can_be_told_is_named() -> None:
    def of(rank: int) -> list[Factors]:
        return [Factors("a", torch.zeros(rank, 2), torch.zeros(2, rank), 1.0)]

    assert [rank_for_vllm(of(rank)) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
    with pytest.raises(StateError, match="up to 512, and this delta has rank 513"):
        rank_for_vllm(of(513))


def test_a_whole_matrix_that_is_transposed_is_not_called_a_part(tmp_path: Path) -> None:
    tuned = deltune.attach(ARCHITECTURES["gpt2"].build("language"), "lora(rank=2, targets=ffn.down)")
    with pytest.raises(StateError, match=r"ffn\.down is a transposed matrix"):
        deltune.export(tuned, tmp_path / "out", "vllm")


@pytest.mark.parametrize("format", ["peft", "vllm"])
def test_a_folder_that_does_something_else_is_not_kept(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = tuned_with("lora(rank=4)")
    expected = probe_logits(tuned.model)
    save = deltune.Tuned.save

    def damaged(self: Any, path: Path, *args: Any, **options: Any) -> Any:
        save(self, path, *args, **options)
        file = path / "adapter_model.safetensors"
        tensors = load_file(file)
        key = next(key for key in tensors if ".lora_B." in key)
        save_file(tensors | {key: 2 * tensors[key]}, file, metadata={"format": "pt"})
        return path

    monkeypatch.setattr(deltune.Tuned, "save", damaged)
    with pytest.raises(StateError, match="does not do the same"):
        deltune.export(tuned, tmp_path / "out", format)
    assert list(tmp_path.iterdir()) == []
    assert list(tuned.attachments) == ["default"]
    assert torch.equal(probe_logits(tuned.model), expected)


def test_what_peft_has_not_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved in the format of peft"):
        deltune.export(tuned_with("sequential-adapter(width=2)"), tmp_path / "out", "peft")
    assert list(tmp_path.iterdir()) == []


def test_a_classifier_is_exported_with_its_head(tmp_path: Path) -> None:
    tuned = deltune.attach(ARCHITECTURES["bert"].build("classification"), "lora(rank=2)")
    with torch.no_grad():
        for value in tuned.trainable_parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    found = deltune.export(tuned, tmp_path / "out", "peft")
    assert found.drift.largest == 0
    assert any("classifier" in key for key in load_file(tmp_path / "out" / "adapter_model.safetensors"))
