"""Folders of Hugging Face peft: what it saved gives the same outputs here, and what is saved here gives them there."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune
from tests.checkpoints.peft_cases import CASES, Case, logits, same


def saved(case: Case, folder: Path) -> Any:
    """A folder that peft wrote, and the model that it wrote."""
    model = case.peft_model()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if getattr(model.active_peft_config, "_pruned", False):
            prune(model)
        model.save_pretrained(folder)
        # what peft itself makes of the folder: pruned ranks are cut out there
        return case.reloaded(folder) if "adalora" in case.name else model


def prune(model: Any) -> None:
    """Drop singular values as AdaLoRA does: one of each matrix, all of the first."""
    pattern = {}
    with torch.no_grad():
        for number, (name, value) in enumerate(
            (name, value) for name, value in model.named_parameters() if "lora_E" in name
        ):
            kept = torch.tensor([number > 0, False, number > 0, number > 1])
            value *= kept[:, None]
            pattern[name.removeprefix("base_model.model.")] = kept.tolist()
    model.active_peft_config.rank_pattern = pattern


def load(case: Case, folder: Path) -> deltune.Tuned:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tuned = deltune.load(case.build(), folder)
    notes = [str(item.message) for item in caught if str(folder) in str(item.message)]
    assert len(notes) == len(case.notes), notes
    assert all(expected in note for expected, note in zip(case.notes, notes, strict=True)), notes
    return tuned


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name}-{case.architecture.name}-{case.head}")
def test_what_peft_saved_gives_the_same_outputs_here_and_back_there(case: Case, tmp_path: Path) -> None:
    model = saved(case, tmp_path / "peft")
    expected = [logits(model, batch) for batch in case.batches()]
    bare = [logits(case.build(), batch) for batch in case.batches()]
    assert all(same(one, other) > 1e-2 for one, other in zip(bare, expected, strict=True)), "it changes something"
    tuned = load(case, tmp_path / "peft")
    found = [logits(tuned.model, batch) for batch in case.batches()]
    assert max(same(one, other) for one, other in zip(found, expected, strict=True)) < 1e-5
    # it is a delta like any other
    tuned.save(tmp_path / "native")
    fresh = deltune.load(case.build(), tmp_path / "native")
    for batch, before in zip(case.batches(), found, strict=True):
        assert torch.equal(logits(fresh.model, batch), before)
    # and peft reads what is written of it
    tuned.save(tmp_path / "again", format="peft")
    back = case.reloaded(tmp_path / "again")
    for batch, before in zip(case.batches(), expected, strict=True):
        assert same(logits(back, batch), before) < 1e-5
