"""DyLoRA: runs that were stopped, copies, sizes, and what is refused."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError, StateError
from deltune.tuned import HANDLE
from tests.methods.common import attached, build, loss_of, output, relative_error
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.test_dylora import ALL, draw, fill, forms_of, gradients, plain_lora, toy, toy_batches
from tests.training import tiny
from tests.training.test_fit import StopAt, run

# -- resuming --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", ["", ", update=nested, distribution=geometric, dropout=0.2", ", leak=true, rank_seed=4"]
)
def test_a_stopped_run_ends_in_the_same_bits(options: str, tmp_path: Path) -> None:
    method = f"dylora(rank=4, {ALL}{options})"
    settings = {"gradient_accumulation": 2, "evaluate_every": 3, "save_every": 2, "epochs": 3, "patience": 5}
    whole = tiny.classifier(method)
    expected = run(whole, output=tmp_path / "whole", settings=settings)
    assert expected.steps == 12
    for seed, step in enumerate((1, 5, 9)):
        with pytest.raises(KeyboardInterrupt):
            run(
                tiny.classifier(method, seed=seed),
                output=tmp_path / "stopped",
                settings=settings,
                callbacks=[StopAt(step)],
            )
    last = tiny.classifier(method, seed=99)
    result = run(last, output=tmp_path / "stopped", settings=settings)
    assert tiny.equal(tiny.weights(last), tiny.weights(whole))
    assert (result.metrics, result.history) == (expected.metrics, expected.history)
    files = [tmp_path / name / "delta.safetensors" for name in ("whole", "stopped")]
    assert files[0].read_bytes() == files[1].read_bytes()
    # a run that has ended is read, not done again
    again = tiny.classifier(method, seed=7)
    run(again, output=tmp_path / "whole", settings=settings)
    assert tiny.equal(tiny.weights(again), tiny.weights(whole))


def test_the_choice_of_rank_is_of_evaluation_and_of_the_file_alone(tmp_path: Path) -> None:
    """Training is the same, whichever rank is evaluated meanwhile; the file is a LoRA of that rank."""
    found = []
    for rank in (4, 1):
        tuned = tiny.classifier(f"dylora(rank=4, {ALL})")
        tuned.set_rank(rank)
        run(tuned, output=tmp_path / str(rank), settings={"steps": 6, "keep_best": False})
        found.append(tuned)
    assert tiny.equal(*(tiny.weights(tuned) for tuned in found))
    loaded = deltune.load(tiny.classifier("full").detach(), tmp_path / "1")
    assert str(loaded.attachments["default"].method).startswith("lora(rank=1")


def test_an_own_loop_goes_on_from_a_state_dict() -> None:
    start = toy()[0].model.state_dict()

    def begun() -> tuple[deltune.Tuned, torch.optim.Optimizer]:
        tuned, _ = toy()
        tuned.model.load_state_dict(start)
        tuned.model.train()
        return tuned, torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-2)

    def steps(
        tuned: deltune.Tuned, optimizer: torch.optim.Optimizer, batches: list[tuple[Tensor, Tensor]]
    ) -> list[int]:
        bound = tuned.bind(optimizer)
        (form,) = forms_of(tuned).values()
        ranks = []
        for x, target in batches:
            ranks.append(form.active)
            optimizer.zero_grad()
            (tuned.model(x) - target).square().mean().backward()
            optimizer.step()
        bound.remove()
        return ranks

    batches = toy_batches(10)
    whole, part, rest = begun(), begun(), begun()
    expected = steps(*whole, batches)
    ranks = steps(*part, batches[:4])
    for one, other in zip(rest, part, strict=True):
        state = copy.deepcopy(getattr(other, "model", other).state_dict())
        getattr(one, "model", one).load_state_dict(state)
    ranks += steps(*rest, batches[4:])
    assert ranks == expected
    assert tiny.equal(tiny.weights(rest[0]), tiny.weights(whole[0]))


# -- copies and recomputation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "gpt_neox", "t5"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_uses_the_rank_of_the_step(name: str, reentrant: bool) -> None:
    tuned, batch = attached(name, f"dylora(rank=4, {ALL})", dtype=torch.float64)
    fill(tuned)
    draw(tuned, 3)
    expected = gradients(tuned, batch)
    tuned.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    found = gradients(tuned, batch)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[key], value, rtol=1e-8, atol=1e-12) for key, value in expected.items())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_go_on_with_the_same_ranks(copied: Any) -> None:
    tuned, batch = attached("llama-gqa", f"dylora(rank=4, {ALL})", dtype=torch.bfloat16)
    tuned.model.train()

    def steps(handle: deltune.Tuned, count: int) -> list[int]:
        optimizer = torch.optim.SGD(handle.trainable_parameters(), lr=1.0)
        handle.bind(optimizer)
        ranks = []
        for _ in range(count):
            ranks.append(next(iter(forms_of(handle).values())).active)
            optimizer.zero_grad()
            loss_of(handle.model, batch).backward()
            optimizer.step()
        return ranks

    steps(tuned, 3)
    other = vars(copied(tuned.model))[HANDLE]
    assert other is not tuned
    assert steps(other, 4) == steps(tuned, 4)
    assert tiny.equal(tiny.weights(other), tiny.weights(tuned))
    assert any(form.B.any() for form in forms_of(other).values())


# -- the rest --------------------------------------------------------------------------------------------------


def test_published_counts() -> None:
    assert BERT_BASE.count("dylora") == 294_912
    assert BERT_BASE.count("dylora(rank=2)") == 73_728
    assert LLAMA.count("dylora") == 460_800
    assert LLAMA.count("dylora(rank=2)") == 115_200


def test_start_is_that_of_lora() -> None:
    one, _ = attached("bert", "dylora")
    other, _ = attached("bert", "lora")
    for dynamic, plain in zip(forms_of(one).values(), forms_of(other).values(), strict=True):
        assert torch.equal(dynamic.A, plain.A)
        assert not dynamic.B.any()


def test_an_embedding_can_be_cut_too() -> None:
    tuned, batch = attached("gemma2", "dylora(rank=4, alpha=6, targets=embeddings)")
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert torch.equal(output(tuned.model, batch), bare)
    (form,) = forms_of(tuned).values()
    nn.init.normal_(form.A, std=0.1)
    tuned.set_rank(3)
    other = deltune.attach(build("gemma2"), "lora(rank=3, alpha=6, targets=embeddings)")
    with torch.no_grad():
        forms_of(other)[next(iter(forms_of(tuned)))].A.copy_(form.A[:3])
        forms_of(other)[next(iter(forms_of(tuned)))].B.copy_(form.B[:, :3])
    assert relative_error(output(tuned.model, batch), output(other.model, batch)) < 1e-6
    draw(tuned, 3)
    assert relative_error(output(tuned.model, batch), output(other.model, batch)) < 1e-6


def test_ranks_that_cannot_be_chosen() -> None:
    tuned, _ = attached("bert", "dylora(rank=4)")
    for rank in (0, 5, -1, 2.5):
        with pytest.raises(MethodError, match="ranks 1 to 4"):
            tuned.set_rank(rank)  # type: ignore[arg-type]
    assert {form.chosen for form in forms_of(tuned).values()} == {4}
    with pytest.raises(MethodError, match="ranks 1 to 4"):
        next(iter(forms_of(tuned).values())).set_rank(5)
    tuned.attach("lora(rank=4)", "plain", train_head=False)
    with pytest.raises(MethodError, match="lora cannot be cut"):
        tuned.set_rank(2)
    tuned.set_rank(2, "default")
    assert {form.chosen for form in forms_of(tuned).values()} == {2}
    tuned.activate()
    with pytest.raises(StateError, match="default, plain"):
        tuned.set_rank(2)
    with pytest.raises(StateError, match="Nothing is attached"):
        tuned.set_rank(2, "other")
    with pytest.raises(MethodError, match="at most 32"):
        attached("bert", "dylora(rank=33)")
    with pytest.raises(MethodError, match="frozen"):
        deltune.DyLoRA(update="froze")
    # all or none of a sum
    both = deltune.attach(build("bert"), "dylora(rank=4) + dylora(rank=2, targets=ffn.up)")
    with pytest.raises(MethodError, match="ranks 1 to 2"):
        both.set_rank(3)
    both.set_rank(1)
    assert {form.chosen for form in forms_of(both).values()} == {1}


def test_two_of_different_ranks_on_one_model() -> None:
    tuned, batch = attached("bert", f"dylora(rank=4, alpha=6, {ALL})")
    fill(tuned)
    with tuned.disabled():
        bare = output(tuned.model, batch)
    tuned.attach(f"dylora(rank=3, {ALL})", "second", train_head=False)
    assert torch.equal(output(tuned.model, batch), bare)
    tuned.set_rank(1, "default")
    tuned.activate("default", "second")
    expected = output(plain_lora("bert", forms_of(tuned), 1, 6), batch)
    assert relative_error(output(tuned.model, batch), expected) < 1e-6
    tuned.activate("default", weights=(0.5,))
    half = output(plain_lora("bert", forms_of(tuned), 1, 3), batch)
    assert relative_error(output(tuned.model, batch), half) < 1e-6
