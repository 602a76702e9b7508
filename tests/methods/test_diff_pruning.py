"""Diff pruning: gates, gradients, what is kept. Numbers are those of the fact sheet's invariants."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.func import functional_call

import deltune
from deltune.methods.selective.gated_differences import GatedDifferences
from deltune.methods.selective.hard_concrete import HardConcrete
from tests.methods.common import build, output
from tests.zoo import ARCHITECTURES

GATES = HardConcrete(-1.5, 1.5)
RATIO = 0.1
METHOD = f"diff-pruning(ratio={RATIO})"


def differing(
    method: str = METHOD, name: str = "bert", **options: Any
) -> tuple[deltune.Tuned, dict[str, Tensor], Any, GatedDifferences]:
    """The method on a random model in training mode, a batch with labels, a copy of the bare model, and the form."""
    architecture = ARCHITECTURES[name]
    head: Any = "classification" if "classification" in architecture.heads else "language"
    model = build(name, head, **options)
    bare = copy.deepcopy(model)
    tuned = deltune.attach(model, method)
    batch = architecture.batch(5, head=head)
    batch["labels"] = architecture.labels(head, batch)
    model.train()
    bare.train()
    return tuned, batch, bare, form_of(tuned)


def form_of(tuned: deltune.Tuned, name: str = "default") -> GatedDifferences:
    ((_, _, form),) = tuned.attachments[name].sites
    assert isinstance(form, GatedDifferences)
    return form


@torch.no_grad()
def spread(form: GatedDifferences, seed: int = 0, scale: float = 0.05) -> None:
    """Differences as after a training, and gates of every kind."""
    generator = torch.Generator().manual_seed(seed)
    assert form.w is not None
    assert form.alpha is not None
    form.w.copy_(torch.randn(form.w.shape, generator=generator) * scale)
    form.alpha.copy_(torch.randn(form.alpha.shape, generator=generator) * 2)
    if form.group_alpha is not None:
        form.group_alpha.copy_(torch.randn(form.group_alpha.shape, generator=generator) * 2)


def gates_of(gates: HardConcrete, alpha: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """z and dz/dalpha."""
    s = gates.concrete(alpha, noise)
    return gates.gate(s), gates.gate_backward(torch.ones_like(s), s)


def steps(tuned: deltune.Tuned, batch: dict[str, Tensor], count: int, total: int | None = None, **options: Any) -> Any:
    """Train; the phases are those of a training of ``total`` steps. Returns the optimizer."""
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-3, **options})
    tuned.bind(optimizer, total or count)
    tuned.model.train()
    for _ in range(count):
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()
    return optimizer


def slow_gates(form: GatedDifferences, name: str, draw: int | None) -> tuple[Tensor, Tensor]:
    """z and z_g of one parameter as differentiable functions of alpha and alpha_g, by the formula of the paper."""
    number, part = form.parts[name]
    assert form.alpha is not None
    noise = torch.full((part.stop - part.start + 1,), 0.5)
    if draw is not None:
        noise = form._noise(number, draw, len(noise) - 1, form.alpha.device)
    odds = torch.logit(noise, eps=1e-4)  # with the last bits of the form's, so that the same gates are at their bounds
    width = form.gates.high - form.gates.low
    z = ((form.alpha[part] + odds[:-1]).sigmoid() * width + form.gates.low).clamp(0, 1)
    if form.group_alpha is None:
        return z, torch.ones(())
    return z, ((form.group_alpha[number] + odds[-1]).sigmoid() * width + form.gates.low).clamp(0, 1)


def slow_parameters(form: GatedDifferences, bare: Any, draw: int | None) -> dict[str, Tensor]:
    """theta_0 + z z_g w of every parameter."""
    assert form.w is not None
    found = {}
    for name, (_, part) in form.parts.items():
        z, group = slow_gates(form, name, draw)
        value = bare.get_parameter(name).detach()
        found[name] = value + (z * group * form.w[part]).view_as(value)
    return found


def twin(tuned: deltune.Tuned, bare: Any, draw: int | None) -> dict[str, Tensor]:
    """All parameters of the tuned model, from the bare one's and the formula: head as it is trained."""
    return {**slow_parameters(form_of(tuned), bare, draw), **dict(tuned.attachments["default"].selection)}


# -- invariants ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5", "vit"])
def test_invariant_01_step_0_is_the_base_model_for_any_gates(name: str) -> None:
    tuned, batch, bare, form = differing(name=name)
    expected = output(bare, batch)
    for draw in range(3):
        assert torch.equal(output(tuned.model, batch), expected)
        form.draws.fill_(draw + 1)
    with torch.no_grad():
        assert form.alpha is not None
        form.alpha.normal_(0, 3)
    assert torch.equal(output(tuned.model, batch), expected)
    assert torch.equal(output(tuned.model.eval(), batch), output(bare.eval(), batch))


