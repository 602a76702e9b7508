"""AdaLoRA over whole schedules, against an independent computation in numpy and Hugging Face peft."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

import deltune
from deltune.errors import MethodError
from deltune.methods.reparameterized.singular_triplets import BudgetSchedule
from deltune.training import fit
from tests.methods.common import attached, build, loss_of, output
from tests.methods.test_adalora import SHORT, forms_of, labelled, masks, ranks_of, walk
from tests.training import tiny


class Sheet:
    """The sheet's equations, on lists of numpy arrays: P (d_out, r), Lambda (r), Q (r, d_in) of each matrix."""

    def __init__(self, ranks: list[int], target: int, total: int, initial: int, final: int, every: int) -> None:
        self.b0, self.bT = sum(ranks), target * len(ranks)
        self.T, self.ti, self.tf, self.every = total, initial, final, every
        self.mean: dict[tuple[int, str], Any] = {}
        self.spread: dict[tuple[int, str], Any] = {}

    def budget(self, t: int) -> int:
        if t <= self.ti:
            return self.b0
        if t > self.T - self.tf:
            return self.bT
        share = (t - self.ti) / (self.T - self.ti - self.tf)
        return int(self.bT + (self.b0 - self.bT) * (1 - share) ** 3)

    def after(self, t: int, values: list[dict[str, Any]], gradients: list[dict[str, Any]]) -> list[Any] | None:
        """Entries of Lambda to be zeroed after step t, by matrix; None where there is no allocation."""
        if t < self.T - self.tf:
            for k, matrix in enumerate(values):
                for name, w in matrix.items():
                    now = np.abs(w * gradients[k][name])
                    old = self.mean.get((k, name), np.zeros_like(w)), self.spread.get((k, name), np.zeros_like(w))
                    self.mean[k, name] = 0.85 * old[0] + 0.15 * now
                    self.spread[k, name] = 0.85 * old[1] + 0.15 * np.abs(now - self.mean[k, name])
        last_phase, middle = t > self.T - self.tf, self.ti < t <= self.T - self.tf
        if not (last_phase or (middle and t % self.every == 0)):
            return None
        scores = []
        for k, matrix in enumerate(values):
            single = {name: self.mean[k, name] * self.spread[k, name] for name in matrix}
            rank = len(matrix["Lambda"])
            scores.append(
                [single["Lambda"][i] + single["Q"][i, :].mean() + single["P"][:, i].mean() for i in range(rank)]
            )
        dropped = self.b0 - self.budget(t)
        threshold = sorted(score for matrix in scores for score in matrix)[dropped - 1] if dropped else -np.inf
        return [np.array([score <= threshold for score in matrix]) for matrix in scores]


