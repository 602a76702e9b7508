"""AdapterDrop: changes of the lowest layers are left out, at inference or at random in training.

Numbers are those of the fact sheet's invariants. 7 (several tasks in one pass) is in test_routing.py; 8 and 9 concern
adapter fusion.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import deltune
from deltune.errors import StateError
from deltune.model_hooks import dropped_at
from tests.methods.common import build, output
from tests.training import tiny
from tests.zoo import ARCHITECTURES

METHOD = "sequential-adapter(width=4, standard_deviation=0.3, train_norms=false)"


def adapted(name: str = "bert", method: str = METHOD) -> tuple[deltune.Tuned, Any, int]:
    """Adapters on a random model of four layers, a batch, and the number of layers."""
    options = {"gpt2": {"n_layer": 4}}.get(name, {"num_hidden_layers": 4})
    model = build(name, "base" if "base" in ARCHITECTURES[name].heads else None, **options)
    torch.manual_seed(1)
    tuned = deltune.attach(model, method)
    return tuned, ARCHITECTURES[name].batch(), len(next(iter(tuned.anatomy.stacks.values())))


def states(tuned: deltune.Tuned, batch: Any) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return tuple(tuned.model(**batch, output_hidden_states=True).hidden_states)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_1_2_and_3_no_layer_every_layer_and_the_states_below(name: str) -> None:
    tuned, batch, layers = adapted(name)
    full = output(tuned.model, batch)
    with tuned.disabled():
        bare, bare_states = output(tuned.model, batch), states(tuned, batch)
    tuned.drop_layers(0)
    assert torch.equal(output(tuned.model, batch), full)
    tuned.drop_layers(layers)
    assert torch.equal(output(tuned.model, batch), bare)
    for count in range(layers):
        tuned.drop_layers(count)
        found = states(tuned, batch)
        for index in range(count + 1):
            assert torch.equal(found[index], bare_states[index])
        assert not torch.equal(found[-1], bare_states[-1])
    tuned.drop_layers(0)
    assert torch.equal(output(tuned.model, batch), full)


@pytest.mark.parametrize("count", [1, 3])
def test_4_dropping_equals_a_model_built_without_these_adapters(count: int) -> None:
    tuned, batch, _ = adapted()
    tuned.drop_layers(count)
    expected = output(tuned.model, batch)
    kept = dict(tuned.attachments["default"].parameters())
    smaller, _, _ = adapted(method=METHOD.replace(")", f", targets='attention,ffn layers={count}:')"))
    smaller.model.load_state_dict(
        {key: value for key, value in tuned.model.state_dict().items() if ".deltune." not in key}, strict=False
    )
    for key, value in smaller.attachments["default"].parameters():
        value.data.copy_(kept[key])
    assert torch.equal(output(smaller.model, batch), expected)


def test_5_nothing_below_the_lowest_adapter_has_a_graph() -> None:
    tuned, batch, _ = adapted()
    tuned.model.train()
    tuned.drop_layers(2)
    seen: dict[int, bool] = {}
    for index, name in enumerate(tuned.anatomy.stacks["encoder"].layers):
        tuned.model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, index=index: seen.__setitem__(index, args[0].requires_grad)
        )
    output_ = ARCHITECTURES["bert"].output(tuned.model(**batch))
    output_.square().mean().backward()
    assert seen == {0: False, 1: False, 2: False, 3: True}
    for key, value in tuned.attachments["default"].parameters():
        assert (value.grad is None) == (int(key.split(".")[1]) < 2), key


def test_6_the_draws_are_uniform_and_the_same_in_every_process() -> None:
    draws = 12_000
    for layers in (3, 12):
        counts = Counter(dropped_at(step, 7, layers) for step in range(draws))
        assert set(counts) == set(range(layers))
        assert all(abs(count / draws - 1 / layers) < 0.01 for count in counts.values())
    # fixed numbers, so that another process or machine would be seen to draw others
    assert [dropped_at(step, 0, 12) for step in range(8)] == EIGHT_DRAWS
    assert [dropped_at(step, 1, 12) for step in range(8)] != EIGHT_DRAWS


EIGHT_DRAWS = [6, 4, 3, 10, 1, 5, 1, 4]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_6_one_number_for_each_step_however_many_batches(checkpointing: bool) -> None:
    tuned, batch, layers = adapted()
    if checkpointing:
        tuned.model.gradient_checkpointing_enable()
    tuned.model.train()
    tuned.drop_layers_at_random(seed=3)
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=1e-3)
    tuned.bind(optimizer)
    for step in range(6):
        for _ in range(2):
            ARCHITECTURES["bert"].output(tuned.model(**batch)).square().mean().backward()
        expected = dropped_at(step, 3, layers)
        for key, value in tuned.attachments["default"].parameters():
            assert (value.grad is None) == (int(key.split(".")[1]) < expected), (step, key)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_10_evaluation_after_random_dropping_uses_every_layer() -> None:
    tuned, batch, _ = adapted()
    full = output(tuned.model.eval(), batch)
    tuned.drop_layers_at_random(seed=0)
    tuned.bind(torch.optim.SGD(tuned.trainable_parameters(), lr=0.0))
    tuned.model.train()
    numbers = set()
    for step in range(6):
        tuned.attachments["default"].steps = step
        tuned.model(**batch)
        numbers.add(tuned.control.dropped_in_training)
    assert len(numbers) > 1
    tuned.model.eval()
    assert torch.equal(output(tuned.model, batch), full)
    tuned.drop_layers_at_random(None)
    assert tuned.control.dropped_in_training == 0


def test_random_dropping_without_an_optimizer_says_what_to_do() -> None:
    tuned, batch, _ = adapted()
    tuned.drop_layers_at_random()
    tuned.model.train()
    with pytest.raises(StateError, match="bind"):
        tuned.model(**batch)


@pytest.mark.parametrize("count", [-1, 5, True, 1.0, "2"])
def test_a_number_of_layers_that_the_model_lacks_is_refused(count: Any) -> None:
    tuned, _, _ = adapted()
    with pytest.raises(StateError, match="0 to 4 of the lowest layers"):
        tuned.drop_layers(count)


def test_parameters_of_the_model_itself_cannot_be_dropped() -> None:
    tuned, _, _ = adapted(method="sequential-adapter(width=4)")
    with pytest.raises(StateError, match="train_norms=false"):
        tuned.drop_layers(1)
    with pytest.raises(StateError, match="train_norms=false"):
        tuned.drop_layers_at_random()
    tuned.drop_layers(0)


def test_fit_drops_layers_while_it_trains_and_leaves_the_handle_as_it_was() -> None:
    found = {}
    for dropping in (False, True):
        tuned = tiny.classifier("lora(rank=2)")
        settings = tiny.SETTINGS.updated(steps=4, drop_layers=dropping)
        deltune.fit(tuned, tiny.task(), tiny.reviews(32), tokenizer=tiny.tokenizer(), settings=settings)
        assert tuned.control.drop_seed is None
        assert tuned.control.dropped_in_training == 0
        found[dropping] = {key: value.detach().clone() for key, value in tuned.attachments["default"].parameters()}
    assert any(not torch.equal(found[False][key], found[True][key]) for key in found[True])
