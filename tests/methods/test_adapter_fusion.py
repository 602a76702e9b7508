"""AdapterFusion, against its fact sheet (numbers of adapter_fusion) and the pruning of AdapterDrop (8 and 9 there)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import CheckpointError, MethodError, StateError
from deltune.measure import use_picture, use_table
from deltune.methods.additive.adapter_fusion import FusedAdapters
from deltune.methods.additive.bottleneck import Bottleneck
from tests.methods.common import build, output, train
from tests.zoo import ARCHITECTURES

D = 8


def fused(count: int = 3, features: int = D, dtype: torch.dtype = torch.float64, **options: Any) -> FusedAdapters:
    """Random adapters of different widths, with random queries, keys and values."""
    torch.manual_seed(count)
    adapters = [
        Bottleneck(features, 2 + index, initialization="normal", standard_deviation=0.5, dtype=dtype)
        for index in range(count)
    ]
    form = FusedAdapters(adapters, features, dtype=dtype, **options)
    for parameter in form.parameters():
        parameter.data.normal_(std=0.4)
    return form.eval()


def naive(form: FusedAdapters, h: Tensor) -> tuple[Tensor, Tensor]:
    """Changes and weights, token by token."""
    changes, weights = torch.zeros_like(h), torch.zeros(*h.shape[:-1], len(form.adapters), dtype=h.dtype)
    for place in torch.cartesian_prod(*(torch.arange(size) for size in h.shape[:-1])):
        row, token = place.tolist()
        u = h[row, token]
        z = []
        for adapter in form.adapters:
            narrow = torch.relu(adapter.down.weight @ u + adapter.down.bias)
            z.append(adapter.up.weight @ narrow + adapter.up.bias)
        query = form.query.weight @ u + form.query.bias
        scores = torch.stack([query @ (form.key.weight @ item + form.key.bias) for item in z])
        p = torch.exp(scores - scores.max()) / torch.exp(scores - scores.max()).sum()
        values = z if form.value is None else [form.value.weight @ item for item in z]
        changes[row, token] = sum(weight * value for weight, value in zip(p, values, strict=True))
        weights[row, token] = p
    return changes, weights


@pytest.mark.parametrize("value", [True, False])
def test_2_and_7_equals_a_naive_loop_without_scaling(value: bool) -> None:
    form, h = fused(value=value), torch.randn(2, 5, D, dtype=torch.float64)
    changes, weights = naive(form, h)
    found = form.weights(h, form.changes(h))
    assert found.shape == (2, 5, 3)
    assert torch.allclose(found, weights, atol=1e-12)
    assert torch.allclose(found.sum(-1), torch.ones(2, 5, dtype=torch.float64), atol=1e-12)
    assert bool((found >= 0).all())
    assert torch.allclose(form(h), changes, atol=1e-12)


@pytest.mark.parametrize(("off_diagonal", "tolerance"), [(0.0, 1e-12), (1e-6, 1e-4)])
def test_1_one_adapter_with_the_identity_is_that_adapter(off_diagonal: float, tolerance: float) -> None:
    torch.manual_seed(0)
    adapter = Bottleneck(D, 4, initialization="normal", standard_deviation=0.5, dtype=torch.float64)
    h = torch.randn(2, 5, D, dtype=torch.float64)
    expected = adapter(h).detach()
    form = FusedAdapters([adapter], D, off_diagonal=off_diagonal, dtype=torch.float64)
    assert torch.allclose(form(h), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(form(h), expected) == (off_diagonal == 0.0)


def test_1_on_a_model_it_equals_the_single_adapter(tmp_path: Path) -> None:
    tuned, batch = saved_adapter(tmp_path / "one")
    expected = output(tuned.model, batch)
    tuned.attach(deltune.AdapterFusion(adapters=(str(tmp_path / "one"),), off_diagonal=0.0), "fusion")
    head = dict(tuned.attachments["default"].selection)
    for key, value in tuned.attachments["fusion"].selection:
        value.data.copy_(head[key])
    assert torch.allclose(output(tuned.model, batch), expected, atol=1e-6)


def test_3_the_order_of_the_adapters_permutes_the_weights_only() -> None:
    form, h = fused(dtype=torch.float32), torch.randn(2, 5, D)
    weights, change = form.weights(h, form.changes(h)), form(h)
    form.adapters = nn.ModuleList([form.adapters[index] for index in (2, 0, 1)])
    assert torch.allclose(form.weights(h, form.changes(h)), weights[..., [2, 0, 1]], atol=1e-6)
    assert torch.allclose(form(h), change, atol=1e-6)


def test_4_equal_adapters_give_what_one_gives_whatever_queries_and_keys() -> None:
    form, h = fused(1), torch.randn(2, 5, D, dtype=torch.float64)
    one = form(h)
    form.adapters = nn.ModuleList([form.adapters[0]] * 3)
    form._indices = [0, 1, 2]
    form.query.weight.data.normal_()
    assert torch.allclose(form(h), one, atol=1e-12)


def saved_adapter(folder: Path, seed: int = 0, method: str = "pfeiffer-adapter(width=4)") -> tuple[deltune.Tuned, Any]:
    """A trained adapter on a random BERT, saved; the model is the same each time."""
    torch.manual_seed(100)
    model = build("bert", "classification")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    torch.manual_seed(seed)
    tuned = deltune.attach(model, method)
    for _, parameter in tuned.attachments["default"].parameters():
        parameter.data.normal_(std=0.3)
    tuned.save(folder)
    return tuned, batch


def fusion(tmp_path: Path, count: int = 3, **options: Any) -> tuple[deltune.Tuned, Any]:
    folders = [str(tmp_path / f"adapter{index}") for index in range(count)]
    for index, folder in enumerate(folders):
        tuned, batch = saved_adapter(Path(folder), index, f"pfeiffer-adapter(width={4 + index})")
    tuned.detach()
    return deltune.attach(tuned.model, deltune.AdapterFusion(adapters=tuple(folders), **options)), batch


def test_5_only_the_attention_and_the_head_train(tmp_path: Path) -> None:
    tuned, batch = fusion(tmp_path)
    names = {key.split(".")[-2] for key, _ in tuned.named_trainable_parameters()}
    assert names == {"query", "key", "value", "classifier"}
    before = {key: value.clone() for key, value in tuned.model.state_dict().items()}
    train(tuned, batch)
    trained = {id(value) for value in tuned.trainable_parameters()}
    moved = {
        key for key, value in tuned.model.state_dict(keep_vars=True).items() if not torch.equal(value, before[key])
    }
    ours = {key for key, value in tuned.model.state_dict(keep_vars=True).items() if id(value) in trained}
    assert moved == ours
    assert not any(".adapters." in key for key in moved)


@pytest.mark.parametrize("value", [True, False])
def test_6_and_11_the_number_of_parameters_does_not_depend_on_the_adapters(value: bool) -> None:
    for count in (1, 3):
        form = fused(count, value=value)
        assert sum(parameter.numel() for parameter in form.parameters()) == (3 if value else 2) * D * D + 2 * D
    assert (form.penalty() is None) == (not value)
    assert (form.value is None) == (not value)


def test_8_without_queries_and_keys_the_weights_are_equal() -> None:
    form, h = fused(4), torch.randn(2, 5, D, dtype=torch.float64)
    for linear in (form.query, form.key):
        linear.weight.data.zero_()
    form.key.bias.data.zero_()
    assert torch.equal(form.weights(h, form.changes(h)), torch.full((2, 5, 4), 0.25, dtype=torch.float64))


def test_9_the_penalty_and_its_gradient() -> None:
    form = fused()
    weight = form.value.weight  # type: ignore[union-attr]
    penalty = form.penalty()
    assert penalty is not None
    difference = weight.detach().float() - torch.eye(D)
    assert torch.allclose(penalty, 0.01 * difference.square().sum())
    penalty.backward()
    assert torch.allclose(weight.grad.float(), 0.02 * difference, atol=1e-6)
    form.value.weight.data.copy_(torch.eye(D))  # type: ignore[union-attr]
    assert form.penalty().item() == 0.0  # type: ignore[union-attr]


def test_the_penalty_is_part_of_the_loss(tmp_path: Path) -> None:
    tuned, batch = fusion(tmp_path)
    for _, _, form in tuned.attachments["default"].sites:
        form.value.weight.data.normal_()
    labels = {"labels": torch.zeros(3, dtype=torch.long)}
    tuned.model.train()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        loss = tuned.model(**batch, **labels).loss
    with torch.random.fork_rng():
        torch.manual_seed(0)
        logits = tuned.model(**batch).logits
    expected = nn.functional.cross_entropy(logits, labels["labels"]) + tuned.penalty()
    assert torch.allclose(loss, expected, rtol=1e-4)


def test_10_a_token_does_not_change_the_weights_of_another() -> None:
    form, h = fused(), torch.randn(2, 5, D, dtype=torch.float64)
    other = h.clone()
    other[:, 3] = torch.randn(2, D, dtype=torch.float64)
    rest = [0, 1, 2, 4]
    found, changed = (form.weights(x, form.changes(x)) for x in (h, other))
    assert torch.equal(found[:, rest], changed[:, rest])
    assert not torch.equal(found[:, 3], changed[:, 3])


def test_the_query_is_made_of_what_the_adapters_read(tmp_path: Path) -> None:
    """In BERT the norm of the sum f + a, not the sum."""
    tuned, batch = fusion(tmp_path)
    seen: list[Tensor] = []
    form = tuned.attachments["default"].forms["encoder.0.ffn"]
    handle = form.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    output(tuned.model, batch)
    handle.remove()
    norm = tuned.model.bert.encoder.layer[0].output.LayerNorm
    centred = (seen[0] - norm.bias) / norm.weight
    assert torch.allclose(centred.mean(-1), torch.zeros_like(centred[..., 0]), atol=1e-4)
    assert torch.allclose(centred.var(-1, unbiased=False), torch.ones_like(centred[..., 0]), atol=1e-3)


@pytest.mark.parametrize("method", ["parallel-adapter(width=4)", "residual-adapter(width=4)"])
def test_other_kinds_of_adapters_are_fused_at_their_own_places(method: str, tmp_path: Path) -> None:
    tuned, batch = saved_adapter(tmp_path / "one", method=method)
    expected = output(tuned.model, batch)
    tuned.attach(deltune.AdapterFusion(adapters=(str(tmp_path / "one"),) * 2, off_diagonal=0.0), "fusion")
    head = dict(tuned.attachments["default"].selection)
    for key, value in tuned.attachments["fusion"].selection:
        value.data.copy_(head[key])
    assert torch.allclose(output(tuned.model, batch), expected, atol=1e-5)


def test_saving_needs_no_folders_any_more(tmp_path: Path) -> None:
    tuned, batch = fusion(tmp_path)
    train(tuned, batch)
    use = deltune.adapter_use(tuned, [batch])
    deltune.prune_adapters(tuned, use, keep=2)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path / "fusion")
    for index in range(3):
        (tmp_path / f"adapter{index}" / "delta.safetensors").unlink()
    torch.manual_seed(100)
    fresh = build("bert", "classification")
    loaded = deltune.load(fresh, tmp_path / "fusion")
    assert torch.equal(output(loaded.model, batch), expected)


def test_drop_8_and_9_pruning_keeps_the_most_used_and_their_weights_sum_to_one(tmp_path: Path) -> None:
    tuned, batch = fusion(tmp_path)
    train(tuned, batch)
    full = output(tuned.model, batch)
    use = deltune.adapter_use(tuned, [batch, batch])
    forms = tuned.attachments["default"].forms
    assert list(use) == list(forms)
    for key, values in use.items():
        assert sum(values) == pytest.approx(1.0, abs=1e-6), key
    deltune.prune_adapters(tuned, use, keep=3)
    assert torch.equal(output(tuned.model, batch), full)
    deltune.prune_adapters(tuned, use, keep=2)
    assert not torch.equal(output(tuned.model, batch), full)
    pruned = deltune.adapter_use(tuned, [batch])
    for key, values in pruned.items():
        least = min(range(3), key=lambda index: use[key][index])
        assert values[least] == 0.0
        assert sum(values) == pytest.approx(1.0, abs=1e-6)
        assert sorted(forms[key].kept.nonzero().flatten().tolist()) == sorted({0, 1, 2} - {least})
    deltune.prune_adapters(tuned, use, keep=3)
    assert torch.equal(output(tuned.model, batch), full)


def test_use_is_the_mean_over_real_tokens(tmp_path: Path) -> None:
    tuned, _ = fusion(tmp_path)
    batch = ARCHITECTURES["bert"].batch(head="classification", padding="right")
    seen: list[Tensor] = []
    form = tuned.attachments["default"].forms["encoder.1.ffn"]
    handle = form.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    use = deltune.adapter_use(tuned, [batch])
    handle.remove()
    real = batch["attention_mask"].bool()
    assert not bool(real.all())
    expected = form.weights(seen[0], form.changes(seen[0]))[real].mean(0)
    assert use["encoder.1.ffn"] == pytest.approx(expected.tolist(), abs=1e-6)


def test_use_is_shown_as_a_table_and_a_picture(tmp_path: Path) -> None:
    use = {"encoder.0.ffn": [0.25, 0.75], "encoder.1.ffn": [0.5, 0.5]}
    assert use_table(use, ["reviews", "trec"]).splitlines() == [
        "              reviews  trec",
        "encoder.0.ffn    0.25  0.75",
        "encoder.1.ffn    0.50  0.50",
        "mean             0.38  0.62",
    ]
    text = use_picture(use, ["reviews", "trec"], tmp_path / "use.svg", "who is used").read_text()
    assert all(word in text for word in ("reviews", "trec", "0.75", "encoder.1.ffn", "who is used"))
    with pytest.raises(ValueError, match="no weights"):
        use_picture({}, [], tmp_path / "none.svg")


def test_half_precision_scores_do_not_overflow() -> None:
    form = fused(dtype=torch.float32).to(torch.bfloat16)
    h = 100 * torch.randn(2, 5, D).to(torch.bfloat16)
    assert bool(form(h).isfinite().all())
    assert form(h).dtype == torch.bfloat16


def test_wrong_sources_are_refused(tmp_path: Path) -> None:
    tuned, _ = saved_adapter(tmp_path / "one")
    model = tuned.detach()
    with pytest.raises(MethodError, match="needs trained adapters"):
        deltune.attach(model, "adapter-fusion")
    with pytest.raises(MethodError, match="lora, which is no adapter"):
        deltune.attach(model, "adapter-fusion(adapters=lora)")
    with pytest.raises(MethodError, match="different places"):
        deltune.attach(model, "adapter-fusion(adapters='pfeiffer-adapter, residual-adapter')")
    with pytest.raises(MethodError, match="train_norms=false"):
        deltune.attach(model, "adapter-fusion(adapters=sequential-adapter)")
    with pytest.raises(CheckpointError, match="does not exist"):
        deltune.attach(model, f"adapter-fusion(adapters={tmp_path}/two)")
    torch.manual_seed(7)
    other = build("bert", "classification")
    for parameter in other.parameters():
        parameter.data.normal_()
    with pytest.raises(CheckpointError, match="another bert"):
        deltune.attach(other, f"adapter-fusion(adapters={tmp_path}/one)")
    lora = deltune.attach(model, "lora")
    with pytest.raises(StateError, match="no fused adapters"):
        deltune.adapter_use(lora, [])
    lora.attach(f"adapter-fusion(adapters={tmp_path}/one)", "fusion")
    with pytest.raises(StateError, match="No batch"):
        deltune.adapter_use(lora, [])
    with pytest.raises(MethodError, match="1 to 1 adapters"):
        deltune.prune_adapters(lora, {key: [1.0] for key in lora.attachments["fusion"].forms}, keep=2)
