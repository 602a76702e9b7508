"""Laws 4 and 5: padding and batch mates change nothing; cached generation equals uncached generation."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from deltune.errors import StateError
from deltune.methods import parse
from deltune.sites import Insertion
from tests.laws.cases import GENERATES, METHODS, PADS, Case, Only, can_be_routed, cases, sides, take_steps
from tests.zoo import Architecture

TOLERANCE = 2e-5


@pytest.mark.parametrize(("case", "side"), cases(architectures=PADS, paddings=sides))
def test_a_row_does_not_depend_on_padding_or_batch_mates(case: Case, side: Any) -> None:
    architecture = case.architecture
    if "base" in architecture.heads and not architecture.generates:
        case = replace(case, tested_head="base")  # every position, not only the one that a task head reads
    model = case.build()
    tuned = case.attach(model)
    take_steps(tuned, case, case.batch())
    batch = case.batch(padding=side)
    together = case.output(model, batch)
    for row in range(together.shape[0]):
        alone = case.output(model, architecture.alone(batch, row))[0]
        mine = together[row]
        if case.head != "classification":
            mine = mine[architecture.real(batch)[row]]
        assert torch.allclose(mine, alone, atol=TOLERANCE * float(alone.abs().max().clamp(min=1))), row


ROUTED = Only("it trains parameters of the model that all rows go through", can_be_routed)
ROWS_EVERYWHERE = Only(
    "its matrices of queries and keys read a table of relative positions too, which has no rows of the batch",
    lambda architecture: architecture.name != "deberta-v2",
)


#: Without positions or a mask that could tell, no row can have fewer prompt rows than the others.
ONE_LENGTH = ("bart", "vit", "clip", "clip-text", "clip-vision", "clip-image", "blip", "blip-caption")


@pytest.mark.parametrize("case", cases(methods=ROUTED, architectures=ROWS_EVERYWHERE))
def test_a_routed_batch_equals_each_row_alone(case: Case) -> None:
    model = case.build()
    tuned = case.attach(model, name="first")
    batch = case.batch()
    take_steps(tuned, case, batch)
    torch.manual_seed(2)
    tuned.attach(METHODS[case.method], name="second")
    take_steps(tuned, case, case.batch(seed=1))  # other data, because some methods start without random numbers
    rows = len(case.output(model, batch))
    route = [("second", None, "first")[row % 3] for row in range(rows)]
    alone = {}
    for name in ("first", "second"):
        tuned.activate(name)
        alone[name] = case.output(model, batch)
    with tuned.disabled():
        alone[None] = case.output(model, batch)
    tuned.activate("first")
    if parse(METHODS[case.method]).insertion is Insertion.TOKENS and case.architecture.name in ONE_LENGTH:
        with tuned.routed(route), pytest.raises(StateError, match="different lengths"):
            case.output(model, batch)
        route = [("second", "first")[row % 2] for row in range(rows)]
    with tuned.routed(route):
        together = case.output(model, batch)
    for row, name in enumerate(route):
        expected = alone[name][row]
        assert torch.allclose(together[row], expected, atol=TOLERANCE * float(expected.abs().max().clamp(min=1))), name
    assert not torch.allclose(alone["first"], alone["second"])
    assert torch.equal(case.output(model, batch), alone["first"])  # all is as before


def generated(model: Any, prompt: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
    torch.manual_seed(5)
    prompt = {name: value.clone() for name, value in prompt.items()}  # BLIP writes into it
    result: torch.Tensor = model.generate(**prompt, max_new_tokens=6, min_new_tokens=6, **options)
    return result


def prompt_paddings(architecture: Architecture) -> tuple[str, ...]:
    """Prompts are padded on the left. Also where the bare model changes with it: cached or not is all the same."""
    return ("none", "left") if architecture.pads else ("none",)


MODES = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}
#: What changes each position by itself knows nothing of caches, rows and beams: one way of generating tests it.
BY_POSITION = (Insertion.WEIGHT, Insertion.PARALLEL, Insertion.SEQUENTIAL, Insertion.SELECT)


@pytest.mark.parametrize(("case", "padding"), cases(architectures=GENERATES, paddings=prompt_paddings))
def test_cached_generation_equals_uncached(case: Case, padding: Any) -> None:
    model = case.build()
    tuned = case.attach(model)
    take_steps(tuned, case, case.batch())
    prompt = case.architecture.prompt(case.batch(padding=padding))
    for mode, options in MODES.items():
        if mode != "greedy" and parse(METHODS[case.method]).insertion in BY_POSITION:
            continue
        cached = generated(model, prompt, use_cache=True, **options)
        uncached = generated(model, prompt, use_cache=False, **options)
        assert torch.equal(cached, uncached), mode
        assert cached.shape[0] == prompt[next(iter(prompt))].shape[0]


def ends(model: Any) -> int:
    """The token that ends a text; -1 if there is none."""
    end = model.generation_config.eos_token_id
    return -1 if end is None else int(end)


PLAIN_PROMPTS = Only(
    "does not generate, or (BLIP) changes the prompt it is given: first token replaced, last one dropped",
    lambda architecture: architecture.generates and architecture.kind != "text-vision",
)


@pytest.mark.parametrize("case", cases(architectures=PLAIN_PROMPTS))
def test_generation_agrees_with_the_forward_pass(case: Case) -> None:
    """Each greedy token is the argmax of one uncached forward pass over what came before."""
    model = case.build()
    tuned = case.attach(model)
    take_steps(tuned, case, case.batch())
    prompt = case.architecture.prompt(case.batch(batch_size=2))
    tokens = generated(model, prompt, do_sample=False)
    if case.architecture.kind == "encoder-decoder":
        start_token = model.config.decoder_start_token_id
        if tokens[0, 0] != start_token:  # Whisper leaves it out
            tokens = torch.cat([torch.full_like(tokens[:, :1], start_token), tokens], dim=1)
        batch = {**case.batch(batch_size=2), "decoder_input_ids": tokens[:, :-1]}
        logits = case.output(model, batch)
        expected = logits.argmax(-1)[:, -1]
    else:
        start = prompt["input_ids"].shape[1]
        logits = model(input_ids=tokens[:, :-1]).logits
        expected = logits.argmax(-1)[:, -1]
        assert tokens.shape[1] == start + 6
    top = logits[:, -1].topk(2).values
    # generation is told to go on, so that it never takes the end
    clear = ((top[:, 0] - top[:, 1]) > 1e-4) & (expected != ends(model))
    assert torch.equal(expected[clear], tokens[:, -1][clear])
