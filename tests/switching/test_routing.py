"""Which attachment takes which row of a batch, with its own head; several tasks in one pass.

The law that a routed batch equals each row alone is tested on every architecture in tests/laws/test_batches.py.
"""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import StateError
from tests.methods.common import build, output
from tests.zoo import ARCHITECTURES

METHOD = "lora(rank=2, alpha=4, targets='attention.* layers=1:')"


def two_tasks(name: str = "bert", head: str = "classification", method: str = METHOD) -> tuple[deltune.Tuned, Any]:
    """Two attachments whose forms and heads differ, and a batch of three rows."""
    model = build(name, head)
    batch = ARCHITECTURES[name].batch(head=head)
    tuned = deltune.attach(model, method, "a")
    tuned.attach(method, "b")
    torch.manual_seed(0)
    for attachment in tuned.attachments.values():
        for _, parameter in attachment.parameters():
            parameter.data.normal_(std=0.3)
    return tuned, batch


def alone(tuned: deltune.Tuned, batch: Any, name: str) -> Tensor:
    tuned.activate(name)
    return output(tuned.model, batch)


def test_each_row_has_the_head_of_its_attachment() -> None:
    tuned, batch = two_tasks()
    a, b = alone(tuned, batch, "a"), alone(tuned, batch, "b")
    with tuned.disabled():
        bare = output(tuned.model, batch)
    with tuned.routed(["b", None, "a"]):
        mixed = output(tuned.model, batch)
    for row, expected in enumerate((b[0], bare[1], a[2])):
        assert torch.allclose(mixed[row], expected, atol=1e-6)
    assert not torch.allclose(a, b, atol=1e-2)


def test_a_route_ends_where_it_began_and_can_be_changed_in_between() -> None:
    tuned, batch = two_tasks()
    before = alone(tuned, batch, "a")
    tuned.route(["a", "b", "b"])
    first = output(tuned.model, batch)
    tuned.route(["b", "a", "b"])
    second = output(tuned.model, batch)
    tuned.route(["a", "b", "b"])
    assert torch.equal(output(tuned.model, batch), first)
    assert not torch.equal(first, second)
    tuned.route(None)
    assert tuned.active == ("a",)
    assert torch.equal(output(tuned.model, batch), before)
    keys = set(tuned.model.state_dict())
    assert not any("head_" in key for key in keys)


def test_a_batch_twice_as_long_repeats_each_entry() -> None:
    tuned, batch = two_tasks()
    twice = {key: value.repeat_interleave(2, 0) for key, value in batch.items()}
    with tuned.routed(["b", None, "a"]):
        mixed, longer = output(tuned.model, batch), output(tuned.model, twice)
    assert torch.allclose(longer[::2], mixed, atol=1e-6)
    assert torch.allclose(longer[1::2], mixed, atol=1e-6)


def test_routed_beam_search_equals_each_row_alone() -> None:
    tuned, _ = two_tasks("llama-gqa", "language")
    prompt = ARCHITECTURES["llama-gqa"].prompt(ARCHITECTURES["llama-gqa"].batch(head="language"))
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 3, "do_sample": False}
    expected = {}
    for name in ("a", "b"):
        tuned.activate(name)
        expected[name] = tuned.model.generate(**prompt, **options)
    assert not torch.equal(expected["a"], expected["b"])
    with tuned.routed(["a", "b", "a"]):
        mixed = tuned.model.generate(**prompt, **options)
    for row, name in enumerate("aba"):
        assert torch.equal(mixed[row], expected[name][row])


def test_training_a_routed_batch_gives_each_attachment_the_gradient_of_its_rows() -> None:
    tuned, batch = two_tasks()
    expected = {}
    for name, row in (("a", 0), ("b", 1)):
        tuned.activate(name)
        tuned.model.zero_grad()
        ARCHITECTURES["bert"].output(tuned.model(**batch))[row].square().sum().backward()
        expected[name] = {key: value.grad.clone() for key, value in tuned.attachments[name].parameters()}
    tuned.route(["a", "b", None])
    for parameter in tuned.trainable_parameters():
        parameter.grad = None
    ARCHITECTURES["bert"].output(tuned.model(**batch))[:2].square().sum().backward()
    for name, gradients in expected.items():
        for key, value in tuned.attachments[name].parameters():
            assert torch.allclose(value.grad, gradients[key], atol=1e-5), (name, key)
    assert {id(value) for value in tuned.trainable_parameters()} == {
        id(value) for name in "ab" for _, value in tuned.attachments[name].parameters()
    }


def test_a_routed_model_can_be_copied_pickled_and_used_by_threads() -> None:
    tuned, batch = two_tasks()
    tuned.route(["b", "a", None])
    expected = output(tuned.model, batch)
    assert torch.equal(output(copy.deepcopy(tuned.model), batch), expected)
    assert torch.equal(output(pickle.loads(pickle.dumps(tuned.model)), batch), expected)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(output(tuned.model, batch))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(item, expected) for item in found)
    assert len(found) == 4


