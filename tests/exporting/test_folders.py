"""What stands at a place is never lost: refused before any work, and replaced in one step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deltune.errors import CheckpointError, StateError
from deltune.exporting.folders import DELTA_FILES, refuse_existing, write_checked


def exported(folder: Path, text: str = "old") -> Path:
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(text)
    return folder


def fill(text: str) -> Any:
    return lambda folder: exported(folder, text)


def content(folder: Path) -> dict[str, str]:
    return {item.name: item.read_text() for item in folder.iterdir()}


@pytest.mark.parametrize("output", [".", "..", "../work", "sub/..", ""])
def test_the_working_directory_and_what_it_lies_in_stay(
    output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = exported(tmp_path / "work")
    (work / "sub").mkdir()
    monkeypatch.chdir(work)
    with pytest.raises(StateError, match="the working directory is that folder or lies in it"):
        refuse_existing(Path(output), True)
    assert (work / "adapter_config.json").read_text() == "old"


def test_links_and_files_are_refused_at_once(tmp_path: Path) -> None:
    exported(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "nowhere").symlink_to(tmp_path / "absent")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "nowhere"):
        with pytest.raises(StateError, match=f"{name} is a link to"):
            refuse_existing(tmp_path / name, True)
    with pytest.raises(StateError, match="is no folder"):
        refuse_existing(tmp_path / "file", True)


def test_what_is_read_is_not_replaced(tmp_path: Path) -> None:
    model = exported(tmp_path / "around" / "model")
    for output in (model, tmp_path / "around", tmp_path / "around" / ".." / "around" / "model"):
        with pytest.raises(StateError, match="which is read, is that folder or lies in it"):
            refuse_existing(output, True, keep=[model])
    refuse_existing(tmp_path / "other", True, keep=[model, "a-name/of-a-model"])


def test_only_what_is_known_is_replaced(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    (folder / "model-00001-of-00002.safetensors").touch()
    with pytest.raises(StateError, match="exists already"):
        refuse_existing(folder, False)
    refuse_existing(folder, True)
    (folder / "delta.safetensors").touch()
    with pytest.raises(StateError, match=r"it holds delta\.safetensors, which would be lost"):
        refuse_existing(folder, True)
    refuse_existing(folder, True, known=DELTA_FILES)
    (folder / "thesis.txt").touch()
    with pytest.raises(StateError, match=r"it holds thesis\.txt, which would be lost"):
        refuse_existing(folder, True, known=DELTA_FILES)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    output = exported(tmp_path / "out")
    (output / "adapter_model.safetensors").touch()
    assert write_checked(output, fill("new"), content) == {"adapter_config.json": "new"}
    assert content(output) == {"adapter_config.json": "new"}
    assert [item.name for item in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("failing", ["out", "written"], ids=["aside", "in"])
def test_a_folder_that_cannot_be_moved_leaves_the_old_one(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = exported(tmp_path / "out")
    rename = Path.rename

    def failed(self: Path, target: Any) -> Path:
        if self.name == failing and ".replaced" not in str(self.parent):
            raise PermissionError(13, "not permitted")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failed)
    with pytest.raises(CheckpointError, match=r"not permitted.*What stood there before is untouched"):
        write_checked(output, fill("new"), content)
    monkeypatch.undo()
    assert content(output) == {"adapter_config.json": "old"}
    assert [item.name for item in tmp_path.iterdir()] == ["out"]
