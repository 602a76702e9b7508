"""What templates with pseudo tokens must keep of a model: the laws, of which tests/laws has the placement in front."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from transformers import FNetConfig, FNetForMaskedLM

import deltune
from deltune.errors import StateError, TargetError
from tests.laws.cases import sides
from tests.laws.test_unchanged import assert_same_picture, picture_of
from tests.methods.common import build, loss_of, output, relative_error
from tests.methods.templated import FRONT, READERS, TEMPLATE, attached, disturb, form_of, marked, name_of, templated
from tests.zoo import ARCHITECTURES, Architecture


@pytest.mark.parametrize("architecture", READERS, ids=name_of)
def test_detached_and_disabled_the_model_is_as_before(architecture: Architecture) -> None:
    head = "base" if "base" in architecture.heads else "language"
    model = architecture.build(head)  # type: ignore[arg-type]
    batch = architecture.batch(head=head)  # type: ignore[arg-type]
    picture = picture_of(model)
    with torch.no_grad():
        before = architecture.output(model(**batch))
        tuned = deltune.attach(model, TEMPLATE)
        model(**templated(architecture, head))
        with tuned.disabled():
            assert torch.equal(architecture.output(model(**batch)), before)
        tuned.detach()
        assert torch.equal(architecture.output(model(**batch)), before)
    assert_same_picture(picture_of(model), picture)


@pytest.mark.parametrize(("name", "side"), [(item.name, side) for item in READERS for side in sides(item)])
def test_a_row_does_not_depend_on_padding_or_batch_mates(name: str, side: Any) -> None:
    architecture = ARCHITECTURES[name]
    head = "base" if "base" in architecture.heads else "language"
    model = architecture.build(head)  # type: ignore[arg-type]
    torch.manual_seed(1)
    deltune.attach(model, TEMPLATE)
    batch = templated(architecture, head, padding=side)
    with torch.no_grad():
        together = architecture.output(model(**batch))
        for row in range(3):
            alone = architecture.output(model(**architecture.alone(batch, row)))[0]
            mine = together[row][architecture.real(batch)[row]]
            assert relative_error(mine, alone) < 2e-5


MODES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 20},
    "beams": {"do_sample": False, "num_beams": 3},
}


@pytest.mark.parametrize("padding", ["none", "left"])
@pytest.mark.parametrize("name", [item.name for item in READERS if item.generates and "text" in item.inputs])
def test_cached_generation_equals_uncached(name: str, padding: str) -> None:
    architecture = ARCHITECTURES[name]
    tuned, batch = attached(name, padding=padding)
    if name == "blip-caption":  # replaces the first token of its prompt, and drops the last
        batch = architecture.batch(head="language")
        batch["input_ids"] = marked(batch["input_ids"], batch["attention_mask"], (1, 2, 4))
    prompt = architecture.prompt(batch)
    for mode, options in MODES.items():
        found = []
        for use_cache in (True, False):
            torch.manual_seed(5)
            given = {key: value.clone() for key, value in prompt.items()}
            found.append(
                tuned.model.generate(**given, max_new_tokens=5, min_new_tokens=5, use_cache=use_cache, **options)
            )
        assert torch.equal(*found), mode


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral"])
def test_a_static_cache_works(name: str) -> None:
    """Nothing is longer than the model knows, unlike with rows in front."""
    tuned, batch = attached(name)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    static = tuned.model.generate(**batch, cache_implementation="static", disable_compile=True, **options)
    assert torch.equal(static, tuned.model.generate(**batch, **options))


def test_each_row_may_have_an_attachment_of_its_own() -> None:
    """Also with prompts of different lengths, and without one."""
    model = build("llama-gqa")
    torch.manual_seed(1)
    tuned = deltune.attach(model, TEMPLATE, name="three")
    tuned.attach("p-tuning(length=2, placement=template)", name="two")
    ids = ARCHITECTURES["llama-gqa"].batch()["input_ids"]
    everything = torch.ones_like(ids)
    rows = torch.stack([marked(ids, everything, (1, 2))[0], ids[1], marked(ids, everything)[2]])
    alone = []
    for row, name in ((0, "two"), (2, "three")):
        tuned.activate(name)
        alone.append(output(model, {"input_ids": rows[row : row + 1]})[0])
    with tuned.disabled():
        alone.insert(1, output(model, {"input_ids": rows[1:2]})[0])
    with tuned.routed(["two", None, "three"]):
        together = output(model, {"input_ids": rows})
        for row in range(3):
            assert relative_error(together[row], alone[row]) < 1e-5
        with pytest.raises(StateError, match=r"Row 2 .* has 3 pseudo tokens, but nothing that is active for it"):
            output(model, {"input_ids": torch.stack([rows[0], rows[2], rows[2]])})


def test_two_at_once_take_their_pseudo_tokens_in_order() -> None:
    model = build("llama-gqa")
    torch.manual_seed(1)
    tuned = deltune.attach(model, "p-tuning(length=1, placement=template)", name="one")
    tuned.attach("p-tuning(length=2, placement=template)", name="two")
    tuned.activate("one", "two")
    batch = templated(ARCHITECTURES["llama-gqa"], "language")
    together = output(model, batch)
    rows = torch.cat([form_of_name(tuned, "one")(), form_of_name(tuned, "two")()])
    single = deltune.attach(build("llama-gqa"), "p-tuning(length=3, placement=template, encoder=none)")
    with torch.no_grad():
        form_of(single).rows.copy_(rows)
    assert torch.equal(output(single.model, batch), together)


def form_of_name(tuned: deltune.Tuned, name: str) -> Any:
    (form,) = tuned.attachments[name].forms.values()
    return form


@pytest.mark.parametrize("other", ["lora(rank=2)", "prompt-tuning(length=2)", "prefix-tuning(length=2, width=4)"])
def test_sums_with_other_methods(other: str) -> None:
    """Prompt rows in front of a template, too: the ids are seen before they are embedded."""
    tuned, batch = attached("llama-gqa", f"{TEMPLATE} + {other}")
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
    with pytest.raises(StateError, match="has no pseudo tokens"):
        output(tuned.model, ARCHITECTURES["llama-gqa"].batch())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    tuned, batch = attached("llama-gqa")
    loss_of(tuned.model, batch).backward()
    plain = [value.grad.clone() for value in tuned.trainable_parameters()]  # type: ignore[union-attr]
    tuned.model.train()
    tuned.model.gradient_checkpointing_enable()
    tuned.model.zero_grad()
    loss_of(tuned.model, batch).backward()
    for value, wanted in zip(tuned.trainable_parameters(), plain, strict=True):
        assert relative_error(value.grad, wanted) < 1e-5  # type: ignore[arg-type]


def test_copies_and_pickles_are_independent() -> None:
    tuned, batch = attached("bert", head="language")
    expected = output(tuned.model, batch)
    for other in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        assert torch.equal(output(other, batch), expected)
        before = form_of(tuned).outer.bias.detach().clone()
        disturb(form_of(tuned))
        assert not torch.equal(output(tuned.model, batch), expected)
        assert torch.equal(output(other, batch), expected)
        with torch.no_grad():
            form_of(tuned).outer.bias.copy_(before)


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_compiles_into_one_graph(name: str) -> None:
    tuned, batch = attached(name, head="language")
    expected = output(tuned.model, batch)
    graphs = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        nonlocal graphs
        graphs += 1
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(tuned.model, backend=backend, fullgraph=True)(**batch).logits
    torch._dynamo.reset()
    assert graphs == 1
    assert torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["front", "template"])
def test_compiled_training_has_the_same_gradients(placement: str) -> None:
    tuned, batch = attached("bert", f"p-tuning(length=3, placement={placement})", head="language")
    if placement == "front":
        batch = ARCHITECTURES["bert"].batch(head="language")
    loss_of(tuned.model, batch).backward()
    plain = [value.grad.clone() for value in tuned.trainable_parameters()]  # type: ignore[union-attr]
    tuned.model.zero_grad()
    torch._dynamo.reset()
    loss_of(torch.compile(tuned.model, backend="aot_eager"), batch).backward()
    torch._dynamo.reset()
    for value, wanted in zip(tuned.trainable_parameters(), plain, strict=True):
        assert relative_error(value.grad, wanted) < 1e-4  # type: ignore[arg-type]


def test_models_that_nobody_has_described_read_templates_too() -> None:
    torch.manual_seed(0)
    config = FNetConfig(vocab_size=100, hidden_size=32, num_hidden_layers=1, intermediate_size=32)
    model = FNetForMaskedLM(config).eval()
    tuned = deltune.attach(model, TEMPLATE)
    assert not tuned.anatomy.stacks
    ids = torch.arange(10, 17).repeat(3, 1)
    batch = {"input_ids": marked(ids, torch.ones_like(ids))}
    first = output(model, batch)
    disturb(form_of(tuned))
    assert (output(model, batch) - first).abs().max() > 1e-4
    with pytest.raises(StateError, match="has no pseudo tokens"):
        output(model, {"input_ids": ids})
    with pytest.raises(TargetError):
        deltune.attach(FNetForMaskedLM(config), FRONT)


def test_a_table_may_be_chosen_by_its_name() -> None:
    for name, pattern in (("gpt2", "*.wte"), ("bert", "*.word_embeddings"), ("t5", "encoder.embed_tokens")):
        tuned, batch = attached(name, f"p-tuning(length=3, placement=template, targets={pattern})", head="language")
        expected, _ = attached(name, head="language")
        assert torch.equal(output(tuned.model, batch), output(expected.model, batch))


def test_the_head_of_a_language_model_is_not_trained() -> None:
    for architecture in ARCHITECTURES.values():
        if "language" in architecture.heads and "text" in architecture.inputs:
            tuned = deltune.attach(architecture.build("language"), TEMPLATE)
            assert tuned.summary().head_parameters == 0, architecture.name
