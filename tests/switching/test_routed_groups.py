"""Routed rows of many low-rank changes: few kernels, however many changes, and each row as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import deltune
from deltune.quantization import NF4
from tests.laws.test_composition import MODELS, SETTINGS
from tests.methods.common import build, output
from tests.switching.routed import Kernels, batch_of, each_alone, many, routed
from tests.zoo import ARCHITECTURES

# -- few kernels ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
@pytest.mark.parametrize("rank", [2, 12])
def test_a_pass_has_as_many_kernels_for_two_attachments_as_for_eight(name: str, rank: int) -> None:
    batch = batch_of(name, 8)
    tuned = many([f"lora(rank={rank})"] * 8, name)
    counts = []
    for used in (2, 4, 8):
        with tuned.routed([f"a{row % used}" for row in range(8)]):
            output(tuned.model, batch)  # indices and stacks are made
            with Kernels() as kernels:
                output(tuned.model, batch)
        counts.append(kernels)
    with tuned.disabled(), Kernels() as bare:
        output(tuned.model, batch)
    sites = len(tuned.attachments["a0"].forms)
    assert counts[0].products == counts[1].products == counts[2].products == bare.products + 2 * sites
    # two attachments for eight rows are gathered, or rows moved to them; eight for eight rows need neither
    assert counts[0].count.total() == counts[1].count.total() >= counts[2].count.total()


@pytest.mark.parametrize("ranks", [(3, 3), (3, 4)])
def test_training_has_as_many_products_for_two_attachments_as_for_eight(ranks: tuple[int, int]) -> None:
    batch = batch_of("bert", 8)
    tuned = many([f"lora(rank={ranks[number % 2]})" for number in range(8)])
    counts = []
    for used in (2, 8):
        with tuned.routed([f"a{row % used}" for row in range(8)]), Kernels() as kernels:
            tuned.model(**batch).logits.sum().backward()
        counts.append(kernels.products)
    assert counts[0] == counts[1]


def test_rows_of_other_methods_do_not_keep_low_rank_changes_apart() -> None:
    batch = batch_of("bert", 8)
    tuned = many(["lora(rank=2)"] * 6 + ["prefix-tuning(length=2)", "pfeiffer-adapter(width=3)"])
    counts = []
    for used in (2, 6):
        route = [f"a{row % used}" for row in range(6)] + ["a6", "a7"]
        with tuned.routed(route):
            output(tuned.model, batch)
            with Kernels() as kernels:
                output(tuned.model, batch)
        counts.append(kernels.products)
    assert counts[0] == counts[1]


def test_ranks_up_to_the_same_power_of_two_share_their_products() -> None:
    """Others do not: little ones would be computed as large ones."""
    batch = batch_of("bert", 4)
    with Kernels() as bare:
        output(build("bert", MODELS["bert"]), batch)
    # the last four are four changes that are computed each by itself
    for ranks, expected in (((5, 6, 7, 8), 2), ((16, 16, 2, 2), 4), ((1, 2, 4, 8), 8)):
        tuned = many([f"lora(rank={rank}, targets='attention.query layers=0')" for rank in ranks])
        with tuned.routed(["a0", "a1", "a2", "a3"]), Kernels() as kernels:
            output(tuned.model, batch)
        assert kernels.products - bare.products == expected, ranks


# -- each row as if alone ------------------------------------------------------------------------------------

#: A row of a batch of another size is summed in another order; 2**-8 for each of some roundings of bfloat16.
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 0.06}


@st.composite
def low_ranks(draw: st.DrawFn) -> str:
    return (
        f"lora(rank={draw(st.sampled_from([1, 2, 3, 7, 16]))}, alpha={draw(st.sampled_from([1, 4, 10]))}, "
        f"targets='{draw(st.sampled_from(['attention.query', 'attention.*', 'ffn.*', 'attention.* ffn.*']))}')"
    )


@pytest.mark.parametrize("name", MODELS)
@settings(SETTINGS, max_examples=12)
@given(data=st.data())
def test_every_row_equals_itself_alone(name: str, data: st.DataObject) -> None:
    methods = data.draw(st.lists(low_ranks(), min_size=2, max_size=5))
    dtype = data.draw(st.sampled_from(list(TOLERANCES)))
    names = [*(f"a{number}" for number in range(len(methods))), None]
    route = data.draw(st.lists(st.sampled_from(names), min_size=1, max_size=9))
    times = data.draw(st.sampled_from([1, 1, 2, 3]))
    tuned = many(methods, name, dtype)
    batch = batch_of(name, times * len(route), data.draw(st.sampled_from([2, 7])))
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    assert found.dtype == dtype
    assert (found - expected).abs().max() <= TOLERANCES[dtype] * float(expected.abs().max().clamp(min=1))


MIXED = [
    "lora(rank=2, targets='attention.* ffn.*')",
    "pfeiffer-adapter(width=3, standard_deviation=0.3)",
    "prefix-tuning(length=2, reparameterize=false)",
    "lora(rank=3)",
    "lora(rank=2, weight_decomposed=true)",
    "parallel-adapter(width=3, dropout=0)",
    "lora(rank=2, initialization=pissa)",
    "lora(rank=2) + prefix-tuning(length=3, reparameterize=false)",
    "adalora(initial_rank=3, target_rank=2)",
    "krona",
]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
@pytest.mark.parametrize("times", [1, 2])
def test_rows_of_different_methods_in_one_batch(name: str, times: int) -> None:
    tuned = many(MIXED, name)
    route = ["a3", "a1", None, "a0", "a2", "a7", "a4", "a0", "a5", "a6", "a8", "a9"]
    batch = batch_of(name, times * len(route))
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    bare = each_alone(tuned, batch, [None])
    for row in range(len(found)):
        assert torch.allclose(found[row], expected[row], atol=1e-5 * float(expected.abs().max())), row
        assert torch.equal(expected[row], bare[row]) == (route[row // times] is None)
    assert torch.equal(found[2 * times], bare[2 * times]) or torch.allclose(
        found[2 * times], bare[2 * times], atol=1e-5
    )


def test_two_low_rank_changes_of_one_attachment_at_one_matrix() -> None:
    tuned = many(["lora(rank=2) + lora(rank=3)", "lora(rank=2)", "lora(rank=3) + lora(rank=4)"])
    route = ["a0", "a2", "a1", None, "a0"]
    batch = batch_of("bert", 5)
    assert torch.allclose(routed(tuned, batch, route), each_alone(tuned, batch, route), atol=1e-5)


def test_changes_kept_in_float32_beside_a_bfloat16_model_and_under_autocast() -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3)"], dtype=torch.bfloat16)
    for attachment in tuned.attachments.values():
        for form in attachment.forms.values():
            form.float()
    batch, route = batch_of("bert", 3), ["a1", "a0", "a1"]
    expected = each_alone(tuned, batch, route)
    found = routed(tuned, batch, route)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= TOLERANCES[torch.bfloat16] * float(expected.abs().max())
    tuned = many(["lora(rank=2)", "lora(rank=3)"])
    with torch.autocast("cpu", torch.bfloat16):
        expected = each_alone(tuned, batch, route)
        found = routed(tuned, batch, route)
    assert found.dtype == expected.dtype
    assert (found - expected).abs().max() <= TOLERANCES[torch.bfloat16] * float(expected.abs().max())


def test_dropped_layers_and_modes_are_followed_under_one_route() -> None:
    tuned = many(["lora(rank=2, dropout=0.5)", "lora(rank=2)", "lora(rank=2, dropout=0.5)"])
    batch, route = batch_of("bert", 3), ["a0", "a1", "a2"]
    whole = each_alone(tuned, batch, route)
    tuned.drop_layers(1)
    upper = each_alone(tuned, batch, route)
    tuned.drop_layers(0)
    tuned.route(route)
    assert torch.allclose(output(tuned.model, batch), whole, atol=1e-5)
    tuned.drop_layers(1)
    assert torch.allclose(output(tuned.model, batch), upper, atol=1e-5)
    tuned.drop_layers(0)
    tuned.model.train()
    one, other = output(tuned.model, batch), output(tuned.model, batch)
    assert torch.allclose(one[1], whole[1], atol=1e-5)  # its change has no dropout
    assert torch.equal(one[1], other[1])
    for row in (0, 2):
        assert (one[row] - other[row]).abs().max() > 1e-4
    tuned.model.eval()
    assert torch.allclose(output(tuned.model, batch), whole, atol=1e-5)


def test_dropout_begins_and_ends_with_the_mode_where_all_forms_have_it() -> None:
    tuned = many(["lora(rank=2, dropout=0.5)"] * 3)
    batch = batch_of("bert", 3)
    tuned.route(["a0", "a1", "a2"])
    still = output(tuned.model, batch)
    tuned.model.train()
    assert (output(tuned.model, batch) - still).abs().max() > 1e-4
    tuned.model.eval()
    assert torch.equal(output(tuned.model, batch), still)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["llama-gqa", "gpt2", "t5"])
def test_generation_equals_each_row_alone(name: str, beams: int) -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3)", "lora(rank=2)"], name)
    architecture = ARCHITECTURES[name]
    prompt = architecture.prompt(batch_of(name, 5))
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": beams, "do_sample": False}
    route = ["a2", "a0", None, "a1", "a0"]
    expected = []
    for row, item in enumerate(route):
        tuned.activate(*([item] if item else []))
        expected.append(tuned.model.generate(**prompt, **options)[row])
    tuned.activate("a0")
    first = tuned.model.generate(**prompt, **options)
    with tuned.routed(route):
        found = tuned.model.generate(**prompt, **options)
    assert torch.equal(found, torch.stack(expected))
    assert not torch.equal(found, first)


def test_rows_of_a_model_in_4_bits() -> None:
    model = build("llama-gqa", "language", hidden_size=64)
    deltune.quantize(model, NF4(block=32))
    tuned = deltune.attach(model, "lora(rank=3, targets='attention.* ffn.*')", "a0")
    tuned.attach("lora(rank=4)", "a1")
    with torch.no_grad():
        for attachment in tuned.attachments.values():
            generator = torch.Generator().manual_seed(0)
            for _, parameter in attachment.form_parameters():
                parameter.normal_(std=0.1, generator=generator)
    batch, route = batch_of("llama-gqa", 4), ["a1", None, "a0", "a1"]
    expected = each_alone(tuned, batch, route)
    assert torch.allclose(routed(tuned, batch, route), expected, atol=1e-5 * float(expected.abs().max()))


# -- gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
@pytest.mark.parametrize("route", [["a0", "a1", "a2", "a0"], ["a0", "a0", "a1", None], ["a2", "a2", "a1", "a1"]])
def test_gradients_are_those_of_each_row_alone(name: str, route: list[str | None]) -> None:
    tuned = many(["lora(rank=2)", "lora(rank=3, alpha=3)", "lora(rank=9)"], name)
    batch = batch_of(name, 8)
    direction = torch.randn(output(tuned.model, batch).shape, generator=torch.Generator().manual_seed(1))
    expected: dict[str, Tensor] = {}
    for item in dict.fromkeys(one for one in route if one is not None):
        tuned.activate(item)
        tuned.model.zero_grad()
        rows = [row for row in range(8) if route[row // 2] == item]
        (tuned.model(**batch).logits * direction)[rows].sum().backward()
        for key, value in tuned.attachments[item].parameters():
            assert value.grad is not None
            expected[f"{item}.{key}"] = value.grad.clone()
            value.grad = None
    tuned.route(route)
    (tuned.model(**batch).logits * direction).sum().backward()
    found = {
        f"{item}.{key}": value.grad
        for item, attachment in tuned.attachments.items()
        for key, value in attachment.parameters()
        if value.grad is not None
    }
    assert found.keys() == expected.keys()
    for key, gradient in found.items():
        assert (gradient - expected[key]).abs().max() <= 1e-4 * expected[key].abs().max().clamp(min=1e-2), key
