"""Very many attachments on one model: what the n-th costs, what those that are not live cost, what is left behind."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import TargetError
from tests.laws.test_unchanged import assert_same_picture, picture_of
from tests.methods.common import build, output
from tests.zoo import ARCHITECTURES

LORA = "lora(rank=2, alpha=4)"


def with_many(count: int, name: str = "bert", head: str = "base", method: str = LORA) -> tuple[deltune.Tuned, Any]:
    """So many attachments ``a0``, ``a1``, ... with random values, and a batch."""
    model = build(name, head)
    tuned = deltune.attach(model, method, "a0")
    for number in range(1, count):
        tuned.attach(method, f"a{number}")
    torch.manual_seed(0)
    for attachment in tuned.attachments.values():
        for _, parameter in attachment.form_parameters():
            parameter.data.normal_(std=0.2)
    return tuned, ARCHITECTURES[name].batch(head=head)  # type: ignore[arg-type]


def calls(action: Callable[[], object]) -> int:
    """How many functions, of Python and of C, an action calls: what it costs, without a clock."""
    found: Counter[str] = Counter()
    enabled = gc.isenabled()
    gc.disable()
    sys.setprofile(lambda frame, event, argument: found.update((event,)))
    try:
        action()
    finally:
        sys.setprofile(None)
        if enabled:
            gc.enable()
    return found["call"] + found["c_call"]


def disable(tuned: deltune.Tuned) -> None:
    with tuned.disabled():
        pass


#: What is done again and again where many attachments are served; each leaves things as they were.
ACTIONS: dict[str, Callable[[deltune.Tuned], object]] = {
    "activate": lambda tuned: (tuned.activate("a0"), tuned.activate("a3")),
    "disable": disable,
    "route": lambda tuned: (tuned.route(["a1", None, "a2"]), tuned.route(["a2", None, "a1"]), tuned.route(None)),
    "attach and detach": lambda tuned: (tuned.attach(LORA, "new"), tuned.detach("new"), tuned.activate("a3")),
}


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_the_cost_of_an_action_does_not_grow_with_the_number_of_attachments(name: str, action: str) -> None:
    few, many = (with_many(count, name)[0] for count in (5, 60))
    counts = []
    for tuned in (few, many):
        tuned.activate("a3")
        ACTIONS[action](tuned)  # what is imported or worked out once
        counts.append(calls(lambda tuned=tuned: ACTIONS[action](tuned)))
    assert counts[0] > 100
    assert counts[1] == counts[0]


def test_loading_costs_the_same_whatever_is_attached(tmp_path: Path) -> None:
    tuned, _ = with_many(3)
    folder = tuned.save(tmp_path, "a1")
    counts = []
    for count in (5, 60):
        many, _ = with_many(count)
        deltune.load(many, folder, "first")
        counts.append(calls(lambda many=many: deltune.load(many, folder, "second")))
    assert counts[1] == counts[0]


def test_what_is_not_live_costs_nothing_in_a_pass() -> None:
    """As many hooks and calls as if it were not there, also where it acts at other sites."""
    alone, batch = with_many(1)
    expected = calls(lambda: output(alone.model, batch))
    tuned, _ = with_many(8)
    for number, method in enumerate(("lora(targets='ffn.*')", "prefix-tuning(length=2)", "pfeiffer-adapter(width=2)")):
        tuned.attach(method, f"other{number}")
    tuned.activate("a0")
    assert picture_of(tuned.model)["hooks"] == picture_of(alone.model)["hooks"]
    assert calls(lambda: output(tuned.model, batch)) == expected


def test_five_hundred_work_and_leave_no_trace() -> None:
    model = build("bert", "classification")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    before, picture = output(model, batch), picture_of(model)
    method = "lora(rank=1, targets='attention.query layers=-1')"
    tuned = deltune.attach(model, method, "a0", train_head=False)
    for number in range(1, 500):
        tuned.attach(method, f"a{number}", train_head=False)
    for number, attachment in enumerate(tuned.attachments.values()):
        generator = torch.Generator().manual_seed(number)
        for _, parameter in attachment.form_parameters():
            parameter.data.normal_(generator=generator)
    chosen = [f"a{number}" for number in (499, 0, 257)]
    alone = []
    for row, name in enumerate(chosen):
        tuned.activate(name)
        alone.append(output(model, batch)[row])
    with tuned.routed(chosen):
        together = output(model, batch)
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)  # logits of 2, summed in another order
    assert (together - before).abs().max() > 1e-3
    with tuned.disabled():
        assert torch.equal(output(model, batch), before)
        assert_same_picture(picture_of(model), picture, but=("requires_grad", "attributes"))
    tuned.detach("a257")
    tuned.activate("a499")
    assert torch.equal(output(model, batch)[0], alone[0])
    assert sum("deltune" in key for key in model.state_dict()) == 2 * 499
    tuned.detach()
    assert torch.equal(output(model, batch), before)
    assert_same_picture(picture_of(model), picture)


def tensor_bytes() -> int:
    """Of all tensors that there are."""
    gc.collect()
    found = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    return sum({value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in found}.values())


def test_memory_holds_the_numbers_of_the_forms_and_no_others() -> None:
    tuned, batch = with_many(4)
    with torch.no_grad():
        tuned.model(**batch)
    before = tensor_bytes()
    own = sum(value.nbytes for _, value in tuned.attachments["a0"].parameters())
    for number in range(4, 24):
        tuned.attach(LORA, f"a{number}")
        tuned.activate("a1")
    assert tensor_bytes() - before == 20 * own
    tuned.route(["a5", "a6", "a7"])
    tuned.route(None)
    assert tensor_bytes() - before == 20 * own
    for number in range(4, 24):
        tuned.detach(f"a{number}")
    assert tensor_bytes() == before


def test_all_forms_move_and_change_their_mode_with_the_model_live_or_not() -> None:
    tuned, _ = with_many(3)
    forms = [form for attachment in tuned.attachments.values() for form in attachment.forms.values()]
    tuned.activate("a0")
    tuned.model.to(torch.float64)
    assert {value.dtype for form in forms for value in form.parameters()} == {torch.float64}
    tuned.model.train()
    assert all(form.training for form in forms)
    with tuned.disabled():
        tuned.model.eval()
    assert not any(form.training for form in forms)
    with tuned.disabled():
        tuned.model.train()
        tuned.attach(LORA, "new")
    assert all(form.training for form in forms)
    assert all(form.training for form in tuned.attachments["new"].forms.values())


def test_state_dict_names_attachments_in_the_order_of_attaching() -> None:
    tuned, _ = with_many(3)
    tuned.detach("a0")
    tuned.attach(LORA, "a0")
    tuned.activate("a2")
    keys = [key for key in tuned.model.state_dict() if "deltune" in key]
    assert list(dict.fromkeys(key.split("deltune.")[1].split(".")[0] for key in keys)) == ["a1", "a2", "a0"]
    assert len(keys) == sum(1 for attachment in tuned.attachments.values() for _ in attachment.parameters())


def test_merging_for_good_leaves_nothing_of_the_others() -> None:
    tuned, batch = with_many(4)
    tuned.activate("a2")
    expected = output(tuned.model, batch)
    model = tuned.merge(reversible=False)
    assert not tuned.attachments
    assert not any("deltune" in name for name, _ in model.named_modules())
    assert torch.allclose(output(model, batch), expected, atol=1e-5)
    tuned = deltune.attach(model, LORA, "a0")
    tuned.attach(LORA, "again")
    assert not any("a2" in name for name, _ in model.named_modules())


def test_copies_have_banks_of_their_own() -> None:
    tuned, batch = with_many(4)
    tuned.activate("a1")
    expected = output(tuned.model, batch)
    for model in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        handle = vars(model)["_deltune_handle"]
        handle.activate("a3")
        assert not torch.equal(output(model, batch), expected)
        handle.detach("a0")
        handle.activate("a1")
        assert torch.equal(output(model, batch), expected)
        handle.detach()
        assert not any("deltune" in name for name, _ in model.named_modules())
    assert list(tuned.attachments) == ["a0", "a1", "a2", "a3"]
    assert torch.equal(output(tuned.model, batch), expected)


def test_an_attachment_that_fails_leaves_the_others_live() -> None:
    tuned, batch = with_many(4)
    tuned.activate("a2")
    expected, picture = output(tuned.model, batch), picture_of(tuned.model)
    with pytest.raises(TargetError):
        tuned.attach("lora(targets='no.such.module')", "wrong")
    assert tuned.active == ("a2",)
    assert torch.equal(output(tuned.model, batch), expected)
    assert_same_picture(picture_of(tuned.model), picture)


def test_routed_heads_hold_the_values_of_their_attachments_and_no_copies() -> None:
    tuned, batch = with_many(3, head="classification")
    with torch.no_grad():
        for attachment in tuned.attachments.values():
            for _, value in attachment.selection:
                value.normal_()
    alone = []
    for row, name in enumerate(("a2", "a0", "a1")):
        tuned.activate(name)
        alone.append(output(tuned.model, batch)[row])
    before = tensor_bytes()
    tuned.route(["a2", "a0", "a1"])
    assert tensor_bytes() == before
    assert torch.allclose(output(tuned.model, batch), torch.stack(alone), atol=1e-6)
    heads = [module for name, module in tuned.model.named_modules() if name.rpartition(".")[2].startswith("head_")]
    assert len(heads) == 3 * len(tuned.anatomy.head)
    values = {id(value) for attachment in tuned.attachments.values() for _, value in attachment.selection}
    assert {id(value) for head in heads for value in head.parameters()} == values
    assert all(isinstance(head, nn.Module) for head in heads)
