"""Threshold masks: which weights are kept, what the scores learn, what is stored. Numbers are those of the sheet."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel

import deltune
from deltune.errors import CheckpointError, MethodError, StateError
from deltune.measure import SavedTensors
from deltune.methods.selective.threshold_mask import PackedMask, ScoredMask, pack, unpack
from deltune.sites import MaskForm, MaskSite
from tests.assets import asset
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.training import tiny
from tests.training.test_fit import StopAt, run
from tests.zoo import ARCHITECTURES

METHOD = "threshold-mask(zeros_at_start=0.3)"
#: Plain matrices, a fused transposed one, an interleaved one, grouped heads, two stacks.
EVERY_LAYOUT = ("bert", "gpt2", "gpt_neox", "llama-gqa", "t5")


def masked(name: str = "bert", method: str = METHOD, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor], Any]:
    """A masked model, a batch, and a copy of the bare model."""
    architecture = ARCHITECTURES[name]
    head = "language" if architecture.generates else "classification"
    model = build(name, head, **options)
    bare = copy.deepcopy(model)
    torch.manual_seed(1)
    return deltune.attach(model, method), architecture.batch(5, head=head), bare  # type: ignore[arg-type]


def masks(tuned: deltune.Tuned, name: str = "default") -> dict[str, tuple[MaskSite, MaskForm]]:
    found = {}
    for key, site, form in tuned.attachments[name].sites:
        assert isinstance(site, MaskSite)
        assert isinstance(form, MaskForm)
        found[key] = (site, form)
    return found


def scores(tuned: deltune.Tuned, name: str = "default") -> dict[str, nn.Parameter]:
    return {key: form.scores for key, (_, form) in masks(tuned, name).items() if isinstance(form, ScoredMask)}


def by_hand(tuned: deltune.Tuned, bare: Any, name: str = "default") -> Any:
    """A copy of ``bare`` with its matrices multiplied by the masks."""
    model = copy.deepcopy(bare)
    with torch.no_grad():
        for site, form in masks(tuned, name).values():
            weight = model.get_submodule(site.module).weight
            factor = torch.ones_like(weight)
            rows = factor.T if site.transposed else factor
            for number, row in enumerate(row_numbers(site)):
                rows[row] = form.kept()[number].to(factor)
            weight.mul_(factor)
        for key, value in tuned.attachments[name].selection:
            model.get_parameter(key).copy_(value)
    return model


def row_numbers(site: MaskSite) -> list[int]:
    """Where the site's rows are in the matrix (out, in)."""
    if site.rows is None:
        return list(range(site.out_features))
    rows = site.rows
    return [rows.start + block * rows.stride + row for block in range(rows.count) for row in range(rows.length)]


def steps(tuned: deltune.Tuned, batch: dict[str, Tensor], count: int = 3, **options: Any) -> None:
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **options})
    for _ in range(count):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        optimizer.step()


def same(one: Any, other: Any) -> bool:
    values = dict(other.named_parameters())
    return all(torch.equal(value, values[name]) for name, value in one.named_parameters())


# -- the invariants of the sheet ---------------------------------------------------------------------------