def test_heads_of_routed_attachments_move_with_the_model() -> None:
    tuned, batch = two_tasks()
    tuned.route(["b", "a", None])
    tuned.model.to(torch.bfloat16)
    assert output(tuned.model, batch).dtype == torch.bfloat16


def test_heads_follow_a_model_that_was_moved_while_they_were_off() -> None:
    tuned, batch = two_tasks()
    tuned.model.to(torch.bfloat16)
    expected = [alone(tuned, batch, name) for name in ("b", "a")]
    tuned.model.to(torch.float64)
    with tuned.routed(["b", "a", "a"]):
        mixed = output(tuned.model, batch)
    assert mixed.dtype == torch.float64
    assert torch.allclose(mixed[0], expected[0][0].double(), atol=0.1)
    assert torch.allclose(mixed[1:], expected[1][1:].double(), atol=0.1)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "vit", "modernbert"])
def test_one_pass_over_several_tasks_equals_a_pass_for_each(name: str) -> None:
    tuned, batch = two_tasks(name, "classification")
    expected = torch.stack([alone(tuned, batch, task) for task in ("b", "a")])
    calls: dict[int, int] = {}
    layers = [tuned.model.get_submodule(layer) for layer in next(iter(tuned.anatomy.stacks.values())).layers]
    handles = [
        layer.register_forward_hook(
            lambda module, args, result, index=index: calls.__setitem__(
                index, (result if isinstance(result, Tensor) else result[0]).shape[0]
            )
        )
        for index, layer in enumerate(layers)
    ]
    with tuned.one_pass("b", "a"):
        together = output(tuned.model, batch)
    for handle in handles:
        handle.remove()
    assert torch.allclose(together.view_as(expected), expected, atol=1e-5)
    rows = expected.shape[1]
    assert calls == {0: rows, **dict.fromkeys(range(1, len(layers)), 2 * rows)}
    assert torch.equal(alone(tuned, batch, "a"), expected[1])


def test_one_pass_shares_what_drop_layers_leaves_bare() -> None:
    tuned, batch = two_tasks(method="lora(rank=2, alpha=4)")
    tuned.drop_layers(1)
    expected = torch.stack([alone(tuned, batch, task) for task in ("a", "b")])
    seen: list[int] = []
    layer = tuned.model.get_submodule(tuned.anatomy.stacks["encoder"].layers[0])
    handle = layer.register_forward_hook(lambda module, args, result: seen.append(len(args[0])))
    with tuned.one_pass("a", "b"):
        together = output(tuned.model, batch)
    handle.remove()
    assert torch.allclose(together.view_as(expected), expected, atol=1e-5)
    assert seen == [3]


def test_what_cannot_be_routed_says_so() -> None:
    tuned, batch = two_tasks()
    with pytest.raises(StateError, match="Nothing is attached"):
        tuned.route(["c"])
    with pytest.raises(StateError, match="not 'a'"):
        tuned.route("a")
    with pytest.raises(StateError, match="list with a name"):
        tuned.route([])
    tuned.attach("bitfit", "biases")
    with pytest.raises(StateError, match="all rows of a batch go through"):
        tuned.route(["biases", None])
    assert tuned.active == ("biases",)
    tuned.route(["a", "b"])
    with pytest.raises(StateError, match="routed to 2 attachments, but something in the model has 3 rows"):
        tuned.model(**batch)
    with pytest.raises(StateError, match="end routing"):
        tuned.merge()
    tuned.activate("a")
    assert tuned.control.route == ()
    t5 = deltune.attach(build("t5"), "lora")
    with pytest.raises(StateError, match="one stack"), t5.one_pass("default"):
        pass
    tuned.attach("prompt-tuning(length=2)", "prompt")
    with pytest.raises(StateError, match="before the layers"), tuned.one_pass("prompt"):
        pass
    assert tuned.active == ("prompt",)


def test_detaching_while_routed_leaves_the_bare_model() -> None:
    model = build("bert", "classification")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    before, keys = output(model, batch), list(model.state_dict())
    tuned = deltune.attach(model, METHOD, "a")
    tuned.attach(METHOD, "b")
    tuned.route(["a", "b", None])
    tuned.detach()
    assert torch.equal(output(model, batch), before)
    assert list(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("method", ["lora", "bitfit", "prompt-tuning(length=2)"])
def test_nothing_is_attached_below_what_replaces_the_states_without_a_gradient(method: str) -> None:
    model = build("bert", "classification")
    with pytest.raises(StateError, match="would learn nothing beside it"):
        deltune.attach(model, f"attention-fusion + {method}")
    tuned = deltune.attach(model, "attention-fusion", "fusion")
    tuned.attach(method, "other", train_head=False)
    with pytest.raises(StateError, match="Attach attention-fusion alone"):
        tuned.activate("fusion", "other")
    assert tuned.active == ("other",)
