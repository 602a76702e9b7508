from __future__ import annotations

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import BertForSequenceClassification

import deltune
from deltune.errors import TrainingError
from deltune.tasks import CausalLanguageModeling, InstructionTuning, SequenceToSequence, Task, TextRegression
from deltune.training import TrainingSettings, evaluate, fit, predict
from tests.tasks.tiny import byte_tokenizer, decoder, encoder_decoder
from tests.training import tiny


def test_the_result_does_not_depend_on_batches_or_order() -> None:
    tuned, task, tokenizer = tiny.classifier(), tiny.task(), tiny.tokenizer()
    rows = tiny.reviews(37)
    tuned.model.train()
    state = torch.get_rng_state()
    whole = evaluate(tuned, task, rows, tokenizer, batch_size=64)
    assert torch.equal(state, torch.get_rng_state())
    assert tuned.model.training
    parts = evaluate(tuned, task, rows.select(range(36, -1, -1)), tokenizer, batch_size=5)
    assert parts == pytest.approx(whole, abs=1e-6)


def test_predictions_come_in_the_order_of_the_rows() -> None:
    tuned, task, tokenizer = tiny.classifier(), tiny.task(), tiny.tokenizer()
    rows = tiny.reviews(11)
    together = predict(tuned, task, rows.remove_columns("label"), tokenizer, batch_size=4)
    alone = [predict(tuned, task, rows.select([row]), tokenizer)[0] for row in range(11)]
    assert [item["probability"] for item in together] == pytest.approx([item["probability"] for item in alone])
    accuracy = sum(item["label"] == label for item, label in zip(together, rows["label"], strict=True)) / 11
    assert accuracy == pytest.approx(evaluate(tuned, task, rows, tokenizer)["accuracy"])


def test_generation_options_are_for_tasks_that_generate() -> None:
    with pytest.raises(TrainingError, match="leave out num_beams"):
        predict(tiny.classifier(), tiny.task(), tiny.reviews(2), tiny.tokenizer(), num_beams=2)


def _copying(rows: int) -> list[dict[str, Any]]:
    return [{"question": f"say {'ab'[row % 2] * 2}", "answer": "ab"[row % 2] * 2} for row in range(rows)]


GENERATIVE: list[tuple[Task, Any]] = [
    (InstructionTuning(prompt="question", answer="answer", template="raw", max_length=32), decoder),
    (CausalLanguageModeling(text="answer", max_length=32), decoder),
    (SequenceToSequence(source="question", target="answer", max_length=32), encoder_decoder),
]


@pytest.mark.parametrize("method", ["full", "lora(rank=4, targets=attention.*)", "prefix-tuning(length=2)"])
@pytest.mark.parametrize(("task", "model"), GENERATIVE, ids=[task.name for task, _ in GENERATIVE])
def test_generative_tasks_train_measure_and_generate(task: Task, model: Any, method: str) -> None:
    tokenizer = byte_tokenizer(ends=task.name == "sequence-to-sequence")
    tokenizer.pad_token = tokenizer.eos_token
    tuned = deltune.attach(model(), method)
    rows = Dataset.from_list(_copying(24))
    before = evaluate(tuned, task, rows, tokenizer)
    settings = TrainingSettings(steps=30, batch_size=8, learning_rate=0.02, threads=1, evaluate_every=10)
    result = fit(tuned, task, rows, rows, tokenizer=tokenizer, settings=settings)
    assert result.metrics["loss"] < before["loss"] - (0.5 if method == "full" else 0.01)
    texts = predict(tuned, task, rows.select(range(3)), tokenizer, max_new_tokens=4)
    assert all(isinstance(item["text"], str) for item in texts)


def test_regression_trains() -> None:
    task = TextRegression(label="score")
    rows = Dataset.from_list(
        [{"text": row["text"], "score": float(row["label"] == "positive")} for row in tiny.reviews(40)]
    )
    model = BertForSequenceClassification(tiny.config(0.0, **task.model_options()))
    tuned = deltune.attach(model, "full")
    settings = TrainingSettings(epochs=8, batch_size=8, learning_rate=0.01, threads=1)
    result = fit(tuned, task, rows, rows, tokenizer=tiny.tokenizer(), settings=settings)
    assert result.metrics["pearson"] > 0.5
    assert predict(tuned, task, rows.select([0]), tiny.tokenizer())[0].keys() == {"value"}
