"""U-BitFit and S-BitFit, against their fact sheet. U-LoRA and S-LoRA are tested in test_us_lora.py."""

from __future__ import annotations

import contextlib
import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import CheckpointError, MethodError
from deltune.methods import parse
from deltune.methods.pruning_search import Candidates, PruningSchedule, prune
from deltune.methods.selective.us_bitfit import SearchedBiases, kept_biases
from tests.methods.common import attached, bits, build, loss_of, output
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.training import tiny
from tests.training.test_fit import StopAt, run

BOTH = ["u-bitfit", "s-bitfit"]
STEPS = 12


class Values(Candidates):
    """Candidates that belong to no model."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.tensors = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in sizes])
        vectors = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        self.begin_search(list(self.tensors), vectors)

    def searched(self) -> list[nn.Parameter]:
        return list(self.tensors)


def scored(scores: Tensor, *sizes: int) -> Values:
    """Candidates with these scores."""
    form = Values(*sizes)
    form.score += scores
    form.observed += 1
    return form


def search(
    method: str, name: str = "bert", steps: int = STEPS, scale: float = 1.0, **options: Any
) -> tuple[deltune.Tuned, dict[str, Tensor], list[Tensor]]:
    """A plain training loop with dropout-free AdamW and decay; which candidates were left after each step."""
    tuned, batch = attached(name, method)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})
    tuned.bind(optimizer, steps)
    left = []
    for _ in range(steps):
        optimizer.zero_grad()
        (scale * loss_of(tuned.model, batch)).backward()
        optimizer.step()
        left.append(form_of(tuned).kept.clone())
    return tuned, batch, left


def form_of(tuned: deltune.Tuned) -> SearchedBiases:
    (form,) = (form for form in tuned.attachments["default"].forms.values() if isinstance(form, SearchedBiases))
    return form


@pytest.mark.parametrize("method", BOTH)
def test_invariant_01_step_0_is_the_frozen_model(method: str) -> None:
    for name in ("bert", "llama-gqa"):
        tuned, batch = attached(name, method)
        assert torch.equal(output(tuned.model, batch), output(build(name), batch))


@pytest.mark.parametrize("method", BOTH)
def test_invariant_01_with_nothing_pruned_it_is_bitfit(method: str) -> None:
    searched, batch, _ = search(f"{method}(budget=1)")
    plain, _ = attached("bert", "bitfit")
    optimizer = torch.optim.AdamW(plain.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(plain.model, batch).backward()
        optimizer.step()
    wanted = dict(plain.named_trainable_parameters())
    found = dict(searched.named_trainable_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("criterion", ["signed", "absolute"])
def test_invariant_02_scores_are_the_mean_of_minus_update_times_gradient(criterion: str) -> None:
    """Written out, beside a BitFit that takes the same steps; none is dropped before the sixth."""
    steps = 6
    tuned, batch = attached("bert", f"u-bitfit(warm_up=0.5, search=0.5, criterion={criterion})")
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
    tuned.bind(optimizer, 2 * steps + 2)
    twin, _ = attached("bert", "bitfit")
    biases = {name: value for name, value in twin.named_trainable_parameters() if name.endswith("bias")}
    head = set(twin.attachments["default"].head_names)
    start = {name: value.detach().clone() for name, value in biases.items()}
    other = torch.optim.SGD(twin.trainable_parameters(), lr=0.1)
    expected = {name: torch.zeros_like(value) for name, value in biases.items() if name not in head}
    for _ in range(steps):
        for model, stepping in ((tuned.model, optimizer), (twin.model, other)):
            stepping.zero_grad()
            loss_of(model, batch).backward()
            if model is twin.model:
                for name in expected:
                    gradient = biases[name].grad
                    change = -(biases[name].detach() - start[name]) * gradient / steps
                    expected[name] += change if criterion == "signed" else change.abs()
            stepping.step()
    scores, _ = form_of(tuned).scores(structured=False)
    wanted = torch.cat(list(expected.values()))
    assert wanted.abs().max() > 0
    assert bool((wanted < 0).any()) == (criterion == "signed")
    assert (scores - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_invariant_03_of_a_linear_loss_the_score_is_what_dropping_costs() -> None:
    form, slopes = Values(5, 3), torch.randn(8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for value, update in zip(form.tensors, torch.randn(8).split([5, 3]), strict=True):
            value.copy_(update)

    def loss() -> Tensor:
        return (torch.cat(list(form.tensors)) * slopes).sum()

    loss().backward()
    form.observe()
    scores, _ = form.scores(structured=False)
    before = loss().item()
    for index in range(8):
        updates = torch.cat([value.detach() for value in form.tensors])
        updates[index] = 0
        assert (updates * slopes).sum().item() - before == pytest.approx(scores[index].item(), abs=1e-5)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=8),
    seed=st.integers(0, 1000),
    share=st.floats(0.01, 1.0),
    forms=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_invariant_04_and_07_as_many_are_kept_as_the_budget_says(
    sizes: list[int], seed: int, share: float, forms: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    drawn = [torch.randn(sum(sizes), generator=generator) for _ in range(forms)]
    together = torch.cat(drawn)
    left = max(1, round(share * len(together)))

    single = [scored(scores, *sizes) for scores in drawn]
    prune(single, left, structured=False, owner="test")
    kept = torch.cat([form.kept for form in single])
    assert int(kept.sum()) == left
    assert left == len(kept) or together[kept].min() >= together[~kept].max()

    whole = [scored(scores, *sizes) for scores in drawn]
    sums = torch.cat([torch.stack([part.sum() for part in scores.split(sizes)]) for scores in drawn])
    found = torch.cat([form.scores(structured=True)[0] for form in whole])
    assert torch.allclose(found, sums, atol=1e-6)
    lengths = sizes * forms
    # those that alone are too much are no choice
    order = [index for index in found.argsort(descending=True, stable=True).tolist() if lengths[index] <= left]
    if not order:
        with pytest.raises(MethodError, match=rf"{left} values holds nothing: the smallest vector has {min(lengths)}"):
            prune(whole, left, structured=True, owner="test")
        return
    prune(whole, left, structured=True, owner="test")
    vectors = torch.cat([form.kept for form in whole]).split(lengths)
    assert all(bool(vector.all()) or not bool(vector.any()) for vector in vectors)
    chosen = [index for index, vector in enumerate(vectors) if vector.any()]
    assert sorted(order[: len(chosen)]) == chosen
    total = sum(lengths[index] for index in chosen)
    assert total <= left
    assert len(chosen) == len(order) or total + lengths[order[len(chosen)]] > left


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.2)", "s-bitfit(budget=0.3)"])
def test_invariant_04_and_05_what_is_left_shrinks_to_the_budget_and_nothing_comes_back(method: str) -> None:
    tuned, _, left = search(method, steps=20)
    counts = [int(kept.sum()) for kept in left]
    assert all(not bool((later & ~earlier).any()) for earlier, later in itertools.pairwise(left))
    assert len(set(counts)) > 4
    total = left[0].numel()
    budget = round(parse(method).budget * total)  # type: ignore[attr-defined]
    assert counts[0] == total
    assert counts[7:] == [counts[7]] * 13  # 0.4 of the steps
    summary = tuned.summary()
    assert summary.parameters - summary.head_parameters == counts[-1]
    assert summary.bytes == 4 * summary.parameters
    if method.startswith("u"):
        assert counts[-1] == budget
    else:
        assert budget - 16 * 4 < counts[-1] <= budget
        sizes = [value.numel() for value in form_of(tuned).searched()]
        assert all(bool(part.all()) or not bool(part.any()) for part in left[-1].split(sizes))


@pytest.mark.parametrize("restart", ["true", "false"])
@pytest.mark.parametrize("method", BOTH)
def test_invariant_06_and_09_what_is_dropped_stays_what_it_was(method: str, restart: str) -> None:
    tuned, batch = attached("bert", f"{method}(budget=0.2, restart={restart})")
    with tuned.disabled():
        before = bits(tuned.model)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tuned.bind(optimizer, STEPS)
    head = tuned.attachments["default"].head_names
    for step in range(STEPS):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        form = form_of(tuned)
        state = tuned.model.state_dict()
        for (name, value), (_, part) in zip(form._biases.items(), form._slices(), strict=True):
            kept = form.kept[part]
            assert torch.equal(value.detach()[~kept], before[name][~kept])
            if step == STEPS - 1:
                assert bool((value.detach()[kept] != before[name][kept]).all())
        ours = {*form._biases, *head}
        assert all(torch.equal(state[name], value) for name, value in before.items() if name not in ours)
    with tuned.disabled():
        assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())


def test_training_begins_anew_with_what_was_found() -> None:
    """Also for the optimizer; the last training equals one of the entries alone, with the head as it is then."""
    steps, last = 10, 4
    tuned, batch = attached("bert", "u-bitfit(budget=0.2)")
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.0)
    tuned.bind(optimizer, steps)
    start = bits(tuned.model)
    names = list(form_of(tuned)._biases)
    for step in range(1, last + 1):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        moved = any(not torch.equal(tuned.model.state_dict()[name], start[name]) for name in names)
        assert moved == (step < last)
    biases = form_of(tuned).searched()
    assert not any(value in optimizer.state for value in biases)
    assert all(
        value in optimizer.state for value in tuned.trainable_parameters() if not any(value is b for b in biases)
    )

    twin, _ = attached("bert", "bitfit")
    twin.model.load_state_dict({k: v for k, v in tuned.model.state_dict().items() if "deltune" not in k})
    kept = dict(zip(names, form_of(tuned).kept.split([value.numel() for value in biases]), strict=True))
    own = [value for name, value in twin.named_trainable_parameters() if name in kept]
    head = [value for name, value in twin.named_trainable_parameters() if name not in kept]
    ours = [value for value in tuned.trainable_parameters() if not any(value is bias for bias in biases)]
    groups = [{"params": own, "lr": 3 * 1e-2}, {"params": head}]
    other = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0)
    for value, mine in zip(head, ours, strict=True):
        other.state[value] = copy.deepcopy(optimizer.state[mine])
    for _ in range(steps - last):
        for model, stepping in ((tuned.model, optimizer), (twin.model, other)):
            stepping.zero_grad()
            loss_of(model, batch).backward()
            if model is twin.model:
                for name, value in twin.named_trainable_parameters():
                    if name in kept and value.grad is not None:
                        value.grad.mul_(kept[name])
            stepping.step()
    found, wanted = tuned.model.state_dict(), twin.model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in names)


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.2)", "s-bitfit(budget=0.3)"])
def test_invariant_08_a_scaled_loss_chooses_the_same(method: str) -> None:
    """Adam's steps do not depend on the scale, but for its epsilon, which is next to nothing here."""
    _, _, one = search(method, eps=1e-30, weight_decay=0)
    _, _, other = search(method, scale=8.0, eps=1e-30, weight_decay=0)
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "qwen2"])
@pytest.mark.parametrize("method", ["u-bitfit(budget=0.1)", "s-bitfit(budget=0.3)"])
def test_invariant_10_saved_and_loaded(method: str, name: str, tmp_path: Path) -> None:
    tuned, batch, _ = search(method, name)
    counts = kept_biases(tuned.attachments["default"].forms)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path / "delta")
    tensors = load_file(tmp_path / "delta" / "delta.safetensors")
    head = set(tuned.attachments["default"].head_names)
    own = {key: value for key, value in tensors.items() if key not in head}
    if method.startswith("u"):
        assert own.keys() == {"biases.indices", "biases.values"}
        assert own["biases.indices"].dtype == torch.int32
        assert len(own["biases.values"]) == sum(counts.values())
    else:
        assert {key: value.numel() for key, value in own.items()} == counts

    loaded = deltune.load(build(name), tmp_path / "delta")
    assert torch.equal(output(loaded.model, batch), expected)
    assert kept_biases(loaded.attachments["default"].forms) == counts
    loaded.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "delta.safetensors").keys() == tensors.keys()
    again = load_file(tmp_path / "again" / "delta.safetensors")
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.1)", "s-bitfit(budget=0.3)"])
def test_what_was_found_is_trained_for_another_task(method: str, tmp_path: Path) -> None:
    found, batch, _ = search(method)
    counts = kept_biases(found.attachments["default"].forms)
    found.save(tmp_path / "delta")
    kind = method.partition("(")[0]
    tuned, _ = attached("bert", f"{kind}(architecture='{tmp_path / 'delta'}')")
    assert torch.equal(output(tuned.model, batch), output(build("bert"), batch))
    assert kept_biases(tuned.attachments["default"].forms) == counts
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tuned.bind(optimizer)  # nothing is searched for, so nobody has to know how long
    before = bits(tuned.model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
    assert kept_biases(tuned.attachments["default"].forms) == counts
    moved = sum(int((tuned.model.state_dict()[name] != before[name]).sum()) for name in counts)
    assert moved == sum(counts.values())
    tuned.save(tmp_path / "other")
    expected = output(tuned.model, batch)
    assert torch.equal(output(deltune.load(build("bert"), tmp_path / "other").model, batch), expected)


def test_an_architecture_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    found, _, _ = search("s-bitfit(budget=0.3)")
    found.save(tmp_path / "delta")
    with pytest.raises(MethodError, match=r"holds a delta of s-bitfit, not of a finished search of u-bitfit"):
        attached("bert", f"u-bitfit(architecture='{tmp_path / 'delta'}')")
    with pytest.raises(MethodError, match=r"this model has no bias .* to train.*the targets"):
        attached("bert", f"s-bitfit(architecture='{tmp_path / 'delta'}', targets=attention.key)")
    for other in (build("gpt2"), build("bert", hidden_size=64)):
        with pytest.raises(CheckpointError, match="trained on"):
            deltune.attach(other, f"s-bitfit(architecture='{tmp_path / 'delta'}')")
    unfinished, _ = attached("bert", "s-bitfit(budget=0.3)")
    unfinished.save(tmp_path / "unfinished")
    with pytest.raises(MethodError, match="not of a finished search"):
        attached("bert", f"s-bitfit(architecture='{tmp_path / 'unfinished'}')")
    with pytest.raises(CheckpointError, match="does not exist"):
        attached("bert", f"s-bitfit(architecture='{tmp_path / 'none'}')")


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.1)", "s-bitfit(budget=0.3)"])
def test_a_second_training_goes_on_with_what_was_found(method: str) -> None:
    tuned, batch, left = search(method)
    before = bits(tuned.model)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
    tuned.bind(optimizer, 40)  # the search of so long a training would not be over yet
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        assert torch.equal(form_of(tuned).kept, left[-1])
        assert not all(torch.equal(value, before[name]) for name, value in form_of(tuned)._biases.items())
    with tuned.disabled():
        start = bits(tuned.model)
    assert sum(int((value != start[name]).sum()) for name, value in form_of(tuned)._biases.items()) == int(
        left[-1].sum()
    )


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.1)", "s-bitfit(budget=0.3)"])
def test_an_unfinished_search_ends_in_the_next_training(method: str) -> None:
    """Of 40 steps the first 10 are taken, and then a training of 10 is begun, whose search would be over long ago."""
    tuned, batch = attached("bert", method)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
    for steps in (40, 10):
        following = tuned.bind(optimizer, steps)
        for _ in range(10):
            optimizer.zero_grad()
            loss_of(tuned.model, batch).backward()
            optimizer.step()
        following.remove()
        left = int(form_of(tuned).kept.sum()) / form_of(tuned).kept.numel()
        assert (left > 0.3) == (steps == 40)
        assert bool(form_of(tuned).finished) == (steps == 10)


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.2)", "s-bitfit(budget=0.3)"])
def test_scores_stay_float32_where_the_model_is_cast(method: str) -> None:
    tuned, batch = attached("bert", method)
    tuned.model.to(torch.bfloat16)
    assert form_of(tuned).score.dtype == torch.float32
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)
    tuned.bind(optimizer, 6)
    for _ in range(6):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
    assert 0 < int(form_of(tuned).kept.sum()) <= round(0.3 * form_of(tuned).kept.numel())


