"""Prompts of several tasks, against the fact sheet: multitask prompt tuning, and the transfer of prompts (SPoT).

Of the sheet's invariants 1 to 6 are ATTEMPT's (test_attempt.py); here are 7 to 11. In tests/laws, over every
architecture: padding, cached generation, saving, which tensors train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import CheckpointError, MethodError, StateError
from deltune.methods.additive.multitask_prompt_tuning import MultitaskPrompt
from deltune.prompting import (
    mix_prompts,
    most_similar,
    prompt_similarity,
    read_prompt,
    separate_task,
    set_task,
    tasks_of_rows,
    transfer_weights,
)
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

SMALL = "multitask-prompt-tuning(length=3, tasks='rte,mnli,qqp')"
MODELS = ["bert", "gpt2", "llama-gqa", "t5"]


def form_of(tuned: deltune.Tuned) -> MultitaskPrompt:
    (form,) = tuned.attachments["default"].forms.values()
    assert isinstance(form, MultitaskPrompt)
    return form


def apart(tuned: deltune.Tuned, seed: int = 4) -> None:
    """Give every tensor of the forms a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in form_of(tuned).parameters():
            value.add_(torch.randn(value.shape, generator=generator).to(value))


# -- multitask prompt tuning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_invariant_07_the_prompt_is_the_shared_one_times_a_mask_of_low_rank(rank: int) -> None:
    tuned, _ = attached("gpt2", f"multitask-prompt-tuning(length=7, tasks='a,b', rank={rank})", dtype=torch.float64)
    apart(tuned)
    form = form_of(tuned)
    with torch.no_grad():
        for task in ("a", "b"):
            u, v = form.u[task], form.v[task]
            prompt = form.prompt(task)
            for p in range(7):
                for j in range(32):
                    mask = sum(u[p, s] * v[s, j] for s in range(rank))
                    assert abs(prompt[p, j] - form.shared[p, j] * mask) < 1e-12
            assert torch.linalg.matrix_rank(prompt / form.shared) == rank


@pytest.mark.parametrize("name", MODELS)
def test_invariant_07_each_row_of_a_batch_has_its_own_task(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    apart(tuned)
    alone = {}
    for task in ("rte", "mnli", "qqp"):
        set_task(tuned, task)
        alone[task] = output(tuned.model, batch)
    with tasks_of_rows(tuned, ["qqp", "rte", "qqp"]):
        together = output(tuned.model, batch)
    for row, task in enumerate(("qqp", "rte", "qqp")):
        assert relative_error(together[row], alone[task][row]) < 1e-5
    assert relative_error(alone["rte"], alone["qqp"]) > 1e-3
    assert torch.equal(output(tuned.model, batch), alone["qqp"])  # all is as before


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_invariant_07_also_in_beam_search_where_rows_are_repeated(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    apart(tuned)
    prompt = ARCHITECTURES[name].prompt(batch)
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 3}
    tasks = ["mnli", "rte", "qqp"]
    with tasks_of_rows(tuned, tasks):
        together = tuned.model.generate(**prompt, **options)
    for row, task in enumerate(tasks):
        set_task(tuned, task)
        alone = tuned.model.generate(**{key: value[row : row + 1] for key, value in prompt.items()}, **options)
        assert torch.equal(together[row], alone[0])


@pytest.mark.parametrize("name", MODELS)
def test_invariant_08_with_factors_of_one_it_is_prompt_tuning(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    plain, _ = attached(name, "prompt-tuning(length=3)")
    (prompt,) = plain.attachments["default"].forms.values()
    with torch.no_grad():
        prompt.rows.copy_(form_of(tuned).shared)  # type: ignore[operator, union-attr]
    for task in form_of(tuned).tasks:
        set_task(tuned, task)
        assert torch.equal(output(tuned.model, batch), output(plain.model, batch))


@pytest.mark.parametrize("rank", [1, 4])
def test_every_mask_starts_at_one_and_higher_ranks_can_grow(rank: int) -> None:
    tuned, batch = attached("gpt2", f"multitask-prompt-tuning(length=5, rank={rank})")
    form = form_of(tuned)
    assert torch.equal(form.prompt("0"), form.shared)
    train(tuned, batch, weight_decay=0)
    assert torch.linalg.matrix_rank(form.u["0"] @ form.v["0"], rtol=1e-6) == rank


def test_invariant_10_counts() -> None:
    for tasks in (1, 3, 6):
        method = f"multitask-prompt-tuning(length=100, tasks={tasks})"
        assert BERT_BASE.count(method) == 76_800 + 868 * tasks
        assert LLAMA.count(method) == 57_600 + 676 * tasks


@pytest.mark.parametrize("name", MODELS)
def test_invariant_11_a_task_as_a_plain_prompt_gives_the_same_bits(name: str, tmp_path: Path) -> None:
    """Its head too, where the model has one that trains."""
    tuned, batch = attached(name, SMALL)
    train(tuned, batch)
    apart(tuned)
    set_task(tuned, "mnli")
    expected = output(tuned.model, batch)
    state = torch.random.get_rng_state()
    separate_task(tuned, "mnli", "plain")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert tuned.active == ("plain",)
    assert torch.equal(output(tuned.model, batch), expected)
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build(name), tmp_path).model, batch), expected)
    assert torch.equal(read_prompt(tmp_path), form_of(tuned).prompt("mnli"))


