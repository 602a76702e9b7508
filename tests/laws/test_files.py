"""Laws 6, 7, 8 and 9: merging, saving, sums and averages, counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import deltune
from deltune.backbone import Rows
from deltune.errors import CheckpointError, StateError
from tests.laws.cases import MERGEABLE, METHODS, NOT_MERGEABLE, Case, Only, cases, take_steps
from tests.zoo import ARCHITECTURES


@pytest.mark.parametrize("case", cases(MERGEABLE))
def test_merged_equals_unmerged_and_comes_apart_exactly(case: Case) -> None:
    model = case.build()
    batch = case.batch()
    tuned = case.attach(model)
    take_steps(tuned, case, batch)
    unmerged = case.output(model, batch)
    with tuned.disabled():
        bits = {key: value.clone() for key, value in model.state_dict().items()}
    tuned.merge()
    merged = case.output(model, batch)
    assert torch.allclose(merged, unmerged, atol=2e-5 * float(unmerged.abs().max().clamp(min=1)))
    assert not any(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(StateError, match="unmerge"):
        tuned.save("never")
    tuned.unmerge()
    assert torch.equal(case.output(model, batch), unmerged)
    with tuned.disabled():
        for key, value in model.state_dict().items():
            assert torch.equal(value, bits[key]), key


@pytest.mark.parametrize("case", cases(NOT_MERGEABLE))
def test_what_cannot_be_merged_says_so(case: Case) -> None:
    tuned = case.attach(case.build())
    with pytest.raises(StateError, match="cannot be merged"):
        tuned.merge()
    assert tuned.active == ("default",)


@pytest.mark.parametrize("case", cases())
def test_saved_and_loaded_into_a_fresh_model(case: Case, tmp_path: Path) -> None:
    model = case.build()
    batch = case.batch()
    tuned = case.attach(model)
    take_steps(tuned, case, batch)
    trained = case.output(model, batch)
    tuned.save(tmp_path / "delta")

    fresh = case.build()
    state = torch.random.get_rng_state()
    loaded = deltune.load(fresh, tmp_path / "delta")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(case.output(fresh, batch), trained)

    with safe_open(str(tmp_path / "delta" / "delta.safetensors"), "pt") as stream:
        keys = list(stream.keys())
        stored = sum(stream.get_tensor(key).numel() for key in keys)
    # of fused adapters and mixed prompts the file holds the sources too, and of masks the positions; they do not train.
    # Of biases of which some entries are left it holds these entries
    beside = {
        f"{key}.{name}": form.get_buffer(name).numel()
        for key, form in loaded.attachments["default"].forms.items()
        for name in form.saved_buffers
    }
    assert (case.method in ("adapter-fusion", "diff-pruning", "fish-mask", "threshold-mask", "u-bitfit")) == any(
        beside.values()
    )
    entries = loaded.attachments["default"].recorded if case.method == "u-bitfit" else frozenset()
    whole = {name: value.numel() for name, value in loaded.named_trainable_parameters() if name not in entries}
    assert (sum(whole.values()) == loaded.summary().parameters) == (not entries)
    assert stored == sum(whole.values()) + sum(beside.values())
    assert set(keys) == {*beside, *whole}
    description = json.loads((tmp_path / "delta" / "deltune.json").read_text(encoding="utf-8"))
    assert set(description["tensors"]) == set(keys)


@pytest.mark.parametrize("method", METHODS)
def test_a_strict_load_names_what_does_not_fit(method: str, tmp_path: Path) -> None:
    case = Case(method, ARCHITECTURES["bert"])
    tuned = case.attach(case.build())
    tuned.save(tmp_path)
    # a model of the same weights below the head, with a head of another size
    smaller = case.architecture.build("classification")
    smaller.classifier = torch.nn.Linear(smaller.classifier.in_features, 2)
    with pytest.raises(CheckpointError, match=r"misshapen: .*classifier"):
        deltune.load(smaller, tmp_path)
    assert not any(len(module._forward_hooks) for module in smaller.modules())


AVERAGED = Only(
    "its change cannot be scaled, so it has no average",
    lambda method: all(part.insertion.value in ("weight", "parallel", "sequential") for part in method.parts),
)


@pytest.mark.parametrize("case", cases(AVERAGED))
def test_the_average_of_a_delta_with_itself_is_that_delta(case: Case, tmp_path: Path) -> None:
    # trained norms are no change that can be scaled
    method = METHODS[case.method].replace("sequential-adapter(", "sequential-adapter(train_norms=false, ")
    model = case.build()
    batch = case.batch()
    torch.manual_seed(1)
    tuned = deltune.attach(model, method, name="first", train_head=False)
    take_steps(tuned, case, batch)
    alone = case.output(model, batch)
    tuned.save(tmp_path)
    deltune.load(tuned, tmp_path, name="second")
    tuned.activate("first", "second", weights=(0.5, 0.5))
    both = case.output(model, batch)
    assert torch.allclose(both, alone, atol=1e-5 * float(alone.abs().max().clamp(min=1)))
    tuned.activate("first", "second", weights=(1.0, 0.0))
    assert torch.allclose(case.output(model, batch), alone, atol=1e-5 * float(alone.abs().max().clamp(min=1)))


SUMS = [
    ("lora(rank=2, targets='attention.* ffn.*')", "prefix-tuning(length=3, width=6)"),
    ("lora(rank=2)", "lora(rank=1, targets='attention.query')"),
    ("sequential-adapter(width=4, standard_deviation=0.1, train_norms=false)", "lora(rank=2)"),
    ("pfeiffer-adapter(width=4, standard_deviation=0.1)", "residual-adapter(width=3, standard_deviation=0.1)"),
    ("parallel-adapter(width=4, dropout=0)", "sequential-adapter(width=3, train_norms=false)"),
    ("prompt-tuning(length=3)", "bitfit(missing=add)"),
    ("prefix-tuning(length=2, reparameterize=false)", "prompt-tuning(length=3)"),
]


@pytest.mark.parametrize(("one", "other"), SUMS)
@pytest.mark.parametrize("architecture", ["bert", "gpt2", "gpt_neox", "llama-gqa", "t5", "vit"])
def test_methods_attached_together_equal_their_sum(architecture: str, one: str, other: str, tmp_path: Path) -> None:
    case = Case("lora", ARCHITECTURES[architecture])
    batch = case.batch()
    model = case.build()
    torch.manual_seed(1)
    tuned = deltune.attach(model, one, name="one", train_head=False)
    tuned.attach(other, name="other", train_head=False)
    tuned.activate("one", "other")
    take_steps(tuned, case, batch)
    together = case.output(model, batch)

    torch.manual_seed(1)
    summed = deltune.attach(case.build(), f"{one} + {other}", train_head=False)
    assert summed.summary().parameters == tuned.summary().parameters
    sum_values = dict(summed.named_trainable_parameters())
    with torch.no_grad():
        for number, name in enumerate(("one", "other")):
            for key, value in tuned.attachments[name].parameters():
                sum_values.get(f"{number}.{key}", sum_values.get(key)).copy_(value)  # type: ignore[union-attr]
    assert torch.allclose(case.output(summed.model, batch), together, atol=1e-6)
    summed.save(tmp_path)
    assert torch.equal(case.output(deltune.load(case.build(), tmp_path).model, batch), case.output(summed.model, batch))


def matrices(anatomy: Any, modules: dict[str, torch.nn.Module], roles: tuple[str, ...]) -> list[tuple[int, int]]:
    """(out, in) of every matrix of these roles, read from the weights themselves."""
    found = []
    for part in anatomy:
        if part.role not in roles:
            continue
        weight = modules[part.module].weight
        out, into = weight.shape if isinstance(modules[part.module], torch.nn.Linear) else reversed(weight.shape)
        found.append((part.rows.size if isinstance(part.rows, Rows) else int(out), int(into)))
    return found


@pytest.mark.parametrize("case", cases())
def test_parameter_counts_are_those_of_the_formula(case: Case) -> None:
    model = case.build()
    tuned = deltune.attach(model, METHODS[case.method], train_head=False)
    anatomy, modules = tuned.anatomy, dict(model.named_modules(remove_duplicate=False))
    count = tuned.summary().parameters
    projections = ("attention.query", "attention.key", "attention.value", "attention.output")
    feed_forward = ("ffn.up", "ffn.gate", "ffn.down")
    unique = {id(value): value.numel() for value in model.parameters() if "deltune" not in str(type(value))}
    if case.method == "full":
        with tuned.disabled():
            assert count == sum({id(value): value.numel() for value in model.parameters()}.values())
    elif case.method == "freeze":
        last = {stack.layers[-1] for stack in anatomy.stacks.values()}
        assert count == sum(value.numel() for name in last for value in modules[name].parameters())
    elif case.method == "lora":
        assert count == sum(2 * (out + into) for out, into in matrices(anatomy, modules, projections + feed_forward))
    elif case.method == "sequential-adapter":
        sublayers = sum(
            2 * 4 * anatomy.stack_of(part).hidden_size + 4 + anatomy.stack_of(part).hidden_size
            for part in anatomy
            if part.role in ("attention", "ffn")
        )
        norms = {part.module for part in anatomy if part.role == "norm"}
        assert count == sublayers + sum(value.numel() for name in norms for value in modules[name].parameters())
    elif case.method == "prefix-tuning":
        attentions = anatomy.of("attention")
        trunks = {part.stack: anatomy.stack_of(part).hidden_size for part in attentions}
        expected = sum(3 * width + width * 6 + 6 for width in trunks.values())
        expected += sum((6 + 1) * 2 * part.attention.key_value_features for part in attentions if part.attention)
        assert count == expected
    elif case.method == "prompt-tuning":
        stack = next(stack for stack in anatomy.stacks.values() if stack.tokens is not None)
        assert stack.tokens is not None
        assert count == 3 * stack.tokens.width
    else:  # the formulas of the others are in their own tests
        selected = [value for name, value in tuned.named_trainable_parameters()]
        assert count == sum(value.numel() for value in selected)
        assert case.method != "bitfit" or all(value.dim() == 1 for value in selected)
    assert unique
