"""FISH mask: which entries are chosen, and that these alone train. Numbers are those of the fact sheet's invariants."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.fisher_information import fisher_information
from deltune.methods.selective.greatest import greatest
from deltune.sites import EntriesForm, EntriesSite
from tests.methods.common import build, output
from tests.training import tiny
from tests.training.test_fit import StopAt, run
from tests.zoo import ARCHITECTURES

RATIO = 0.1
METHOD = f"fish-mask(ratio={RATIO})"


def masked(
    name: str = "bert", method: str = METHOD, head: str | None = None
) -> tuple[deltune.Tuned, dict[str, Tensor], Any]:
    """A prepared mask, a batch with labels, and a copy of the bare model."""
    architecture = ARCHITECTURES[name]
    head = head or ("classification" if "classification" in architecture.heads else "language")
    model = build(name, head)
    bare = copy.deepcopy(model)
    tuned = deltune.attach(model, method)
    batch = architecture.batch(5, head=head)  # type: ignore[arg-type]
    batch["labels"] = architecture.labels(head, batch)  # type: ignore[arg-type]
    tuned.prepare([batch])
    return tuned, batch, bare


def entries(tuned: deltune.Tuned, name: str = "default") -> tuple[EntriesSite, EntriesForm]:
    ((_, site, form),) = tuned.attachments[name].sites
    assert isinstance(site, EntriesSite)
    assert isinstance(form, EntriesForm)
    return site, form


def selected(tuned: deltune.Tuned, name: str = "default") -> dict[str, Tensor]:
    """Which entries of each parameter train, boolean."""
    site, form = entries(tuned, name)
    found = {key: torch.zeros_like(tuned.model.get_parameter(key), dtype=torch.bool) for key in site.names}
    for key, _, places in site.split(form.indices):
        found[key].view(-1)[places] = True
    return found


def naive_information(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums of squares, from one backward pass for each example."""
    found = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for row in range(len(batch["labels"])):
        model.zero_grad()
        model(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        for name, value in model.named_parameters():
            if value.grad is not None:
                found[name] += value.grad**2
    model.zero_grad()
    return found


def steps(tuned: deltune.Tuned, batch: dict[str, Tensor], count: int = 3, **options: Any) -> None:
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), **{"lr": 1e-2, "weight_decay": 0.0, **options})
    tuned.bind(optimizer)
    tuned.model.train()
    for _ in range(count):
        optimizer.zero_grad()
        tuned.model(**batch).loss.backward()
        optimizer.step()
    tuned.model.eval()


def test_1_and_2_importance_is_the_sum_of_squares_of_single_examples() -> None:
    _, batch, bare = masked()
    parameters = dict(bare.named_parameters())
    found = fisher_information(bare, parameters, [batch], 100)
    expected = naive_information(bare, batch)
    back = {name: value.flip(0) for name, value in batch.items()}
    reversed_ = fisher_information(bare, parameters, [back], 100)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(reversed_[name], value, rtol=1e-4, atol=1e-9)
    bare(**batch).loss.backward()
    assert not torch.allclose(bare.classifier.weight.grad**2 * 5, found["classifier.weight"], rtol=1e-2)


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "gpt2", "vit", "t5"])
def test_3_exactly_the_share_trains_and_the_head_is_part_of_it(name: str) -> None:
    tuned, _, bare = masked(name)
    total = sum(value.numel() for value in bare.parameters())
    summary = tuned.summary()
    assert summary.parameters == int(RATIO * total)
    head = {f"{module}." for module in tuned.anatomy.head}
    trained = {key for key, _ in tuned.attachments["default"].selection}
    assert trained == {key for key, _ in bare.named_parameters() if key.startswith(tuple(head) or ("\0",))}
    assert not any(key in trained for key in selected(tuned))
    assert sum(int(mask.sum()) for mask in selected(tuned).values()) == int(RATIO * total) - summary.head_parameters


