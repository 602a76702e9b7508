"""IncreLoRA, against its fact sheet: the numbers are those of its invariants.

The optimizer (11), merging (12), resumed runs, files and options are in test_increlora_runs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import deltune
from deltune.methods.reparameterized.growth import GrowthSchedule
from deltune.methods.reparameterized.incremental_triplets import IncrementalTriplets, grow
from tests.methods.common import attached, build, matrix_site, output, relative_error
from tests.methods.test_adalora import LAYOUTS, labelled
from tests.zoo import ARCHITECTURES

#: Five growths or more, from step 4 on, in 20 steps.
SHORT = "target_rank=2, initial=3, final=6, warmup=3"


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, IncrementalTriplets]:
    return {key: form for key, form in tuned.attachments[name].forms.items() if isinstance(form, IncrementalTriplets)}


def total(tuned: deltune.Tuned, name: str = "default") -> int:
    return sum(form.rank for form in forms_of(tuned, name).values())


def adamw(tuned: deltune.Tuned, rate: float = 5e-3) -> torch.optim.Optimizer:
    return torch.optim.AdamW(tuned.trainable_parameters(), lr=rate, weight_decay=0.1)


def walk(tuned: deltune.Tuned, name: str, steps: int, optimizer: Any = None, schedule: Any = None) -> Any:
    """A plain training loop; yields the number of each step after it was taken, from 1."""
    optimizer = optimizer or adamw(tuned)
    following = tuned.bind(optimizer, steps)
    tuned.model.train()  # these models have no dropout
    for step in range(1, steps + 1):
        tuned.model(**labelled(name, step)).loss.backward()
        optimizer.step()
        if schedule is not None:
            schedule.step()
        yield step
        optimizer.zero_grad()
    following.remove()
    tuned.model.eval()


def make_distinct(form: IncrementalTriplets, seed: int = 0, scale: float = 1.0) -> None:
    """Values that are far from the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in form.parameters():
            value.copy_(scale * torch.randn(value.shape, generator=generator))


def naive(form: IncrementalTriplets, reserve: bool, divisor: float) -> Tensor:
    """The change as the sum of outer products."""
    delta = torch.zeros(form.out_features, form.in_features, dtype=torch.float64)
    for i in range(len(form.a) if reserve else form.rank):
        weight = form.lambdas[i].item() if i < form.rank else form.constant
        delta += form.alpha / divisor * weight * torch.outer(form.b[i][:, 0].double(), form.a[i][0].double())
    return delta.detach()


