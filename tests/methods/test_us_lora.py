"""U-LoRA and S-LoRA: the search of test_us_bitfit.py over the entries and components of low-rank changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError
from deltune.methods.reparameterized.us_lora import SearchedLowRank, kept_components
from tests.methods.common import attached, bits, build, loss_of, matrix_site, output, relative_error
from tests.methods.sizes import BERT_BASE
from tests.training import tiny
from tests.training.test_fit import StopAt, run

BOTH = ["u-lora(rank=4, budget=0.2)", "s-lora(rank=4, budget=0.3)"]


def forms_of(tuned: deltune.Tuned) -> dict[str, SearchedLowRank]:
    forms = tuned.attachments["default"].forms
    return {key: form for key, form in forms.items() if isinstance(form, SearchedLowRank)}


def search(method: str, name: str = "bert", steps: int = 12, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, method)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-2, "weight_decay": 0.1, **options})
    tuned.bind(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
    return tuned, batch


def test_the_form_is_the_product_less_that_at_the_start() -> None:
    torch.manual_seed(0)
    form = SearchedLowRank(matrix_site(12, 20), rank=3, scale=2.0).double()
    x = torch.randn(5, 12, dtype=torch.float64)
    assert not form(x).any()
    first_A, first_B = form.A.detach().clone(), form.B.detach().clone()
    with torch.no_grad():
        form.A.add_(torch.randn_like(form.A))
        form.B.add_(torch.randn_like(form.B))
    expected = 2.0 * x @ (form.B @ form.A - first_B @ first_A).T
    assert relative_error(form(x), expected) < 1e-12
    assert relative_error(form.weight_delta(), 2.0 * (form.B @ form.A - first_B @ first_A)) < 1e-12


def test_both_factors_start_with_vectors_of_length_one() -> None:
    torch.manual_seed(0)
    form = SearchedLowRank(matrix_site(512, 2048), rank=64, scale=1.0)
    assert form.A.norm(dim=1).mean().item() == pytest.approx(1.0, abs=0.03)
    assert form.B.norm(dim=0).mean().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
@pytest.mark.parametrize("method", BOTH)
def test_step_0_is_the_frozen_model(method: str, name: str) -> None:
    tuned, batch = attached(name, method)
    assert torch.equal(output(tuned.model, batch), output(build(name), batch))


@pytest.mark.parametrize("method", BOTH)
def test_the_budget_is_met_and_what_is_dropped_changes_nothing(method: str) -> None:
    tuned, batch = attached("bert", method)
    starts = {key: form.start.clone() for key, form in forms_of(tuned).items()}
    with tuned.disabled():
        before = bits(tuned.model)
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2, weight_decay=0.1)
    tuned.bind(optimizer, 12)
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        for key, form in forms_of(tuned).items():
            now = torch.cat([form.A.detach().flatten(), form.B.detach().flatten()])
            assert torch.equal(now[~form.kept], starts[key][~form.kept])
    total = sum(form.kept.numel() for form in forms_of(tuned).values())
    kept = sum(int(form.kept.sum()) for form in forms_of(tuned).values())
    summary = tuned.summary()
    assert summary.parameters - summary.head_parameters == kept
    if method.startswith("u"):
        assert kept == round(0.2 * total)
    else:
        size = forms_of(tuned)["encoder.0.attention.query"].kept.numel() // 4
        assert 0.3 * total - size < kept <= 0.3 * total
        assert kept == size * sum(kept_components(forms_of(tuned)).values())  # type: ignore[arg-type]
        for form in forms_of(tuned).values():
            rows = form.kept[: form.A.numel()].view_as(form.A)
            columns = form.kept[form.A.numel() :].view_as(form.B)
            assert torch.equal(rows.all(1), rows.any(1))
            assert torch.equal(rows.all(1), columns.all(0))
            assert torch.equal(columns.all(0), columns.any(0))
    for form in forms_of(tuned).values():
        if not form.kept.any():
            assert not form.weight_delta().any()
    with tuned.disabled():
        assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("method", BOTH)
def test_saved_it_is_a_lora_of_what_is_left(method: str, name: str, tmp_path: Path) -> None:
    tuned, batch = search(method, name)
    expected = output(tuned.model, batch)
    counts = kept_components(tuned.attachments["default"].forms)
    tuned.save(tmp_path / "delta")
    loaded = deltune.load(build(name), tmp_path / "delta")
    assert loaded.attachments["default"].method.name == "lora"
    ranks = {key: form.rank for key, form in loaded.attachments["default"].forms.items()}  # type: ignore[attr-defined]
    assert ranks == {key: 2 * count for key, count in counts.items() if count}
    assert relative_error(output(loaded.model, batch), expected) < 1e-5
    if method.startswith("s"):
        assert min(counts.values()) < max(counts.values())


@pytest.mark.parametrize("method", BOTH)
def test_a_stopped_run_ends_in_the_same_bits(method: str, tmp_path: Path) -> None:
    options = {"steps": 12, "save_every": 1}
    whole = tiny.classifier(method)
    run(whole, settings=options)
    with pytest.raises(KeyboardInterrupt):
        run(tiny.classifier(method), settings=options, output=tmp_path, callbacks=[StopAt(4)])
    resumed = tiny.classifier(method, seed=9)
    run(resumed, settings=options, output=tmp_path)
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    for key, form in forms_of(whole).items():
        assert tiny.equal(dict(form.state_dict()), dict(forms_of(resumed)[key].state_dict()))


def test_counts_and_ranks_that_do_not_fit() -> None:
    assert BERT_BASE.count("u-lora") == BERT_BASE.count("s-lora") == 294_912
    with pytest.raises(MethodError, match=r"rank 400 is more than half .* Use a rank of 384 at most"):
        BERT_BASE.count("s-lora(rank=400)")