def test_4_and_12_the_greatest_of_all_parameters_are_kept_and_tied_ones_ranked_once() -> None:
    tuned, batch, bare = masked("gpt2", head="language")  # whose head is its table of embeddings
    information = naive_information(bare, batch)
    masks = selected(tuned)
    assert set(masks) == set(information)
    assert "lm_head.weight" not in masks
    kept = torch.cat([information[name][mask] for name, mask in masks.items()])
    dropped = torch.cat([information[name][~mask] for name, mask in masks.items()])
    assert kept.min() >= dropped.max() * (1 - 1e-4)


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    seed=st.integers(0, 99),
    share=st.floats(0.02, 1),
)
@settings(max_examples=60, deadline=None)
def test_4_selection_is_that_of_sorting_everything(sizes: list[int], seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = {str(number): torch.rand(size, generator=generator) for number, size in enumerate(sizes)}
    count = max(1, int(share * sum(sizes)))
    flat = torch.cat(list(scores.values()))
    starts = {str(number): sum(sizes[:number]) for number in range(len(sizes))}
    assert torch.equal(greatest(scores, count, starts), flat.argsort(descending=True)[:count].sort().values)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_5_frozen_entries_keep_their_bits(decay: float) -> None:
    tuned, batch, bare = masked()
    steps(tuned, batch, weight_decay=decay)
    masks = selected(tuned)
    now = dict(tuned.model.named_parameters())
    for name, value in bare.named_parameters():
        if name in masks:
            assert torch.equal(now[name][~masks[name]], value[~masks[name]]), name
    moved = torch.cat([(now[name] != value)[masks[name]] for name, value in bare.named_parameters() if name in masks])
    assert moved.all()


def test_6_selected_entries_get_the_dense_gradient() -> None:
    tuned, batch, bare = masked()
    for _ in range(2):  # which add up
        tuned.model(**batch).loss.backward()
        bare(**batch).loss.backward()
    site, form = entries(tuned)
    dense = {
        name: value.grad if value.grad is not None else torch.zeros_like(value)
        for name, value in bare.named_parameters()
    }
    torch.testing.assert_close(form.values.grad, site.gather(dense, form.indices))
    assert all(value.grad is None for key, value in tuned.model.named_parameters() if key in site.names)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
@pytest.mark.parametrize("fused", [False, True])
def test_6_steps_are_those_of_dense_training_with_a_mask(name: str, fused: bool) -> None:
    tuned, batch, bare = masked(name, head="classification")
    masks = selected(tuned)
    dense = dict(bare.named_parameters())
    optimizer = torch.optim.AdamW(dense.values(), lr=1e-2, weight_decay=0.0, fused=fused)
    bare.train()
    for _ in range(50):
        optimizer.zero_grad()
        bare(**batch).loss.backward()
        for key, mask in masks.items():
            if dense[key].grad is not None:
                dense[key].grad *= mask
        optimizer.step()
    steps(tuned, batch, 50, fused=fused)
    now = dict(tuned.model.named_parameters())
    for key, value in dense.items():
        assert torch.equal(now[key], value), key


def test_7_and_11_a_saved_mask_is_positions_and_values(tmp_path: Path) -> None:
    tuned, batch, bare = masked()
    steps(tuned, batch)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(copy.deepcopy(bare), tmp_path)
    assert torch.equal(output(loaded.model, batch), expected)
    assert all(torch.equal(mask, selected(loaded)[name]) for name, mask in selected(tuned).items())
    # by hand, on the base alone
    site, form = entries(tuned)
    for name, part, places in site.split(form.indices):
        bare.get_parameter(name).data.view(-1)[places] = form.values.detach()[part]
    for name, value in tuned.attachments["default"].selection:
        bare.get_parameter(name).data.copy_(value)
    assert torch.equal(output(bare, batch), expected)


def test_8_preparing_changes_nothing_and_leaves_no_gradient() -> None:
    tuned, batch, bare = masked()
    assert torch.equal(output(tuned.model, batch), output(bare, batch))
    assert all(value.grad is None for value in tuned.model.parameters())
    assert not tuned.model.training


def test_preparing_needs_no_originals() -> None:
    model = build("bert", "classification")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    batch["labels"] = ARCHITECTURES["bert"].labels("classification", batch)
    for method in (METHOD, "full", "lora"):
        tuned = deltune.attach(copy.deepcopy(model), method, reversible=False)
        tuned.prepare([batch])
        tuned.model(**batch).loss.backward()
        assert all(value.grad is not None for value in tuned.trainable_parameters() if value.dim() == 2)


def test_9_more_of_the_same_examples_choose_the_same() -> None:
    tuned, batch, _ = masked()
    before = selected(tuned)
    tuned.prepare([batch, batch])
    assert all(torch.equal(mask, selected(tuned)[name]) for name, mask in before.items())


def test_10_expected_labels_are_the_given_ones_where_the_model_is_certain() -> None:
    _, batch, bare = masked()
    with torch.no_grad():
        bare.classifier.weight.mul_(20)
        batch["labels"] = bare(**batch).logits.argmax(-1)
    parameters = {"classifier.weight": bare.classifier.weight, "query": next(bare.bert.encoder.parameters())}
    given_, expected = (fisher_information(bare, parameters, [batch], 9, labels=kind) for kind in ("given", "expected"))
    probability = bare(**batch).logits.softmax(-1).amax()
    if probability > 0.9999:
        for name, value in given_.items():
            torch.testing.assert_close(expected[name], value, rtol=1e-2, atol=1e-6)
    # and by the definition
    total = torch.zeros_like(bare.classifier.weight)
    for row in range(5):
        logits = bare(**{name: value[row : row + 1] for name, value in batch.items() if name != "labels"}).logits[0]
        for label in range(3):
            (gradient,) = torch.autograd.grad(logits.log_softmax(-1)[label], bare.classifier.weight, retain_graph=True)
            total += logits.softmax(-1)[label].detach() * gradient**2
    torch.testing.assert_close(expected["classifier.weight"], total, rtol=1e-3, atol=1e-8)


def test_absolute_values_rank_differently() -> None:
    tuned, batch, bare = masked()
    other = deltune.attach(copy.deepcopy(bare), METHOD.replace(")", ", power=absolute)"))
    other.prepare([batch])
    total = {name: torch.zeros_like(value) for name, value in bare.named_parameters()}
    for row in range(5):
        bare.zero_grad()
        bare(**{name: value[row : row + 1] for name, value in batch.items()}).loss.backward()
        for name, value in bare.named_parameters():
            total[name] += value.grad.abs() if value.grad is not None else 0
    masks = selected(other)
    kept = torch.cat([total[name][mask] for name, mask in masks.items()])
    assert kept.min() >= torch.cat([total[name][~mask] for name, mask in masks.items()]).max() * (1 - 1e-4)
    assert any(not torch.equal(mask, masks[name]) for name, mask in selected(tuned).items())


# -- what a vector of entries has to survive --------------------------------------------------------------


def test_the_optimizer_has_state_for_the_entries_alone() -> None:
    tuned, batch, bare = masked()
    optimizer = torch.optim.AdamW(tuned.trainable_parameters())
    tuned.model(**batch).loss.backward()
    optimizer.step()
    held = sum(value.numel() for state in optimizer.state.values() for value in state.values() if value.dim())
    assert held == 2 * tuned.summary().parameters < 0.21 * sum(value.numel() for value in bare.parameters())


def test_switching_brings_back_every_bit() -> None:
    tuned, batch, bare = masked()
    steps(tuned, batch)
    tuned.attach("fish-mask(ratio=0.05)", "other")
    tuned.prepare([batch])
    steps(tuned, batch, lr=1e-3)
    found = {}
    for name in ("default", "other"):
        tuned.activate(name)
        found[name] = output(tuned.model, batch)
    with tuned.disabled():
        for name, value in bare.named_parameters():
            assert torch.equal(tuned.model.get_parameter(name), value)
    tuned.activate("default")
    assert torch.equal(output(tuned.model, batch), found["default"])
    assert not torch.equal(found["default"], found["other"])
    tuned.detach()
    state = tuned.model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in bare.state_dict().items())
    assert not any(getattr(value, "_post_accumulate_grad_hooks", None) for value in tuned.model.parameters())
    assert all(value.requires_grad for value in tuned.model.parameters())


