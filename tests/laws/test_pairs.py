"""Laws 4, 5, 7 and 8 for sums: every pair of methods on six architectures, and gates of every triple of mechanisms.

At every commit each method is tested with one other on one architecture; ``make test-slow`` runs all. How many there
are, and which cannot be and why: ``python -m tests.laws.pairs``.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import deltune
from deltune.errors import MethodError, StateError
from deltune.methods import parse
from tests.laws.cases import can_be_routed, sides, take_steps
from tests.laws.pairs import ENTRIES, ONE_LENGTH, PAIRS, TRIPLES, Combined
from tests.laws.test_batches import TOLERANCE, generated, prompt_paddings


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, atol=TOLERANCE * float(other.abs().max().clamp(min=1)))


def perturb(tuned: deltune.Tuned, name: str) -> None:
    """Give everything that an attachment trains other values."""
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for _, value in tuned.attachments[name].parameters():
            value.add_(0.1 * torch.randn(value.shape, generator=generator).to(value))


def trained(case: Combined) -> deltune.Tuned:
    """Attached and trained a little."""
    tuned = case.attach(case.build())
    take_steps(tuned, case, case.batch(), steps=2)
    return tuned


def law_4_padding(case: Combined) -> None:
    if "base" in case.architecture.heads and not case.architecture.generates:
        case = replace(case, tested_head="base")
    tuned = trained(case)
    for side in sides(case.architecture):
        batch = case.batch(padding=side)
        together = case.output(tuned.model, batch)
        for row in range(together.shape[0]):
            alone = case.output(tuned.model, case.architecture.alone(batch, row))[0]
            mine = together[row]
            if case.head != "classification":
                mine = mine[case.architecture.real(batch)[row]]
            assert close(mine, alone), (side, row)


def law_4_routing(case: Combined) -> None:
    tuned = trained(case)
    torch.manual_seed(2)
    tuned.attach(case.method, name="other")
    take_steps(tuned, case, case.batch(seed=1), steps=2)
    batch = case.batch()
    alone = {}
    for name in ("default", "other"):
        tuned.activate(name)
        alone[name] = case.output(tuned.model, batch)
    route: list[str | None] = ["other", None, "default"]
    with tuned.disabled():
        alone[None] = case.output(tuned.model, batch)
    if case.has_prompt and case.architecture.name in ONE_LENGTH:
        route = ["other", "default", "other"]
    with tuned.routed(route[row % 3] for row in range(len(alone["other"]))):
        together = case.output(tuned.model, batch)
    for row in range(len(together)):
        assert close(together[row], alone[route[row % 3]][row]), row
    assert not torch.allclose(alone["default"], alone["other"])


def law_5(case: Combined) -> None:
    tuned = trained(case)
    for padding in prompt_paddings(case.architecture):
        prompt = case.architecture.prompt(case.batch(padding=padding))
        for options in ({"do_sample": False}, {"do_sample": False, "num_beams": 2}):
            cached, uncached = (generated(tuned.model, prompt, use_cache=use, **options) for use in (True, False))
            assert torch.equal(cached, uncached), (padding, options)


def law_7(case: Combined, folder: Path) -> None:
    tuned, batch = trained(case), case.batch()
    before = case.output(tuned.model, batch)
    tuned.save(folder)
    loaded = deltune.load(case.build(), folder)
    assert torch.equal(case.output(loaded.model, batch), before)
    again = deltune.load(case.build(), loaded.save(folder / "again"))
    assert torch.equal(case.output(again.model, batch), before)


def law_8(case: Combined) -> None:
    """Attached together under two names they are their sum; without one they are the other."""
    batch = case.batch()
    torch.manual_seed(1)
    together = deltune.attach(case.build(), case.parts[0], name="0", train_head=False)
    together.attach(case.parts[1], name="1", train_head=False)
    alone = {}
    for name in "01":
        perturb(together, name)
        together.activate(name)
        alone[name] = case.output(together.model, batch)
    together.activate("0", "1")
    summed = deltune.attach(case.build(), " + ".join(case.parts), train_head=False)
    values = dict(summed.attachments["default"].selection)
    with torch.no_grad():
        for name in "01":
            attachment = together.attachments[name]
            for key, form in attachment.forms.items():
                own = summed.attachments["default"].forms[f"{name}.{key}"]
                own.load_state_dict(form.state_dict())
            for key, value in attachment.selection:
                values[key].copy_(value)
    both = case.output(together.model, batch)
    assert close(case.output(summed.model, batch), both)
    assert not torch.equal(both, alone["0"])
    assert not torch.equal(both, alone["1"])
    with together.disabled():
        bare = case.output(together.model, batch)
    assert torch.equal(case.output(case.build(), batch), bare)


@pytest.mark.parametrize("case", PAIRS)
def test_pairs_keep_the_laws(case: Combined, tmp_path: Path) -> None:
    shared = case.shared()
    if case.replaces or (shared and case.disagree):
        with pytest.raises(
            (MethodError, StateError), match=r"Attach .* alone|cannot be active together|two parts select"
        ):
            case.output(case.attach(case.build()).model, case.batch())
        return
    law_4_padding(case)
    if can_be_routed(parse(case.method)):
        law_4_routing(case)
    if case.architecture.generates:
        law_5(case)
    law_7(case, tmp_path)
    if shared and all(name not in ENTRIES for name in case.names):
        with pytest.raises(StateError, match="both have their own value"):
            law_8(case)
    else:
        law_8(case)


@pytest.mark.parametrize("case", TRIPLES)
def test_gated_triples_keep_the_laws(case: Combined, tmp_path: Path) -> None:
    law_4_padding(case)
    law_4_routing(case)
    if case.architecture.generates:
        law_5(case)
    law_7(case, tmp_path)
