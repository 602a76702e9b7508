from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError, TrainingError
from deltune.tasks import CausalLanguageModeling
from deltune.tasks.generative import token_losses
from tests.tasks.tiny import byte_tokenizer, decoder, word_tokenizer

documents = st.lists(st.text("abc de", min_size=1, max_size=40).filter(str.strip), min_size=1, max_size=6)


def trained_pairs(rows):
    """(token before, token learned) of every position with a loss."""
    return [
        (row["input_ids"][place - 1], row["labels"][place])
        for row in rows
        for place in range(1, len(row["labels"]))
        if row["labels"][place] != -100
    ]


@settings(deadline=None, max_examples=50)
@given(documents, st.integers(2, 12))
def test_every_token_of_every_document_is_learned_exactly_once(texts, length):
    tokenizer = byte_tokenizer()
    data = Dataset.from_dict({"text": texts})
    encoded, report = CausalLanguageModeling(max_length=length).encode_with_report(data, tokenizer)
    expected = []
    for text in texts:
        ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        expected += list(itertools.pairwise(ids))
    assert trained_pairs(encoded) == expected
    assert report.trained_tokens == len(expected)
    assert max(encoded["length"]) <= length
    assert all(row["labels"][0] == -100 for row in encoded)


@settings(deadline=None, max_examples=50)
@given(documents, st.integers(2, 12))
def test_blocks_join_documents_and_lose_nothing(texts, length):
    tokenizer = byte_tokenizer()
    encoded = CausalLanguageModeling(block_size=length).encode(Dataset.from_dict({"text": texts}), tokenizer)
    stream = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert trained_pairs(encoded) == list(itertools.pairwise(stream))
    assert all(size == length for size in list(encoded["length"])[:-1])


def test_start_and_end_tokens_are_put_once():
    data = Dataset.from_dict({"text": ["ab"]})
    for tokenizer in (byte_tokenizer(start=True), byte_tokenizer(start=True, ends=True)):
        (row,) = CausalLanguageModeling().encode(data, tokenizer)
        assert tokenizer.decode(row["input_ids"]) == "<start>ab<end>"


def test_prompts_keep_their_end_and_get_no_end_token():
    tokenizer = byte_tokenizer()
    encoded, report = CausalLanguageModeling(max_length=3).encode_with_report(
        Dataset.from_dict({"text": ["abcdef"]}), tokenizer, labelled=False
    )
    assert tokenizer.decode(encoded[0]["input_ids"]) == "def"
    assert report.truncated_rows == 1
    assert "labels" not in encoded.column_names


def test_losses_equal_the_model_s_own():
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    task = CausalLanguageModeling(max_length=30)
    model = decoder()
    batch = task.collator(tokenizer)(
        list(task.encode(Dataset.from_dict({"text": ["a longer document here", "short"]}), tokenizer))
    )
    with torch.no_grad():
        outputs = model(**batch)
    sums = task.reduce_logits((outputs.logits,), batch["labels"])
    assert sums.shape == (2, 2)
    assert sums[:, 1].tolist() == [22, 5]
    scores = task.metrics(sums.numpy(), batch["labels"])
    assert scores["loss"] == pytest.approx(outputs.loss.item(), rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["tokens"] == 27


def test_losses_do_not_depend_on_chunks_padding_or_leading_positions():
    torch.manual_seed(0)
    logits = torch.randn(2, 700, 11)
    labels = torch.randint(0, 11, (2, 700))
    labels[1, 5:] = -100
    sums = token_losses(logits, labels, predicts_next=False)
    for row in range(2):
        whole = torch.nn.functional.cross_entropy(logits[row], labels[row], reduction="sum")
        torch.testing.assert_close(sums[row, 0], whole)
    assert sums[:, 1].tolist() == [700, 5]
    longer = torch.cat([torch.randn(2, 9, 11), logits], dim=1)
    torch.testing.assert_close(token_losses(longer, labels, predicts_next=False), sums)
    assert token_losses(logits, torch.full((2, 700), -100), predicts_next=True).tolist() == [[0, 0], [0, 0]]


def test_metrics_refuse_what_they_cannot_use():
    task = CausalLanguageModeling()
    with pytest.raises(DataError, match=r"Pass task.reduce_logits"):
        task.metrics(np.zeros((2, 3)))
    with pytest.raises(DataError, match="No token has a loss"):
        task.metrics(np.zeros((2, 2)))
    with pytest.raises(TrainingError, match="not finite"):
        task.metrics(np.array([[np.inf, 1]]))
    with pytest.raises(TrainingError, match="do not belong to labels"):
        token_losses(torch.zeros(1, 3, 4), torch.zeros(1, 4), predicts_next=True)
    assert task.metrics(np.array([[8000.0, 1]]))["perplexity"] == math.inf


def test_generated_text():
    task = CausalLanguageModeling()
    tokenizer = byte_tokenizer(pad_token="<end>")
    ids = torch.tensor([*tokenizer("hi")["input_ids"], 0, -100])[None]
    assert task.predict(ids, tokenizer) == [{"text": "hi"}]
    assert task.predict(ids.tolist(), tokenizer) == [{"text": "hi"}]
    with pytest.raises(DataError, match="needs the tokenizer"):
        task.predict(ids)
    assert task.answers(Dataset.from_dict({"text": ["a"]})) is None
    assert task.generation_metrics([" a\n", "b"], ["a", "c"]) == {"exact_match": 0.5}
    with pytest.raises(DataError, match="0 generated texts and 1 true ones"):
        task.generation_metrics([], ["a"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 1}, "at least 2"),
        ({"max_length": 1}, "at least 2"),
        ({"block_size": 0}, "at least 1"),
        ({"block_size": 9, "max_length": 8}, "Lower block_size"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        CausalLanguageModeling(**options)


def test_wrong_data_are_refused():
    with pytest.raises(DataError, match=r"no end token.*tokenizer.eos_token"):
        CausalLanguageModeling().encode(Dataset.from_dict({"text": ["good"]}), word_tokenizer())
    with pytest.raises(DataError, match="row 2, column 'text', is empty"):
        CausalLanguageModeling().encode(Dataset.from_dict({"text": ["good", ""]}), byte_tokenizer())
