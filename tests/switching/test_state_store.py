"""Hidden states in a folder: what was put there is found, whatever happened to the process that put it there."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deltune.errors import CheckpointError
from deltune.frozen_states import StateStore

ORIGIN = {"model_type": "bert"}


def store(folder: Path, dtype: torch.dtype = torch.float32) -> StateStore:
    return StateStore(folder, ORIGIN, dtype, 2, 3)


def row(seed: int, positions: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, positions, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


def filled(folder: Path) -> dict[str, Tensor]:
    rows = {f"{seed:032x}": row(seed, positions=seed + 1) for seed in range(3)}
    made = store(folder)
    made.put(rows)
    made.close()
    return rows


@given(
    batches=st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 6)), max_size=4), max_size=5),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    reopened=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_the_first_row_of_a_key_is_found_bit_for_bit(
    batches: list[list[tuple[int, int]]], dtype: torch.dtype, reopened: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        made, expected = store(Path(folder), dtype), {}
        for number, batch in enumerate(batches):
            rows = {f"{key:032x}": row(7 * number + key, positions, dtype) for key, positions in batch}
            made.put(rows)
            expected = rows | expected
            if reopened:
                made.close()
                made = store(Path(folder), dtype)
        assert len(made) == len(expected)
        for key, value in expected.items():
            found = made.get(key)
            assert found is not None
            assert torch.equal(found, value)
        assert made.get("0" * 31 + "a") is None
        assert made.bytes == sum(value.nbytes for value in expected.values())
        made.close()


@pytest.mark.parametrize("file", ["index.txt", "states.bin"])
@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_end_loses_the_last_row_alone_and_is_written_over(file: str, cut: int, tmp_path: Path) -> None:
    rows = filled(tmp_path)
    content = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(content[:-cut])
    made = store(tmp_path)
    *whole, last = rows
    assert made.get(last) is None
    for key in whole:
        found = made.get(key)
        assert found is not None
        assert torch.equal(found, rows[key])
    made.put({last: rows[last], "f" * 32: row(9)})
    made.close()
    again = store(tmp_path)
    for key, value in {**rows, "f" * 32: row(9)}.items():
        found = again.get(key)
        assert found is not None
        assert torch.equal(found, value)
    again.close()


def test_a_damaged_row_is_not_given(tmp_path: Path) -> None:
    rows = filled(tmp_path)
    content = bytearray((tmp_path / "states.bin").read_bytes())
    content[10] ^= 1
    (tmp_path / "states.bin").write_bytes(content)
    made = store(tmp_path)
    first, *others = rows
    assert made.get(first) is None
    assert all(made.get(key) is not None for key in others)
    made.close()


def test_other_contents_are_refused(tmp_path: Path) -> None:
    filled(tmp_path / "a")
    with pytest.raises(CheckpointError, match="dtype is 'float32' there, 'float16' here"):
        store(tmp_path / "a", torch.float16)
    with pytest.raises(CheckpointError, match="model_type is 'bert' there, 'gpt2' here"):
        StateStore(tmp_path / "a", {"model_type": "gpt2"}, torch.float32, 2, 3)
    (tmp_path / "a" / "store.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        store(tmp_path / "a")
    (tmp_path / "a" / "store.json").unlink()
    with pytest.raises(CheckpointError, match="not known what it holds"):
        store(tmp_path / "a")
    for content, file in ((b"[1]", "store.json"), (b"", "store.json")):
        filled(tmp_path / "c")
        (tmp_path / "c" / file).write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged"):
            store(tmp_path / "c")
        (tmp_path / "c" / file).unlink()
        for name in ("index.txt", "states.bin"):
            (tmp_path / "c" / name).unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be a folder"):
        store(tmp_path / "file")
    filled(tmp_path / "d")
    index = tmp_path / "d" / "index.txt"
    index.write_text(index.read_text() + f"{'e' * 32} 5 -1 7\n")
    odd = store(tmp_path / "d")
    assert len(odd) == 3
    odd.close()
    filled(tmp_path / "b")
    store(tmp_path / "b").close()  # a refusal has let go of the folder, and so has this
