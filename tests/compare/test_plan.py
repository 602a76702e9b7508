from __future__ import annotations

import dataclasses

import pytest

from deltune.compare import LINEAR_HEAD, MAJORITY, Comparison, Run
from deltune.compare.command import command, shown_path
from deltune.compare.plan import specification_hash
from deltune.errors import DeltuneError, MethodError
from deltune.methods import split_specifications

CONTENT = {"model": "m", "data": {"train": "t", "evaluation": "e"}, "task": {"task": "text-classification"}}


def simple(**values) -> Comparison:
    return Comparison(**{"model": "model", "data": "data.csv", "methods": ("lora", "bitfit"), "steps": 10, **values})


def test_baselines_come_first_and_majority_runs_once():
    comparison = simple(seeds=(3, 4))
    assert comparison.rows == (MAJORITY, LINEAR_HEAD, "lora", "bitfit")
    assert comparison.runs == [
        Run(MAJORITY, 3),
        *(Run(row, seed) for row in (LINEAR_HEAD, "lora", "bitfit") for seed in (3, 4)),
    ]
    assert comparison.method(MAJORITY) is None
    assert str(comparison.method(LINEAR_HEAD)) == "freeze(layers=0)"


def test_methods_are_written_in_one_way():
    assert simple(methods=("LoRA( rank = 4 )", "lora(rank=8)")).methods[0] == "lora(rank=4)"
    assert simple(methods=("majority", "linear-head", "bitfit")).methods == ("bitfit",)


def test_a_comparison_survives_a_file():
    comparison = simple(methods=("lora(rank=4) + bitfit",), learning_rates={"linear-head": 0.1}, seeds=(1, 2))
    assert Comparison.from_dict(comparison.to_dict()) == comparison


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"methods": ("lora", "lora")}, "method lora is given twice"),
        ({"seeds": (1, 1)}, "seed 1 is given twice"),
        ({"seeds": ()}, "no seed"),
        ({"epochs": 1.0}, "either in steps or in epochs"),
        ({"steps": None}, "either in steps or in epochs"),
        ({"batch_size": 0}, "batch_size must be greater than 0"),
        ({"learning_rates": {"bitft": 1e-3}}, "Did you mean 'bitfit'"),
        ({"learning_rates": {"lora": -1}}, "must be greater than 0"),
        ({"task": "causal-language-modeling"}, "text-classification"),
    ],
)
def test_nonsense_is_refused(values, message):
    with pytest.raises(DeltuneError, match=message):
        simple(**values)


def test_unknown_methods_are_refused():
    with pytest.raises(MethodError, match="lora"):
        simple(methods=("lroa",))


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("full,lora", ["full", "lora"]),
        (" lora(rank=8, alpha=16) , bitfit ,", ["lora(rank=8, alpha=16)", "bitfit"]),
        ("lora(targets='attention.query,ffn.up'),full", ["lora(targets='attention.query,ffn.up')", "full"]),
        ("lora(rank=2) + bitfit,full", ["lora(rank=2) + bitfit", "full"]),
        ("", []),
    ],
)
def test_commas_inside_parentheses_do_not_split(text, pieces):
    assert split_specifications(text) == pieces


def _hashes(comparison: Comparison, content=CONTENT) -> list[str]:
    return [specification_hash(comparison.specification(run, content)) for run in comparison.runs]


def test_every_run_has_its_own_hash():
    hashes = _hashes(simple())
    assert len(set(hashes)) == len(hashes)


@pytest.mark.parametrize(
    "change",
    [{"steps": 11}, {"batch_size": 8}, {"learning_rates": {"lora": 0.5}}, {"methods": ("lora(rank=3)", "bitfit")}],
)
def test_the_hash_changes_with_what_the_quality_depends_on(change):
    run = 4  # the first of lora
    assert _hashes(simple(**change))[run] != _hashes(simple())[run]


def test_the_hash_changes_with_content_and_not_with_paths_or_other_methods():
    assert _hashes(simple(), {**CONTENT, "model": "other"}) != _hashes(simple())
    moved = dataclasses.replace(simple(), model="elsewhere", data="copy.csv", methods=("lora", "full"))
    assert _hashes(moved)[:7] == _hashes(simple())[:7]


def test_a_rate_for_one_method_leaves_the_others_alone():
    changed = _hashes(simple(learning_rates={"bitfit": 0.5}))
    assert changed[:7] == _hashes(simple())[:7]
    assert simple(learning_rates={"linear-head": 0.5}).learning_rate(LINEAR_HEAD) == 0.5
    assert simple().learning_rate(MAJORITY) is None


def test_the_command_of_a_row_names_it_alone():
    text = command(simple(methods=("lora(rank=8)", "bitfit"), learning_rates={"bitfit": 0.1}), "lora(rank=8)", jobs=2)
    assert "--method 'lora(rank=8)'" in text
    assert "bitfit" not in text
    assert "--steps 10" in text
    assert text.endswith("--jobs 2 --output again")


def test_paths_are_shown_without_the_user(tmp_path, monkeypatch):
    home = tmp_path / "somebody"
    (home / "models" / "tiny").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    assert shown_path(str(home / "models" / "tiny")) == "~/models/tiny"
    monkeypatch.chdir(home / "models")
    assert shown_path(str(home / "models" / "tiny")) == "tiny"
    assert shown_path("organisation/model") == "organisation/model"
