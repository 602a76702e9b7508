"""A folder that was saved to before: what it held is replaced as a whole, or stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune
from deltune.checkpoints import FORMATS
from deltune.checkpoints.adapterhub import folders
from deltune.checkpoints.peft import writing
from deltune.errors import CheckpointError
from tests.zoo import ARCHITECTURES


def tuned_with(method: str, value: float = 0.1, *, head: bool = False) -> deltune.Tuned:
    tuned = deltune.attach(ARCHITECTURES["bert"].build("classification"), method, train_head=head)
    with torch.no_grad():
        for tensor in tuned.trainable_parameters():
            tensor.fill_(value)
    return tuned


def again(folder: Path) -> deltune.Tuned:
    return deltune.load(ARCHITECTURES["bert"].build("classification"), folder)


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
def test_a_head_of_before_is_gone(format: str, tmp_path: Path) -> None:
    tuned_with("lora(rank=2)", head=True).save(tmp_path / "one", format=format)
    assert again(tmp_path / "one").attachments["default"].head_names
    tuned_with("lora(rank=2)").save(tmp_path / "one", format=format)
    assert not again(tmp_path / "one").attachments["default"].head_names


def test_a_fusion_of_before_is_gone(tmp_path: Path) -> None:
    fusion = "adapter-fusion(adapters='pfeiffer-adapter, pfeiffer-adapter')"
    tuned_with(fusion).save(tmp_path / "one", format="adapterhub")
    assert again(tmp_path / "one").attachments["default_1_default_2"].method.name == "adapter-fusion"
    tuned_with("lora(rank=2)").save(tmp_path / "one", format="adapterhub")
    assert again(tmp_path / "one").attachments["default"].method.name == "lora"


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
def test_a_pickle_of_before_is_gone(format: str, tmp_path: Path) -> None:
    name = {"adapterhub": "pytorch_adapter.bin", "peft": "adapter_model.bin"}[format]
    (tmp_path / name).write_bytes(b"old")
    tuned_with("lora(rank=2)").save(tmp_path, format=format)
    assert not (tmp_path / name).exists()
    assert again(tmp_path).active == ("default",)


@pytest.mark.parametrize("present", FORMATS)
@pytest.mark.parametrize("format", FORMATS)
def test_formats_are_not_mixed(present: str, format: str, tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=2)")
    tuned.save(tmp_path, format=present)
    before = {item.name: item.read_bytes() for item in tmp_path.iterdir()}
    if present == format:
        tuned.save(tmp_path, format=format)
    else:
        with pytest.raises(CheckpointError, match=f"holds a delta in the format {present}"):
            tuned.save(tmp_path, format=format)
    assert {item.name: item.read_bytes() for item in tmp_path.iterdir()} == before


def failing(error: Exception) -> Callable[..., Any]:
    def write(*arguments: Any) -> Any:
        raise error

    return write


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
@pytest.mark.parametrize("error", [OSError(28, "No space left"), KeyboardInterrupt()], ids=["full", "stopped"])
def test_a_save_that_fails_leaves_what_was_there(
    format: str, error: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned_with("lora(rank=2, alpha=2)", 0.1).save(tmp_path / "one", format=format)
    before = {item.name: item.read_bytes() for item in (tmp_path / "one").iterdir()}
    monkeypatch.setattr(folders if format == "adapterhub" else writing, "write_json", failing(error))
    for folder in ("one", "new"):
        with pytest.raises(type(error)):
            tuned_with("lora(rank=2, alpha=64)", 0.3).save(tmp_path / folder, format=format)
    assert {item.name: item.read_bytes() for item in (tmp_path / "one").iterdir()} == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["adapterhub", "peft"])
def test_a_save_that_is_stopped_while_it_replaces_leaves_no_mixture(
    format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned_with("lora(rank=2, alpha=2)", 0.1).save(tmp_path, format=format)
    replace = Path.replace

    def stopped(self: Path, target: Path) -> Path:
        if target == tmp_path / "adapter_config.json":
            raise OSError(5, "broken disk")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", stopped)
    with pytest.raises(CheckpointError, match=r"broken disk.*It holds no whole delta now"):
        tuned_with("lora(rank=2, alpha=64)", 0.3).save(tmp_path, format=format)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"There is no adapter_config\.json"):
        again(tmp_path)


def test_the_folder_is_named_where_it_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=f"Could not write {tmp_path / 'file'}"):
        tuned_with("lora(rank=2)").save(tmp_path / "file", format="peft")