def test_changes_of_several_are_added_and_scaled() -> None:
    model = build("bert", "base")
    bare = {name: value.detach().clone() for name, value in model.named_parameters()}
    tuned = deltune.attach(model, "fish-mask(ratio=0.3)", "one")
    tuned.attach("fish-mask(ratio=0.2)", "two")
    changes = {}
    for number, name in enumerate(("one", "two"), start=1):
        _, form = entries(tuned, name)
        with torch.no_grad():
            form.values.add_(0.1 * number)
        changes[name] = {key: 0.1 * number * mask for key, mask in selected(tuned, name).items()}
    tuned.activate("one", "two", weights=(0.5, 2.0))
    tuned.model(**ARCHITECTURES["bert"].batch())
    for name, value in tuned.model.named_parameters():
        if name in bare:
            expected = bare[name] + 0.5 * changes["one"][name] + 2 * changes["two"][name]
            torch.testing.assert_close(value, expected)


def test_attachments_with_other_targets_share_the_place() -> None:
    tuned, batch, bare = masked()
    steps(tuned, batch)
    alone = output(tuned.model, batch)
    tuned.attach("fish-mask(ratio=0.05, targets='ffn.up ffn.down')", "upper", train_head=False)
    tuned.prepare([batch])
    with torch.no_grad():
        entries(tuned, "upper")[1].values.add_(0.2)
    tuned.activate("default", "upper")
    both = output(tuned.model, batch)
    masks = {name: selected(tuned, name) for name in ("default", "upper")}
    for name, value in bare.named_parameters():
        if name in masks["upper"]:
            now, own = tuned.model.get_parameter(name), masks["upper"][name] & ~masks["default"][name]
            torch.testing.assert_close(now[own], value[own] + 0.2)
            untouched = ~masks["upper"][name] & ~masks["default"][name]
            assert torch.equal(now[untouched], value[untouched])
    tuned.activate("default")
    assert torch.equal(output(tuned.model, batch), alone)
    assert not torch.equal(both, alone)
    with tuned.disabled():
        assert all(torch.equal(tuned.model.get_parameter(name), value) for name, value in bare.named_parameters())


