"""IncreLoRA in whole runs: the optimizer (11), merging (12), resuming, schedulers, files, options."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import MethodError
from deltune.methods.reparameterized.growth import GrowthSchedule
from deltune.methods.reparameterized.singular_triplets import final_ranks
from tests.methods.common import attached, bits, build, output, relative_error
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.test_adalora import LAYOUTS, labelled
from tests.methods.test_adalora_schedule import StopAt, run
from tests.methods.test_increlora import SHORT, adamw, forms_of, make_distinct, total, walk
from tests.training import tiny


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_11_the_optimizer_has_every_parameter_once_and_keeps_the_states(name: str) -> None:
    tuned, _ = attached(name, f"increlora({SHORT})")
    optimizer = adamw(tuned)
    states: dict[int, Any] = {}
    for step in walk(tuned, name, 20, optimizer):
        listed = [id(value) for group in optimizer.param_groups for value in group["params"]]
        assert listed == [id(value) for value in tuned.trainable_parameters()], step
        assert set(map(id, optimizer.state)) <= set(listed)
        for value, state in optimizer.state.items():
            assert state is states.setdefault(id(value), state)
            if not any(value is other for form in forms_of(tuned).values() for other in form.parameters()):
                assert state["step"] == step


@pytest.mark.parametrize("name", LAYOUTS)
def test_12_merged_equals_unmerged(name: str) -> None:
    tuned, batch = attached(name, f"increlora({SHORT})")
    for _ in walk(tuned, name, 20):
        pass
    for seed, form in enumerate(forms_of(tuned).values()):
        make_distinct(form, seed, 0.1)
    with tuned.disabled():
        before = bits(tuned.model)
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


def test_copies_in_the_middle_of_growth() -> None:
    tuned, batch = attached("bert", f"increlora({SHORT})")
    for step in walk(tuned, "bert", 20):
        if step == 7:
            break
    assert total(tuned) > len(forms_of(tuned))
    tuned.model.eval()
    assert torch.equal(output(deepcopy(tuned.model), batch), output(tuned.model, batch))
    fresh, _ = attached("bert", f"increlora({SHORT})")
    fresh.model.load_state_dict(tuned.model.state_dict())
    assert torch.equal(output(fresh.model.eval(), batch), output(tuned.model, batch))


@pytest.mark.parametrize("options", ["target_rank=2, dropout=0.2", "target_rank=2, initial_rank=0, added=3"])
def test_a_stopped_run_ends_in_the_same_bits(options: str, tmp_path: Path) -> None:
    method = f"increlora({options}, initial=1, final=0.2, warmup=2)"
    whole = tiny.classifier(method)
    expected = run(whole, tmp_path / "whole")
    assert expected.steps == 12
    for seed, step in enumerate((5, 7)):
        with pytest.raises(KeyboardInterrupt):
            run(tiny.classifier(method, seed=seed), tmp_path / "stopped", callbacks=[StopAt(step)])
    last = tiny.classifier(method, seed=99)
    result = run(last, tmp_path / "stopped")
    for key, form in forms_of(whole).items():
        assert tiny.equal(dict(form.state_dict()), dict(forms_of(last)[key].state_dict()))
    assert (result.metrics, result.history) == (expected.metrics, expected.history)
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert total(whole) == 2 * len(forms_of(whole))
    # a run that has ended gives the same ranks again
    again = tiny.classifier(method, seed=5)
    run(again, tmp_path / "whole")
    assert final_ranks(forms_of(again)) == final_ranks(forms_of(whole))  # type: ignore[arg-type]


def test_a_scheduler_of_torch_goes_on() -> None:
    tuned, _ = attached("bert", f"increlora({SHORT})")
    optimizer = adamw(tuned, 1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    for step in walk(tuned, "bert", 20, optimizer, scheduler):
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-2 * (1 - step / 20)])
    assert total(tuned) == 2 * len(forms_of(tuned))


@pytest.mark.parametrize("steps", [3, 4, 7, 20, 180, 500, 20_000])
@pytest.mark.parametrize("matrices", [1, 12, 72, 210])
def test_the_defaults_reach_the_target(steps: int, matrices: int) -> None:
    for target, added in ((2, 1), (8, 4)):
        schedule = GrowthSchedule.plan(
            matrices, target * matrices, matrices, added=added, total=steps, initial=int(0.1 * steps),
            final=int(0.5 * steps), warmup=int(0.06 * steps),
        )  # fmt: skip
        growths = [step for step in range(1, steps + 1) if schedule.grows(step) and step < steps]
        assert len(growths) * schedule.top * added >= (target - 1) * matrices
        if steps >= 20:
            needed = -(-(target - 1) * matrices // (schedule.top * added))
            assert growths[needed - 1] < 0.5 * steps


@pytest.mark.parametrize("steps", [3, 5])
def test_6_however_short_the_training_the_target_is_met(steps: int) -> None:
    tuned, _ = attached("bert", "increlora(target_rank=4)")
    for _ in walk(tuned, "bert", steps):
        pass
    assert total(tuned) == 4 * len(forms_of(tuned))


def test_schedules_that_cannot_be_are_refused() -> None:
    for options, steps, words in (
        ("", None, r"tuned\.bind\(optimizer, steps\)"),
        ("initial=50", 50, "takes 52 steps"),
        ("top=1, interval=10", 30, "takes 18 allocations.*takes 181 steps"),
    ):
        tuned, _ = attached("bert", f"increlora({options})")
        with pytest.raises(MethodError, match=words):
            tuned.bind(adamw(tuned), steps)
    # what it says does fit
    tuned, _ = attached("bert", "increlora(top=1, interval=10, initial=3)")
    tuned.bind(adamw(tuned), 181)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("target_rank=1", "can only grow"),
        ("initial=2.5", "whole number"),
        ("target_rank=99", "at most"),
        ("score=median", "mean"),
        ("alpha=0", "greater than 0"),
    ],
)
def test_impossible_options_are_refused(options: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        attached("bert", f"increlora({options})")


def test_made_active_after_the_optimizer_was_bound() -> None:
    tuned, _ = attached("bert", f"increlora({SHORT})")
    tuned.attach("lora(rank=2)", "other")
    optimizer = torch.optim.AdamW(forms_of(tuned)["encoder.0.ffn.up"].parameters())
    tuned.bind(optimizer)
    tuned.activate("default")
    tuned.model(**labelled("bert", 1)).loss.backward()
    with pytest.raises(MethodError, match="Bind the optimizer again"):
        optimizer.step()


def test_two_on_one_model_grow_apart() -> None:
    tuned, _ = attached("bert", f"increlora({SHORT})")
    tuned.attach("increlora(target_rank=4, targets=attention.query)", "other", train_head=False)
    tuned.activate("default", "other")
    optimizer = adamw(tuned)
    for _ in walk(tuned, "bert", 20, optimizer):
        listed = [id(value) for group in optimizer.param_groups for value in group["params"]]
        assert sorted(listed) == sorted(id(value) for value in tuned.trainable_parameters())
    assert total(tuned) == 2 * len(forms_of(tuned))
    assert total(tuned, "other") == 4 * len(forms_of(tuned, "other"))


@pytest.mark.parametrize("options", [SHORT, f"{SHORT}, divisor=target", f"{SHORT}, initial_rank=0, added=3"])
@pytest.mark.parametrize("steps", [20, 6])
def test_saved_and_loaded(options: str, steps: int, tmp_path: Path) -> None:
    tuned, batch = attached("bert", f"increlora({options})")
    for step in walk(tuned, "bert", 20):
        if step == steps:
            break
    tuned.model.eval()
    for seed, form in enumerate(forms_of(tuned).values()):
        make_distinct(form, seed, 0.2)
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    assert isinstance(loaded.attachments["default"].method, deltune.LoRA)
    ranks = final_ranks(tuned.attachments["default"].forms)
    assert final_ranks(loaded.attachments["default"].forms) == {key: rank for key, rank in ranks.items() if rank}
    assert relative_error(output(loaded.model, batch), output(tuned.model, batch)) < 1e-5
    head = set(tuned.attachments["default"].head_names)
    stored = sum(value.numel() for key, value in load_file(tmp_path / "delta.safetensors").items() if key not in head)
    assert stored == sum(form.rank * (form.in_features + form.out_features) for form in forms_of(tuned).values())


def test_published_counts() -> None:
    assert BERT_BASE.count("increlora") == 165_960
    assert LLAMA.count("increlora(target_rank=2)") == 305_490
    tuned, _ = attached("bert", f"increlora({SHORT})")
    for _ in walk(tuned, "bert", 20):
        pass
    forms = forms_of(tuned).values()
    found = sum(value.numel() for form in forms for value in form.parameters())
    assert found == sum(form.rank * (form.in_features + form.out_features + 1) for form in forms)


def test_as_part_of_a_sum() -> None:
    tuned, _ = attached("bert", f"increlora({SHORT}) + bitfit")
    for _ in walk(tuned, "bert", 20):
        pass
    assert total(tuned) == 2 * len(forms_of(tuned))


def test_a_further_training_has_the_optimizers_own_rates() -> None:
    """What grew before has no warm-up again; and nothing is left to plan, however few steps there are."""
    tuned, _ = attached("bert", f"increlora({SHORT})")
    for _ in walk(tuned, "bert", 20):
        pass
    assert all(len(form.a) == form.rank for form in forms_of(tuned).values())
    for steps in (30, 1):
        optimizer = adamw(tuned, 1e-2)
        following = tuned.bind(optimizer, steps)
        seen: list[list[float]] = []

        def look(bound: torch.optim.Optimizer, *_: Any, rates: list[list[float]] = seen) -> None:
            rates.append([group["lr"] for group in bound.param_groups])

        optimizer.register_step_pre_hook(look)
        tuned.model.train()
        tuned.model(**labelled("bert", 1)).loss.backward()
        optimizer.step()
        following.remove()
        optimizer.zero_grad()
        assert seen == [[1e-2]]
