"""DyLoRA, against its fact sheet. Numbers are those of the sheet's invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import StateError
from deltune.methods.reparameterized.dylora import DynamicLowRank
from deltune.methods.reparameterized.low_rank import LowRank
from tests.methods.common import attached, build, loss_of, matrix_site, output, relative_error

ALL = "targets='attention.* ffn.*'"
#: Ordinary matrices, transposed fused ones, interleaved ones, fused queries/keys/values and gates, T5.
LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, DynamicLowRank]:
    return {key: form for key, _, form in tuned.attachments[name].sites}  # type: ignore[misc]


def fill(tuned: deltune.Tuned) -> None:
    """Values everywhere, B too."""
    with torch.no_grad():
        for seed, form in enumerate(forms_of(tuned).values()):
            form.B.copy_(0.2 * torch.randn(form.B.shape, generator=torch.Generator().manual_seed(seed)))


def draw(tuned: deltune.Tuned, rank: int) -> None:
    """Train at ``rank``, as if a step had drawn it."""
    tuned.model.train()
    for form in forms_of(tuned).values():
        form.draw(0, rank)


def plain_lora(name: str, forms: dict[str, DynamicLowRank], rank: int, alpha: float) -> Any:
    """A model of its own with the first components in a LoRA."""
    tuned = deltune.attach(build(name), f"lora(rank={rank}, alpha={alpha}, {ALL})")
    with torch.no_grad():
        for key, _, form in tuned.attachments["default"].sites:
            assert isinstance(form, LowRank)
            form.A.copy_(forms[key].A[:rank])
            form.B.copy_(forms[key].B[:, :rank])
    return tuned.model


class Toy(nn.Module):
    """One matrix, alone."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.map = nn.Linear(size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.map(x)  # type: ignore[no-any-return]


def toy(options: str = "rank=4", size: int = 6) -> tuple[deltune.Tuned, DynamicLowRank]:
    tuned = deltune.attach(Toy(size), f"dylora({options}, targets=map)")
    (form,) = forms_of(tuned).values()
    return tuned, form


def toy_batches(steps: int, size: int = 6) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(5, size, generator=generator), torch.randn(5, size, generator=generator)) for _ in range(steps)
    ]


def split(tensor: Tensor, name: str) -> list[Tensor]:
    """The components of A, B, or a moment of theirs."""
    return list(tensor.detach().clone().unbind(0 if name == "A" else 1))


# -- output and gradient ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_1_and_2_output_at_b_is_that_of_lora(name: str) -> None:
    tuned, batch = attached(name, f"dylora(rank=4, alpha=6, {ALL})")
    fill(tuned)
    for rank in (1, 3, 4):
        tuned.model.eval()
        tuned.set_rank(rank)
        expected = output(plain_lora(name, forms_of(tuned), rank, 6), batch)
        assert relative_error(output(tuned.model, batch), expected) < 1e-6
        # and while a step trains at b, whatever is chosen for evaluation
        tuned.set_rank(2)
        draw(tuned, rank)
        for update in (True, False):
            for form in forms_of(tuned).values():
                form.frozen = update
            assert relative_error(output(tuned.model, batch), expected) < 1e-6


def test_1_the_formula() -> None:
    form = DynamicLowRank(matrix_site(7, 5), 4, 3.0)
    nn.init.normal_(form.B)
    x, base = torch.randn(2, 3, 7), torch.randn(2, 3, 5)
    for rank in (1, 2, 4):
        form.set_rank(rank)
        change = torch.zeros(2, 3, 5)
        for index in range(rank):
            change += 3.0 / rank * (x @ form.A[index].detach())[..., None] * form.B[:, index].detach()
        assert torch.allclose(form(x), change, atol=1e-6)
        assert torch.allclose(form.add_to(base, x, 0.5), base + 0.5 * change, atol=1e-6)
        assert torch.allclose(x @ form.weight_delta().T, change, atol=1e-6)


