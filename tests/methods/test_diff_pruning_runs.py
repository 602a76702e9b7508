"""Diff pruning in whole runs: phases, optimizers, resuming, files, several attachments, options."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import deltune
from deltune.errors import CheckpointError, MethodError, StateError, TargetError
from deltune.sites import EntriesForm
from tests.methods.common import build, output
from tests.methods.sizes import BERT_BASE, LLAMA, Published
from tests.methods.test_diff_pruning import differing, form_of, slow_parameters, spread, steps
from tests.training import tiny
from tests.training.test_fit import StopAt, run
from tests.zoo import ARCHITECTURES

OWN = ("w", "alpha", "group_alpha")


def all_states(optimizer: torch.optim.Optimizer) -> int:
    """How many numbers an optimizer keeps."""
    return sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())


# -- phases and optimizers ------------------------------------------------------------------------------------


def test_the_optimizer_has_what_is_kept_and_forgets_the_rest() -> None:
    tuned, batch, _, form = differing("diff-pruning(ratio=0.1, initial=2)")
    optimizer = steps(tuned, batch, 2, 4)
    listed = [id(value) for group in optimizer.param_groups for value in group["params"]]
    assert listed == [id(value) for value in tuned.trainable_parameters()]
    head = tuned.summary().head_parameters
    assert tuned.summary().parameters == len(form.values) + head
    assert all_states(optimizer) == 2 * head  # what is kept has no state yet
    optimizer.zero_grad()
    tuned.model(**batch).loss.backward()
    before = form.values.detach().clone()
    optimizer.step()
    assert all_states(optimizer) == 2 * (head + len(form.values))
    assert (form.values != before).float().mean() > 0.9


@pytest.mark.parametrize("scheduled", [False, True])
def test_gates_have_a_rate_of_their_own_and_no_decay(scheduled: bool) -> None:
    tuned, batch, _, form = differing("diff-pruning(penalty_weight=1, gate_rate=0.2)")
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3, weight_decay=0.5)
    tuned.bind(optimizer, 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step if scheduled else 1.0)
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    alpha = form.alpha
    assert alpha is not None
    for number in range(3):
        before = alpha.detach().clone()
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()
        scheduler.step()
        # Adam's steps are of the size of the rate while the gradient is the same: nearly all of it is the penalty's
        moved = (before - alpha.detach()).median()
        assert float(moved) == pytest.approx(0.2, rel=0.05), number
        assert [list(map(id, group["params"])) for group in optimizer.param_groups] == groups
    rate = 1e-3 * (0.25 if scheduled else 1)
    before_w = form.w.detach().clone()  # type: ignore[union-attr]
    optimizer.zero_grad()
    tuned.model(**batch).loss.backward()
    optimizer.step()
    scheduler.step()
    assert (form.w.detach() - before_w).abs().max() <= rate * 1.5 + 0.5 * rate * before_w.abs().max()  # type: ignore[union-attr]


def test_what_is_kept_has_a_rate_of_its_own() -> None:
    tuned, batch, _, form = differing("diff-pruning(ratio=0.1, initial=2, final_rate=5)", dropout=0.0)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3, weight_decay=0.0)
    tuned.bind(optimizer, 10)
    for step in range(3):
        before = next(form.parameters()).detach().clone()
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()
        if step != 1:  # where all become few
            # the first steps of Adam are of the size of the rate
            moved = (next(form.parameters()).detach() - before).abs()
            assert float(moved[moved > 0].median()) == pytest.approx(1e-3 if step == 0 else 5e-3, rel=0.05)
        assert len(optimizer.param_groups) == 1
    assert not form.gated


def test_a_penalty_closes_gates_that_serve_nothing() -> None:
    tuned, batch, _, form = differing("diff-pruning(penalty_weight=1e-3, gate_rate=0.5)", dropout=0.0)
    assert form.alpha is not None
    start = float(form.gates.probability(form.alpha.detach()).sum())
    steps(tuned, batch, 15, 40)
    assert float(form.gates.probability(form.alpha.detach()).sum()) < 0.5 * start


def test_without_an_own_loop_everything_trains_at_one_rate() -> None:
    tuned, batch, _, form = differing()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()
    assert form.gated
    assert int(form.draws) == 4  # gates are drawn for each step all the same


@pytest.mark.parametrize(
    ("first", "total", "expected"), [(0.5, 10, 5), (0.05, 10, 1), (0.29, 10, 2), (3, 10, 3), (7, None, 7)]
)
def test_the_first_phase_has_its_share_of_the_steps(first: float, total: int | None, expected: int) -> None:
    tuned, batch, _, form = differing(f"diff-pruning(ratio=0.1, initial={first})")
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
    tuned.bind(optimizer, total)
    for step in range(1, expected + 2):
        assert form.gated == (step <= expected)
        assert tuned.penalty() is None or form.gated
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()


def test_accumulated_batches_have_one_penalty() -> None:
    tuned, batch, _, form = differing("diff-pruning(penalty_weight=0.01)")
    grown = []
    for parts in (1, 2):
        form.zero_grad()
        for _ in range(parts):
            (tuned.model(**batch).loss / parts).backward()
        assert form.alpha is not None
        assert form.alpha.grad is not None
        grown.append(form.alpha.grad.clone())
    torch.testing.assert_close(*grown)


# -- training with fit ----------------------------------------------------------------------------------------

METHOD = "diff-pruning(ratio=0.2, initial=0.5, penalty_weight=1e-5)"


def test_fit_runs_through_both_phases_and_takes_the_best_of_the_second(tmp_path: Path) -> None:
    tuned = tiny.classifier(METHOD)
    result = run(tuned, output=tmp_path, settings={"steps": 16, "evaluate_every": 2, "learning_rate": 0.01})
    assert not form_of(tuned).gated
    assert result.best_step is not None
    assert result.best_step >= 8
    measured = {row["step"]: row["evaluation"] for row in result.history if "evaluation" in row}
    assert set(measured) == set(range(2, 17, 2))
    assert result.metrics == measured[result.best_step]
    loaded = deltune.load(tiny.classifier(METHOD).detach(), tmp_path)
    batch = {"input_ids": torch.arange(5, 13)[None]}
    assert torch.equal(output(loaded.model.eval(), batch), output(tuned.model.eval(), batch))
    assert all(
        torch.equal(one, other)
        for one, other in zip(loaded.trainable_parameters(), tuned.trainable_parameters(), strict=True)
    )


@pytest.mark.parametrize("stop", [1, 5, 8, 10])
def test_a_stopped_run_ends_in_the_same_bits(stop: int, tmp_path: Path) -> None:
    settings = {"epochs": 2, "save_every": 2, "gradient_accumulation": 1}
    whole = tiny.classifier(METHOD)
    result = run(whole, settings=settings, output=tmp_path / "whole")
    assert result.steps == 16
    with pytest.raises(KeyboardInterrupt):
        run(tiny.classifier(METHOD), settings=settings, output=tmp_path / "run", callbacks=[StopAt(stop)])
    resumed = tiny.classifier(METHOD, seed=2)
    again = run(resumed, settings=settings, output=tmp_path / "run")
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    assert torch.equal(form_of(resumed).indices, form_of(whole).indices)
    assert again.metrics == result.metrics


# -- files, copies, states ------------------------------------------------------------------------------------


def test_a_loaded_delta_trains_on_with_what_is_kept(tmp_path: Path) -> None:
    tuned, batch, bare, form = differing("diff-pruning(ratio=0.1, initial=2)")
    steps(tuned, batch, 4)
    tuned.save(tmp_path)
    loaded = deltune.load(bare, tmp_path)
    method = loaded.attachments["default"].method
    assert str(method) == f"diff-pruning(ratio=0.1, initial=2.0, kept={len(form.values)})"
    ((_, _, kept),) = loaded.attachments["default"].sites
    assert isinstance(kept, EntriesForm)
    assert loaded.penalty() is None
    indices, before = kept.indices.clone(), kept.values.detach().clone()
    steps(loaded, batch, 3)
    assert torch.equal(kept.indices, indices)
    assert not torch.equal(kept.values, before)


@pytest.mark.parametrize("taken", [1, 4])
def test_copies_and_states_in_both_phases(taken: int) -> None:
    tuned, batch, _, form = differing("diff-pruning(ratio=0.1, initial=3)")
    steps(tuned, batch, taken, 6)
    tuned.model.eval()
    expected = output(tuned.model, batch)
    for copied in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        assert torch.equal(output(copied, batch), expected)
        handle = copied._deltune_handle
        steps(handle, batch, 1, 6)
        assert not torch.equal(output(copied.eval(), batch), expected)
    assert torch.equal(output(tuned.model, batch), expected)
    for before in (0, 4):  # from either phase into either
        fresh, _, bare, other = differing("diff-pruning(ratio=0.1, initial=3)")
        steps(fresh, batch, before, 6)
        fresh.model.load_state_dict(tuned.model.state_dict())
        assert other.gated == form.gated
        assert torch.equal(output(fresh.model.eval(), batch), expected)
        steps(fresh, batch, 1, 6)
        fresh.detach()
        assert all(torch.equal(fresh.model.get_parameter(name), value) for name, value in bare.named_parameters())


@pytest.mark.parametrize("taken", [1, 4])
def test_merging_is_what_evaluation_sees(taken: int) -> None:
    tuned, batch, bare, _ = differing("diff-pruning(ratio=0.1, initial=3)", "gpt2")
    steps(tuned, batch, taken, 6)
    expected = output(tuned.model.eval(), batch)
    tuned.model.train()  # in which gates are drawn
    tuned.merge()
    assert torch.equal(output(tuned.model.eval(), batch), expected)
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), expected)
    tuned.detach()
    assert torch.equal(output(tuned.model, batch), output(bare.eval(), batch))


def test_changes_of_several_are_added_and_scaled() -> None:
    tuned, batch, bare, form = differing("diff-pruning(ratio=0.1)")
    spread(form)
    alone = slow_parameters(form, bare, None)
    tuned.attach("fish-mask(ratio=0.2)", "mask", train_head=False)
    ((_, site, mask),) = tuned.attachments["mask"].sites
    assert isinstance(mask, EntriesForm)
    with torch.no_grad():
        mask.values.add_(0.1)
    tuned.activate("default", "mask", weights=(2.0, 0.5))
    tuned.model.eval()
    output(tuned.model, batch)
    for name, value in bare.named_parameters():
        if name in form.parts:
            expected = value + 2 * (alone[name] - value)
            for other, _, places in site.split(mask.indices):  # type: ignore[attr-defined]
                if other == name:
                    expected.detach().view(-1)[places] += 0.05
            torch.testing.assert_close(tuned.model.get_parameter(name), expected)
    # and a gradient reaches both
    tuned.model(**batch).loss.backward()
    assert form.w is not None
    assert form.w.grad is not None
    assert mask.values.grad is not None
    tuned.activate("default")
    output(tuned.model, batch)
    for name in form.parts:
        torch.testing.assert_close(tuned.model.get_parameter(name), alone[name])
    with tuned.disabled():
        assert all(torch.equal(tuned.model.get_parameter(name), value) for name, value in bare.named_parameters())


def test_in_a_sum_with_another_method() -> None:
    _, batch, bare, _ = differing()
    tuned = deltune.attach(copy.deepcopy(bare), "diff-pruning(ratio=0.1, initial=2) + lora(rank=2)")
    steps(tuned, batch, 4)
    ((_, form),) = [item for item in tuned.attachments["default"].forms.items() if isinstance(item[1], EntriesForm)]
    assert len(form.values) == len(form.indices) > 0
    trained = output(tuned.model.eval(), batch)
    assert not torch.equal(trained, output(bare.eval(), batch))
    tuned.detach()
    assert torch.equal(output(tuned.model, batch), output(bare, batch))


def test_entries_of_some_modules_alone() -> None:
    tuned, batch, bare, form = differing(
        "diff-pruning(ratio=0.01, initial=2, targets='attention.query attention.value')"
    )
    assert {name.split(".")[-2] for name in form.parts} == {"query", "value"}
    total = sum(value.numel() for name, value in bare.named_parameters() if not name.startswith("classifier"))
    steps(tuned, batch, 4)
    assert len(form.values) == int(0.01 * total)
    for name, value in bare.named_parameters():
        if not name.startswith("classifier") and name not in form.parts:
            assert torch.equal(tuned.model.get_parameter(name), value)


# -- counts and errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "total", "tensors", "kept"),
    [(BERT_BASE, 109_482_240, 199, 547_411), (LLAMA, 134_515_008, 272, 672_575)],
    ids=["bert-base", "llama"],
)
def test_counts_are_those_of_the_fact_sheet(model: Published, total: int, tensors: int, kept: int) -> None:
    assert model.count("diff-pruning") == 2 * total + tensors
    assert model.count("diff-pruning(structured=false)") == 2 * total
    assert model.count(f"diff-pruning(kept={kept})") == kept == int(0.005 * total)
    head = model.summary("diff-pruning", head=model is BERT_BASE)
    assert head.head_parameters == (1538 if model is BERT_BASE else 0)
    assert head.parameters == 2 * total + tensors + head.head_parameters


def test_what_cannot_be_is_refused() -> None:
    for method, words in (
        ("diff-pruning(ratio=1e-9)", "are 0, of .* Take a ratio between"),
        ("diff-pruning(ratio=0.9, targets=attention.query)", "that can be kept. Take a ratio between"),
        ("diff-pruning(initial=2.5)", "share below 1, or a whole number"),
        ("diff-pruning(high=1)", "greater than 1"),
        ("diff-pruning(low=0)", "at most"),
    ):
        with pytest.raises(MethodError, match=words):
            deltune.attach(build("bert", "classification"), method)
    with pytest.raises(TargetError, match="quary"):
        deltune.attach(build("bert", "classification"), "diff-pruning(targets=attention.quary)")
    tuned, _, _, _ = differing()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
    with pytest.raises(MethodError, match=r"tuned\.bind\(optimizer, steps\)"):
        tuned.bind(optimizer)
    with pytest.raises(MethodError, match="1 of 1 steps"):
        tuned.bind(optimizer, 1)
    with pytest.raises(StateError, match="all rows of a batch go through"):
        tuned.route(["default"])
    tuned.attach("lora(rank=1)", "other", train_head=False)
    following = tuned.bind(torch.optim.SGD(tuned.trainable_parameters(), lr=0.1))
    tuned.activate("default")
    late = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
    following.remove()
    with tuned.disabled():
        following = tuned.bind(late, 10)
    with pytest.raises(MethodError, match="Bind the optimizer again"):
        late.step()


def test_an_optimizer_without_the_differences_is_refused() -> None:
    tuned, batch, _, form = differing("diff-pruning(initial=1)")
    spread(form)
    optimizer = torch.optim.SGD([value for _, value in tuned.attachments["default"].selection], lr=0.1)
    tuned.bind(optimizer, 4)
    tuned.model(**batch).loss.backward()
    with pytest.raises(MethodError, match=r"diff-pruning: .*tuned\.trainable_parameters\(\)"):
        optimizer.step()


def test_gates_that_all_close_are_an_error() -> None:
    tuned, batch, _, _ = differing("diff-pruning(ratio=0.1, penalty_weight=10, gate_rate=5, initial=4)")
    with pytest.raises(MethodError, match="penalty_weight, which is 10"):
        steps(tuned, batch, 4, 6)


def test_a_head_of_another_size_is_named(tmp_path: Path) -> None:
    tuned, batch, _, _ = differing("diff-pruning(ratio=0.1, initial=1)")
    steps(tuned, batch, 2)
    tuned.save(tmp_path)
    other: Any = ARCHITECTURES["bert"].build("classification")
    other.classifier = torch.nn.Linear(other.classifier.in_features, 2)
    with pytest.raises(CheckpointError, match=r"misshapen: .*classifier"):
        deltune.load(other, tmp_path)
    assert not hasattr(other, "_deltune_handle")
