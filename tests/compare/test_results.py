from __future__ import annotations

import os

import pytest

from deltune.compare.results import ResultsFile
from deltune.errors import DeltuneError


def test_results_are_read_back_and_the_latest_counts(tmp_path):
    file = ResultsFile(tmp_path)
    assert file.read() == {}
    file.append({"hash": "a", "status": "failed", "error": "größer <b>"})
    file.append({"hash": "b", "status": "done"})
    file.append({"hash": "a", "status": "done"})
    assert {key: value["status"] for key, value in ResultsFile(tmp_path).read().items()} == {"a": "done", "b": "done"}
    assert len(file.path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize("cut", [1, 2, 10, 18])
def test_a_torn_last_line_is_repaired(tmp_path, cut):
    file = ResultsFile(tmp_path)
    file.append({"hash": "a"})
    whole = file.path.read_bytes()
    file.append({"hash": "b", "n": 1})
    file.path.write_bytes(file.path.read_bytes()[:-cut])
    again = ResultsFile(tmp_path)
    assert again.repaired > 0
    assert file.path.read_bytes() == whole
    again.append({"hash": "c"})
    assert list(again.read()) == ["a", "c"]


def test_a_line_that_is_no_result_is_named(tmp_path):
    file = ResultsFile(tmp_path)
    file.append({"hash": "a"})
    with file.path.open("a") as stream:
        stream.write("nonsense\n")
    with pytest.raises(DeltuneError, match=r"Line 2 of .*results\.jsonl"):
        file.read()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    file = ResultsFile(tmp_path)
    file.append({"hash": "a"})
    before = file.path.read_bytes()
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, line: write(descriptor, line[:5]))
    with pytest.raises(DeltuneError, match="Free some space"):
        file.append({"hash": "b"})
    assert file.path.read_bytes() == before