def test_tasks_without_a_row_in_the_batch_do_not_move() -> None:
    tuned, batch = attached("gpt2", SMALL)
    form = form_of(tuned)
    start = {name: value.detach().clone() for name, value in form.named_parameters()}
    with tasks_of_rows(tuned, ["qqp", "rte", "rte"]):
        train(tuned, batch)
    for name, value in form.named_parameters():
        assert torch.equal(value, start[name]) == name.endswith("mnli"), name


def test_the_gradient_of_a_mixed_batch_is_the_sum_over_its_rows() -> None:
    tuned, batch = attached("gpt2", SMALL, dtype=torch.float64)
    apart(tuned)
    form, tasks = form_of(tuned), ["qqp", "rte", "qqp"]
    with tasks_of_rows(tuned, tasks):
        logits = tuned.model(**batch).logits
    direction = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (logits * direction).sum().backward()
    together = {name: value.grad for name, value in form.named_parameters()}
    tuned.model.zero_grad()
    for row, task in enumerate(tasks):
        set_task(tuned, task)
        single = {key: value[row : row + 1] for key, value in batch.items()}
        (tuned.model(**single).logits * direction[row]).sum().backward()
    for name, value in form.named_parameters():
        if name.endswith("mnli"):
            assert together[name] is None
        else:
            assert relative_error(together[name], value.grad) < 1e-10, name  # type: ignore[arg-type]


def test_the_live_task_is_saved_and_all_tasks_are_in_the_file(tmp_path: Path) -> None:
    tuned, batch = attached("gpt2", SMALL)
    apart(tuned)
    set_task(tuned, "qqp")
    tuned.save(tmp_path)
    assert len(load_file(tmp_path / "delta.safetensors")) == 1 + 2 * 3
    loaded = deltune.load(build("gpt2"), tmp_path)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    for both in (tuned, loaded):
        set_task(both, "mnli")
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


