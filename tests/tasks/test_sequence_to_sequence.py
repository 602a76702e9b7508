from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks import SequenceToSequence
from tests.tasks.tiny import byte_tokenizer, encoder_decoder, word_tokenizer

DATA = Dataset.from_dict({"source": ["ab", "a longer source"], "target": ["a longer target", "b"]})


@settings(deadline=None, max_examples=40)
@given(st.text("abc", min_size=1, max_size=20), st.integers(2, 12), st.booleans())
def test_targets_always_end_with_the_end_token(target, limit, ends):
    tokenizer = byte_tokenizer(ends=ends)
    data = Dataset.from_dict({"source": ["x"], "target": [target]})
    task = SequenceToSequence(max_target_length=limit)
    encoded, report = task.encode_with_report(data, tokenizer)
    labels = encoded[0]["labels"]
    assert tokenizer.decode(labels) == target[: limit - 1] + "<end>"
    assert report.truncated_rows == int(len(target) > limit - 1)


def test_losses_equal_the_model_s_own():
    tokenizer = byte_tokenizer(ends=True, pad_token="<end>")
    task = SequenceToSequence(prefix="x: ", max_length=9)
    rows = task.encode(DATA, tokenizer)
    assert tokenizer.decode(rows[0]["input_ids"]) == "x: ab<end>"
    assert tokenizer.decode(rows[1]["input_ids"]) == "x: a lon<end>"
    batch = task.collator(tokenizer)(list(rows))
    assert batch["labels"].shape == (2, 16)
    assert batch["labels"][1, 2:].eq(-100).all()
    assert set(batch) == {"input_ids", "attention_mask", "labels"}  # the model makes the decoder's inputs
    with torch.no_grad():
        outputs = encoder_decoder()(**batch)
    sums = task.reduce_logits((outputs.logits, outputs.encoder_last_hidden_state), batch["labels"])
    scores = task.metrics(sums, None)
    assert scores["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert scores["tokens"] == 18


def test_prediction_needs_no_target():
    task = SequenceToSequence(max_length=3)
    encoded, report = task.encode_with_report(DATA.remove_columns("target"), byte_tokenizer(), labelled=False)
    assert list(encoded["length"]) == [2, 3]
    assert report.truncated_rows == 1
    assert task.answers(DATA) == ["a longer target", "b"]
    assert task.prediction_padding_side == "right"
    assert task.generates


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_target_length": 1}, "at least 2"),
        ({"max_target_length": None}, "at least 2"),
        ({"prefix": None}, "prefix must be text"),
        ({"source": ""}, "source must be the name"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        SequenceToSequence(**options)


def test_wrong_data_are_refused():
    task = SequenceToSequence()
    with pytest.raises(DataError, match="row 2, column 'target', is empty"):
        task.encode(Dataset.from_dict({"source": ["a", "b"], "target": ["a", " "]}), byte_tokenizer())
    with pytest.raises(DataError, match=r"'target', which the data do not have.*Columns present: source"):
        task.encode(Dataset.from_dict({"source": ["a"]}), byte_tokenizer())
    with pytest.raises(DataError, match="no end token"):
        task.encode(DATA, word_tokenizer())
    with pytest.raises(DataError, match="row 1, column 'source', is empty"):
        task.encode(Dataset.from_dict({"source": [""], "target": ["a"]}), byte_tokenizer())