def test_invariant_01_masks_are_zero_or_one_and_the_same_from_saved_bits(tmp_path: Path) -> None:
    tuned, batch, bare = masked()
    for value in scores(tuned).values():
        with torch.no_grad():
            value[0, :3] = torch.tensor([0.01, math.nextafter(0.01, 1) + 1e-8, 0.0])  # tau, just above, below
    for _, form in masks(tuned).values():
        assert form.kept().dtype is torch.bool
        assert form.kept()[0, :3].tolist() == [False, True, False]
    steps(tuned, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(bare, tmp_path)
    for key, (_, form) in masks(tuned).items():
        assert torch.equal(masks(loaded)[key][1].kept(), form.kept())
    assert all(isinstance(form, PackedMask) for _, form in masks(loaded).values())
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_invariant_02_the_matrix_is_kept_bit_for_bit_or_exactly_zero(name: str) -> None:
    tuned, batch, bare = masked(name)
    steps(tuned, batch)
    output(tuned.model, batch)
    seen: dict[str, Tensor] = {}
    for site, form in masks(tuned).values():
        now, before = (model.get_submodule(site.module).weight.detach() for model in (tuned.model, bare))
        touched = seen.setdefault(site.module, torch.zeros_like(now, dtype=torch.bool))
        rows = row_numbers(site)
        (now_, before_, touched_) = (value.T if site.transposed else value for value in (now, before, touched))
        kept = form.kept()
        assert 0 < kept.sum() < kept.numel()
        assert torch.equal(now_[rows][kept], before_[rows][kept])
        dropped = now_[rows][~kept]
        assert (dropped == 0).all()
        assert not dropped.signbit().any()
        touched_[rows] = True
    assert all(touched.all() for touched in seen.values())


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_invariant_03_scores_get_the_gradient_of_the_mask(name: str, weight: float) -> None:
    architecture = ARCHITECTURES[name]
    tuned = deltune.attach(build(name), METHOD, train_head=False)
    bare = copy.deepcopy(tuned.model)._deltune_handle.detach()
    batch = architecture.batch(5)
    tuned.activate("default", weights=(weight,))
    loss_of(tuned.model, batch).backward()
    # the masked matrices as leaves of a plain model
    twin = copy.deepcopy(bare).requires_grad_(False)
    for module in {site.module for site, _ in masks(tuned).values()}:
        leaf = twin.get_submodule(module).weight
        leaf.copy_(tuned.model.get_submodule(module).weight).requires_grad_(True)
    loss_of(twin, batch).backward()
    largest = 0.0
    for key, (site, _) in masks(tuned).items():
        gradient, frozen = (twin.get_submodule(site.module).weight.grad, bare.get_submodule(site.module).weight)
        rows = row_numbers(site)
        expected = weight * (gradient * frozen).detach()
        expected = (expected.T if site.transposed else expected)[rows]
        found = scores(tuned)[key].grad
        assert found is not None
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1e-9), key
        kept = masks(tuned)[key][1].kept()
        if expected.abs().max() > 0:
            assert found[kept].abs().max() > 0
            assert found[~kept].abs().max() > 0
        largest = max(largest, float(found.abs().max()))
    assert largest > 1e-6


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_invariant_04_everything_frozen_keeps_its_bits(name: str) -> None:
    tuned, batch, bare = masked(name)
    steps(tuned, batch, weight_decay=0.1)
    matrices = {f"{site.module}.weight" for site, _ in masks(tuned).values()}
    head = set(tuned.attachments["default"].head_names)
    live = dict(tuned.model.named_parameters())
    others = [key for key, _ in bare.named_parameters() if key not in matrices | head]
    assert any("bias" in key for key in others)
    for key in others:
        assert torch.equal(live[key], bare.get_parameter(key)), key
    with tuned.disabled():
        for key, value in bare.named_parameters():
            assert torch.equal(tuned.model.get_parameter(key), value), key
    originals = dict(tuned.detach().named_parameters())
    assert all(torch.equal(originals[key], value) for key, value in bare.named_parameters())


@pytest.mark.parametrize("initialization", ["uniform", "exact", "magnitude"])
@pytest.mark.parametrize("share", [0.03, 0.05, 0.5])
def test_invariant_05_the_share_of_zeros_at_the_start(share: float, initialization: str) -> None:
    tuned, _, bare = masked(method=f"threshold-mask(zeros_at_start={share}, initialization={initialization})")
    total = dropped = 0
    for site, form in masks(tuned).values():
        kept = form.kept()
        total, dropped = total + kept.numel(), dropped + int((~kept).sum())
        if initialization != "uniform":
            assert int((~kept).sum()) == round(share * kept.numel())
        if initialization == "magnitude":
            weight = bare.get_submodule(site.module).weight.detach().abs()
            assert weight[~kept].max() <= weight[kept].min()
    assert abs(dropped / total - share) < 3 * math.sqrt(share * (1 - share) / total)


