"""What deltune trained gives the same outputs in Hugging Face peft; what peft cannot hold is refused."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import CheckpointError
from tests.checkpoints.peft_cases import logits, same
from tests.zoo import ARCHITECTURES

EVERYTHING = "targets='attention.* ffn.*'"
PREFIX = "prefix-tuning(length=3, width=6, shift_positions=true)"
#: method, architectures, peft's type
WRITTEN: list[tuple[str, tuple[str, ...], str]] = [
    (f"lora(rank=2, alpha=5, {EVERYTHING})", ("bert", "gpt2", "llama-gqa", "t5", "vit"), "LORA"),
    # rows of fused matrices, side by side and head by head
    ("lora(rank=2, alpha=5)", ("phi3", "gpt_neox", "modernbert"), "LORA"),
    ("lora(rank_pattern='attention.query -> 3; attention.value layers=0 -> 2')", ("bert", "gpt2", "llama-gqa"), "LORA"),
    ("lora(rank=2, rank_stabilized=true, initialization=pissa)", ("bert", "gpt2"), "LORA"),
    (f"lora(rank=2, weight_decomposed=true, {EVERYTHING})", ("bert", "llama-gqa", "t5", "vit"), "LORA"),
    ("lora(rank=2, targets='attention.value layers=1:')", ("bert", "llama-gqa", "t5"), "LORA"),
    ("lora(rank=2, targets='attention.value,embeddings')", ("bert", "gpt2", "llama-gqa"), "LORA"),
    ("lora(rank=2, targets='*.projection,attention.key')", ("vit",), "LORA"),
    ("adalora(initial_rank=4, target_rank=2)", ("bert", "gpt2"), "LORA"),
    ("dylora(rank=3)", ("llama-gqa",), "LORA"),
    ("lora(rank=2) + bitfit", ("bert", "gpt2", "vit"), "LORA"),
    ("lora(rank=2) + bitfit(targets='attention.query,attention.value')", ("bert",), "LORA"),
    ("lora(rank=2) + bitfit(missing=add, targets='attention.value')", ("llama-gqa", "t5"), "LORA"),
    ("lora(rank=2) + full(targets=norm)", ("bert", "gpt2", "llama-gqa", "t5"), "LORA"),
    ("ia3", ("bert", "gpt2", "llama-gqa", "t5", "vit"), "IA3"),
    ("ia3(targets='attention.query layers=0', inputs=none)", ("bert", "gpt2"), "IA3"),
    (f"krona(scale=1.5, {EVERYTHING})", ("bert", "llama-gqa", "t5", "vit"), "LOKR"),
    ("krona(rows=8, columns=8)", ("bert", "llama-gqa"), "LOKR"),
    (PREFIX, ("bert", "gpt2", "llama-gqa"), "PREFIX_TUNING"),
    (f"{PREFIX[:-1]}, targets='attention stacks=decoder')", ("t5",), "PREFIX_TUNING"),
    ("prompt-tuning(length=3)", ("gpt2", "llama-gqa", "t5"), "PROMPT_TUNING"),
    ("p-tuning(length=3)", ("gpt2", "llama-gqa", "t5"), "P_TUNING"),
]
#: method, architecture, words of the refusal
REFUSED = [
    ("sequential-adapter(width=4)", "bert", "nothing like its"),
    ("bitfit", "bert", "only trains parameters of the model"),
    ("fish-mask(ratio=0.3)", "bert", "nothing like its EntriesForm"),
    ("lora + u-bitfit(budget=0.3)", "bert", "trains single entries"),
    (f"lora + {PREFIX}", "gpt2", "LORA and PREFIX_TUNING at once"),
    ("prefix-tuning(length=3)", "gpt2", "shift_positions=True"),
    ("prefix-tuning(length=3, shift_positions=true, targets='attention layers=1:')", "gpt2", r"decoder\.0\.attention"),
    ("prefix-tuning(length=3)", "t5", "one stack alone"),
    ("prefix-tuning(length=3, targets='attention stacks=encoder')", "t5", r"decoder\.0\.attention"),
    ("prefix-tuning(length=3, targets='attention stacks=decoder')", "t5", "shift_positions=True"),
    ("prompt-tuning(length=3)", "bert", "prompt's own output"),
    ("p-tuning(length=3)", "bert", "prompt's own output"),
    ("krona", "gpt2", "whole linear maps"),
    ("krona(rows=2, columns=8)", "bert", "shapes of LoKr's factors"),
    ("lora(weight_decomposed=true)", "gpt2", "magnitudes"),
    ("lora(targets=attention.value) + bitfit(missing=add, targets=ffn.up)", "llama-gqa", "none of its own"),
    ("krona + bitfit", "bert", "beside LOKR"),
    ("ia3(targets=ffn.down)", "bert", "acts twice"),
]


def head_of(architecture: str) -> Any:
    return "language" if ARCHITECTURES[architecture].generates else "classification"


def attached(method: str, architecture: str) -> deltune.Tuned:
    """The method on the architecture, with random values in all that trains."""
    torch.manual_seed(2)
    tuned = deltune.attach(ARCHITECTURES[architecture].build(head_of(architecture)), method)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, value in tuned.attachments["default"].parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator))
    return tuned


@pytest.mark.parametrize(
    ("method", "architecture", "kind"),
    [
        pytest.param(method, architecture, kind, id=f"{method}-{architecture}")
        for method, architectures, kind in WRITTEN
        for architecture in architectures
    ],
)
def test_peft_gives_the_same_outputs(method: str, architecture: str, kind: str, tmp_path: Path) -> None:
    tuned = attached(method, architecture)
    tuned.model.eval()
    tuned.save(tmp_path, format="peft")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    text = (tmp_path / "adapter_config.json").read_text()
    config = json.loads(text)
    assert config["peft_type"] == kind
    assert list(config) == sorted(config)
    zoo = ARCHITECTURES[architecture]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for harmless in ("fan_in_fan_out", "lora_bias=True", "Model has `tie_word_embeddings=True`"):
            warnings.filterwarnings("ignore", message=f".*{harmless}.*")
        there = peft.PeftModel.from_pretrained(zoo.build(head_of(architecture)), str(tmp_path)).eval()
    bare = zoo.build(head_of(architecture))
    back = deltune.load(zoo.build(head_of(architecture)), tmp_path)
    for padding in ("none", "right") if zoo.pads else ("none",):
        batch = zoo.batch(3, 7, padding=padding, head=head_of(architecture))
        batch.pop("position_ids", None)
        expected = logits(tuned.model, batch)
        assert same(logits(bare, batch), expected) > 1e-3
        assert same(logits(there, batch), expected) < 1e-5
        assert same(logits(back.model, batch), expected) < 1e-5


@pytest.mark.parametrize(("method", "architecture", "words"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_peft_cannot_hold_is_refused(method: str, architecture: str, words: str, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, deltune.errors.TargetError), match=words):
        attached(method, architecture).save(tmp_path / "folder", format="peft")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize(("architecture", "targets"), [("bert", "embeddings"), ("vit", "*.projection")])
def test_changes_of_one_matrix_by_several_are_joined(architecture: str, targets: str, tmp_path: Path) -> None:
    method = f"lora(rank=2, targets='{targets}') + lora(rank=3, alpha=1, targets='{targets}')"
    attached(method, architecture).save(tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 5


def test_the_configuration_names_the_base_model_and_the_task(tmp_path: Path) -> None:
    model = ARCHITECTURES["bert"].build("classification")
    model.config._name_or_path = "models/encoder"
    tuned = deltune.attach(model, "lora(rank=2, targets='attention.query')")
    tuned.save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "models/encoder"
    assert config["task_type"] == "SEQ_CLS"
    assert config["target_modules"] == ["query"]
    assert config["modules_to_save"] == ["classifier"]
    assert config["r"] == 2
    assert "base_model.model.classifier.weight" in load_file(tmp_path / "adapter_model.safetensors")


def test_without_a_task_of_peft_the_class_is_named(tmp_path: Path) -> None:
    deltune.attach(ARCHITECTURES["bert"].build("language"), "lora(rank=2)").save(tmp_path, format="peft")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["task_type"] is None
    assert config["auto_mapping"]["base_model_class"] == "BertForMaskedLM"
    with pytest.warns(UserWarning, match="trained on a BertForMaskedLM, and this model is a BertModel"):
        deltune.load(ARCHITECTURES["bert"].build("base"), tmp_path)
    tuned = deltune.attach(ARCHITECTURES["bert"].build("language"), "prompt-tuning(length=2)")
    with pytest.raises(CheckpointError, match="BertForMaskedLM is none of these"):
        tuned.save(tmp_path / "prompt", format="peft")
