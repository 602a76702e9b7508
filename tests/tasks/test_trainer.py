"""The pieces fit into transformers.Trainer: labels, reduced logits and metrics."""

from __future__ import annotations

import pytest
from datasets import Dataset

from deltune.tasks import InstructionTuning, SequenceToSequence, TextClassification
from tests.tasks.tiny import byte_tokenizer, decoder, encoder, encoder_decoder, word_tokenizer

pytest.importorskip("accelerate")

CASES = {
    "classification": (
        Dataset.from_dict({"text": ["good", "very bad film", "fine"], "label": ["yes", "no", "yes"]}),
        TextClassification,
        word_tokenizer,
        lambda: encoder(num_labels=2),
    ),
    "instruction": (
        Dataset.from_dict({"prompt": ["a", "bbb", "c"], "completion": ["long answer", "x", "yy"]}),
        InstructionTuning,
        lambda: byte_tokenizer(pad_token="<end>"),
        decoder,
    ),
    "sequence to sequence": (
        Dataset.from_dict({"source": ["a", "bbb", "c"], "target": ["long answer", "x", "yy"]}),
        SequenceToSequence,
        lambda: byte_tokenizer(pad_token="<end>", ends=True),
        encoder_decoder,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_evaluation_in_batches_equals_one_batch(case, tmp_path):
    from transformers import Trainer, TrainingArguments

    data, kind, make_tokenizer, make_model = CASES[case]
    task, tokenizer, model = kind.from_data(data), make_tokenizer(), make_model()
    encoded = task.encode(data, tokenizer)

    def scores(batch_size):
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, report_to=[], use_cpu=True
            ),
            data_collator=task.collator(tokenizer),
            eval_dataset=encoded,
            compute_metrics=lambda outcome: task.metrics(outcome.predictions, outcome.label_ids),
            preprocess_logits_for_metrics=task.reduce_logits,
        )
        return trainer.evaluate()

    one, several = scores(3), scores(1)
    for name in ("loss", "perplexity", "tokens") if task.generates else ("accuracy", "macro_f1", "matthews"):
        assert one[f"eval_{name}"] == pytest.approx(several[f"eval_{name}"], rel=1e-5)
    if task.generates:
        assert one["eval_tokens"] == len("long answerxyy") + 3