@pytest.mark.parametrize(("share", "upper"), [(0.05, 0.58), (0.03, 0.98), (0.1, 0.28), (0.5, 0.04)])
def test_uniform_scores_have_the_bounds_of_the_sheet(share: float, upper: float) -> None:
    tuned, _, _ = masked(method=f"threshold-mask(zeros_at_start={share})")
    drawn = torch.cat([value.detach().flatten() for value in scores(tuned).values()])
    assert -0.02 <= drawn.min() < -0.02 + 0.01 * (upper + 0.02)
    assert upper - 0.01 * (upper + 0.02) < drawn.max() <= upper + 1e-6
    assert abs(float(drawn.mean()) - (upper - 0.02) / 2) < 5 * (upper + 0.02) / math.sqrt(12 * drawn.numel())


def test_invariant_06_a_step_that_crosses_nothing_changes_nothing() -> None:
    model = build("bert", "classification")
    tuned = deltune.attach(model, METHOD, train_head=False)
    batch = ARCHITECTURES["bert"].batch(5)
    before, started = output(model, batch), {key: value.detach().clone() for key, value in scores(tuned).items()}
    closest = min(float((value - 0.01).abs().min()) for value in started.values())
    steps(tuned, batch, 1, lr=closest / 2)
    assert any(not torch.equal(value, started[key]) for key, value in scores(tuned).items())
    assert torch.equal(output(model, batch), before)
    steps(tuned, batch, 1, lr=0.1)  # as a step that is large enough does
    assert not torch.equal(output(model, batch), before)


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_invariant_07_without_zeros_the_model_is_the_base(name: str) -> None:
    tuned, batch, bare = masked(name, "threshold-mask(zeros_at_start=0)")
    assert all(form.kept().all() for _, form in masks(tuned).values())
    assert torch.equal(output(tuned.model, batch), output(bare, batch))
    steps(tuned, batch, 1, lr=0.05)
    assert not torch.equal(output(tuned.model, batch), output(bare, batch))


