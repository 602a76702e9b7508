"""The three loops of the examples train the same LoRA to the same losses."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertModel

import deltune
from deltune.tasks import TextClassification
from tests.cli.conftest import write_csv
from tests.training import tiny

LOOPS = ("plain_pytorch", "transformers_trainer", "accelerate_loop")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments for a model without dropout, and data."""
    folder = tmp_path_factory.mktemp("examples")
    torch.manual_seed(0)
    BertModel(tiny.config(dropout=0.0)).save_pretrained(folder / "model")
    tiny.tokenizer().save_pretrained(folder / "model")
    data = write_csv(folder / "reviews.csv", list(tiny.reviews(40)))
    return ["--model", str(folder / "model"), "--data", str(data)]


def trained(name: str, arguments: list[str], output: Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    from examples.inputs import options

    module: Any = importlib.import_module(f"examples.{name}")
    chosen = options(module.__doc__, [*arguments, "--output", str(output), "--steps", "9", "--batch-size", "8"])
    losses = module.train(chosen)
    model = TextClassification(label_names=("negative", "positive")).load_model(chosen.model)
    return losses, dict(deltune.load(model, output).named_trainable_parameters())


def test_all_loops_train_to_the_same_losses(inputs: list[str], tmp_path: Path) -> None:
    (expected, weights), *others = (trained(name, inputs, tmp_path / name) for name in LOOPS)
    assert len(expected) == 9  # more than one pass over 40 rows
    assert len(set(expected)) == 9
    for losses, values in others:
        assert losses == pytest.approx(expected, abs=1e-6)
        assert values.keys() == weights.keys()
        assert all(torch.allclose(values[name], weights[name], atol=1e-6) for name in weights)


@pytest.mark.parametrize("name", LOOPS)
def test_an_example_says_how_it_ended(
    name: str, inputs: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module: Any = importlib.import_module(f"examples.{name}")
    module.main([*inputs, "--output", str(tmp_path), "--steps", "2", "--batch-size", "8"])
    assert "first loss" in capsys.readouterr().out
    assert sorted(file.name for file in tmp_path.iterdir()) == ["delta.safetensors", "deltune.json"]
    assert f"python -m examples.{name}" in module.__doc__
