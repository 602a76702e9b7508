from __future__ import annotations

import json
from pathlib import Path

import pytest

from deltune.methods import registry
from tests.cli.conftest import write_csv
from tests.tasks.tiny import CHAT_TEMPLATE, byte_tokenizer, decoder
from tests.training import tiny


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny stand-ins for the folders that the pages name: ``models`` and ``data``."""
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_model(folder / "models" / "encoder")
    decoder().save_pretrained(folder / "models" / "decoder")
    byte_tokenizer(chat_template=CHAT_TEMPLATE).save_pretrained(folder / "models" / "decoder")
    (folder / "data").mkdir()
    write_csv(folder / "data" / "reviews.csv", list(tiny.reviews(80)))
    rows = [{"instruction": f"say {word}", "input": "", "output": word} for word in ("aa", "bb", "cc", "dd")] * 2
    (folder / "data" / "instructions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "data" / "preferences.jsonl").write_text("".join(json.dumps(preference(row)) + "\n" for row in rows))
    return folder


def preference(row: dict[str, str], rejected: str = "zz") -> dict[str, list[dict[str, str]]]:
    """The right answer to an instruction, and a worse one, as turns of a conversation."""
    question = f"{row['instruction']}\n{row['input']}".strip()
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": row["output"]}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


@pytest.fixture
def here(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory in which ``models`` and ``data`` are found."""
    for name in ("models", "data"):
        (tmp_path / name).symlink_to(inputs / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def own_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is registered in the test is forgotten after it."""
    registry.all_methods()
    monkeypatch.setattr(registry, "_REGISTERED", dict(registry._REGISTERED))
