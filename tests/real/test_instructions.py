"""Real chat models learn to answer in the form that the data ask for, and to stop there."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from deltune.tasks import InstructionTuning
from deltune.training import predict
from tests.assets import asset
from tests.real import texts
from tests.real.tuning import Lesson, Outcome, train

METHODS = ("lora", "prefix-tuning")


@pytest.fixture(scope="module", params=METHODS)
def answering(request: pytest.FixtureRequest, review_questions: Lesson) -> Outcome:
    """MiniMind2-Small, tuned to answer questions about reviews with one word."""
    return train(review_questions, request.param, 20, batch_size=4)


def prompts(lesson: Lesson, rows: int = 6) -> dict[str, Any]:
    """A batch of held-out prompts, padded on the left."""
    _, held_out = texts.review_questions(1, rows)
    encoded = lesson.task.encode(held_out, lesson.tokenizer, labelled=False)
    return dict(lesson.task.collator(lesson.tokenizer, padding_side="left")([encoded[row] for row in range(rows)]))


def answers(outcome: Outcome, lesson: Lesson, **options: Any) -> list[str]:
    _, held_out = texts.review_questions(1, 8)
    found = predict(outcome.tuned, lesson.task, held_out, lesson.tokenizer, max_new_tokens=10, **options)
    return [item["text"] for item in found]


def test_the_loss_on_held_out_answers_falls_far_below_the_untuned_models(answering: Outcome) -> None:
    # measured, per token: lora 3.21 to 0.21, prefix-tuning 3.07 to 0.43
    assert answering.before["loss"] > 2.5
    assert answering.after["loss"] < 0.25 * answering.before["loss"]


def test_answers_have_the_form_of_the_data_with_and_without_a_cache(
    answering: Outcome, review_questions: Lesson
) -> None:
    cached = answers(answering, review_questions)
    assert set(cached) <= set(texts.WORDS)
    assert answers(answering, review_questions, use_cache=False) == cached
    with answering.tuned.disabled():
        untuned = answers(answering, review_questions)
    assert not set(untuned) & set(texts.WORDS)


def test_generation_stops_at_the_learned_end(answering: Outcome, review_questions: Lesson) -> None:
    model, tokenizer, batch = answering.tuned.model, review_questions.tokenizer, prompts(review_questions)
    start = batch["input_ids"].shape[1]

    def generate(use_cache: bool) -> torch.Tensor:
        ids = model.generate(
            **batch, max_new_tokens=12, do_sample=False, use_cache=use_cache, pad_token_id=tokenizer.pad_token_id
        )
        return ids[:, start:]

    ids = generate(True)
    assert torch.equal(generate(False), ids)
    assert ids.shape[1] < 12  # every row ended by itself
    for row in ids.tolist():
        end = row.index(tokenizer.eos_token_id)
        assert set(row[end + 1 :]) <= {tokenizer.pad_token_id}


def test_prediction_stops_where_training_put_the_end_whatever_the_model_says(
    answering: Outcome, review_questions: Lesson
) -> None:
    expected = answers(answering, review_questions)
    settings = answering.tuned.model.generation_config
    end = settings.eos_token_id
    settings.eos_token_id = review_questions.tokenizer.pad_token_id  # as in base models with a chat tokenizer
    try:
        assert answers(answering, review_questions) == expected
    finally:
        settings.eos_token_id = end


def test_a_prompt_alone_teaches_the_form(review_questions: Lesson) -> None:
    """In a classifier the new head could learn without the prompt; here nothing but the prompt trains."""
    outcome = train(review_questions, "prompt-tuning", 20, batch_size=4)

    assert outcome.tuned.summary().parameters == 20 * 512
    assert outcome.after["loss"] < 0.35 * outcome.before["loss"]  # measured: 4.31 to 0.30
    assert answers(outcome, review_questions, use_cache=False) == answers(outcome, review_questions)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_real_instructions_are_learned(method: str) -> None:
    """The model has seen many instructions already, so there is less to gain than from a form of its own."""
    task = InstructionTuning(context="input")
    lesson = Lesson.of(task, asset("minimind2-small"), *texts.instructions(400, 60))

    outcome = train(lesson, method, 60, batch_size=8)

    # the bar was set beforehand; the value itself is still to be measured
    assert outcome.after["loss"] < outcome.before["loss"] - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_smollm2_learns_to_answer_with_one_word(method: str) -> None:
    task = InstructionTuning(context="input")
    lesson = Lesson.of(task, asset("smollm2-135m"), *texts.review_questions(400, 24))

    outcome = train(lesson, method, 16, batch_size=4)

    # the bar was set beforehand; the value itself is still to be measured
    assert outcome.after["loss"] < 0.3 * outcome.before["loss"]
    cached = answers(outcome, lesson)
    assert set(cached) <= set(texts.WORDS)
    assert answers(outcome, lesson, use_cache=False) == cached