@pytest.mark.parametrize("name", LAYOUTS)
def test_1_construction_is_exactly_the_frozen_model_and_the_reserve_hardly_changes_it(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    before = output(model, batch)
    tuned = deltune.attach(model, "increlora(target_rank=4)")
    for mode in (True, False):
        tuned.model.train(mode)
        assert torch.equal(output(model, batch), before)
    for form in forms_of(tuned).values():
        assert (form.rank, len(form.a), len(form.b)) == (1, 1, 1)
        assert not form.lambdas[0].any()
        assert abs(float(torch.cat(list(form.a)).detach().std()) - 0.02) < 0.01
    optimizer = adamw(tuned, 0.0)
    tuned.bind(optimizer, 20)
    tuned.model(**labelled(name, 1)).loss.backward()
    optimizer.step()
    assert {(form.rank, len(form.a)) for form in forms_of(tuned).values()} == {(1, 3)}
    assert torch.equal(output(model, batch), before)  # in evaluation the reserve does not act
    tuned.model.train()
    assert 0 < relative_error(output(model, batch), before) < 1e-4


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_2_the_change_is_that_of_the_formula(rank: int) -> None:
    # a constant that is not tiny: without the reserve the change would be another
    form = IncrementalTriplets(matrix_site(7, 5), rank, 6.0, constant=0.5, reserves=2)
    form.reserve(1)
    make_distinct(form)
    x, base = torch.randn(3, 2, 7), torch.randn(3, 2, 5)
    form.requires_grad_(False)
    for reserve in (False, True):
        form.observed = reserve
        delta = naive(form, reserve, max(rank, 1))
        expected = (x.double() @ delta.T).float()
        assert relative_error(form(x), expected) < 2e-6
        assert relative_error(form.add_to(base, x, 0.5), base + 0.5 * expected) < 2e-6
        # the sheet's divisor has 1e-5 more
        assert relative_error(delta, naive(form, reserve, max(rank, 1) + 1e-5)) < 1.00001e-5
    assert torch.allclose(form.weight_delta().double(), naive(form, False, max(rank, 1)), atol=1e-6)


def test_2_a_constant_divisor() -> None:
    form = IncrementalTriplets(matrix_site(7, 5), 2, 6.0, 4)
    make_distinct(form)
    assert torch.allclose(form.weight_delta().double(), naive(form, False, 4), atol=1e-6)


def test_3_the_lambda_of_the_reserve_is_constant_while_its_vectors_learn() -> None:
    tuned, _ = attached("bert", f"increlora({SHORT})")
    start = {}
    for step in walk(tuned, "bert", 20):
        if step == 1:
            start = {
                key: (form.a[1].detach().clone(), form.b[1].detach().clone()) for key, form in forms_of(tuned).items()
            }
        if step == 3:
            break
    for key, form in forms_of(tuned).items():
        assert form.rank == 1
        assert len(form.lambdas) == 1  # that of the reserve is no parameter
        assert not torch.equal(form.a[1], start[key][0])
        assert not torch.equal(form.b[1], start[key][1])
        # the number behind which they learn, bit for bit
        form.b[1].data.fill_(1.0)
        assert torch.equal(form.factors()[1][:, 1], torch.full((form.out_features,), 1e-5))


def scored(ranks: list[int], scores: list[float], added: int = 2) -> list[IncrementalTriplets]:
    forms = [IncrementalTriplets(matrix_site(16, 12), rank, 1.0, reserves=added) for rank in ranks]
    for form, score in zip(forms, scores, strict=True):
        form.reserve(0)
        form.sensitivity.fill_(score)
        form.uncertainty.fill_(1.0)
    return forms


def test_4_growth_adds_n_and_a_new_reserve_to_what_is_chosen() -> None:
    forms = scored([1, 1, 1, 1], [1.0, 4.0, 2.0, 3.0])
    before = [list(form.parameters()) for form in forms]
    grow(forms, GrowthSchedule(40, 0, 1, 2, 2, 20, 3), 5)
    assert [form.rank for form in forms] == [1, 3, 1, 3]
    assert [len(form.a) for form in forms] == [3, 5, 3, 5]
    for form, values in zip(forms, before, strict=True):
        assert {id(value) for value in values} <= {id(value) for value in form.parameters()}
        assert len(list(form.parameters())) - len(values) == (6 if form.rank == 3 else 0)
    assert forms[1].joined.tolist() == [[0, 0], [0, 5], [0, 5], [5, 0], [5, 0]]


@pytest.mark.parametrize(("target", "top", "chosen"), [(40, 3, 3), (8, 3, 2), (7, 3, 1), (40, 9, 6), (6, 3, 0)])
def test_5_as_many_are_chosen_as_top_and_budget_allow(target: int, top: int, chosen: int) -> None:
    forms = scored([1] * 6, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], added=1)
    grow(forms, GrowthSchedule(target, 0, 1, top, 1, 20, 3), 5)
    assert [form.rank for form in forms] == [1] * (6 - chosen) + [2] * chosen
    equal = scored([1] * 6, [1.0] * 6, added=1)
    grow(equal, GrowthSchedule(target, 0, 1, top, 1, 20, 3), 5)
    assert sum(form.rank for form in equal) == 6 + chosen  # also of equal scores


@pytest.mark.parametrize("name", ["bert", "gpt_neox"])
@pytest.mark.parametrize("options", [SHORT, "target_rank=4, added=3", "target_rank=2, initial_rank=0, added=3"])
def test_6_ranks_only_grow_and_end_exactly_at_the_target(name: str, options: str) -> None:
    tuned, _ = attached(name, f"increlora({options})")
    forms, before = forms_of(tuned), {}
    for _ in walk(tuned, name, 20):
        now = {key: form.rank for key, form in forms.items()}
        assert all(now[key] >= rank for key, rank in before.items())
        before = now
    target = int(options.split("target_rank=")[1][0]) * len(forms)
    assert total(tuned) == target
    if "initial_rank=0" in options:
        assert 0 in before.values()


def test_7_at_the_target_nothing_is_observed_and_the_reserve_is_gone() -> None:
    tuned, batch = attached("bert", f"increlora({SHORT})")
    scores: list[Tensor] = []
    for _ in walk(tuned, "bert", 20):
        if total(tuned) == 2 * len(forms_of(tuned)):
            scores.append(torch.stack([form.sensitivity for form in forms_of(tuned).values()]))
            for form in forms_of(tuned).values():
                assert form.gradient is None
                assert not form.observed
                assert len(form.a) == len(form.b) == len(form.lambdas)
            training = output(tuned.model, batch)
            tuned.model.eval()
            assert torch.equal(output(tuned.model, batch), training)
            tuned.model.train()
    assert len(scores) >= 6
    assert all(torch.equal(score, scores[0]) for score in scores)


