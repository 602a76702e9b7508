"""Changes of a model's parameters: exact, to calculate with, written and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import deltune
from deltune import SparseDelta
from deltune.errors import CheckpointError, StateError
from deltune.sparse_delta import Entries
from tests.methods.common import attached, bits, build, output, train

MERGEABLE = ["bitfit", "fish-mask(ratio=0.1)", "freeze(layers=1)", "full", "lora", "u-bitfit"]


def dense(delta: SparseDelta, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The slow twin: whole tensors of changes."""
    found = {name: torch.zeros(value.numel(), dtype=torch.float64) for name, value in like.items()}
    for name, entries in delta.entries.items():
        found[name][entries.indices] = entries.changes
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", MERGEABLE)
def test_a_base_model_and_its_change_are_the_tuned_values(method: str, dtype: torch.dtype) -> None:
    tuned, batch = attached("bert", method, head="base", dtype=dtype)
    train(tuned, batch)
    expected = output(tuned.model, batch)
    live = bits(tuned.model) if method != "lora" else {}
    delta = tuned.changes()
    assert tuned.active == ("default",)
    assert 0 < delta.count == sum(delta.counts().values())

    model = build("bert", "base", dtype=dtype)
    before = bits(model)
    applied = delta.apply(model)
    if method == "lora":
        tuned.merge()
        live = bits(tuned.model)
        expected = output(tuned.model, batch)
    assert all(torch.equal(value, live[name]) for name, value in model.state_dict().items())
    assert torch.equal(output(model, batch), expected)
    applied.revert()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(StateError, match="taken out already"):
        applied.revert()


def test_means_are_those_of_the_whole_parameter() -> None:
    tuned, batch = attached("bert", "bitfit")
    train(tuned, batch)
    with tuned.disabled():
        before = bits(tuned.model)
    now = tuned.model.state_dict()
    head = set(tuned.attachments["default"].head_names)
    means = tuned.changes().means()
    assert means.keys() == {name for name, _ in tuned.named_trainable_parameters()} - head
    for name, mean in means.items():
        assert mean == pytest.approx((now[name].double() - before[name].double()).abs().mean().item(), rel=1e-12)
    assert tuned.changes(head=True).means().keys() == means.keys() | head


def test_added_biases_are_changes_that_cannot_be_written() -> None:
    tuned, batch = attached("llama-gqa", "bitfit(missing=add)")
    train(tuned, batch)
    delta = tuned.changes()
    assert delta.count
    with pytest.raises(StateError, match=r"no parameter .*bias.*attach the delta instead"):
        delta.apply(build("llama-gqa"))


entries = st.lists(st.tuples(st.integers(0, 11), st.floats(-4, 4, width=32)), max_size=12)


@given(first=entries, second=entries, factor=st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]))
@settings(deadline=None)
def test_arithmetic_is_that_of_whole_tensors(
    first: list[tuple[int, float]], second: list[tuple[int, float]], factor: float
) -> None:
    like = {"a": torch.zeros(2, 3), "b": torch.zeros(6)}

    def made(pairs: list[tuple[int, float]]) -> SparseDelta:
        flat = torch.zeros(12)
        for place, value in pairs:
            flat[place] = value
        return SparseDelta(
            {"a": Entries.between(like["a"], flat[:6].view(2, 3)), "b": Entries.between(like["b"], flat[6:])}
        )

    one, other = made(first), made(second)
    whole, rest = dense(one, like), dense(other, like)
    for delta, expected in (
        (one + other, {name: whole[name] + rest[name] for name in like}),
        (one - other, {name: whole[name] - rest[name] for name in like}),
        (factor * one, {name: factor * whole[name] for name in like}),
        (-one, {name: -whole[name] for name in like}),
    ):
        found = dense(delta, like)
        assert all(torch.equal(found[name], expected[name]) for name in like)
        assert delta.count == sum(int((value != 0).sum()) for value in expected.values())
    assert (one - one).count == 0
    assert one + other == other + one
    either = sum(int(((whole[name] != 0) | (rest[name] != 0)).sum()) for name in like)
    both = sum(int(((whole[name] != 0) & (rest[name] != 0)).sum()) for name in like)
    assert one.overlap(other) == pytest.approx(both / either if either else 0.0)