@given(u=st.floats(0, 1), alpha=st.floats(-12, 12), low=st.floats(-3, -0.1), high=st.floats(1.1, 3))
@settings(max_examples=200, deadline=None)
def test_invariant_02_gates_and_slopes_are_those_of_the_formula(
    u: float, alpha: float, low: float, high: float
) -> None:
    noise = torch.tensor([u])  # in float32, as the clamp
    z, slope = gates_of(HardConcrete(low, high), torch.tensor([alpha], dtype=torch.float64), noise)
    clamped = min(max(float(noise), float(torch.tensor(1e-4))), float(torch.tensor(1 - 1e-4)))
    s = 1 / (1 + math.exp(-(math.log(clamped) - math.log(1 - clamped) + alpha)))
    stretched = s * (high - low) + low
    assert 0 <= float(z) <= 1
    assert float(z) == pytest.approx(min(1, max(0, stretched)), abs=1e-6)
    if min(abs(stretched), abs(stretched - 1)) > 1e-5:  # at the bounds rounding decides
        expected = (high - low) * s * (1 - s) if 0 < stretched < 1 else 0.0
        assert float(slope) == pytest.approx(expected, abs=1e-6)


def test_invariant_02_gates_are_exactly_0_and_1_with_positive_probability() -> None:
    z, slope = gates_of(GATES, torch.zeros(10_000), torch.rand(10_000, generator=torch.Generator().manual_seed(0)))
    for bound in (0.0, 1.0):
        at_bound = z == bound
        assert at_bound.sum() > 1000
        assert not slope[at_bound].any()
    assert slope[(z > 0) & (z < 1)].min() > 0


def test_noise_at_the_ends_gives_finite_gates() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        z, slope = gates_of(GATES, torch.zeros(2), torch.tensor([0.0, 1.0], dtype=dtype))
        assert z.tolist() == [0.0, 1.0]
        assert slope.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("low", "high"), [(-1.5, 1.5), (-0.1, 1.1)])
@pytest.mark.parametrize("alpha", [-2.0, 0.0, 1.0, 5.0])
def test_invariant_03_gates_are_open_as_often_as_expected(alpha: float, low: float, high: float) -> None:
    count = 100_000
    gates = HardConcrete(low, high)
    noise = torch.rand(count, generator=torch.Generator().manual_seed(7))
    z, _ = gates_of(gates, torch.full((count,), alpha), noise)
    expected = 1 / (1 + math.exp(-(alpha - math.log(-low / high))))
    error = 3 * math.sqrt(expected * (1 - expected) / count)
    assert abs(float((z > 0).double().mean()) - expected) < error
    assert float(gates.probability(torch.tensor(alpha))) == pytest.approx(expected, rel=1e-6)
    if (alpha, high) == (0.0, 1.5):
        assert expected == 0.5
        one = 1 - 1 / (1 + math.exp(-math.log(5)))
        assert one == pytest.approx(0.167, abs=1e-3)
        assert abs(float((z == 1).double().mean()) - one) < 3 * math.sqrt(one * (1 - one) / count)