def test_layers_below_the_entries_run_once(tmp_path: Path) -> None:
    model = build("bert", "classification", num_hidden_layers=3)
    tuned = deltune.attach(model, "fish-mask(ratio=0.05, targets='attention.* layers=2:')")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    with torch.no_grad(), tuned.frozen_states(tmp_path) as states:
        assert states.trunk.depth == 2
        found = [model(**batch).logits for _ in range(3)]
        assert states.reused == 3
    torch.testing.assert_close(found[2], found[0])


def test_copies_train_by_themselves() -> None:
    tuned, batch, _ = masked()
    for copied in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        handle = copied._deltune_handle
        before = {name: value.detach().clone() for name, value in tuned.model.named_parameters()}
        steps(handle, batch)
        masks = selected(handle)
        assert all(
            (copied.get_parameter(name) != before[name])[mask].all() for name, mask in masks.items() if mask.any()
        )
        for name, value in tuned.model.named_parameters():
            assert torch.equal(value, before[name])


def test_a_model_that_nobody_has_any_more_is_freed() -> None:
    gc.collect()
    hooks = len(_global_optimizer_post_hooks)
    tuned, batch, _ = masked()
    steps(tuned, batch)
    # none of its own: PyTorch goes through these when a step ends, and would stumble over one that leaves meanwhile
    assert len(_global_optimizer_post_hooks) == hooks
    alive = weakref.ref(tuned.model)
    del tuned
    gc.collect()
    assert alive() is None


def test_a_call_of_a_part_of_the_model_sees_changed_values() -> None:
    tuned, batch, _ = masked("t5")
    encoder = tuned.model.get_encoder()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    before = encoder(**inputs).last_hidden_state
    with torch.no_grad():
        entries(tuned)[1].values.add_(0.5)
    assert not torch.equal(encoder(**inputs).last_hidden_state, before)


