"""A run beside a quantised model that is stopped goes on exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertForSequenceClassification

import deltune
from tests.methods.test_adalora_schedule import StopAt, run
from tests.training import tiny
from tests.zoo import randomize


def quantised(method: str, seed: int = 0) -> deltune.Tuned:
    torch.manual_seed(seed)
    options = {"num_labels": 2, "problem_type": "single_label_classification"}
    model = BertForSequenceClassification(tiny.config(0.1, **options))
    randomize(model.bert, 5)
    deltune.quantize(model, deltune.NF4(engine="torch"))
    return deltune.attach(model, method)


@pytest.mark.parametrize("method", ["qlora(rank=2)", "increlora(initial=1, final=0.2, warmup=2)"])
def test_a_stopped_run_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    whole = quantised(method)
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(quantised(method), tmp_path / "stopped", callbacks=[StopAt(7)])
    again = quantised(method, seed=9)  # what it begins with does not matter
    result = run(again, tmp_path / "stopped")
    assert (result.metrics, result.history) == (expected.metrics, expected.history)
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