def test_scores_that_are_no_numbers_choose_nothing() -> None:
    with pytest.raises(MethodError, match="not finite numbers: training has diverged"):
        prune([scored(torch.tensor([1.0, float("nan")]), 2)], 1, structured=False, owner="test")


def test_invariant_11_of_equal_scores_the_first_stay() -> None:
    form = scored(torch.tensor([1.0, 2.0, 1.0, 1.0]), 4)
    prune([form], 2, structured=False, owner="test")
    assert form.kept.tolist() == [True, True, False, False]
    one, other = search("u-bitfit(budget=0.2)")[2], search("u-bitfit(budget=0.2)")[2]
    assert all(torch.equal(first, second) for first, second in zip(one, other, strict=True))


def test_without_any_score_nothing_is_chosen() -> None:
    with pytest.raises(MethodError, match="no candidate has a score"):
        prune([scored(torch.zeros(4), 4)], 2, structured=False, owner="test")


@given(
    total=st.integers(2, 10_000),
    share=st.floats(0.01, 0.99),
    first=st.integers(2, 40),
    length=st.integers(0, 60),
    events=st.integers(1, 12),
)
@settings(deadline=None)
def test_the_schedule_meets_its_target_in_equal_ratios(
    total: int, share: float, first: int, length: int, events: int
) -> None:
    target = max(1, round(share * total))
    schedule = PruningSchedule(total, target, first, first + length, events)
    found = {step: left for step in range(1, first + length + 10) if (left := schedule.left_after(step)) is not None}
    assert list(found)[-1] == first + length
    assert min(found) >= first
    assert len(found) == min(events, length + 1)
    lefts = list(found.values())
    assert lefts[-1] == target
    assert lefts == sorted(lefts, reverse=True)
    for number, left in enumerate(lefts, 1):
        assert left == pytest.approx(total * (target / total) ** (number / len(lefts)), abs=0.51)