def test_8_every_component_has_its_own_warmup() -> None:
    schedule = GrowthSchedule(9, 0, 1, 1, 1, 40, 5)
    found = {step: schedule.multiplier(10, step) for step in range(10, 42)}
    assert found[10] is None  # there is no gradient yet
    assert [found[step] for step in (11, 12, 16)] == [0, 0.2, 1.0]
    for step in range(16, 41):
        assert found[step] == pytest.approx(1 - (step - 16) / 25)
    assert schedule.multiplier(0, 7) is None


def test_8_the_optimizer_follows_it() -> None:
    """Against plain SGD by hand: what joined moves by its own rate, all else by the scheduler's."""
    tuned, _ = attached("bert", f"increlora({SHORT}, orthogonality=0)")
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.5, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step == 11 else 1 / (1 + step))
    tuned.bind(optimizer, 20)
    tuned.model.train()
    forms, seen = forms_of(tuned), set()
    for step in range(1, 21):
        tuned.model(**labelled("bert", step)).loss.backward()
        rate = optimizer.param_groups[0]["lr"]
        before = {id(value): (value, value.detach().clone()) for value in tuned.trainable_parameters()}
        optimizer.step()
        since = {id(value): joined for form in forms.values() for value, joined in form.trained_since()}
        for key, (value, old) in before.items():
            joined = since.get(key, 0)
            if value.grad is None:
                continue
            own = rate
            if joined:
                age = step - joined - 1
                share = age / 3 if age < 3 else (20 - joined - age) / (20 - joined - 3)
                own = 0.5 * share
                seen.add(age)
            assert torch.allclose(value, old - own * (value.grad + 0.1 * old), atol=1e-6), step
        assert len(optimizer.param_groups) == 1
        scheduler.step()
        optimizer.zero_grad()
    assert {0, 1, 2, 3, 4} <= seen


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("mean", [False, True])
def test_9_the_score_is_that_of_autograd(batches: int, mean: bool) -> None:
    form = IncrementalTriplets(matrix_site(7, 5), 2, 6.0, constant=0.5, reserves=2)
    form.reserve(1)
    make_distinct(form)
    form.observed = True
    delta = naive(form, True, 2).requires_grad_()
    generator = torch.Generator().manual_seed(3)
    for _ in range(batches):
        x = torch.randn(4, 3, 7, generator=generator)
        (form.add_to(torch.zeros(4, 3, 5), x).tanh() + form(2 * x)).square().sum().backward()
        wide = x.double()
        (F.linear(wide, delta).tanh() + F.linear(2 * wide, delta)).square().sum().backward()
    assert delta.grad is not None
    expected = (delta * delta.grad).abs().sum() / (35 if mean else 35**0.5)
    assert relative_error(form.score(mean), expected.detach()) < 1e-5
    form.zero_grad()  # a pass that led to no step is forgotten
    form(x).sum().backward()
    assert relative_error(form.gradient, torch.ones(5, 1) * x.sum((0, 1))) < 1e-5  # type: ignore[arg-type]


@pytest.mark.parametrize("reentrant", [True, False])
def test_9_gradient_checkpointing_changes_no_score(reentrant: bool) -> None:
    found = []
    for checkpointing in (False, True):
        tuned, _ = attached("gpt2", f"increlora({SHORT})")
        if checkpointing:
            tuned.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for step in walk(tuned, "gpt2", 20):
            if step == 3:
                break
        found.append(torch.stack([form.sensitivity for form in forms_of(tuned).values()]))
    assert found[0].all()
    assert torch.allclose(found[0], found[1], rtol=1e-4)


def test_10_right_after_growth_only_divisor_and_new_reserve_differ() -> None:
    (form,) = scored([1], [1.0], added=1)
    form.constant = 0.5
    make_distinct(form)
    form.observed = True
    x = torch.randn(4, 16)
    before, old = form(x), naive(form, True, 1)
    grow([form], GrowthSchedule(9, 0, 1, 1, 1, 20, 3), 5)
    assert torch.equal(form.lambdas[1], torch.full((1, 1), 0.5))
    with torch.no_grad():
        form.a[2].normal_()
        form.b[2].normal_()
    new = form.scale * 0.5 * (form.b[2] @ form.a[2]).double()
    assert torch.allclose(form(x).double(), x.double() @ (old / 2 + new).T, atol=1e-5)
    assert not torch.equal(form(x), before)
