"""Commands that quantise the model by themselves, since the method or the delta says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import deltune as library
from deltune.errors import CheckpointError, MethodError
from deltune.quantization import format_of, is_quantized, load_quantized
from tests.cli.conftest import Command, Place

METHOD = "qlora(rank=2, engine=torch)"


@pytest.fixture(scope="module")
def run(place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A QLoRA run by the command line."""
    from deltune.cli import main

    folder = tmp_path_factory.mktemp("qlora") / "run"
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in place.tune(folder, "--method", METHOD)])
    assert not ended.value.code
    return folder


def test_tune_trains_beside_a_quantised_model(place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune(*place.tune(tmp_path, "--method", METHOD))
    assert ended.status == 0, ended.err
    assert "matrices in 4 bits" in ended.out
    assert "bits each" in ended.out
    described = json.loads((tmp_path / "deltune.json").read_text())["base_model"]
    assert described["quantization"]["format"] == "nf4"
    assert described["quantization"]["block"] == 64
    # counted before packing
    bare = AutoModelForSequenceClassification.from_pretrained(place.model)
    assert described["parameters"] == sum(value.numel() for value in bare.base_model.parameters())


def test_the_share_of_trained_values_is_that_of_the_unquantised_model(
    place: Place, deltune: Command, tmp_path: Path
) -> None:
    found = deltune(*place.tune(tmp_path / "one", "--method", METHOD, "--json")).json["parameters"]
    plain = deltune(*place.tune(tmp_path / "two", "--method", "lora(rank=2, targets=attention.* ffn.*)", "--json"))
    assert found["trainable"] == plain.json["parameters"]["trainable"]
    assert found["model"] == plain.json["parameters"]["model"]
    assert 4.1 < found["bits_per_quantized_parameter"] < 5.2


def test_a_sum_with_qlora_quantises_too(place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune(*place.tune(tmp_path, "--method", f"{METHOD} + bitfit", "--json"))
    assert ended.status == 0, ended.err
    assert "bits_per_quantized_parameter" in ended.json["parameters"]


def test_eval_and_predict_quantise_as_training_did(
    run: Path, place: Place, deltune: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []
    original = library.load

    def remember(model: torch.nn.Module, *args: object, **options: object) -> library.Tuned:
        loaded.append(format_of(model))
        return original(model, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(library, "load", remember)
    ended = deltune("eval", "--model", place.model, "--delta", run, "--data", place.test, "--json")
    assert ended.status == 0, ended.err
    result = json.loads((run / "result.json").read_text())
    assert ended.json["metrics"]["loss"] == pytest.approx(result["metrics"]["loss"], abs=1e-6)
    assert deltune("predict", "--model", place.model, "--delta", run, "--data", place.test).status == 0
    assert [found is not None and found.block for found in loaded] == [64, 64]


def test_the_same_command_returns_and_another_format_is_another_run(run: Path, place: Place, deltune: Command) -> None:
    again = deltune(*place.tune(run, "--method", METHOD))
    assert again.status == 0, again.err
    refused = deltune(*place.tune(run, "--method", "qlora(rank=2, engine=torch, block=32)"))
    assert refused.status == 2
    assert "--restart" in refused.err


def test_compare_has_a_row_of_a_quantised_model(place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune(
        *("compare", "--model", place.model, "--data", place.train, "--methods", f"{METHOD};bitfit".replace(";", ",")),
        *("--seeds", "0", "--steps", 2, "--batch-size", 8, "--output", tmp_path),
    )
    assert ended.status == 0, ended.err
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert "qlora" in str(rows)
    assert not any(row.get("error") for row in rows)


@pytest.mark.parametrize("into", ["dequantized", "original"])
def test_merge_says_how_far_it_drifts(into: str, run: Path, place: Place, deltune: Command, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    ended = deltune("merge", "--model", place.model, "--delta", run, "--output", output, "--into", into, "--json")
    assert ended.status == 0, ended.err
    merged = AutoModelForSequenceClassification.from_pretrained(output)
    assert not any(is_quantized(module) for module in merged.modules())
    drift, again = ended.json["drift"], ended.json["drift_if_quantized_again"]
    if into == "dequantized":
        assert drift["relative"] < 1e-4
        # rounding to 4 bits anew loses more than the arithmetic does
        assert again["relative"] > 10 * drift["relative"]
    else:
        assert 1e-4 < drift["relative"] < 1
    text = deltune("merge", "--model", place.model, "--delta", run, "--output", output, "--overwrite", "--into", into)
    assert f"merged into the {into} matrices" in text.out


def test_merge_into_something_else_is_refused(run: Path, place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune("merge", "--model", place.model, "--delta", run, "--output", tmp_path / "x", "--into", "origin")
    assert ended.status == 2
    assert "original" in ended.err


def test_the_merged_model_is_the_dequantised_one_with_the_change(run: Path, place: Place) -> None:
    def quantised() -> torch.nn.Module:
        model = load_quantized(place.model, AutoModelForSequenceClassification, library.NF4(engine="torch"))
        assert isinstance(model, torch.nn.Module)
        return model

    tuned = library.load(quantised(), run)
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        before = tuned.model(ids).logits
        merged = tuned.merge(reversible=False, dequantize=True)
        after = merged(ids).logits
    assert float((before - after).abs().max()) < 1e-5 * max(1.0, float(before.abs().max()))
    assert format_of(merged) is None

    with pytest.raises(library.errors.StateError, match="reversible=False"):
        library.load(quantised(), run).merge(dequantize=True)


def test_loading_beside_other_numbers_warns_or_is_refused(run: Path, place: Place) -> None:
    plain = AutoModelForSequenceClassification.from_pretrained(place.model)
    with pytest.warns(UserWarning, match=r"deltune\.quantize\(model, NF4\(block=64"):
        library.load(plain, run)
    other = load_quantized(place.model, AutoModelForSequenceClassification, library.NF4(engine="torch", block=32))
    with pytest.raises(CheckpointError, match="blocks of 64"):
        library.load(other, run)
    assert library.load(other, run, strict=False).active


def test_a_plain_delta_on_a_quantised_model_warns(place: Place, deltune: Command, tmp_path: Path) -> None:
    assert deltune(*place.tune(tmp_path, "--method", "lora(rank=2)")).status == 0
    model = load_quantized(place.model, AutoModelForSequenceClassification, library.NF4(engine="torch"))
    with pytest.warns(UserWarning, match="was not quantised, and this one is"):
        library.load(model, tmp_path)


def test_two_formats_in_one_sum_are_refused() -> None:
    both = library.QLoRA(rank=2) + library.QLoRA(rank=2, block=128)
    with pytest.raises(MethodError, match="two ways"):
        both.base_format  # noqa: B018
    with pytest.raises(MethodError, match="power of two"):
        library.QLoRA(block=96)
