"""Which format a folder has is found out by itself; weights that are pickled are read on request alone."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import deltune
from deltune.checkpoints import FORMATS, Format, Saved, format_named, recognised
from deltune.checkpoints.weights import read_config, read_weights
from deltune.errors import CheckpointError
from tests.zoo import ARCHITECTURES


def saved(folder: Path) -> deltune.Tuned:
    tuned = deltune.attach(ARCHITECTURES["bert"].build("classification"), deltune.LoRA(rank=2), name="one")
    tuned.save(folder)
    return tuned


class Notes(Format):
    """A format of the test's own: a text file with the number that every value has."""

    name = "notes"
    wanted = "note.txt"

    def recognises(self, folder: Path) -> bool:
        return (folder / "note.txt").is_file()

    def read(self, folder: Path, model: Any, anatomy: Any, pickled: bool) -> Saved:
        assert not any("deltune" in name for name, _ in model.named_modules()), "nothing is live while a format reads"
        value = float((folder / "note.txt").read_text())
        tensors = {
            f"encoder.{layer}.attention.query.{factor}": torch.full(shape, value)
            for layer in range(3)
            for factor, shape in (("A", (2, 32)), ("B", (32, 2)))
        }
        method = deltune.LoRA(rank=2, targets="attention.query")
        return Saved("noted", method, tensors, notes=("the number is rounded",))

    def write(self, attachment: Any, model: Any, anatomy: Any, base_model: Any, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        first = next(value for _, value in attachment.form_parameters())
        (folder / "note.txt").write_text(f"{first.flatten()[0].item()}")
        return folder


@pytest.fixture
def notes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "notes", f"{__name__}:Notes")


def test_a_folder_of_deltune_is_recognised(tmp_path: Path) -> None:
    saved(tmp_path / "one")
    assert recognised(tmp_path / "one").name == "deltune"
    assert recognised(tmp_path / "one", "deltune").name == "deltune"


@pytest.mark.usefixtures("notes")
def test_another_format_is_loaded_as_its_own_and_can_be_saved_as_deltunes(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "note.txt").write_text("0.5")
    model = ARCHITECTURES["bert"].build("classification")
    first = deltune.attach(model, deltune.LoRA(rank=2), name="other")
    with pytest.warns(UserWarning, match="foreign: the number is rounded"):
        deltune.load(model, tmp_path / "foreign")
    assert first.active == ("noted",)
    parameters = dict(first.attachments["noted"].parameters())
    assert len(parameters) == 6
    assert all(value.eq(0.5).all() for value in parameters.values())
    first.save(tmp_path / "native")
    first.save(tmp_path / "again", format="notes")
    assert (tmp_path / "again" / "note.txt").read_text() == "0.5"
    fresh = deltune.load(ARCHITECTURES["bert"].build("classification"), tmp_path / "native")
    for key, value in fresh.attachments["noted"].parameters():
        assert torch.equal(value, parameters[key])


@pytest.mark.usefixtures("notes")
def test_a_folder_in_two_formats_needs_its_format_said(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "note.txt").write_text("0.5")
    with pytest.raises(CheckpointError, match="several formats: deltune, notes"):
        deltune.load(ARCHITECTURES["bert"].build("classification"), tmp_path)
    tuned = deltune.load(ARCHITECTURES["bert"].build("classification"), tmp_path, format="deltune")
    assert tuned.active == ("one",)


def test_a_folder_in_no_format(tmp_path: Path) -> None:
    saved(tmp_path / "runs" / "one")
    model = ARCHITECTURES["bert"].build("classification")
    with pytest.raises(CheckpointError, match=r"these folders do: .*one"):
        deltune.load(model, tmp_path / "runs")
    with pytest.raises(CheckpointError, match=r"does not exist. Did you mean runs\?"):
        deltune.load(model, tmp_path / "run")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"there is no delta.safetensors \(deltune\)"):
        deltune.load(model, tmp_path / "empty")
    assert not hasattr(model, "_deltune_handle")


def test_a_format_that_does_not_exist(tmp_path: Path) -> None:
    tuned = saved(tmp_path / "one")
    with pytest.raises(CheckpointError, match="Did you mean 'deltune'"):
        tuned.save(tmp_path / "two", format="deltunes")
    with pytest.raises(CheckpointError, match="There is no format 'keras'"):
        deltune.load(tuned, tmp_path / "one", "two", format="keras")
    assert not (tmp_path / "two").exists()


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_there_under_its_name(name: str) -> None:
    assert format_named(name).name == name


class Harm:
    """What a pickle can do: call any function when it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("harmed"),))


def test_pickled_weights_are_read_on_request_and_run_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = {"a": torch.arange(3.0)}
    torch.save(tensors, tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match=r"weights.bin is a pickle.*pickled=True"):
        read_weights(tmp_path, "weights.safetensors", "weights.bin", False)
    assert torch.equal(read_weights(tmp_path, "weights.safetensors", "weights.bin", True)["a"], tensors["a"])
    torch.save({"a": Harm()}, tmp_path / "weights.bin")
    for pickled in (False, True):
        with pytest.raises(CheckpointError, match=r"weights.bin"):
            read_weights(tmp_path, "weights.safetensors", "weights.bin", pickled)
    (tmp_path / "weights.bin").write_bytes(pickle.dumps(Harm()))
    with pytest.raises(CheckpointError, match="weights_only"):
        read_weights(tmp_path, "weights.safetensors", "weights.bin", True)
    assert not (tmp_path / "harmed").exists()
    torch.save([tensors["a"]], tmp_path / "weights.bin")
    with pytest.raises(CheckpointError, match="no tensors by name"):
        read_weights(tmp_path, "weights.safetensors", "weights.bin", True)
    save_file({"b": tensors["a"]}, tmp_path / "weights.safetensors")
    assert list(read_weights(tmp_path, "weights.safetensors", "weights.bin", True)) == ["b"]


def test_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither weights.safetensors nor weights.bin"):
        read_weights(tmp_path, "weights.safetensors", "weights.bin", False)
    save_file({"b": torch.zeros(64)}, tmp_path / "weights.safetensors")
    content = (tmp_path / "weights.safetensors").read_bytes()
    (tmp_path / "weights.safetensors").write_bytes(content[:-16])
    with pytest.raises(CheckpointError, match=r"weights.safetensors is damaged or cut short"):
        read_weights(tmp_path, "weights.safetensors", "weights.bin", False)
    with pytest.raises(CheckpointError, match=r"There is no config.json"):
        read_config(tmp_path / "config.json")
    for text, message in (("{", "damaged"), ("[1]", "no JSON object, but list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            read_config(tmp_path / "config.json")
    (tmp_path / "config.json").write_text(json.dumps({"a": 1}))
    assert read_config(tmp_path / "config.json") == {"a": 1}