@given(shape=st.lists(st.integers(1, 13), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_invariant_08_masks_are_packed_eight_to_a_byte(shape: list[int], seed: int) -> None:
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    bits = pack(mask)
    assert bits.dtype is torch.uint8
    assert bits.tolist() == numpy.packbits(mask.numpy().reshape(-1), bitorder="little").tolist()
    assert bits.shape == (-(-mask.numel() // 8),)
    assert torch.equal(unpack(bits, tuple(shape)), mask)


def test_invariant_08_a_file_holds_one_bit_for_each_weight_and_the_head(tmp_path: Path) -> None:
    tuned, batch, _ = masked()
    steps(tuned, batch)
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "delta.safetensors")
    head = tuned.attachments["default"].head_names
    for key, (site, _) in masks(tuned).items():
        bits = tensors.pop(f"{key}.bits")
        assert bits.dtype is torch.uint8
        assert bits.numel() == -(-site.in_features * site.out_features // 8)
    assert tensors.keys() == set(head)


@pytest.mark.parametrize("name", EVERY_LAYOUT)
def test_invariant_09_multiplying_the_weights_by_hand_gives_the_same(name: str) -> None:
    tuned, batch, bare = masked(name)
    steps(tuned, batch)
    expected = output(by_hand(tuned, bare), batch)
    assert relative_error(output(tuned.model, batch), expected) < 1e-6
    live = output(tuned.model, batch)
    assert torch.equal(output(tuned.merge(), batch), live)
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), live)
    tuned.merge(reversible=False)
    assert relative_error(output(tuned.model, batch), expected) < 1e-6


def test_invariant_10_the_score_of_a_zero_weight_never_changes() -> None:
    model = build("bert", "classification")
    matrix = model.bert.encoder.layer[1].intermediate.dense.weight
    zeros = torch.rand(matrix.shape, generator=torch.Generator().manual_seed(0)) < 0.2
    with torch.no_grad():
        matrix[zeros] = 0
    tuned = deltune.attach(model, METHOD)
    value = scores(tuned)["encoder.1.ffn.up"]
    before = value.detach().clone()
    steps(tuned, ARCHITECTURES["bert"].batch(5), 5)
    assert torch.equal(value[zeros], before[zeros])
    assert (value[~zeros] != before[~zeros]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("layers", "options", "lowest"),
    [(12, "", 2), (6, "", 1), (5, "", 0), (30, "", 5), (12, "unmasked_layers=0.5", 6), (12, "unmasked_layers=0", 0)],
)
def test_invariant_11_the_lowest_layers_are_left_alone(layers: int, options: str, lowest: int) -> None:
    tuned, _, bare = masked(method=f"threshold-mask({options})", num_hidden_layers=layers)
    found = masks(tuned)
    assert {site.part.layer for site, _ in found.values()} == {*range(lowest, layers), None}
    assert [key for key, (site, _) in found.items() if site.part.layer is None] == ["bert.pooler.dense"]
    roles = {site.part.role for site, _ in found.values()} - {"module"}
    assert roles == {f"attention.{part}" for part in ("query", "key", "value", "output")} | {"ffn.up", "ffn.down"}
    for layer in range(lowest):
        assert same(tuned.model.bert.encoder.layer[layer], bare.bert.encoder.layer[layer])
    assert len(found) == 6 * (layers - lowest) + 1


def test_targets_say_what_is_masked_instead() -> None:
    tuned, _, _ = masked(method="threshold-mask(targets='ffn.*')", num_hidden_layers=6)
    assert {site.part.layer for site, _ in masks(tuned).values()} == set(range(1, 6))  # and no pooler
    tuned, _, _ = masked(method="threshold-mask(targets='ffn.up layers=0')", num_hidden_layers=6)
    assert list(masks(tuned)) == ["encoder.0.ffn.up"]
    tuned, _, _ = masked(method="threshold-mask(targets='ffn.up *.pooler.dense')")
    assert "bert.pooler.dense" in masks(tuned)
    with pytest.raises(MethodError, match=r"unmasked_layers=0\.167 leaves nothing"):
        masked(method="threshold-mask(targets='*.0.intermediate.dense')", num_hidden_layers=6)


def test_a_pooler_that_a_model_of_several_stacks_never_calls_is_left_alone() -> None:
    tuned = deltune.attach(ARCHITECTURES["blip"].build("base"), METHOD)
    assert any("pooler" in name for name, _ in tuned.model.named_modules())
    assert not any("pooler" in key for key in masks(tuned))


def test_each_stack_leaves_its_own_lowest_layers() -> None:
    tuned, _, _ = masked("t5", "threshold-mask(unmasked_layers=0.5)")
    lowest: dict[str, set[int | None]] = {}
    for site, _ in masks(tuned).values():
        lowest.setdefault(site.part.stack, set()).add(site.part.layer)
    assert lowest == {"encoder": {1, 2}, "decoder": {1}, "cross": {1}}


# -- training ----------------------------------------------------------------------------------------------


def test_of_a_matrix_only_the_input_is_kept_for_the_backward_pass() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    weights = list(model.parameters())
    tuned = deltune.attach(model, "threshold-mask(targets='0 1')")
    x = torch.randn(4, 64)
    with SavedTensors(besides=[*weights, *model.parameters()]) as saved:
        model(x).sum()
    assert saved.bytes == 4 * (4 * 64 + 4 * 48)
    assert not any(saved.holds(value) for value in tuned.trainable_parameters())


def written(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which matrices are written from now on."""
    found: list[str] = []
    write = MaskSite.write_masked

    def noted(self: MaskSite, weight: Tensor, original: Tensor, kept: Tensor) -> None:
        found.append(self.key)
        write(self, weight, original, kept)

    monkeypatch.setattr(MaskSite, "write_masked", noted)
    return found


def test_matrices_are_written_once_after_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    tuned, batch, _ = masked()
    found = written(monkeypatch)
    output(tuned.model, batch)
    for _ in range(2):  # gradients that add up
        loss_of(tuned.model, batch).backward()
    assert found == []
    torch.optim.SGD(tuned.trainable_parameters(), lr=0.1).step()
    assert sorted(found) == sorted(masks(tuned))
    found.clear()
    output(tuned.model, batch)
    assert found == []
    with torch.no_grad():
        scores(tuned)["encoder.0.ffn.up"].mul_(-1)  # by hand, with no optimizer
    before = output(tuned.model, batch)
    assert found == ["encoder.0.ffn.up"]
    with torch.no_grad():
        scores(tuned)["encoder.0.ffn.up"].mul_(-1)
    assert not torch.equal(output(tuned.model, batch), before)


@pytest.mark.parametrize("fused", [False, True])
def test_whoever_reads_the_weights_after_a_step_finds_them_masked_anew(fused: bool) -> None:
    tuned, batch, bare = masked()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.05, fused=fused)
    for _ in range(2):
        before = {key: form.kept() for key, (_, form) in masks(tuned).items()}
        loss_of(tuned.model, batch).backward()
        optimizer.step()
        assert any(not torch.equal(form.kept(), before[key]) for key, (_, form) in masks(tuned).items())
        expected = by_hand(tuned, bare)
        assert same(expected, tuned.model)


def test_scores_stay_in_single_precision() -> None:
    tuned, batch, _ = masked(dtype=torch.bfloat16)
    assert {value.dtype for value in scores(tuned).values()} == {torch.float32}
    tuned, batch, bare = masked()
    before = {key: (value.detach().clone(), value) for key, value in scores(tuned).items()}
    tuned.model.to(torch.bfloat16)
    for value, now in before.values():
        assert now.dtype is torch.float32
        assert torch.equal(now, value)
    assert output(tuned.model, batch).dtype is torch.bfloat16
    loss_of(tuned.model, batch).backward()
    assert all(value.grad is not None and value.grad.dtype is torch.float32 for _, value in before.values())
    assert same(tuned.detach(), bare.to(torch.bfloat16))


def test_layers_below_the_masks_run_once(tmp_path: Path) -> None:
    tuned, batch, _ = masked(method="threshold-mask(targets='attention.* layers=2:')", num_hidden_layers=3)
    with torch.no_grad(), tuned.frozen_states(tmp_path) as states:
        assert states.trunk.depth == 2
        found = [tuned.model(**batch).logits for _ in range(3)]
        assert states.reused > 0
    torch.testing.assert_close(found[2], found[0])


def test_models_may_change_their_projections_in_place() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 5)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.inner(x)
            found *= 0.5
            return found

    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(4, 6)
    tuned = deltune.attach(model, "threshold-mask(zeros_at_start=0.5, targets=inner)")
    frozen = copy.deepcopy(model)._deltune_handle.detach().inner.weight
    model(x).sum().backward()
    (value,) = scores(tuned).values()
    torch.testing.assert_close(value.grad, 0.5 * torch.ones(4, 5).T @ x * frozen.detach())


def test_a_stopped_run_ends_in_the_same_bits(tmp_path: Path) -> None:
    chosen = {"epochs": 2, "save_every": 2}
    whole, stopped, resumed = (tiny.classifier(METHOD) for _ in range(3))
    run(whole, settings=chosen, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, settings=chosen, output=tmp_path / "run", callbacks=[StopAt(5)])
    run(resumed, settings=chosen, output=tmp_path / "run")
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    assert any("scores" in name for name in tiny.weights(whole))


# -- saved masks, several masks ----------------------------------------------------------------------------


def test_saved_masks_stay_packed_and_are_switched_exactly(tmp_path: Path) -> None:
    expected, batch = {}, {}
    for number in range(3):
        tuned, batch, _ = masked(method=f"threshold-mask(zeros_at_start={0.1 + 0.2 * number})")
        steps(tuned, batch)
        tuned.save(tmp_path / f"m{number}")
        expected[f"m{number}"] = output(tuned.model, batch)
    bare = build("bert", "classification")
    model = copy.deepcopy(bare)
    handle: Any = model
    for name in expected:
        handle = deltune.load(handle, tmp_path / name, name=name)
    weights = sum(site.in_features * site.out_features for site, _ in masks(handle, "m0").values())
    for name in ("m1", "m0", "m2", "m2", "m1"):
        handle.activate(name)
        assert torch.equal(output(model, batch), expected[name])
        held = [value for _, form in masks(handle, name).values() for value in (*form.parameters(), *form.buffers())]
        assert sum(value.numel() * value.element_size() for value in held) == weights // 8
        assert [key for key, _ in handle.named_trainable_parameters()] == list(handle.attachments[name].head_names)
    with handle.disabled():
        assert same(bare, model)
    assert same(bare, handle.detach())


def test_a_mask_that_was_switched_to_in_inference_mode_trains_afterwards() -> None:
    tuned, batch, _ = masked()
    expected = output(tuned.model, batch)
    with torch.inference_mode():
        tuned.activate()
        tuned.activate("default")
        assert torch.equal(output(tuned.model, batch), expected)
    steps(tuned, batch)
    assert not torch.equal(output(tuned.model, batch), expected)


def test_a_mask_without_a_head_is_loaded_and_has_nothing_to_train(tmp_path: Path) -> None:
    tuned, batch, bare = masked("gpt2")
    steps(tuned, batch)
    tuned.save(tmp_path / "one")
    loaded = deltune.load(bare, tmp_path / "one")
    assert loaded.trainable_parameters() == []
    assert torch.equal(output(bare, batch), output(tuned.model, batch))
    loaded.save(tmp_path / "two")
    one, two = (load_file(tmp_path / name / "delta.safetensors") for name in ("one", "two"))
    assert all(torch.equal(value, two[key]) for key, value in one.items())
    handle = tiny.classifier("threshold-mask(fixed=true)")
    handle.detach()
    handle = deltune.attach(handle.model, "threshold-mask(fixed=true)", train_head=False)
    with pytest.raises(StateError, match="nothing to train"):
        run(handle)


def test_training_goes_on_from_a_saved_mask(tmp_path: Path) -> None:
    tuned, batch, bare = masked()
    steps(tuned, batch)
    tuned.save(tmp_path)
    again = deltune.attach(copy.deepcopy(bare), f"threshold-mask(start_from='{tmp_path}')")
    for key, (_, form) in masks(tuned).items():
        assert torch.equal(masks(again)[key][1].kept(), form.kept())
        assert torch.equal(scores(again)[key], 0.02 * form.kept())
    steps(again, batch, lr=0.02)
    assert any(not torch.equal(masks(again)[key][1].kept(), form.kept()) for key, (_, form) in masks(tuned).items())
    again.save(tmp_path / "more")
    assert "start_from" not in str(deltune.load(copy.deepcopy(bare), tmp_path / "more").attachments["default"].method)
    other = build("bert", "classification")
    with torch.no_grad():
        other.bert.embeddings.word_embeddings.weight.mul_(2)
        for value in other.parameters():
            value.add_(0.1)
    with pytest.raises(CheckpointError, match="trained on another"):
        deltune.attach(other, f"threshold-mask(start_from='{tmp_path}')")
    tuned, _, _ = masked(method="threshold-mask(targets='ffn.*')")
    tuned.save(tmp_path / "few")
    with pytest.raises(CheckpointError, match=r"holds no mask of 128 bytes for encoder\.0\.attention\.query"):
        deltune.attach(copy.deepcopy(bare), f"threshold-mask(start_from='{tmp_path / 'few'}')")


def test_the_changes_of_several_masks_are_added_and_scaled() -> None:
    model = build("bert", "base")
    bare = copy.deepcopy(model)
    tuned = deltune.attach(model, METHOD, name="one")
    tuned.attach("threshold-mask(zeros_at_start=0.5, targets='ffn.*')", name="two")
    tuned.activate("one", "two", weights=(0.5, 2.0))
    output(model, ARCHITECTURES["bert"].batch(5))
    for key, (site, form) in masks(tuned, "one").items():
        weight = bare.get_submodule(site.module).weight
        factor = 1 - 0.5 * (~form.kept()).float()
        if key in masks(tuned, "two"):
            factor = factor - 2 * (~masks(tuned, "two")[key][1].kept()).float()
        torch.testing.assert_close(model.get_submodule(site.module).weight, weight * factor)
    tuned.activate("two")
    for key, (site, _) in masks(tuned, "one").items():
        if key not in masks(tuned, "two"):
            assert torch.equal(model.get_submodule(site.module).weight, bare.get_submodule(site.module).weight)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_a_mask_and_a_low_rank_change_of_the_same_matrices_go_together(name: str) -> None:
    tuned, batch, bare = masked(name, f"{METHOD} + lora(rank=2)")
    steps(tuned, batch, 5)
    live = output(tuned.model, batch)
    merged = output(tuned.merge(), batch)
    assert relative_error(merged, live) < 1e-5
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), live)
    assert same(tuned.detach(), bare)


def test_loaded_weights_are_masked_in_their_turn() -> None:
    tuned, batch, bare = masked("gpt2", "threshold-mask(zeros_at_start=0.3, targets=attention.query)")
    other = copy.deepcopy(bare)
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    tuned.model.load_state_dict(other.state_dict())
    assert torch.equal(output(tuned.model, batch), output(other, batch))
    steps(tuned, batch, 1, lr=0.02)
    assert relative_error(output(tuned.model, batch), output(by_hand(tuned, other), batch)) < 1e-6
    state, expected = copy.deepcopy(tuned.model.state_dict()), output(tuned.model, batch)
    assert same(tuned.detach(), other)
    fresh, _, _ = masked("gpt2", "threshold-mask(zeros_at_start=0.1, targets=attention.query)")
    fresh.model.load_state_dict(state)
    assert torch.equal(output(fresh.model, batch), expected)


# -- what cannot be ----------------------------------------------------------------------------------------


def test_a_mask_that_keeps_nothing_is_refused(tmp_path: Path) -> None:
    tuned, _, bare = masked("gpt2")
    tuned.save(tmp_path / "good")
    with torch.no_grad():
        scores(tuned)["decoder.1.ffn.up"].fill_(0.01)
    for action in (lambda: tuned.save(tmp_path / "empty"), tuned.merge):
        with pytest.raises(StateError, match=r"mask of decoder\.1\.ffn\.up drops every weight.*weight decay"):
            action()
    assert tuned.active == ("default",)
    assert not (tmp_path / "empty").exists()
    with pytest.raises(MethodError, match=r"zeros_at_start=0\.99 keeps none of the 6 weights of 0"):
        deltune.attach(
            nn.Sequential(nn.Linear(3, 2)), "threshold-mask(zeros_at_start=0.99, initialization=exact, targets='0')"
        )
    file = tmp_path / "good" / "delta.safetensors"
    with safe_open(str(file), "pt") as stream:
        metadata = stream.metadata()
    tensors = load_file(file)
    tensors["decoder.1.ffn.up.bits"].zero_()
    save_file(tensors, file, metadata)
    with pytest.raises(StateError, match=r"mask of decoder\.1\.ffn\.up drops every weight"):
        deltune.load(bare, tmp_path / "good")
    assert "_deltune_handle" not in vars(bare)


def test_quantised_and_tied_matrices_are_refused() -> None:
    model = build("llama-gqa", "language")
    deltune.quantize(model, deltune.NF4(block=32))
    with pytest.raises(MethodError, match=r"is quantised.*dequantize\(model\)"):
        deltune.attach(model, METHOD)
    with pytest.raises(MethodError, match=r"lm_head is tied to .*wte"):
        deltune.attach(build("gpt2", "language"), "threshold-mask(targets=lm_head)")


def test_what_else_writes_into_the_same_matrices_is_refused() -> None:
    model = build("bert", "classification")
    for other in ("fish-mask(ratio=0.3)", "full"):
        with pytest.raises(StateError, match=r"both write values into .*cannot be active together"):
            deltune.attach(model, f"{METHOD} + {other}")
    tuned = deltune.attach(model, METHOD, name="mask")
    tuned.attach("fish-mask(ratio=0.3)", name="fish", train_head=False)
    with pytest.raises(StateError, match="both write values into"):
        tuned.activate("mask", "fish")
    tuned.activate("mask")
    with pytest.raises(StateError, match="all rows of a batch go through"):
        tuned.route(["mask"])
    with pytest.raises(StateError, match="cannot be dropped"):
        tuned.drop_layers(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("zeros_at_start=1", "zeros_at_start must be at most 0.99"),
        ("threshold=0", "threshold must be greater than 0"),
        ("unmasked_layers=1", "unmasked_layers must be at most 0.99"),
        ("initialization=random", "initialization cannot be 'random'"),
    ],
)
def test_options_are_checked(options: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        deltune.methods.parse(f"threshold-mask({options})")


# -- a real encoder ----------------------------------------------------------------------------------------


def test_masks_of_a_real_encoder_are_small_and_exact(tmp_path: Path) -> None:
    folder = asset("minilm")
    model: Any = AutoModel.from_pretrained(folder).eval()
    bare = {name: value.clone() for name, value in model.state_dict().items()}
    ids = {"input_ids": torch.arange(1000, 1012)[None]}
    expected = {}
    for seed in range(2):
        torch.manual_seed(seed)
        tuned = deltune.attach(model, "threshold-mask", name=f"m{seed}")
        expected[f"m{seed}"] = output(model, ids)
        tuned.save(tmp_path / f"m{seed}")
        tuned.detach()
    # layers 1 to 5, each of 4 * 384 * 384 + 2 * 384 * 1536, and the pooler
    weights = 5 * (4 * 384 * 384 + 2 * 384 * 1536) + 384 * 384
    size = (tmp_path / "m0" / "delta.safetensors").stat().st_size
    assert weights // 8 <= size < weights // 8 + 10_000
    assert sum(value.nbytes for value in bare.values()) > 75 * size
    handle: Any = model
    for name in expected:
        handle = deltune.load(handle, tmp_path / name)
    for name in ("m0", "m1", "m0"):
        handle.activate(name)
        assert torch.equal(output(model, ids), expected[name])
    assert not torch.equal(expected["m0"], expected["m1"])
    handle.activate("m1")
    handle.merge()
    assert torch.equal(output(model, ids), expected["m1"])
    handle.detach()
    assert all(torch.equal(value, bare[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", ["threshold-mask(zeros_at_start=0.3)", "fish-mask(ratio=0.1)", "diff-pruning"])
def test_what_is_not_loaded_stays_as_it_was(method: str) -> None:
    """A state of the head alone changes neither what acts nor the originals."""
    tuned, batch = attached("bert", method)
    with tuned.disabled():
        before = bits(tuned.model)
    train(tuned, batch)
    tuned.model.eval()
    expected = output(tuned.model, batch)
    head = {name: value.clone() for name, value in tuned.model.state_dict().items() if name.startswith("classifier")}
    tuned.model.load_state_dict(head, strict=False)
    assert torch.equal(output(tuned.model, batch), expected)
    tuned.model.load_state_dict({}, strict=False)
    assert torch.equal(output(tuned.model, batch), expected)
    with tuned.disabled():
        assert all(torch.equal(value, before[name]) for name, value in tuned.model.state_dict().items())