def gradients(tuned: deltune.Tuned, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    tuned.model.zero_grad()
    loss_of(tuned.model, batch).backward()
    return {name: value.grad.clone() for name, value in tuned.named_trainable_parameters() if value.grad is not None}


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("update", ["frozen", "nested"])
def test_3_and_4_only_what_the_step_trains_has_a_gradient(name: str, update: str) -> None:
    tuned, batch = attached(name, f"dylora(rank=4, update={update}, {ALL})", dtype=torch.float64)
    fill(tuned)
    model = build(name, dtype=torch.float64)
    for rank in (1, 3, 4):
        draw(tuned, rank)
        found = gradients(tuned, batch)
        # the reference: leaves of their own for each component, in a plain LoRA
        other = deltune.attach(model, f"lora(rank={rank}, alpha=16, {ALL})")
        with torch.no_grad():
            for key, _, form in other.attachments["default"].sites:
                form.A.copy_(forms_of(tuned)[key].A[:rank])  # type: ignore[operator, union-attr]
                form.B.copy_(forms_of(tuned)[key].B[:, :rank])  # type: ignore[operator, union-attr]
        model.train()
        whole = gradients(other, batch)
        other.detach()
        trained = range(rank) if update == "nested" else (rank - 1,)
        for key in forms_of(tuned):
            for factor in ("A", "B"):
                expected = split(whole[f"{key}.{factor}"], factor)
                for index, component in enumerate(split(found[f"{key}.{factor}"], factor)):
                    if index in trained:
                        assert component.any(), key
                        assert torch.allclose(component, expected[index], rtol=1e-8, atol=1e-14), key
                    else:
                        assert not component.any(), key


@pytest.mark.parametrize("update", ["frozen", "nested"])
def test_5_later_components_have_no_influence(update: str) -> None:
    tuned, batch = attached("bert", f"dylora(rank=4, update={update}, {ALL})")
    fill(tuned)
    draw(tuned, 2)
    expected = gradients(tuned, batch), output(tuned.model, batch)
    with torch.no_grad():
        for form in forms_of(tuned).values():
            form.A[2:] = torch.nan
            form.B[:, 2:] = torch.nan
    found = gradients(tuned, batch), output(tuned.model, batch)
    assert torch.equal(found[1], expected[1])
    assert all(torch.equal(found[0][name], value) for name, value in expected[0].items())
    tuned.set_rank(2)
    tuned.model.eval()
    assert torch.isfinite(output(tuned.model, batch)).all()
    tuned.merge()
    assert torch.isfinite(output(tuned.model, batch)).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_7_step_0_is_unchanged_for_every_rank(name: str) -> None:
    tuned, batch = attached(name, f"dylora({ALL})")
    with tuned.disabled():
        bare = output(tuned.model, batch)
    for rank in range(1, 9):
        tuned.set_rank(rank)
        assert torch.equal(output(tuned.model, batch), bare)
    for rank in (1, 5, 8):
        draw(tuned, rank)  # the random models have no dropout
        assert torch.equal(output(tuned.model, batch), bare)


# -- merging, evaluation, files --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_8_merging_uses_the_chosen_rank(name: str) -> None:
    tuned, batch = attached(name, f"dylora(rank=4, {ALL})")
    fill(tuned)
    frozen = {key: value.clone() for key, value in tuned.model.state_dict().items()}
    whole = output(tuned.model, batch)
    for rank in (3, 1):
        tuned.set_rank(rank)
        cut = output(tuned.model, batch)
        assert relative_error(cut, whole) > 1e-4
        draw(tuned, 2)  # a step's rank has no part in it
        tuned.merge()
        tuned.model.eval()
        assert relative_error(output(tuned.model, batch), cut) < 1e-5
        with pytest.raises(StateError, match="while merged"):
            tuned.set_rank(2)
        tuned.unmerge()
        assert all(
            torch.equal(value, frozen[key]) for key, value in tuned.model.state_dict().items() if ".deltune." not in key
        )
        forms = forms_of(tuned)
        assert {form.chosen for form in forms.values()} == {rank}
        for form in forms.values():
            form.eval()  # it was off the model when that went to evaluation mode
        assert torch.equal(output(tuned.model, batch), cut)


def test_8_the_merged_matrix_in_float64() -> None:
    tuned, form = toy("rank=4, alpha=6")
    tuned.model.double()
    fill(tuned)
    frozen = tuned.model.map.weight.detach().clone()  # type: ignore[union-attr, operator]
    tuned.set_rank(3)
    expected = frozen + 6 / 3 * form.B[:, :3].detach() @ form.A[:3].detach()
    tuned.merge()
    assert torch.allclose(tuned.model.map.weight, expected, atol=1e-12)  # type: ignore[union-attr, arg-type]


def test_10_evaluation_is_deterministic_and_at_the_chosen_rank() -> None:
    tuned, batch = attached("bert", f"dylora(rank=4, {ALL})")
    fill(tuned)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=0.0)
    tuned.bind(optimizer)
    tuned.set_rank(3)
    tuned.model.eval()
    expected = output(tuned.model, batch)
    state = torch.get_rng_state()
    for _ in range(5):
        tuned.model.train()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        tuned.model.eval()
        assert torch.equal(output(tuned.model, batch), expected)
    assert torch.equal(torch.get_rng_state(), state)  # nobody else's random numbers are used


@pytest.mark.parametrize("name", LAYOUTS)
def test_11_a_cut_one_is_saved_as_a_plain_lora(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, f"dylora(rank=4, alpha=6, {ALL})")
    fill(tuned)
    for rank in (1, 3):
        tuned.set_rank(rank)
        folder = tuned.save(tmp_path / str(rank))
        loaded = deltune.load(build(name), folder)
        method = loaded.attachments["default"].method
        assert isinstance(method, deltune.LoRA)
        assert (method.rank, method.alpha, method.rank_pattern) == (rank, 6, "")
        assert {form.A.shape[0] for form in forms_of(loaded).values()} == {rank}
        assert relative_error(output(loaded.model, batch), output(tuned.model, batch)) < 1e-6
    # at the full rank every rank stays possible
    tuned.set_rank(4)
    loaded = deltune.load(build(name), tuned.save(tmp_path / "whole"))
    assert loaded.attachments["default"].method == tuned.attachments["default"].method
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    for handle in (tuned, loaded):
        handle.set_rank(2)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


def test_ranks_may_differ_from_site_to_site(tmp_path: Path) -> None:
    tuned, batch = attached("bert", f"dylora(rank=4, {ALL})")
    fill(tuned)
    for number, form in enumerate(forms_of(tuned).values()):
        form.set_rank(1 + number % 4)
    loaded = deltune.load(build("bert"), tuned.save(tmp_path))
    assert {form.A.shape[0] for form in forms_of(loaded).values()} == {1, 2, 3, 4}
    assert relative_error(output(loaded.model, batch), output(tuned.model, batch)) < 1e-6
