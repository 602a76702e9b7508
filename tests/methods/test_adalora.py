"""AdaLoRA, against its fact sheet: the numbers are those of its invariants.

Whole schedules are in test_adalora_schedule.py; files (10, 12) and options in test_adalora_files.py.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.methods.reparameterized.adalora import AdaLoRA, final_ranks
from deltune.methods.reparameterized.singular_triplets import BudgetSchedule, SingularTriplets, allocate
from tests.methods.common import attached, bits, build, matrix_site, output, relative_error
from tests.zoo import ARCHITECTURES

LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]
#: A short schedule with all its phases: 20 steps, the first 3 and the last 6 without change.
SHORT = "initial_rank=4, target_rank=2, initial=3, final=6"


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, SingularTriplets]:
    return {key: form for key, form in tuned.attachments[name].forms.items() if isinstance(form, SingularTriplets)}


def ranks_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, int]:
    return final_ranks(tuned.attachments[name].forms)


def labelled(name: str, seed: int) -> dict[str, Tensor]:
    """A batch with labels."""
    architecture = ARCHITECTURES[name]
    batch = architecture.batch(seed=seed, head="language" if architecture.generates else "classification")
    if architecture.generates:
        return {**batch, "labels": batch.get("decoder_input_ids", batch["input_ids"])}
    generator = torch.Generator().manual_seed(seed)
    return {**batch, "labels": torch.randint(3, (len(batch["input_ids"]),), generator=generator)}


def walk(tuned: deltune.Tuned, name: str, steps: int, rate: float = 5e-3, announced: bool = True) -> Any:
    """A plain training loop; yields the number of each step after it was taken, from 1."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=rate, weight_decay=0.0)
    tuned.bind(optimizer, steps if announced else None)
    tuned.model.train()  # these models have no dropout; the penalty is part of the loss
    for step in range(1, steps + 1):
        tuned.model(**labelled(name, step)).loss.backward()
        optimizer.step()
        yield step
        optimizer.zero_grad()
    tuned.model.eval()


def trained(name: str, method: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, method, **options)
    assert len(list(walk(tuned, name, 20))) == 20
    return tuned, batch


def masks(tuned: deltune.Tuned) -> dict[str, list[bool]]:
    """Which entries of Lambda are not zero."""
    return {key: (form.E[:, 0] != 0).tolist() for key, form in forms_of(tuned).items()}