def test_candidates_are_those_of_bitfit() -> None:
    assert BERT_BASE.count("u-bitfit") == BERT_BASE.count("s-bitfit") == 102_912
    assert LLAMA.count("u-bitfit") == LLAMA.count("s-bitfit") == 155_520
    with pytest.raises(MethodError, match="no biases to train"):
        LLAMA.count("u-bitfit(missing=refuse)")


@pytest.mark.parametrize("method", BOTH)
@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_stopped_run_ends_in_the_same_bits(method: str, stop: int, tmp_path: Path) -> None:
    specification = f"{method}(budget=0.3)"
    options = {"steps": 12, "save_every": 1}
    whole = tiny.classifier(specification)
    run(whole, settings=options)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.classifier(specification), settings=options, output=tmp_path, callbacks=[StopAt(stop)])
    resumed = tiny.classifier(specification)
    run(resumed, settings=options, output=tmp_path)
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    assert torch.equal(form_of(resumed).kept, form_of(whole).kept)


@pytest.mark.parametrize("method", BOTH)
def test_the_best_weights_are_within_the_budget(method: str) -> None:
    """Also where those of the search are better: evaluated after every step, best is one of the last steps."""
    tuned = tiny.classifier(f"{method}(budget=0.3, search=0.8)")
    result = run(tuned, settings={"steps": 10, "evaluate_every": 1})
    total = form_of(tuned).kept.numel()
    assert result.best_step in (8, 9, 10)
    assert int(form_of(tuned).kept.sum()) <= round(0.3 * total)