def test_invariant_03_the_draws_of_a_model_are_uniform_and_differ() -> None:
    _, _, _, form = differing()
    draws = [form._noise(number, draw, 20_000, torch.device("cpu")) for number in (0, 1) for draw in (0, 1)]
    for noise in draws:
        assert abs(float(noise.double().mean()) - 0.5) < 3 * math.sqrt(1 / 12 / len(noise))
    together = torch.corrcoef(torch.stack(draws))
    assert (together - torch.eye(4)).abs().max() < 4 / math.sqrt(20_000)


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("form_name", ["sum", "product"])
def test_invariant_04_the_penalty_and_its_gradient(structured: bool, form_name: str) -> None:
    method = f"diff-pruning(structured={structured}, penalty_weight=0.01, penalty_form={form_name}, low=-0.5)"
    _, _, _, form = differing(method)
    form.double()
    spread(form)
    assert form.alpha is not None
    penalty = form.penalty()
    assert penalty is not None
    penalty.backward()
    p = 1 / (1 + torch.exp(-(form.alpha.detach() - math.log(0.5 / 1.5))))
    product = structured and form_name == "product"
    total = torch.zeros((), dtype=torch.float64)
    for number, part in form.parts.values():
        group = torch.ones((), dtype=torch.float64)
        if form.group_alpha is not None:
            group = 1 / (1 + torch.exp(-(form.group_alpha.detach()[number] - math.log(0.5 / 1.5))))
        own = p[part]
        gradient = 0.01 * own * (1 - own) * (group if product else 1)
        torch.testing.assert_close(form.alpha.grad[part], gradient, rtol=1e-6, atol=0)
        total += own.sum() * (group if product else 1) + (group if structured and not product else 0)
        if form.group_alpha is not None:
            expected = 0.01 * group * (1 - group) * (own.sum() if product else 1)
            torch.testing.assert_close(form.group_alpha.grad[number], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(penalty, 0.01 * total)


def test_invariant_04_the_penalty_is_part_of_the_loss_in_training() -> None:
    tuned, batch, bare, form = differing("diff-pruning(penalty_weight=0.01, structured=false)")
    plain = bare(**batch).loss
    loss = tuned.model(**batch).loss
    probability = 1 / (1 + math.exp(-5))
    torch.testing.assert_close(loss - plain, torch.tensor(0.01 * probability * form.size))
    loss.backward()
    assert form.alpha is not None  # w is 0, so that all of the gradient is the penalty's
    expected = torch.full_like(form.alpha, 0.01 * probability * (1 - probability))
    torch.testing.assert_close(form.alpha.grad, expected, rtol=1e-5, atol=0)
    tuned.model.eval()
    torch.testing.assert_close(tuned.model(**batch).loss, bare.eval()(**batch).loss)


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_invariant_05_gradients_are_those_of_autograd(name: str, structured: bool, training: bool) -> None:
    tuned, batch, bare, form = differing(f"diff-pruning(structured={structured}, penalty_weight=0)", name)
    tuned.model.double()
    bare.double()
    spread(form)
    form.draws.fill_(3)
    tuned.model.train(training)
    batches = [batch, {key: value[:2] for key, value in batch.items()}]
    for part in batches:  # which add up
        tuned.model(**part).loss.backward()
    found = {key: value.grad for key, value in form.named_parameters()}
    assert all(value.grad is None for key, value in tuned.model.named_parameters() if key in form.parts)
    form.zero_grad()
    for part in batches:
        values = twin(tuned, bare, 3 if training else None)
        functional_call(bare.train(training), values, kwargs=part).loss.backward()
    assert found.keys() == {"w", "alpha"} | ({"group_alpha"} if structured else set())
    for key, value in form.named_parameters():
        assert value.grad is not None
        assert value.grad.abs().max() > 0
        torch.testing.assert_close(found[key], value.grad, rtol=1e-5, atol=1e-7 * float(value.grad.abs().max()))


def test_invariant_06_entries_whose_gate_is_0_are_those_of_the_model() -> None:
    tuned, batch, bare, form = differing()
    spread(form)
    output(tuned.model, batch)
    closed = 0
    for name in form.parts:
        z, group = slow_gates(form, name, 0)
        now, before = tuned.model.get_parameter(name).view(-1), bare.get_parameter(name).view(-1)
        off = (z * group) == 0
        assert torch.equal(now[off], before[off])
        assert group == 0 or not torch.equal(now[~off], before[~off])
        closed += int(off.sum())
    assert 0.2 * form.size < closed < form.size


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("restart", ["difference", "zero"])
def test_invariant_07_the_greatest_differences_are_kept(name: str, restart: str) -> None:
    tuned, _, bare, form = differing(f"diff-pruning(ratio={RATIO}, restart={restart})", name)
    spread(form)
    w = form.w.detach().clone()  # type: ignore[union-attr]
    change = {key: value - bare.get_parameter(key) for key, value in slow_parameters(form, bare, None).items()}
    magnitudes = torch.cat([change[key].detach().view(-1).abs() for key in form.parts])
    form.keep(restart == "zero")
    head = [module + "." for module in tuned.anatomy.head]
    total = sum(value.numel() for key, value in bare.named_parameters() if not key.startswith(tuple(head) or ("\0",)))
    assert total == form.size
    assert len(form.values) == len(form.indices) == int(RATIO * total)
    kept = torch.zeros(total, dtype=torch.bool)
    kept[form.indices] = True
    # theta has rounding of its own, the differences have not
    assert magnitudes[kept].min() >= magnitudes[~kept].max() - 1e-6
    expected = torch.zeros_like(form.values) if restart == "zero" else w[form.indices]
    assert torch.equal(form.values.detach(), expected)


def test_invariant_07_entries_that_do_not_differ_are_not_kept() -> None:
    _, _, _, form = differing()
    with torch.no_grad():
        assert form.w is not None
        form.w[5:25] = 0.1
    form.keep(restart=False)
    assert form.indices.tolist() == list(range(5, 25))


@pytest.mark.parametrize("fused", [False, True])
def test_invariant_08_entries_outside_of_the_mask_are_those_of_the_model(fused: bool) -> None:
    tuned, batch, bare, form = differing("diff-pruning(ratio=0.1, initial=3)")
    steps(tuned, batch, 8, weight_decay=0.1, fused=fused)
    site = form.site
    assert not form.gated
    moved = 0
    for name, _, places in site.split(form.indices):
        kept = torch.zeros(tuned.model.get_parameter(name).numel(), dtype=torch.bool)
        kept[places] = True
        now, before = tuned.model.get_parameter(name).view(-1), bare.get_parameter(name).view(-1)
        assert torch.equal(now[~kept], before[~kept])
        moved += int((now[kept] != before[kept]).sum())
    assert moved > 0.9 * len(form.values)
    untouched = set(site.names) - {name for name, _, _ in site.split(form.indices)}
    assert all(torch.equal(tuned.model.get_parameter(name), bare.get_parameter(name)) for name in untouched)
    tuned.detach()
    state = tuned.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in bare.state_dict().items())


