"""The zoo itself: what it says of its architectures is true."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from tests.backbone.recording import CASES, NAMES, example, run
from tests.zoo import ARCHITECTURES, Head, Padding

PADDED = [(name, side) for name in NAMES if "base" in ARCHITECTURES[name].heads for side in ("left", "right")]


@pytest.mark.parametrize(("name", "side"), PADDED)
def test_padding_changes_nothing_where_it_is_said_to(name: str, side: Padding) -> None:
    architecture, model, _ = example(name)
    batch = architecture.batch(padding=side)
    real = architecture.real(batch)
    if architecture.pads:
        assert batch["attention_mask"].sum(1).tolist() == [7, 6, 5]
    with torch.no_grad():
        together = architecture.output(model(**batch))
        same = True
        for row in range(3):
            alone = architecture.alone(batch, row)
            output = architecture.output(model(**alone))[architecture.real(alone)]
            same = same and torch.allclose(together[row][real[row]], output, rtol=1e-4, atol=1e-4)
    assert same == (architecture.left_padding if side == "left" else architecture.right_padding)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_models_have_a_loss_with_a_gradient(name: str, head: Head) -> None:
    if head == "base":
        return
    architecture = ARCHITECTURES[name]
    model = architecture.build(head, seed=1)
    batch = architecture.batch(padding="right", head=head)
    outputs = model(**batch, labels=architecture.labels(head, batch))
    assert torch.isfinite(outputs.loss)
    outputs.loss.backward()
    assert any(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    if head != "classification":
        assert architecture.output(outputs).shape[:2] == architecture.real(batch).shape


@pytest.mark.parametrize("name", [name for name in NAMES if ARCHITECTURES[name].generates])
def test_models_generate(name: str) -> None:
    architecture, model, _ = example(name, "language")
    side: Padding = "left" if architecture.left_padding else "right"
    prompt = architecture.prompt(architecture.batch(2, 5, padding=side))
    generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert generated.shape[0] == 2


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_model_and_batch(name: str) -> None:
    architecture = ARCHITECTURES[name]
    head = architecture.heads[0]
    state = torch.random.get_rng_state()
    first, second, third = (architecture.build(head, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    pairs = list(zip(first.parameters(), second.parameters(), third.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two, _ in pairs)
    assert not any(torch.equal(one, three) for one, _, three in pairs)
    batches = [architecture.batch(seed=seed) for seed in (5, 5, 6)]
    assert all(torch.equal(batches[0][key], batches[1][key]) for key in batches[0])
    assert any(not torch.equal(batches[0][key], batches[2][key]) for key in batches[0])


@pytest.mark.parametrize("name", NAMES)
def test_facts(name: str) -> None:
    architecture, model, _ = example(name)
    assert not model.training
    assert architecture.has_biases == any(key.endswith("bias") for key, _ in model.named_parameters())
    assert not any(module.p for module in model.modules() if isinstance(module, nn.Dropout))
    dropped = architecture.build(architecture.heads[0], dropout=0.25)
    torch.manual_seed(0)
    before = architecture.output(run(architecture, dropped.train()))
    assert not torch.equal(before, architecture.output(run(architecture, dropped)))
    assert architecture.build(architecture.heads[0], dtype=torch.bfloat16).dtype == torch.bfloat16


def test_building_is_fast() -> None:
    architecture = ARCHITECTURES["llama"]
    architecture.build("language")
    start = time.perf_counter()
    for seed in range(10):
        architecture.build("language", seed=seed)
    assert (time.perf_counter() - start) / 10 < 0.1