def by_hand(model: Any, name: str, steps: int, sheet: Sheet, rate: float, gamma: float) -> Any:
    """The loop of the authors' scripts on a model that nothing is bound to; yields Lambda by matrix."""
    tuned = vars(model)["_deltune_handle"]
    names = {"P": "B", "Lambda": "E", "Q": "A"}
    matrices = [{mine: getattr(form, theirs) for mine, theirs in names.items()} for form in forms_of(tuned).values()]
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=rate, weight_decay=0.0)
    model.eval()  # the model itself adds no penalty then
    for t in range(steps):
        grams = [gram for m in matrices for gram in (m["P"].T @ m["P"], m["Q"] @ m["Q"].T)]
        norms = [(gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum().sqrt() for gram in grams]
        loss = model(**labelled(name, t + 1)).loss + gamma * sum(norms) / len(norms)
        loss.backward()
        optimizer.step()

        def plain(value: Tensor, key: str) -> Any:
            array = value.detach().numpy().copy()
            return array[:, 0] if key == "Lambda" else array

        values = [{key: plain(value, key) for key, value in matrix.items()} for matrix in matrices]
        gradients = [{key: plain(value.grad, key) for key, value in matrix.items()} for matrix in matrices]
        zeroed = sheet.after(t, values, gradients)
        if zeroed is not None:
            for matrix, mask in zip(matrices, zeroed, strict=True):
                matrix["Lambda"].data[torch.from_numpy(mask)] = 0
        yield [matrix["Lambda"].detach()[:, 0].clone() for matrix in matrices]
        optimizer.zero_grad()


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_a_plain_loop_gives_the_masks_of_the_independent_computation(name: str, every: int) -> None:
    """Step by step over a whole schedule, in the model's own loop with nothing but ``bind``."""
    method = f"adalora(initial_rank=4, target_rank=2, initial=4, final=8, interval={every})"
    tuned, _ = attached(name, method, dtype=torch.float64)
    twin = copy.deepcopy(tuned.model)
    sheet = Sheet([form.rank for form in forms_of(tuned).values()], 2, 30, 4, 8, every)
    reference = by_hand(twin, name, 30, sheet, rate=5e-3, gamma=0.1)
    counts = []
    for step in walk(tuned, name, 30):
        for expected, (key, form) in zip(next(reference), forms_of(tuned).items(), strict=True):
            assert torch.equal(form.E[:, 0] != 0, expected != 0), (step, key)
            assert torch.allclose(form.E[:, 0], expected, atol=1e-9), (step, key)
        counts.append(sum(sum(mask) for mask in masks(tuned).values()))
    assert counts[-1] == sheet.bT
    # really adaptive: other ranks here and there, and some that came back
    final = set(ranks_of(tuned).values())
    assert len(final) > 2
    if every > 1:
        assert any(later > earlier for earlier, later in pairwise(counts))


def test_triplets_come_back_from_one_allocation_to_the_next() -> None:
    """Those of a lower score may have a higher one later: the choice is not only a shrinking one."""
    tuned, _ = attached("bert", "adalora(initial_rank=4, target_rank=1, initial=0.1, final=0.1)")
    seen = [masks(tuned) for _ in walk(tuned, "bert", 40, rate=2e-2)]
    back = [
        step
        for step in range(6, len(seen))
        for key in seen[0]
        for i in range(4)
        if seen[step][key][i] and not seen[step - 1][key][i]
    ]
    assert back


def test_equals_huggingface_peft_over_a_whole_schedule() -> None:
    """Its model, its penalty and its allocator, called where its documentation says."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    tuned, _ = attached("bert", f"adalora({SHORT}, alpha=6, orthogonality=0.3)", dtype=torch.float64)
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=3, tfinal=6, deltaT=1, total_step=20, lora_alpha=6, orth_reg_weight=0.3,
        target_modules=["query", "key", "value", "dense"], exclude_modules=".*pooler.*", beta1=0.85, beta2=0.85,
    )  # fmt: skip
    model = build("bert", dtype=torch.float64)
    model.requires_grad_(False)
    theirs = peft.get_peft_model(model, config)
    modules = dict(theirs.base_model.model.named_modules())
    pairs = []
    for _, site, form in tuned.attachments["default"].sites:
        module = modules[site.module]  # type: ignore[attr-defined]
        for mine in "ABE":
            getattr(module, f"lora_{mine}")["default"].data.copy_(getattr(form, mine).data)
        pairs.append((form, module))
    assert len(pairs) == sum("lora_E" in key for key, _ in theirs.named_parameters())
    for _, value in tuned.attachments["default"].selection:
        value.requires_grad_(False)
    chosen = [value for key, value in theirs.named_parameters() if "lora_" in key and "ranknum" not in key]
    optimizer = torch.optim.AdamW(chosen, lr=5e-3, weight_decay=0.0)
    for step in walk(tuned, "bert", 20):
        # of the tuner: a PeftModel without a task type passes by it, and so by its penalty
        loss = theirs.base_model(**labelled("bert", step)).loss
        loss.backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step - 1)
        optimizer.zero_grad()
        for form, module in pairs:
            assert torch.equal(form.E != 0, module.lora_E["default"] != 0), step
            for mine in "ABE":
                assert torch.allclose(getattr(form, mine), getattr(module, f"lora_{mine}")["default"], atol=1e-8), step
    assert sum(ranks_of(tuned).values()) == 2 * len(pairs)


def test_the_schedule_has_to_know_the_number_of_steps() -> None:
    tuned, _ = attached("bert", "adalora")
    optimizer = torch.optim.AdamW(tuned.trainable_parameters())
    with pytest.raises(MethodError, match=r"tuned\.bind\(optimizer, steps\).*total_steps"):
        tuned.bind(optimizer)
    assert not optimizer._optimizer_step_post_hooks
    tuned.bind(optimizer, steps=10)
    tuned, _ = attached("bert", "adalora(total_steps=10)")
    tuned.bind(torch.optim.AdamW(tuned.trainable_parameters()))
    assert {form.schedule.total for form in forms_of(tuned).values() if form.schedule} == {10}


def test_phases_are_shares_or_numbers_of_steps() -> None:
    def schedule(options: str, steps: int) -> BudgetSchedule | None:
        tuned, _ = attached("bert", f"adalora({options})")
        tuned.bind(torch.optim.AdamW(tuned.trainable_parameters()), steps)
        return next(iter(forms_of(tuned).values())).schedule

    count = len(forms_of(attached("bert", "adalora")[0]))
    assert schedule("initial=0.1, final=0.3", 50) == BudgetSchedule(12 * count, 8 * count, 5, 15, 50, 1)
    assert schedule("initial=8, final=20, interval=10", 50) == BudgetSchedule(12 * count, 8 * count, 8, 20, 50, 10)
    assert schedule("initial=0.1, final=0.3, total_steps=40", 50) == BudgetSchedule(12 * count, 8 * count, 4, 12, 40, 1)
    for options, words in (
        ("initial=30, final=20", r"initial \(30 steps\) and final \(20 steps\).*50"),
        ("initial=0.5, final=0.5", "leave nothing"),
        ("total_steps=60", "total_steps is 60, but training has 50"),
    ):
        with pytest.raises(MethodError, match=words):
            schedule(options, 50)


def test_made_active_after_the_optimizer_was_bound() -> None:
    tuned, batch = attached("bert", f"adalora({SHORT})")
    tuned.attach("lora(rank=2)", "other")
    optimizer = torch.optim.AdamW(tuned.attachments["default"].forms["encoder.0.ffn.up"].parameters())
    tuned.bind(optimizer)
    tuned.activate("default")
    loss_of(tuned.model, batch).backward()
    with pytest.raises(MethodError, match="Bind the optimizer again"):
        optimizer.step()


def test_two_on_one_model_have_budgets_of_their_own() -> None:
    tuned, batch = attached("bert", f"adalora({SHORT})")
    tuned.attach("adalora(initial_rank=3, target_rank=1, targets=attention.query)", "other", train_head=False)
    tuned.activate("default", "other")
    for _ in walk(tuned, "bert", 20):
        pass
    assert sum(ranks_of(tuned).values()) == 2 * len(forms_of(tuned))
    assert sum(ranks_of(tuned, "other").values()) == len(forms_of(tuned, "other"))
    both = output(tuned.model, batch)
    tuned.activate("default", "other", weights=(1.0, 0.5))
    assert not torch.equal(output(tuned.model, batch), both)


class StopAt(TrainerCallback):  # type: ignore[misc]
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def run(tuned: deltune.Tuned, output: Path, **options: Any) -> Any:
    settings = tiny.SETTINGS.updated(epochs=3, gradient_accumulation=2, evaluate_every=3, save_every=2, keep_best=False)
    return fit(
        tuned, tiny.task(), tiny.reviews(60), tiny.reviews(20, seed=1), tokenizer=tiny.tokenizer(), settings=settings,
        output=output, **options,
    )  # fmt: skip


def test_the_best_weights_are_within_the_budget() -> None:
    """Also where earlier ones are better: evaluated after every step, best is one of those that meet the target."""
    tuned = tiny.classifier("adalora(initial_rank=3, target_rank=1, initial=0, final=0.2)")
    forms = forms_of(tuned)
    method = tuned.attachments["default"].method
    assert not method.settled(tuned.attachments["default"].forms)
    settings = tiny.SETTINGS.updated(steps=10, evaluate_every=1)
    result = fit(
        tuned, tiny.task(), tiny.reviews(60), tiny.reviews(20, seed=1), tokenizer=tiny.tokenizer(), settings=settings
    )
    assert result.best_step in (8, 9, 10)
    assert sum(ranks_of(tuned).values()) <= len(forms)
    assert method.settled(tuned.attachments["default"].forms)


def everything(tuned: deltune.Tuned) -> dict[str, Tensor]:
    """Parameters and what the schedule remembers."""
    return {
        f"{key}.{name}": value for key, form in forms_of(tuned).items() for name, value in form.state_dict().items()
    }


@pytest.mark.parametrize("total", ["", ", total_steps=12"])
def test_a_stopped_run_ends_in_the_same_bits(total: str, tmp_path: Path) -> None:
    method = f"adalora(initial_rank=3, target_rank=1, dropout=0.2, final=0.3{total})"
    whole = tiny.classifier(method)
    expected = run(whole, tmp_path / "whole")
    assert expected.steps == 12
    for seed, step in enumerate((1, 5, 9)):
        with pytest.raises(KeyboardInterrupt):
            run(tiny.classifier(method, seed=seed), tmp_path / "stopped", callbacks=[StopAt(step)])
    last = tiny.classifier(method, seed=99)
    result = run(last, tmp_path / "stopped")
    assert tiny.equal(everything(last), everything(whole))
    assert (result.metrics, result.history) == (expected.metrics, expected.history)
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    ranks = ranks_of(whole)
    assert sum(ranks.values()) == len(ranks)
    # a run that has ended gives the same ranks again
    again = tiny.classifier(method, seed=5)
    run(again, tmp_path / "whole")
    assert ranks_of(again) == ranks


@pytest.mark.parametrize("total", range(1, 8))
@pytest.mark.parametrize("options", ["", "initial=0, final=0", "initial=0, final=0.5, interval=5"])
def test_3_however_short_the_training_the_target_is_met(total: int, options: str) -> None:
    tuned, _ = attached("bert", f"adalora(initial_rank=4, target_rank=2, {options})".replace(", )", ")"))
    for _ in walk(tuned, "bert", total):
        pass
    assert sum(sum(mask) for mask in masks(tuned).values()) == 2 * len(forms_of(tuned))