@pytest.mark.parametrize("taken", [0, 1, 2, 5])
def test_invariant_08_the_model_comes_back_bit_for_bit_in_every_phase(taken: int) -> None:
    tuned, batch, bare, _ = differing("diff-pruning(ratio=0.1, initial=3)")
    steps(tuned, batch, taken, 6)
    trained = output(tuned.model, batch)
    with tuned.disabled():
        state = tuned.model.state_dict()
        assert state.keys() == bare.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in bare.state_dict().items())
    assert torch.equal(output(tuned.model, batch), trained)
    tuned.detach()
    assert all(torch.equal(tuned.model.get_parameter(name), value) for name, value in bare.named_parameters())
    assert not any(getattr(value, "_post_accumulate_grad_hooks", None) for value in tuned.model.parameters())


def test_invariant_08_steps_of_the_second_phase_are_those_of_dense_training_with_a_mask() -> None:
    tuned, batch, bare, form = differing("diff-pruning(ratio=0.1, initial=2, restart=zero)")
    steps(tuned, batch, 2, 6, weight_decay=0.0)
    assert not form.gated
    masks = {name: torch.zeros_like(value) for name, value in bare.named_parameters()}
    for name, _, places in form.site.split(form.indices):
        masks[name].view(-1)[places] = 1
    with torch.no_grad():  # a head of the same values
        for name, value in tuned.attachments["default"].selection:
            bare.get_parameter(name).copy_(value)
            masks[name].fill_(1)
    optimizer = torch.optim.SGD(bare.parameters(), lr=0.1)
    own = torch.optim.SGD(tuned.trainable_parameters(), lr=0.1)
    for _ in range(4):
        for model, stepping in ((bare, optimizer), (tuned.model, own)):
            stepping.zero_grad()
            model(**batch).loss.backward()
        for name, value in bare.named_parameters():
            value.grad = None if value.grad is None else value.grad * masks[name]
        optimizer.step()
        own.step()
    for name, value in bare.named_parameters():
        torch.testing.assert_close(tuned.model.get_parameter(name), value, rtol=1e-5, atol=1e-6)


def test_invariant_09_the_head_has_no_gate_and_no_penalty() -> None:
    tuned, batch, bare, form = differing("diff-pruning(penalty_weight=0.01)")
    head = {name for name, _ in bare.named_parameters() if name.startswith("classifier")}
    assert head
    assert not head & set(form.parts)
    assert {name for name, _ in tuned.attachments["default"].selection} == head
    tuned.model(**batch).loss.backward()
    bare(**batch).loss.backward()
    for name in head:
        torch.testing.assert_close(tuned.model.get_parameter(name).grad, bare.get_parameter(name).grad)
    steps(tuned, batch, 1, 10, lr=1e-2)
    for name in head:  # no gate and no mask holds any of its entries
        assert (tuned.model.get_parameter(name) != bare.get_parameter(name)).all()


def test_invariant_10_a_closed_gate_of_a_tensor_closes_all_of_it() -> None:
    tuned, batch, bare, form = differing()
    spread(form)
    name = "bert.encoder.layer.0.attention.self.query.weight"
    number, _ = form.parts[name]
    with torch.no_grad():
        assert form.group_alpha is not None
        form.group_alpha.fill_(20)
        form.group_alpha[number] = -20
    for training in (True, False):
        output(tuned.model.train(training), batch)
        for other in form.parts:
            same = torch.equal(tuned.model.get_parameter(other), bare.get_parameter(other))
            assert same == (other == name), other
    form.keep(restart=False)
    assert name not in {other for other, _, _ in form.site.split(form.indices)}


