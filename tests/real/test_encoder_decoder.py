"""A real encoder-decoder learns to write a word for a review, and a sentence for a table."""

from __future__ import annotations

import pytest
import torch

import deltune
from deltune.tasks import SequenceToSequence
from deltune.training import predict
from deltune.tuned import Tuned
from tests.assets import asset
from tests.real import texts
from tests.real.tuning import Lesson, Outcome, logits_of, train

METHODS = ("lora", "prefix-tuning", "sequential-adapter")


@pytest.fixture(scope="module", params=METHODS)
def writing(request: pytest.FixtureRequest, review_words: Lesson) -> Outcome:
    """Flan-T5-small, tuned to write the sentiment of a review."""
    return train(review_words, request.param, 16, batch_size=8)


def written(tuned: Tuned, lesson: Lesson, rows: int = 12, **options: object) -> list[str]:
    _, held_out = texts.review_questions(1, rows)
    found = predict(tuned, lesson.task, held_out, lesson.tokenizer, max_new_tokens=10, **options)
    return [item["text"] for item in found]


def test_the_loss_on_held_out_words_falls_far_below_the_untuned_models(writing: Outcome) -> None:
    # <MEASURED>
    assert writing.after["loss"] < 0.3 * writing.before["loss"]


def test_it_writes_words_of_the_data_with_and_without_a_cache(writing: Outcome, review_words: Lesson) -> None:
    cached = written(writing.tuned, review_words)
    assert set(cached) <= set(texts.WORDS)
    assert written(writing.tuned, review_words, use_cache=False) == cached
    assert written(writing.tuned, review_words, rows=4, num_beams=3) == written(
        writing.tuned, review_words, rows=4, num_beams=3, use_cache=False
    )


def test_a_merged_lora_writes_the_same(review_words: Lesson) -> None:
    outcome = train(review_words, "lora", 16, batch_size=8)
    before, logits = written(outcome.tuned, review_words), logits_of(outcome.tuned.model, review_words.probe())

    outcome.tuned.merge()
    assert written(outcome.tuned, review_words) == before
    torch.testing.assert_close(logits_of(outcome.tuned.model, review_words.probe()), logits, atol=1e-3, rtol=0)
    outcome.tuned.unmerge()
    assert torch.equal(logits_of(outcome.tuned.model, review_words.probe()), logits)


def test_encoder_decoder_and_cross_attention_each_have_a_prefix_that_learns(review_words: Lesson) -> None:
    tuned = deltune.attach(review_words.fresh_model(), deltune.PrefixTuning(length=4, reparameterize=False))
    collate = review_words.task.collator(review_words.tokenizer)
    tuned.model(**collate([review_words.train[row] for row in range(4)])).loss.backward()

    gradients = {name: parameter.grad for name, parameter in tuned.named_trainable_parameters()}
    assert len(gradients) == 2 * 3 * 8  # keys and values of three attentions in eight layers
    for name, gradient in gradients.items():
        assert gradient is not None, name
        assert gradient.abs().max() > 0, name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix-tuning"])
def test_tables_become_sentences(method: str) -> None:
    task = SequenceToSequence(max_target_length=48)
    lesson = Lesson.of(task, asset("flan-t5-small"), *texts.restaurants(480, 40))

    outcome = train(lesson, method, 40, batch_size=8)

    # <MEASURED>
    assert outcome.after["loss"] < outcome.before["loss"] - 0.5
