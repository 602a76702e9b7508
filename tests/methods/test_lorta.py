"""LoRTA in models, against its part of the fact sheet: numbers are those of the sheet's invariants."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError
from deltune.methods.reparameterized.decompositions import CP, SharedSlice
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, singular_values, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "qwen3", "phi3", "t5", "vit"]
ROLES = ("query", "key", "value", "output")


def factors(tuned: deltune.Tuned) -> list[CP]:
    return [form for form in tuned.attachments["default"].forms.values() if isinstance(form, CP)]


def slices(tuned: deltune.Tuned) -> dict[str, SharedSlice]:
    return {key: form for key, _, form in tuned.attachments["default"].sites if isinstance(form, SharedSlice)}


def randomized(name: str, method: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, method, **options)
    for made in factors(tuned):
        for value in made.parameters():
            nn.init.normal_(value, std=0.5)
    return tuned, batch


def test_the_change_of_every_head_is_the_formula() -> None:
    """Rows of queries, keys and values, and columns of outputs, head by head."""
    tuned, _ = randomized("bert", "lorta(rank=3, scale=2)")
    (made,) = factors(tuned)
    U, V1, V2, P1, P2 = (value.detach() for value in made.parameters())
    assert [value.shape[0] for value in (U, V1, V2, P1, P2)] == [32, 4, 8, 3, 4]
    forms = slices(tuned)
    for layer, (number, role), head in itertools.product(range(3), enumerate(ROLES), range(4)):
        delta = forms[f"encoder.{layer}.attention.{role}"].weight_delta()
        part = (delta.T if role == "output" else delta)[8 * head : 8 * head + 8]
        expected = sum(
            2 * V1[head, r] * P1[layer, r] * P2[number, r] * torch.outer(V2[:, r], U[:, r]) for r in range(3)
        )
        assert torch.allclose(part, expected, atol=1e-6)  # type: ignore[arg-type]


def test_2_the_rank_of_every_matrixs_change() -> None:
    tuned, _ = randomized("llama-gqa", "lorta(rank=3)", dtype=torch.float64)
    for key, form in slices(tuned).items():
        values = singular_values(form.weight_delta())
        assert values[2] > 1e-8 * values[0], key
        assert values[3] < 1e-12 * values[0], key


@pytest.mark.parametrize("name", LAYOUTS)
def test_6_merged_equals_unmerged(name: str) -> None:
    tuned, batch = attached(name, "lorta(rank=4, scale=2)")
    before = bits(tuned.model)
    train(tuned, batch)
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), unmerged)
    with tuned.disabled():
        for key, value in tuned.model.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", LAYOUTS)
def test_7_step_0_is_the_frozen_model_and_one_factor_has_a_gradient(name: str) -> None:
    model = build(name)
    head = "language" if ARCHITECTURES[name].generates else "classification"
    batch = ARCHITECTURES[name].batch(head=head)  # type: ignore[arg-type]
    before = output(model, batch)
    tuned = deltune.attach(model, "lorta")
    assert torch.equal(output(model, batch), before)
    loss_of(model, batch).backward()
    for made in factors(tuned):
        for key, value in made.named_parameters():
            assert value.grad is not None, key
            assert bool(value.grad.any()) == (key == "V2"), key


def test_8_published_counts() -> None:
    assert BERT_BASE.count("lorta(rank=1)") == 860
    assert BERT_BASE.count("lorta") == 13_760
    assert LLAMA.count("lorta(rank=1, targets='attention.query,attention.output')") == 681
    assert LLAMA.count("lorta(rank=1, targets='attention.key,attention.value')") == 675
    assert LLAMA.count("lorta(rank=4)") == 4 * (681 + 675)


def test_9_the_gradient_of_a_shared_factor_is_the_sum_over_matrices() -> None:
    tuned, batch = randomized("bert", "lorta(rank=4)")
    (made,) = factors(tuned)
    loss_of(tuned.model, batch).backward()
    expected = {key: value.grad for key, value in made.named_parameters()}
    forms = slices(tuned)
    for form in forms.values():
        form._shared = (copy.deepcopy(made),)
        form.decomposition.zero_grad()
    loss_of(tuned.model, batch).backward()
    for key, gradient in expected.items():
        alone = [form.decomposition.get_parameter(key).grad for form in forms.values()]
        assert gradient is not None
        assert relative_error(sum(value for value in alone if value is not None), gradient) < 1e-5, key  # type: ignore[arg-type]


def test_10_order_of_components_and_place_of_a_scalar_do_not_matter() -> None:
    tuned, batch = randomized("bert", "lorta(rank=3)")
    before = output(tuned.model, batch)
    (made,) = factors(tuned)
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(value[:, torch.tensor([2, 0, 1])])
        made.U.mul_(-4)
        made.get_parameter("V2").mul_(-0.25)
    assert relative_error(output(tuned.model, batch), before) < 1e-5


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_11_shared_factors_are_stored_once_and_shared_again(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, "lorta(rank=4)", "tokens" if name == "bert" else None)
    train(tuned, batch)
    tuned.save(tmp_path)
    keys = [key for key in load_file(tmp_path / "delta.safetensors") if "factors" in key]
    assert len(keys) == 5 * len(factors(tuned))
    loaded = deltune.load(build(name, "tokens" if name == "bert" else None), tmp_path)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    for twin in (loaded, copy.deepcopy(tuned)):
        shared = {id(made) for made in factors(twin)}
        assert {id(form.decomposition) for form in slices(twin).values()} == shared
        assert not shared & {id(made) for made in factors(tuned)}


# -- options, types ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rank=0", "at least 1"),
        ("scale=0", "greater than 0"),
        ("targets='attention.* ffn.up'", r"ffn\.up is no matrix of attention"),
    ],
)
def test_what_does_not_fit_is_refused(options: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        attached("bert", f"lorta({options})")


def test_chosen_layers_and_matrices_alone_are_counted() -> None:
    tuned, _ = attached("bert", "lorta(rank=2, targets='attention.query,attention.value layers=-2:')", "base")
    assert tuned.summary().parameters == 2 * (32 + 4 + 8 + 2 + 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_number_types(dtype: torch.dtype) -> None:
    tuned, batch = attached("llama-gqa", "lorta(rank=4)", dtype=dtype)
    train(tuned, batch)
    assert {value.dtype for value in tuned.trainable_parameters()} == {dtype}
    found = output(tuned.model, batch)
    assert found.dtype == dtype
    tuned.merge()
    assert relative_error(output(tuned.model, batch), found) < (1e-12 if dtype == torch.float64 else 0.2)