def test_what_does_not_fit_is_refused() -> None:
    tuned, batch = attached("gpt2", SMALL)
    with pytest.raises(MethodError, match=r"no task 'mnl'\. Did you mean 'mnli'"):
        set_task(tuned, "mnl")
    with pytest.raises(MethodError, match="no task 'x'"), tasks_of_rows(tuned, ["rte", "x"]):
        pass
    with pytest.raises(StateError, match="list with the name"), tasks_of_rows(tuned, "rte"):
        pass
    with tasks_of_rows(tuned, ["rte", "mnli"]), pytest.raises(StateError, match=r"2 tasks.*wanted for 3 rows"):
        output(tuned.model, batch)
    with pytest.raises(StateError, match="'other' is no attachment with several tasks"):
        set_task(tuned, "rte", "other")
    tuned.attach("lora(rank=1)", "lora")
    with pytest.raises(StateError, match=r"Say which.*default"):
        set_task(tuned, "rte")
    with pytest.raises(StateError, match="'lora' is no attachment"):
        separate_task(tuned, "rte", "plain", "lora")
    tuned.attach(f"{SMALL} + lora(rank=1)", "sum")
    set_task(tuned, "qqp")
    with pytest.raises(StateError, match="not all that 'sum' trains"):
        separate_task(tuned, "rte", "plain")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("tasks='a,a'", "different names"),
        ("tasks='a.b'", "cannot be named 'a.b'"),
        ("tasks='keys'", "cannot be named 'keys'"),
        ("tasks=0", "at least 1"),
        ("tasks='rte,mnli', current_task=rt", "Did you mean 'rte'"),
    ],
)
def test_tasks_that_make_no_sense_are_refused(options: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        deltune.methods.parse(f"multitask-prompt-tuning({options})")


# -- transfer ------------------------------------------------------------------------------------------------


def saved(folder: Path, name: str, seed: int, length: int = 3) -> str:
    """The folder of a prompt from its own seed, and its rows."""
    model = build(name)
    torch.manual_seed(seed)
    tuned = deltune.attach(model, f"prompt-tuning(length={length}, initialization=uniform)")
    return str(tuned.save(folder / f"{name}-{seed}-{length}"))


def rows_of(tuned: deltune.Tuned) -> torch.Tensor:
    (form,) = tuned.attachments["default"].forms.values()
    return (form.shared if isinstance(form, MultitaskPrompt) else form.rows).detach()  # type: ignore[return-value, operator]


def naive_cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    first = [sum(row[j] for row in one.tolist()) / len(one) for j in range(one.shape[1])]
    second = [sum(row[j] for row in other.tolist()) / len(other) for j in range(other.shape[1])]
    dot = sum(a * b for a, b in zip(first, second, strict=True))
    return float(dot / (sum(a * a for a in first) ** 0.5 * sum(b * b for b in second) ** 0.5))


def test_invariant_09_similarity_is_the_cosine_of_means() -> None:
    one, other = torch.randn(4, 6, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)
    assert prompt_similarity(one, other) == pytest.approx(naive_cosine(one, other), abs=1e-12)
    assert prompt_similarity(one, one) == pytest.approx(1, abs=1e-12)
    assert prompt_similarity(one, -3 * one) == pytest.approx(-1, abs=1e-12)
    with pytest.raises(MethodError, match=r"not \(4, 6\) and \(3, 5\)"):
        prompt_similarity(one, other[:, :5])


def test_invariant_09_retrieval_picks_the_greatest_cosine() -> None:
    torch.manual_seed(0)
    target, sources = torch.randn(4, 6), {str(number): torch.randn(4, 6) for number in range(8)}
    ranked = most_similar(target, sources)
    cosines = {name: naive_cosine(target, source) for name, source in sources.items()}
    assert ranked[0][0] == max(cosines, key=lambda name: cosines[name])
    assert [name for name, _ in ranked] == sorted(cosines, key=lambda name: -cosines[name])


def test_invariant_09_weights_are_not_negative_and_sum_to_one() -> None:
    weights = transfer_weights([0.5, -0.3, 0.25, 0.0])
    assert torch.allclose(weights, torch.tensor([2 / 3, 0, 1 / 3, 0], dtype=torch.float64), atol=1e-15)
    assert transfer_weights([0.5, 0.3, 0.2], nearest=2).tolist() == pytest.approx([0.625, 0.375, 0])
    assert transfer_weights([0.3, 0.3, 0.3], nearest=1).tolist() == [1, 0, 0]
    with pytest.raises(MethodError, match=r"No source prompt is similar.*-0\.100, -0\.200"):
        transfer_weights([-0.1, -0.2])


def test_invariant_09_the_mixture_is_the_weighted_sum() -> None:
    prompts = [torch.randn(3, 4, dtype=torch.float64) for _ in range(3)]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    for prompt, weight in zip(prompts, (0.6, 0.0, 0.2), strict=True):
        expected += weight * prompt / 0.8
    assert (mix_prompts(prompts, [0.6, -0.5, 0.2]) - expected).abs().max() < 1e-12
    assert torch.equal(mix_prompts(prompts, [0.6, 0.5, 0.7], nearest=1), prompts[2])
    with pytest.raises(MethodError, match="one shape"):
        mix_prompts([prompts[0], prompts[1][:2]], [1, 1])


@pytest.mark.parametrize("method", ["prompt-tuning", "multitask-prompt-tuning"])
def test_invariant_09_a_prompt_starts_as_the_most_similar_source_bit_for_bit(method: str, tmp_path: Path) -> None:
    sources = [saved(tmp_path, "t5", seed) for seed in range(4)]
    target = saved(tmp_path, "t5", 9, length=2)  # a task is compared by the mean of its rows, however many
    ranked = most_similar(read_prompt(target), {folder: read_prompt(folder) for folder in sources})
    assert ranked[0][1] > 0
    options = f"length=3, start_from='{','.join(sources)}', similar_to={target}"
    best, _ = attached("t5", f"{method}({options}, nearest=1)")
    assert torch.equal(rows_of(best), read_prompt(ranked[0][0]))
    mixed, _ = attached("t5", f"{method}({options})")
    similarities = dict(ranked)
    expected = mix_prompts([read_prompt(item) for item in sources], [similarities[item] for item in sources])
    assert torch.equal(rows_of(mixed), expected)


@pytest.mark.parametrize("method", ["prompt-tuning", "multitask-prompt-tuning"])
def test_several_sources_without_a_target_are_averaged(method: str, tmp_path: Path) -> None:
    sources = [saved(tmp_path, "bert", seed) for seed in range(3)]
    tuned, _ = attached("bert", f"{method}(length=3, start_from='{','.join(sources)}')")
    expected = sum(read_prompt(item).double() for item in sources) / 3
    assert (rows_of(tuned) - expected).abs().max() < 1e-7
    one, _ = attached("bert", f"{method}(length=3, start_from={sources[1]})")
    assert torch.equal(rows_of(one), read_prompt(sources[1]))


def test_invariant_11_a_transferred_prompt_is_saved_without_its_sources(tmp_path: Path) -> None:
    source = saved(tmp_path, "gpt2", 1)
    tuned, batch = attached("gpt2", f"prompt-tuning(length=3, start_from={source})")
    other = deltune.load(build("gpt2"), source)
    assert torch.equal(output(tuned.model, batch), output(other.model, batch))
    tuned.save(tmp_path / "target")
    (tmp_path / "gpt2-1-3").rename(tmp_path / "gone")
    loaded = deltune.load(build("gpt2"), tmp_path / "target")
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


def test_prompts_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = saved(tmp_path, "gpt2", 1)
    with pytest.raises(CheckpointError, match=r"\(3, 32\), but \(20, 32\) is wanted\. Use length=3"):
        attached("gpt2", f"prompt-tuning(start_from={source})")
    with pytest.raises(CheckpointError, match="trained on another model"):
        deltune.attach(build("gpt2", seed=1), f"prompt-tuning(length=3, start_from={source})")
    with pytest.raises(CheckpointError, match=r"no prompt for encoder\.embeddings: it holds decoder\.embeddings"):
        attached("bert", f"prompt-tuning(length=3, start_from={source})")
    with pytest.raises(CheckpointError, match=r"does not exist\. Did you mean gpt2-1-3"):
        attached("gpt2", f"prompt-tuning(length=3, start_from={source[:-1]})")
    lora, _ = attached("gpt2", "lora(rank=1)")
    lora.save(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="holds no prompt for one input: it holds none, and its method is lora"):
        read_prompt(tmp_path / "lora")


def test_a_related_source_beats_a_random_start_at_equal_steps(tmp_path: Path) -> None:
    """The source was trained for a direction of the output that is close to the target's."""

    def steps(method: str, turn: float, count: int) -> tuple[deltune.Tuned, float]:
        tuned, batch = attached("gpt2", method)
        optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=0.03)
        generator = torch.Generator().manual_seed(3)
        shape = tuned.model(**batch).logits.shape
        target = torch.randn(shape, generator=generator) + turn * torch.randn(shape, generator=generator)
        for _ in range(count):
            optimizer.zero_grad()
            loss = (tuned.model(**batch).logits - target).square().mean()
            loss.backward()
            optimizer.step()
        return tuned, float(loss.detach())

    source, _ = steps("prompt-tuning(length=3)", 0.0, 60)
    source.save(tmp_path)
    _, transferred = steps(f"prompt-tuning(length=3, start_from={tmp_path})", 0.3, 10)
    _, fresh = steps("prompt-tuning(length=3)", 0.3, 10)
    assert transferred < fresh


def test_nothing_but_the_prompt_and_its_factors_trains() -> None:
    tuned, batch = attached("t5", "multitask-prompt-tuning(length=3)")
    loss_of(tuned.model, batch).backward()
    shapes = [tuple(value.shape) for value in tuned.model.parameters() if value.grad is not None]
    assert sorted(shapes) == [(1, 32), (3, 1), (3, 32)]