def test_whoever_binds_says_how_long() -> None:
    tuned, _ = attached("bert", "u-bitfit")
    optimizer = torch.optim.AdamW(tuned.trainable_parameters())
    with pytest.raises(MethodError, match=r"how many steps .* tuned\.bind\(optimizer, steps\)"):
        tuned.bind(optimizer)
    with pytest.raises(MethodError, match="needs three steps at least"):
        tuned.bind(optimizer, 2)
    small, _ = attached("bert", "s-bitfit(budget=0.001)")
    with pytest.raises(MethodError, match=r"holds nothing: the smallest vector has"):
        small.bind(torch.optim.AdamW(small.trainable_parameters()), 10)
    with pytest.raises(MethodError, match=r"warm_up is 0\.5 .* search ends after 0\.4"):
        deltune.UBitFit(warm_up=0.5)


def test_two_parts_that_select_one_bias_are_refused() -> None:
    with pytest.raises(MethodError, match=r"two parts select .*bias.*different targets"):
        attached("bert", "u-bitfit + bitfit")
    tuned, _ = attached("bert", "u-bitfit(targets=ffn.*) + bitfit(targets=attention.*) + lora")
    assert tuned.attachments["default"].recorded
    assert all(".attention." not in name or "output.dense" in name for name in tuned.attachments["default"].recorded)