def make_distinct(form: SingularTriplets, seed: int = 0) -> None:
    """Values that are far from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in form.parameters():
            value.copy_(torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize("name", LAYOUTS)
def test_1_step_0_is_exactly_the_frozen_model(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    before = output(model, batch)
    tuned = deltune.attach(model, "adalora")
    assert torch.equal(output(model, batch), before)
    for form in forms_of(tuned).values():
        assert not form.E.any()
        assert abs(float(form.A.detach().std()) - 0.02) < 0.004
        assert abs(float(form.B.detach().std()) - 0.02) < 0.004


def test_2_the_change_is_that_of_the_formula() -> None:
    model = nn.ModuleDict({"linear": nn.Linear(7, 5)})
    (form,) = forms_of(
        deltune.attach(model, "adalora(initial_rank=4, target_rank=2, alpha=6, targets=linear)")
    ).values()
    make_distinct(form)
    x, base = torch.randn(3, 2, 7), torch.randn(3, 2, 5)
    scale = 6 / (4 + 1e-5)
    expected = torch.zeros(3, 2, 5)
    form.requires_grad_(False)
    for i in range(4):
        expected += scale * form.E[i, 0] * (x @ form.A[i])[..., None] * form.B[:, i]
    assert relative_error(form(x), expected) < 1e-5
    assert relative_error(form.add_to(base, x, 0.5), base + 0.5 * expected) < 1e-5
    assert relative_error(x @ form.weight_delta().T, expected) < 1e-5


@pytest.mark.parametrize("name", LAYOUTS)
def test_2_merged_equals_unmerged_and_unmerging_restores_the_bits(name: str) -> None:
    tuned, batch = attached(name, "adalora(initial_rank=4, target_rank=2)")
    before = bits(tuned.model)
    for form in forms_of(tuned).values():
        make_distinct(form)
        with torch.no_grad():
            form.E.mul_(0.02)
            form.keep(torch.tensor([True, False, True, True])[: form.rank])
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


def test_3_the_budget_is_cubic() -> None:
    schedule = BudgetSchedule(start=9, target=3, initial=5, final=8, total=30, interval=1)
    found = [schedule.budget(t) for t in range(30)]
    assert found[:15] == [9, 9, 9, 9, 9, 9, 8, 7, 6, 5, 5, 4, 4, 3, 3]
    assert found[30 - 8 :] == [3] * 8
    assert all(later <= earlier for earlier, later in pairwise(found))
    for start, target, initial, final, total in ((288, 72, 10, 20, 100), (864, 576, 0, 0, 51), (100, 100, 3, 3, 20)):
        schedule = BudgetSchedule(start, target, initial, final, total, 1)
        assert schedule.budget(initial) == start
        assert schedule.budget(total - final) == target
        for t in range(initial, total - 1 - (not final)):
            exact = target + (start - target) * (1 - (t - initial) / (total - initial - final)) ** 3
            assert schedule.budget(t) == (int(exact) if t <= total - final else target), t


@pytest.mark.parametrize("name", ["bert", "gpt_neox"])
def test_4_right_after_an_allocation_the_budget_holds(name: str) -> None:
    tuned, _ = attached(name, f"adalora({SHORT}, interval=2)")
    count = len(forms_of(tuned))
    schedule = BudgetSchedule(4 * count, 2 * count, 3, 6, 20, 2)
    for step in walk(tuned, name, 20):
        left = sum(sum(mask) for mask in masks(tuned).values())
        if step - 1 > 3 and ((step - 1) % 2 == 0 or step - 1 > 14):
            assert left == schedule.budget(step - 1), step
        elif step - 1 <= 3:
            assert left == 4 * count


def test_4_of_equal_scores_no_more_are_zeroed_than_the_budget_asks() -> None:
    forms = [SingularTriplets(matrix_site(6, 5), 3, 1.0, 3) for _ in range(2)]
    for form in forms:
        make_distinct(form)  # nothing was observed: all scores are zero
    allocate(forms, 4)
    assert [form.kept.tolist() for form in forms] == [[True] * 3, [True, False, False]]
    allocate(forms, 6)  # the budget of the start: nothing is zeroed
    assert all(form.kept.all() for form in forms)


def test_5_the_running_means_are_exact() -> None:
    form = SingularTriplets(matrix_site(6, 5), 3, 1.0, 3)
    make_distinct(form)
    generator = torch.Generator().manual_seed(1)
    mean, spread = {}, {}
    for _ in range(7):
        for name, value in form.named_parameters():
            value.grad = torch.randn(value.shape, generator=generator)
            now = np.abs(value.detach().double().numpy() * value.grad.double().numpy())
            mean[name] = 0.8 * mean.get(name, 0) + 0.2 * now
            spread[name] = 0.7 * spread.get(name, 0) + 0.3 * np.abs(now - mean[name])
        form.observe(0.8, 0.7)
    for name in mean:
        assert np.allclose(form.get_buffer(f"sensitivity_{name}").numpy(), mean[name], atol=1e-6)
        assert np.allclose(form.get_buffer(f"uncertainty_{name}").numpy(), spread[name], atol=1e-6)
    score = {name: mean[name] * spread[name] for name in mean}
    expected = score["E"][:, 0] + score["A"].mean(1) + score["B"].mean(0)
    assert np.allclose(form.scores().numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_5_a_parameter_without_a_gradient_has_no_sensitivity(dtype: torch.dtype) -> None:
    form = SingularTriplets(matrix_site(6, 5), 3, 1.0, 3).to(dtype)
    form.E.grad = torch.ones_like(form.E)
    form.observe(0.85, 0.85)
    assert not form.get_buffer("sensitivity_A").any()


def test_6_an_allocation_touches_lambda_alone() -> None:
    tuned, _ = attached("bert", f"adalora({SHORT})")
    method = tuned.attachments["default"].method
    forms = forms_of(tuned)
    for seed, form in enumerate(forms.values()):
        make_distinct(form, seed)
        for value in form.parameters():
            value.grad = torch.randn(value.shape)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.0)
    method.begin(forms, 20)
    before = {name: value.detach().clone() for name, value in tuned.named_trainable_parameters()}
    for step in (1, 10):
        method.after_step(forms, step, optimizer)
    after = dict(tuned.named_trainable_parameters())
    for name, value in before.items():
        if not name.endswith(".E"):
            assert torch.equal(after[name], value), name
    changed = sum(int((after[name] != value).sum()) for name, value in before.items())
    assert changed == 4 * len(forms) - forms[next(iter(forms))].schedule.budget(9)  # type: ignore[union-attr]


def test_7_a_zeroed_entry_moves_in_the_reduction_and_stays_zero_at_the_end() -> None:
    tuned, _ = attached("bert", f"adalora({SHORT}, interval=4)")
    previous, revived = None, 0
    for step in walk(tuned, "bert", 20):
        now, t = masks(tuned), step - 1
        if previous is not None and 4 < t < 15 and t % 4 != 0:
            for key, mask in previous.items():
                for i, alive in enumerate(mask):
                    if not alive:
                        revived += 1
                        assert now[key][i], (step, key, i)
        if t >= 15:
            assert sum(sum(mask) for mask in now.values()) == 2 * len(now)
        previous = now
    assert revived


def test_8_the_choice_is_constant_in_the_last_phase() -> None:
    tuned, _ = attached("gpt2", f"adalora({SHORT})")
    seen, scores = [], []
    for step in walk(tuned, "gpt2", 20):
        if step - 1 > 14:
            seen.append(masks(tuned))
            scores.append(torch.cat([form.scores() for form in forms_of(tuned).values()]))
    assert seen == [seen[0]] * 5
    assert all(torch.equal(score, scores[0]) for score in scores)


@pytest.mark.parametrize("kind", ["norms", "squares"])
def test_9_the_penalty_vanishes_for_orthonormal_factors(kind: str) -> None:
    method = AdaLoRA(initial_rank=3, target_rank=2, orthogonality=0.7, orthogonality_form=kind)
    forms = {str(i): SingularTriplets(matrix_site(6 + i, 5), 3, 1.0, 3) for i in range(3)}
    for seed, form in enumerate(forms.values()):
        make_distinct(form, seed)
    penalty = method.penalty(forms)  # type: ignore[arg-type]
    assert penalty is not None
    grams = [gram.detach() for form in forms.values() for gram in (form.B.T @ form.B, form.A @ form.A.T)]
    squares = [sum((float(gram[i, j]) - (i == j)) ** 2 for i in range(3) for j in range(3)) for gram in grams]
    expected = sum(squares) if kind == "squares" else sum(value**0.5 for value in squares) / 6
    assert penalty.item() == pytest.approx(0.7 * expected, rel=1e-5)
    penalty.backward()
    for form in forms.values():
        assert form.E.grad is None
        assert form.A.grad is not None
        assert form.B.grad is not None
        with torch.no_grad():
            form.A.copy_(torch.linalg.qr(form.A.T)[0].T)
            form.B.copy_(torch.linalg.qr(form.B)[0])
        form.zero_grad()
    penalty = method.penalty(forms)  # type: ignore[arg-type]
    assert penalty is not None
    assert 0 <= penalty.item() <= 1e-6
    penalty.backward()
    assert all(torch.isfinite(value.grad).all() for form in forms.values() for value in (form.A, form.B))  # type: ignore[arg-type]


def test_9_the_penalty_is_part_of_the_training_loss_and_can_be_left_out() -> None:
    tuned, _ = attached("bert", "adalora(initial_rank=4, target_rank=2, orthogonality=0.5)")
    batch = labelled("bert", 0)
    bare = tuned.model(**batch).loss
    tuned.model.train()
    penalty = tuned.penalty()
    assert penalty is not None
    assert torch.allclose(tuned.model(**batch).loss, bare + penalty)
    with torch.autocast("cpu", torch.bfloat16):
        low = tuned.penalty()
    assert low is not None
    assert torch.equal(low, penalty)
    assert attached("bert", "adalora(initial_rank=4, target_rank=2, orthogonality=0)")[0].penalty() is None


def test_11_the_scale_of_the_gradients_changes_no_choice() -> None:
    chosen, scores = [], []
    for factor in (1.0, 8.0):
        forms = [SingularTriplets(matrix_site(6, 5), 4, 1.0, 4).double() for _ in range(3)]
        generator = torch.Generator().manual_seed(0)
        for seed, form in enumerate(forms):
            make_distinct(form, seed)
        for _ in range(5):
            for form in forms:
                for value in form.parameters():
                    value.grad = factor * torch.randn(value.shape, generator=generator, dtype=torch.float64)
                form.observe(0.85, 0.85)
        scores.append(torch.cat([form.scores() for form in forms]))
        allocate(forms, 5)
        chosen.append([form.kept.tolist() for form in forms])
    assert torch.allclose(scores[1], 64 * scores[0])
    assert chosen[0] == chosen[1]
    # over all matrices: not the same number in each
    assert len({sum(kept) for kept in chosen[0]}) > 1
