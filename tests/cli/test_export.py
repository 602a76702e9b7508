from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltune.cli import main
from tests.cli.conftest import Command, Place
from tests.tasks.tiny import CHAT_TEMPLATE, byte_tokenizer, decoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A decoder, and a LoRA that was trained on it."""
    folder = tmp_path_factory.mktemp("decoder")
    decoder().save_pretrained(folder / "model")
    byte_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "model")
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in ("aa", "bb", "cc", "dd")] * 2
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [
        *("tune", "--model", folder / "model", "--data", folder / "data.jsonl", "--task", "instruction-tuning"),
        *("--method", "lora", "--rank", 3, "--learning-rate", 0.05, "--steps", 4, "--batch-size", 4, "--threads", 1),
        *("--output", folder / "delta", "--json"),
    ]
    with pytest.raises(SystemExit) as ended:
        main([str(item) for item in arguments])
    assert not ended.value.code
    return folder / "model", folder / "delta"


WRITTEN = {
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
    "vllm": {"adapter_config.json", "adapter_model.safetensors"},
    "gguf": {"adapter.gguf"},
    "merged": {"config.json", "model.safetensors", "tokenizer.json"},
}


@pytest.mark.parametrize("format", WRITTEN)
def test_every_format_is_written_and_its_drift_is_said(
    format: str, folders: tuple[Path, Path], deltune: Command, tmp_path: Path
) -> None:
    arguments = ("--model", folders[0], "--delta", folders[1], "--format", format, "--output", tmp_path / "out")
    ended = deltune("export", *arguments)
    assert ended.status == 0, ended.err
    assert WRITTEN[format] <= {item.name for item in (tmp_path / "out").iterdir()}
    assert "lora(rank=3)" in ended.out
    assert "of the positions prefer the same" in ended.out
    assert deltune("export", *arguments).status == 2  # the folder exists
    again = deltune("export", *arguments, "--overwrite", "--json")
    assert again.json["drift"]["relative"] < 1e-5
    assert again.json["drift"]["agreement"] == 1


def test_merging_and_exporting_a_merged_model_are_one(
    folders: tuple[Path, Path], deltune: Command, tmp_path: Path
) -> None:
    given = ("--model", folders[0], "--delta", folders[1])
    deltune("export", *given, "--format", "merged", "--output", tmp_path / "one")
    deltune("merge", *given, "--output", tmp_path / "other")
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "other" / "model.safetensors"
    ).read_bytes()


def test_what_is_read_is_never_replaced(folders: tuple[Path, Path], deltune: Command) -> None:
    given = ("--model", folders[0], "--delta", folders[1], "--overwrite")
    before = {item: item.read_bytes() for folder in folders for item in folder.iterdir() if item.is_file()}
    for output in (*folders, folders[0].parent):
        for command in (("export", "--format", "peft"), ("export", "--format", "merged"), ("merge",)):
            ended = deltune(*command, *given, "--output", output)
            assert ended.status == 2
            assert "which is read, is that folder or lies in it" in ended.err
    assert all(item.read_bytes() == content for item, content in before.items())


def test_a_folder_of_another_library_is_named(folders: tuple[Path, Path], deltune: Command, tmp_path: Path) -> None:
    given = ("--model", folders[0], "--format", "peft")
    deltune("export", *given, "--delta", folders[1], "--output", tmp_path / "peft")
    ended = deltune("export", *given, "--delta", tmp_path / "peft", "--output", tmp_path / "again")
    assert ended.status == 2
    assert "holds a delta in the format peft, which says no task" in ended.err


def test_wrong_input_ends_with_a_message(
    folders: tuple[Path, Path], place: Place, delta: Path, deltune: Command, tmp_path: Path
) -> None:
    given = ("export", "--model", folders[0], "--delta", folders[1], "--output", tmp_path / "out")
    ended = deltune(*given, "--format", "peff")
    assert ended.status == 2
    assert "Did you mean 'peft'?" in ended.err
    classifier = ("export", "--model", place.model, "--delta", delta, "--output", tmp_path / "out")
    for format, message in (("gguf", "convert_lora_to_gguf.py"), ("vllm", "a decoder that generates text")):
        ended = deltune(*classifier, "--format", format)
        assert ended.status == 2
        assert message in ended.err
    assert deltune(*classifier, "--format", "peft").status == 0