def test_merging_writes_the_values_also_into_tied_matrices() -> None:
    tuned, batch, bare = masked("gpt2", head="language")
    steps(tuned, batch)
    expected = output(tuned.model, batch)
    assert torch.equal(output(tuned.merge(), batch), expected)
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), expected)
    tuned.detach()
    assert torch.equal(output(tuned.model, batch), output(bare, batch))


def test_another_type_of_numbers() -> None:
    model = build("bert", "classification").to(torch.bfloat16)
    bare = {name: value.detach().clone() for name, value in model.named_parameters()}
    tuned = deltune.attach(model, METHOD)
    batch = ARCHITECTURES["bert"].batch()
    with torch.no_grad():
        entries(tuned)[1].values.add_(0.5)
    assert output(model, batch).dtype == torch.bfloat16
    model.float()
    assert output(model, batch).dtype == torch.float32
    tuned.detach()
    assert all(torch.equal(value.to(torch.bfloat16), bare[name]) for name, value in model.named_parameters())


@pytest.mark.parametrize("stop", [1, 5])
def test_a_stopped_run_ends_in_the_same_bits(stop: int, tmp_path: Path) -> None:
    settings = {"epochs": 2, "save_every": 2}
    whole = tiny.classifier("fish-mask(ratio=0.2, examples=20)")
    run(whole, settings=settings, output=tmp_path / "whole")
    stopped = tiny.classifier("fish-mask(ratio=0.2, examples=20)")
    with pytest.raises(KeyboardInterrupt):
        run(stopped, settings=settings, output=tmp_path / "run", callbacks=[StopAt(stop)])
    resumed = tiny.classifier("fish-mask(ratio=0.2, examples=20)")
    run(resumed, settings=settings, output=tmp_path / "run")
    assert tiny.equal(tiny.weights(resumed), tiny.weights(whole))
    assert all(torch.equal(mask, selected(resumed)[name]) for name, mask in selected(whole).items())


def test_entries_of_some_modules_alone() -> None:
    tuned, batch, bare = masked(method="fish-mask(ratio=0.1, targets='attention.query attention.value')")
    assert all(name.split(".")[-2] in ("query", "value") for name, mask in selected(tuned).items() if mask.any())
    assert all(name.split(".")[-2] in ("query", "value") for name in tuned.attachments["default"].selected_names)
    steps(tuned, batch)
    for name, value in bare.named_parameters():
        if not name.startswith("classifier") and "query" not in name and "value" not in name:
            assert torch.equal(tuned.model.get_parameter(name), value)


def test_what_cannot_be_is_refused() -> None:
    model = build("bert", "classification")
    with pytest.raises(MethodError, match=r"head alone has 99\. Take a ratio above 0\.0034"):
        deltune.attach(model, "fish-mask(ratio=0.001)")
    with pytest.raises(MethodError, match="entries cannot be selected of"):
        deltune.attach(model, "fish-mask(ratio=0.9, targets=attention.query)")
    with pytest.raises(TargetError, match="quary"):
        deltune.attach(model, "fish-mask(targets=attention.quary)")
    tuned = deltune.attach(model, METHOD)
    with pytest.raises(MethodError, match="labels"):
        tuned.prepare([ARCHITECTURES["bert"].batch()])
    with pytest.raises(StateError, match="all rows of a batch go through"):
        tuned.route(["default"])
    with pytest.raises(StateError, match="cannot be dropped"):
        tuned.drop_layers(1)
    tuned.attach("freeze(layers=2)", "layers", train_head=False)
    for names in (("layers", "default"), ("default", "layers")):
        with pytest.raises(StateError, match=r"'layers' has its own value of .*, and 'default' of entries of it"):
            tuned.activate(*names)
    language = deltune.attach(build("gpt2", "language"), "fish-mask(labels=expected)")
    batch = ARCHITECTURES["gpt2"].batch(head="language")
    with pytest.raises(MethodError, match="labels=given"):
        language.prepare([{**batch, "labels": batch["input_ids"]}])