def test_two_parts_that_select_one_bias_by_two_names_are_refused() -> None:
    model = nn.ModuleDict({"first": nn.Linear(4, 4), "second": nn.Linear(4, 4)})
    model["second"].bias = model["first"].bias
    with pytest.raises(MethodError, match=r"two parts select second\.bias"):
        deltune.attach(model, "u-bitfit(targets=first) + bitfit(targets=second)")
    model["second"].bias = nn.Parameter(torch.zeros(4))
    tuned = deltune.attach(model, "u-bitfit(targets=first) + bitfit(targets=second)")
    assert tuned.attachments["default"].recorded == {"first.bias"}


def test_a_copy_prunes_its_own_biases() -> None:
    tuned, batch = attached("bert", "u-bitfit(budget=0.2)")
    twin = copy.deepcopy(tuned)
    optimizer = torch.optim.AdamW(twin.trainable_parameters(), lr=1e-2)
    twin.bind(optimizer, 3)
    before = bits(tuned.model)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(twin.model, batch).backward()
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())
    assert int(form_of(twin).kept.sum()) < int(form_of(tuned).kept.sum())
    names = dict(twin.named_trainable_parameters())
    assert all(value is names[name] for name, value in form_of(twin)._biases.items())


@pytest.mark.parametrize("method", ["u-bitfit(budget=0.2, final_rate=4)", "s-bitfit(budget=0.3, final_rate=4)"])
def test_what_is_left_has_its_own_rate_when_the_search_is_over(method: str) -> None:
    steps, rate = 10, 0.5
    tuned, batch = attached("bert", method)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=steps)
    tuned.bind(optimizer, steps)
    form = form_of(tuned)
    (head,) = (value for name, value in tuned.named_trainable_parameters() if name.endswith("classifier.bias"))
    multiples = []
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        values = torch.cat([bias.detach().clone() for bias in form.searched()])
        before, now = head.detach().clone(), rate * (1 - 0.9 * step / steps)
        searching = not form.finished
        optimizer.step()
        assert head.grad is not None
        torch.testing.assert_close(head.detach(), before - now * head.grad)
        if searching == (not form.finished):
            moved = values - torch.cat([bias.detach() for bias in form.searched()])
            gradients = torch.cat([bias.grad for bias in form.searched() if bias.grad is not None])
            large = form.kept & (gradients.abs() > gradients.abs().max() / 100)
            multiples.append(float((moved / (now * gradients))[large].median()))
        schedule.step()
        assert [len(group["params"]) for group in optimizer.param_groups] == [len(list(tuned.trainable_parameters()))]
    # the search is over after the fourth step, in which all begin anew
    assert multiples == pytest.approx([1, 1, 1, 4, 4, 4, 4, 4, 4], rel=1e-2)