def test_two_changes_come_out_in_the_reverse_order() -> None:
    model = nn.Linear(4, 3)
    before = bits(model)
    one = SparseDelta({"weight": Entries((3, 4), torch.tensor([1, 5]), torch.tensor([0.5, -0.25]).double())})
    other = SparseDelta({"weight": Entries((3, 4), torch.tensor([5]), torch.tensor([3.0]).double())})
    first = one.apply(model)
    second = other.apply(model)
    with pytest.raises(StateError, match=r"1 more changes .* Take those out first"):
        first.revert()
    second.revert()
    first.revert()
    with one.applied(model), (2 * other).applied(model):
        assert model.weight.flatten()[5] == before["weight"].flatten()[5] - 0.25 + 6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_fit_is_refused_and_nothing_is_written() -> None:
    model = nn.Linear(4, 3)
    before = bits(model)
    fits = Entries((3, 4), torch.tensor([1]), torch.tensor([0.5]).double())
    with pytest.raises(StateError, match=r"no parameter weigth\. Nearest: weight"):
        SparseDelta({"weight": fits, "weigth": fits}).apply(model)
    with pytest.raises(StateError, match=r"bias is \(3,\) in the model, and \(3, 4\)"):
        SparseDelta({"weight": fits, "bias": fits}).apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(StateError, match="not of one model"):
        SparseDelta({"bias": fits}) + SparseDelta({"bias": Entries((3,), fits.indices, fits.changes)})
    tuned, _ = attached("bert", "prefix-tuning(length=2)")
    with pytest.raises(StateError, match="cannot be merged"):
        tuned.changes()
    tuned.attach("bitfit", "other")
    tuned.activate()
    with pytest.raises(StateError, match="Say which attachment to compare"):
        tuned.changes()


def test_a_tied_matrix_is_refused_as_in_merging() -> None:
    tuned, _ = attached("gpt2", "lora(rank=2, targets=embeddings)")
    with pytest.raises(StateError, match="tied to another parameter"):
        tuned.changes()


def test_changes_are_not_taken_out_of_another_parameter() -> None:
    model = build("bert")
    name = "bert.encoder.layer.0.output.dense.bias"
    before = bits(model)
    found = Entries(tuple(before[name].shape), torch.tensor([1]), torch.tensor([0.5]).double())
    applied = SparseDelta({name: found}).apply(model)
    tuned = deltune.attach(model, "bitfit")
    with pytest.raises(StateError, match=rf"Another parameter stands in the place of {name}"):
        applied.revert()
    tuned.detach()
    applied.revert()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_parameters_in_pieces_are_refused_before_anything_is_written() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 2)).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    before = bits(model)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    delta = SparseDelta(
        {
            name: Entries(shapes[name], torch.tensor([1]), torch.tensor([0.5]).double())
            for name in ("0.bias", "1.weight")
        }
    )
    with pytest.raises(StateError, match=r"1\.weight does not lie in one piece"):
        delta.apply(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_saved_and_loaded(tmp_path: Path) -> None:
    tuned, batch = attached("bert", "fish-mask(ratio=0.1)")
    train(tuned, batch)
    delta = tuned.changes()
    folder = delta.save(tmp_path / "delta")
    assert SparseDelta.load(folder) == delta
    (file,) = folder.iterdir()
    assert 12 * delta.count <= file.stat().st_size < 12 * delta.count + 10_000
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        SparseDelta.load(folder)
    with pytest.raises(CheckpointError, match="holds no sparse delta"):
        SparseDelta.load(tmp_path)


def test_a_changed_model_is_freed() -> None:
    import gc
    import weakref

    model = nn.Linear(4, 3)
    applied = SparseDelta({"weight": Entries((3, 4), torch.tensor([1]), torch.tensor([0.5]).double())}).apply(model)
    found = weakref.ref(model)
    del model
    gc.collect()
    assert found() is None
    with pytest.raises(StateError, match="taken out already"):
        applied.revert()


def test_tasks_are_added() -> None:
    """Two selections of different entries, both in one model, give each its own values."""
    tuned, batch = attached("bert", "bitfit(targets=attention.query)", head="base")
    train(tuned, batch)
    tuned.attach("bitfit(targets=ffn.up)", "other")
    train(tuned, batch)
    both = tuned.changes("default") + tuned.changes("other")
    tuned.activate("default", "other")
    model = build("bert", "base")
    with both.applied(model):
        assert torch.equal(output(model, batch), output(tuned.model, batch))


def test_keys_of_parameters() -> None:
    anatomy = deltune.anatomy_of(build("bert", "classification"))
    assert anatomy.parameter_key("bert.encoder.layer.1.attention.self.query.bias") == "encoder.1.attention.query.bias"
    assert anatomy.parameter_key("bert.encoder.layer.1.intermediate.dense.weight") == "encoder.1.ffn.up"
    assert anatomy.parameter_key("bert.pooler.dense.bias") == "bert.pooler.dense.bias"