@pytest.mark.parametrize("taken", [2, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_invariant_11_a_file_and_the_base_are_the_tuned_model(taken: int, dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, batch, bare, form = differing("diff-pruning(ratio=0.1, initial=4, gate_rate=0.5)", dtype=dtype)
    steps(tuned, batch, taken, 8, lr=1e-2)
    bare.eval()
    tuned.model.eval()
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(copy.deepcopy(bare), tmp_path)
    # by hand, on the base alone
    stored = load_file(tmp_path / "delta.safetensors")
    assert set(stored) == {"entries.indices", "entries.values", "classifier.weight", "classifier.bias"}
    indices, values = stored["entries.indices"], stored["entries.values"]
    assert len(values) == len(indices) <= int(0.1 * form.size)
    sites = form.site
    for name, part, places in sites.split(indices):
        flat = bare.get_parameter(name).data.view(-1)
        flat[places] = (flat[places].float() + values[part].float()).to(dtype)
    for name in ("classifier.weight", "classifier.bias"):
        bare.get_parameter(name).data.copy_(stored[name])
    by_hand = output(bare, batch)
    assert torch.equal(output(loaded.model, batch), by_hand)
    # before the end of the first phase a file holds what would be kept then
    assert torch.equal(by_hand, expected) == (taken == 6)
    if taken == 2:
        with torch.no_grad():
            for name, value in form.named_parameters():
                value.fill_(0.0 if name == "w" else 20.0)
            form.get_parameter("w")[indices] = values
        assert torch.equal(output(tuned.model, batch), by_hand)


def test_invariant_12_evaluation_is_repeatable_and_has_the_gates_of_the_formula() -> None:
    tuned, batch, bare, form = differing()
    spread(form)
    tuned.model.eval()
    first = output(tuned.model, batch)
    for draw in range(3):
        form.draws.fill_(draw)
        assert torch.equal(output(tuned.model, batch), first)
    with torch.no_grad():
        expected = functional_call(bare.eval(), twin(tuned, bare, None), kwargs=batch).logits
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    tuned.model.train()
    drawn = output(tuned.model, batch)
    assert not torch.equal(drawn, first)
    assert torch.equal(output(tuned.model.eval(), batch), first)
    assert torch.equal(output(tuned.model.train(), batch), drawn)


# -- gates in training ----------------------------------------------------------------------------------------


def test_gates_are_drawn_once_for_each_step() -> None:
    tuned, batch, bare, form = differing()
    spread(form)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.0)
    tuned.bind(optimizer, 10)
    drawn = []
    for step in range(3):
        found = [output(tuned.model, batch) for _ in range(2)]  # batches of one step
        assert torch.equal(*found)
        with torch.no_grad():
            expected = functional_call(bare, twin(tuned, bare, step), kwargs=batch).logits
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
        tuned.model(**batch).loss.backward()
        optimizer.step()
        drawn.append(found[0])
    assert not torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[1], drawn[2])


def test_gates_are_those_of_the_seed() -> None:
    found = []
    for seed in (0, 0, 1):
        tuned, batch, _, form = differing(f"diff-pruning(seed={seed})")
        torch.manual_seed(len(found))  # of no importance
        spread(form)
        state = torch.get_rng_state()
        found.append(output(tuned.model, batch))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers_have_the_same_gates(reentrant: bool) -> None:
    tuned, batch, _, form = differing(name="gpt2")
    tuned.model.double()
    spread(form)
    tuned.model(**batch).loss.backward()
    plain = {name: value.grad.clone() for name, value in form.named_parameters() if value.grad is not None}
    form.zero_grad()
    tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    tuned.model(**batch).loss.backward()
    assert plain.keys() == {"w", "alpha", "group_alpha"}
    for name, value in form.named_parameters():
        torch.testing.assert_close(value.grad, plain[name])


def test_gradients_in_training_belong_to_the_gates_that_acted() -> None:
    tuned, batch, _, form = differing("diff-pruning(penalty_weight=0)")
    spread(form)
    tuned.model(**batch).loss.backward()
    expected = {name: value.grad.clone() for name, value in form.named_parameters() if value.grad is not None}
    form.zero_grad()
    loss = tuned.model(**batch).loss
    tuned.model.eval()  # before the backward pass
    loss.backward()
    for name, value in form.named_parameters():
        assert torch.equal(value.grad, expected[name])  # type: ignore[arg-type]
