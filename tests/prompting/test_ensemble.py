"""Ensembles of prompts (invariant 10 of prompt tuning): one batch for all of them, and their vote."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError, StateError
from deltune.prompting import PromptEnsemble, compare_votes, majority_vote, repeated
from tests.methods.common import build, relative_error
from tests.zoo import ARCHITECTURES

SMALL = "prompt-tuning(length=3)"


def voted(*prompts: list[float]) -> int:
    """The vote of prompts on one row."""
    return int(majority_vote(torch.tensor(prompts, dtype=torch.float64)[:, None]))


def test_the_majority_wins_even_with_less_probability() -> None:
    assert voted([0.4, 0.6], [0.45, 0.55], [1.0, 0.0]) == 1


def test_of_equally_many_votes_the_greater_sum_wins() -> None:
    assert voted([0.9, 0.1], [0.4, 0.6]) == 0
    assert voted([0.6, 0.4], [0.1, 0.9]) == 1
    # votes 1, 1, 2 for classes 0, 1, 2 and the greatest sum for class 0, which has no majority
    assert voted([0.9, 0.1, 0.0], [0.1, 0.9, 0.0], [0.3, 0.3, 0.4], [0.3, 0.3, 0.4]) == 2


def test_of_equal_sums_the_first_class_wins() -> None:
    assert voted([0.25, 0.75, 0.0], [0.75, 0.25, 0.0]) == 0
    assert voted([0.0, 0.25, 0.75], [0.0, 0.75, 0.25]) == 1
    assert voted([0.5, 0.5], [0.5, 0.5]) == 0  # each votes for the first of its own ties


def test_the_vote_does_not_depend_on_the_order_of_the_prompts() -> None:
    probabilities = torch.randn(4, 50, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    expected = majority_vote(probabilities)
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        assert torch.equal(majority_vote(probabilities[order]), expected)


def test_the_vote_equals_counting_by_hand() -> None:
    probabilities = torch.randn(5, 40, 4, generator=torch.Generator().manual_seed(1)).softmax(-1).double()
    for row, winner in enumerate(majority_vote(probabilities).tolist()):
        votes = [max(range(4), key=lambda c: float(p[row, c])) for p in probabilities]
        ranking = [(-votes.count(c), -sum(float(p[row, c]) for p in probabilities), c) for c in range(4)]
        assert winner == min(ranking)[2]


def test_the_comparison_says_how_the_prompts_do_alone() -> None:
    # of three rows the prompts have right 2, 2 and 1, and their vote 3
    first = [[0.9, 0.1], [0.1, 0.9], [0.6, 0.4]]
    second = [[0.8, 0.2], [0.7, 0.3], [0.1, 0.9]]
    third = [[0.1, 0.9], [0.2, 0.8], [0.3, 0.7]]
    labels = torch.tensor([0, 1, 1])
    report = compare_votes(["a", "b", "c"], torch.tensor([first, second, third]), labels)
    assert report.single == pytest.approx({"a": 2 / 3, "b": 2 / 3, "c": 2 / 3})
    assert (report.vote, report.rows, report.best) == (1.0, 3, "a")
    assert report.mean == pytest.approx(2 / 3)
    assert str(report) == "vote 1.0000, best prompt a 0.6667, mean of 3 prompts 0.6667, on 3 rows"
    with pytest.raises(MethodError, match="2 names and 3 labels"):
        compare_votes(["a", "b"], torch.tensor([first, second, third]), labels)
    with pytest.raises(MethodError, match=r"not \(3, 2\)"):
        majority_vote(torch.tensor(first))


def test_a_batch_is_repeated_as_a_whole() -> None:
    batch = {"input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([0, 1]), "use_cache": False}
    again = repeated(batch, 2)
    assert again["input_ids"].tolist() == [[1, 2], [3, 4], [1, 2], [3, 4]]
    assert again["labels"].tolist() == [0, 1, 0, 1]
    assert again["use_cache"] is False


# -- on a model ----------------------------------------------------------------------------------------------


def ensemble(name: str, head: str | None = None, **options: Any) -> tuple[PromptEnsemble, dict[str, Tensor]]:
    made = PromptEnsemble(build(name, head), SMALL, count=3, **options)
    chosen: Any = head or ("language" if ARCHITECTURES[name].generates else "classification")
    batch = ARCHITECTURES[name].batch(batch_size=4, padding="right", head=chosen)
    return made, {**batch, "labels": ARCHITECTURES[name].labels(chosen, batch)}


def test_prompts_come_from_their_seeds() -> None:
    made, _ = ensemble("gpt2", seeds=(7, 8, 9))
    for name, seed in zip(made.names, (7, 8, 9), strict=True):
        torch.manual_seed(seed)
        alone = deltune.attach(build("gpt2"), SMALL)
        (ours,) = made.tuned.attachments[name].forms.values()
        (theirs,) = alone.attachments["default"].forms.values()
        assert torch.equal(ours.rows, theirs.rows)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "head"), [("gpt2", None), ("t5", None), ("bert", None), ("llama-gqa", "classification")]
)
def test_invariant_10_one_batch_equals_separate_runs(name: str, head: str | None) -> None:
    made, batch = ensemble(name, head)
    given = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad(), made.routed() as model:
        together = model(**repeated(given, 3)).logits
    for number, prompt in enumerate(made.names):
        made.tuned.activate(prompt)
        with torch.no_grad():
            alone = made.tuned.model(**given).logits
        part = together[number * 4 : (number + 1) * 4]
        if alone.dim() == 3 and name != "t5":
            real = ARCHITECTURES[name].real(batch)
            alone, part = alone[real], part[real]
        assert relative_error(part, alone) < 1e-5, prompt


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_invariant_10_training_together_is_training_alone(name: str) -> None:
    """The loss is the mean of the prompts' losses, each one's gradient its own divided by their number."""
    made, batch = ensemble(name)
    loss = made.loss(batch)
    loss.backward()
    together = [value.grad.clone() for value in made.parameters()]
    losses, alone = [], []
    for prompt in made.names:
        made.tuned.activate(prompt)
        made.tuned.model.zero_grad()
        single = made.tuned.model(**batch).loss
        single.backward()
        losses.append(float(single.detach()))
        alone += [value.grad.clone() for value in made.tuned.trainable_parameters()]
    assert float(loss.detach()) == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert len(together) == len(alone)
    for ours, theirs in zip(together, alone, strict=True):
        assert relative_error(3 * ours, theirs) < 1e-4


def test_predictions_are_the_vote_of_the_prompts() -> None:
    made, batch = ensemble("bert")
    probabilities = made.probabilities(batch)
    assert probabilities.shape == (3, 4, 3)
    assert torch.allclose(probabilities.sum(-1), torch.ones(3, 4))
    for number, prompt in enumerate(made.names):
        made.tuned.activate(prompt)
        with torch.no_grad():
            alone = made.tuned.model(**batch).logits.softmax(-1)
        assert torch.allclose(probabilities[number], alone, atol=1e-5)
    assert torch.equal(made.predict(batch), majority_vote(probabilities))


def test_labels_that_are_tokens_are_chosen_from_the_output() -> None:
    words = torch.tensor([20, 30])
    made, batch = ensemble("t5", scores=lambda output: output.logits[:, 0, words])
    assert made.probabilities(batch).shape == (3, 4, 2)
    plain, batch = ensemble("t5")
    with pytest.raises(StateError, match=r"\(rows, classes\) with 12 rows is wanted\. Pass scores="):
        plain.predict(batch)


def test_it_is_trained_evaluated_and_leaves_the_model_as_it_was() -> None:
    made, _ = ensemble("bert")
    model = made.tuned.model
    batches = []
    for seed in range(3):
        batch = ARCHITECTURES["bert"].batch(batch_size=6, seed=seed)
        batches.append({**batch, "labels": batch["input_ids"][:, 0] % 3})
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.02)
    model.train()
    losses = []
    for _ in range(15):
        for batch in batches:
            optimizer.zero_grad()
            loss = made.loss(batch)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert made.tuned.active == made.names
    report = made.evaluate(batches)
    assert model.training  # as before
    assert report.rows == 18
    assert report.vote == pytest.approx(
        sum(float((made.predict(batch) == batch["labels"]).sum()) for batch in batches) / 18
    )
    model.eval()
    for name, value in report.single.items():
        made.tuned.activate(name)
        right = sum(float((model(**batch).logits.argmax(-1) == batch["labels"]).sum()) for batch in batches)
        assert value == pytest.approx(right / 18)
    with pytest.raises(MethodError, match="nothing to evaluate"):
        made.evaluate([])
    with pytest.raises(StateError, match="no loss"):
        made.loss({"input_ids": batches[0]["input_ids"]})


def test_every_prompt_and_head_moves() -> None:
    made, batch = ensemble("bert")
    start = [value.detach().clone() for value in made.parameters()]
    assert len(start) == 3 * 3  # rows, and weight and bias of the head
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.02)
    made.loss(batch).backward()
    optimizer.step()
    assert all(not torch.equal(value, before) for value, before in zip(made.parameters(), start, strict=True))
    made.tuned.route(None)
    assert made.tuned.active == (made.names[-1],)  # as attaching left it


def test_what_is_no_ensemble_is_refused() -> None:
    model = build("gpt2")
    with pytest.raises(MethodError, match="two prompts or more"):
        PromptEnsemble(model, SMALL, count=1)
    with pytest.raises(MethodError, match="each from its own seed"):
        PromptEnsemble(model, SMALL, count=2, seeds=(1, 1))
    with pytest.raises(MethodError, match="lora adds nothing to the input"):
        PromptEnsemble(model, "lora", count=2)
    tuned = deltune.attach(model, "lora(rank=1)", "prompt-1")
    with pytest.raises(StateError, match="taken"):
        PromptEnsemble(tuned, SMALL, count=2)
    assert list(tuned.attachments) == ["prompt-1"]  # nothing is left behind
