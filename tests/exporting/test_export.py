"""What is true of every format."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import deltune
from deltune.errors import StateError
from deltune.exporting import FORMATS, Drift, probe_logits
from tests.exporting.test_gguf import ROUNDING, tuned_with
from tests.tasks.tiny import byte_tokenizer
from tests.zoo import ARCHITECTURES


def test_a_merged_model_is_an_ordinary_folder_and_the_live_one_stays_as_it_is(tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4)")
    expected = probe_logits(tuned.model)
    found = deltune.export(tuned, tmp_path / "out", "merged", tokenizer=byte_tokenizer())
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        item.name for item in (tmp_path / "out").iterdir()
    }
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert Drift.between(expected, probe_logits(again)) == found.drift
    assert found.drift.relative < ROUNDING
    assert torch.equal(probe_logits(tuned.model), expected)
    assert not tuned.merged


def test_what_cannot_be_merged_is_refused_and_stays_live(tmp_path: Path) -> None:
    tuned = tuned_with("prefix-tuning(length=2)")
    expected = probe_logits(tuned.model)
    with pytest.raises(StateError, match="cannot be merged"):
        deltune.export(tuned, tmp_path / "out", "merged")
    assert torch.equal(probe_logits(tuned.model), expected)


def test_a_quantised_model_is_not_merged_for_good_in_passing(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"].build("language")
    tuned = deltune.attach(deltune.quantize(model, deltune.NF4(block=32)), "lora(rank=2)")
    with pytest.raises(StateError, match="for good"):
        deltune.export(tuned, tmp_path / "out", "merged")
    assert deltune.export(tuned, tmp_path / "out", "gguf").drift.largest == 0


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_replaced_unasked(format: str, tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4)")
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StateError, match="exists already"):
        deltune.export(tuned, tmp_path, format)
    assert (tmp_path / "mine.txt").read_text() == "mine"
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "special_tokens_map.json").touch()
    deltune.export(tuned, tmp_path / "out", format, overwrite=True)
    assert not (tmp_path / "out" / "special_tokens_map.json").exists()
    (tmp_path / "out" / "thesis.txt").touch()
    with pytest.raises(StateError, match=r"thesis\.txt, which would be lost"):
        deltune.export(tuned, tmp_path / "out", format, overwrite=True)
    assert (tmp_path / "out" / "thesis.txt").exists()
    assert {item.name for item in tmp_path.iterdir()} == {"mine.txt", "out"}


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_live_and_how_stays(format: str, tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=2)")
    tuned.attach("lora(rank=2)", "other")
    tuned.activate("default", "other", weights=(0.5, 2.0), stacked=True, frozen="other")
    deltune.export(tuned, tmp_path / "stacked", format, name="other")
    assert (tuned.control.live, tuned.control.stacked) == ({"default": 0.5, "other": 2.0}, True)
    assert tuned.trained == ("default",)
    tuned.route(["default", None, "other"])
    deltune.export(tuned, tmp_path / "routed", format, name="other")
    assert tuned.control.route == ("default", None, "other")
    tuned.route(None)
    assert (tuned.control.stacked, tuned.trained) == (True, ("default",))


@pytest.mark.parametrize("format", FORMATS)
def test_changes_of_one_matrix_by_several_are_joined(format: str, tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4, alpha=2) + lora(rank=8, targets='attention.query')")
    found = deltune.export(tuned, tmp_path / "out", format)
    assert found.drift.relative < ROUNDING
    if format == "vllm":
        assert "--max-lora-rank 16 " in found.use


def test_modes_and_training_go_on_as_before(tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4, dropout=0.5)")
    tuned.model.train()
    tuned.model.model.norm.eval()
    modes = {name: module.training for name, module in tuned.model.named_modules()}
    for format in FORMATS:
        assert deltune.export(tuned, tmp_path / format, format).drift.relative < ROUNDING
    assert {name: module.training for name, module in tuned.model.named_modules()} == modes
    assert all(value.requires_grad for value in tuned.trainable_parameters())


def test_wrong_words_are_answered_with_the_right_ones(tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4)")
    with pytest.raises(StateError, match="Did you mean 'gguf'"):
        deltune.export(tuned, tmp_path / "out", "ggu")
    with pytest.raises(StateError, match="sst2"):
        deltune.export(tuned, tmp_path / "out", "peft", name="sst2")
    vision = deltune.attach(ARCHITECTURES["vit"].build("classification"), "lora(rank=2)")
    with pytest.raises(StateError, match="reads no tokens"):
        deltune.export(vision, tmp_path / "out", "peft")