def test_a_rate_of_its_own_does_not_grow_where_a_step_fails() -> None:
    tuned, batch = attached("bert", "u-bitfit(budget=0.2, final_rate=3)")
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5)
    tuned.bind(optimizer, 10)
    rates = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        rates.append(optimizer.param_groups[-1]["lr"])
        if len(rates) in (6, 7):
            raise RuntimeError("out of memory")

    optimizer.register_step_pre_hook(look)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        with contextlib.suppress(RuntimeError):
            optimizer.step()
            schedule.step()
    assert rates == pytest.approx([0.05] * 4 + [0.15] * 4)


def test_a_schedule_that_starts_at_zero_trains_what_is_left() -> None:
    """When candidates are to be dropped for the first time, none has moved."""
    tuned, batch = attached("bert", "u-bitfit(budget=0.2)")
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.0)
    schedule = torch.optim.lr_scheduler.CyclicLR(optimizer, 0.0, 0.1, step_size_up=6, cycle_momentum=False)
    tuned.bind(optimizer, 10)
    for _ in range(8):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        schedule.step()
    form = form_of(tuned)
    values = torch.cat([bias.detach() for bias in form.searched()])
    assert form.finished
    assert int((values != form.start).sum()) > 0.9 * int(form.kept.sum())


def test_what_was_not_pruned_trains_on_at_its_own_rate(tmp_path: Path) -> None:
    tuned, batch = attached("bert", "u-bitfit(budget=1)")
    again = deltune.load(build("bert"), tuned.save(tmp_path / "delta"))
    ends = []
    for handle in (tuned, again):
        optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=0.1)
        handle.bind(optimizer, 10)
        loss_of(handle.model, batch).backward()
        optimizer.step()
        ends.append(torch.cat([bias.detach() for bias in form_of(handle).searched()]))
    assert (ends[0] != form_of(tuned).start).any()
    torch.testing.assert_close(ends[0], ends[1])
