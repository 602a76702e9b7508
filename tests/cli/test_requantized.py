"""Merging into 4 bits again, and optimizers by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertConfig, BertForSequenceClassification, BertModel

import deltune as library
from deltune.quantization import NF4, format_of, load_quantized
from deltune.training import TrainingSettings
from tests.cli.conftest import Command, Place
from tests.quantization.test_quantize import needs_bitsandbytes
from tests.tasks.tiny import WORDS
from tests.training import tiny

FORMAT = NF4(engine="torch", block=32)
needs_no_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained model whose widths the block divides."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    BertModel(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(wide: Path, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from deltune.cli import main

    folder = tmp_path_factory.mktemp("run")
    arguments = [
        *("tune", "--model", wide, "--data", place.train, "--output", folder, "--steps", 4, "--batch-size", 8),
        *("--method", "qlora(rank=2, engine=torch, block=32)", "--learning-rate", 0.01),
    ]
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in arguments])
    assert not ended.value.code
    return folder


def test_merge_into_four_bits(run: Path, wide: Path, deltune: Command, tmp_path: Path) -> None:
    output = tmp_path / "merged"
    arguments = ("merge", "--model", wide, "--delta", run, "--output", output, "--into", "quantized")
    ended = deltune(*arguments, "--json")
    assert ended.status == 0, ended.err
    assert ended.json["into"] == "quantized"
    assert 1e-4 < ended.json["drift"]["relative"] < 1
    model = load_quantized(output, AutoModelForSequenceClassification, FORMAT)
    assert format_of(model) == NF4(engine="torch", block=32, compute_dtype=torch.float32)
    exact = deltune("merge", "--model", wide, "--delta", run, "--output", tmp_path / "exact", "--json").json
    assert exact["drift_if_quantized_again"] == pytest.approx(ended.json["drift"], rel=1e-3)
    text = deltune(*arguments, "--overwrite")
    assert "It is in 4 bits, and rounding has lost part" in text.out


def test_merge_into_four_bits_that_cannot_be_written_is_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    """The tiny model has 16 inputs a row."""
    delta = tmp_path / "run"
    assert deltune(*place.tune(delta, "--method", "qlora(rank=2, engine=torch)")).status == 0
    ended = deltune(
        *("merge", "--model", place.model, "--delta", delta, "--output", tmp_path / "merged", "--into", "quantized")
    )
    assert ended.status == 2
    assert "blocks of 64 do not divide" in ended.err
    assert not (tmp_path / "merged").exists()


def test_plain_deltas_have_no_other_matrices(place: Place, delta: Path, deltune: Command, tmp_path: Path) -> None:
    for into in ("original", "quantized"):
        ended = deltune(
            *("merge", "--model", place.model, "--delta", delta, "--output", tmp_path / "x", "--into", into)
        )
        assert ended.status == 2
        assert "beside a quantised model" in ended.err


@needs_no_cuda
@pytest.mark.parametrize(("name", "instead"), [("paged-adamw", "adamw,"), ("paged-adamw-8bit", "adamw-8bit,")])
def test_paged_optimizers_are_refused_before_any_work(
    name: str, instead: str, place: Place, deltune: Command, tmp_path: Path
) -> None:
    output = tmp_path / "run"
    ended = deltune(
        *("tune", "--model", place.model, "--data", tmp_path / "absent.csv", "--output", output, "--optimizer", name)
    )
    assert ended.status == 2
    assert "CUDA" in ended.err
    assert f"optimizer={instead}" in ended.err
    assert not output.exists()


def test_unknown_optimizers_are_refused(place: Place, deltune: Command, tmp_path: Path) -> None:
    ended = deltune(*place.tune(tmp_path / "run", "--optimizer", "adam"))
    assert ended.status == 2
    assert "adamw" in ended.err


def test_an_optimizer_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from deltune.errors import TrainingError
    from deltune.training import settings

    monkeypatch.setattr(settings.importlib.util, "find_spec", lambda name: None)
    TrainingSettings().check_optimizer("cpu")
    with pytest.raises(TrainingError, match=r"deltune\[quant\]"):
        TrainingSettings(optimizer="adamw-8bit").check_optimizer("cpu")
    with pytest.raises(TrainingError, match="on mps"):
        TrainingSettings(optimizer="adamw-8bit").check_optimizer("mps")
    with pytest.raises(TrainingError, match=r"deltune\[quant\]"):
        TrainingSettings(optimizer="paged-adamw").check_optimizer("cuda")


@needs_bitsandbytes
def test_8_bit_state_trains_and_resumes_in_the_same_bits(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    from deltune.training import fit

    kept = []

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Remembers the type of the state, and stops on the way if asked to."""

        def __init__(self, last: int) -> None:
            self.last = last

        def on_step_end(self, args: object, state: Any, control: object, optimizer: Any = None, **_: object) -> None:
            states = getattr(optimizer, "optimizer", optimizer).state
            kept.extend((key.numel(), value["state1"].dtype) for key, value in states.items())
            if state.global_step == self.last:
                raise KeyboardInterrupt

    rows = tiny.reviews(40)
    settings = tiny.SETTINGS.updated(optimizer="adamw-8bit", steps=8, save_every=2)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=64, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )

    def train(output: Path, last: int = 0) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        tuned = library.attach(BertForSequenceClassification(config), "full")
        options = {"tokenizer": tiny.tokenizer(), "settings": settings, "callbacks": [Watch(last)]}
        fit(tuned, tiny.task(), rows, output=output, **options)
        return {name: value.detach().clone() for name, value in tuned.named_trainable_parameters()}

    whole = train(tmp_path / "whole")
    # bitsandbytes keeps 8 bits of tensors of 4096 values and more
    assert {(count >= 4096, dtype) for count, dtype in kept} == {(True, torch.uint8), (False, torch.float32)}
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "stopped", 5)
    (newest,) = sorted((tmp_path / "stopped" / "checkpoints").glob("checkpoint-*"))[-1:]
    assert newest.name == "checkpoint-4"
    again = train(tmp_path / "stopped")
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert json.loads((tmp_path / "whole" / "result.json").read_text())["settings"]["optimizer"] == "adamw-8bit"
