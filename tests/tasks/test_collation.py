from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks import Collator

END = 5  # also the padding id: the case that goes wrong where padding is masked by id
rows_of_ids = st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=12), min_size=1, max_size=6)


def make_rows(ids, **more):
    return [{"input_ids": row, "attention_mask": [1] * len(row), "length": len(row), **more} for row in ids]


@settings(deadline=None)
@given(rows_of_ids, st.sampled_from(["left", "right"]), st.sampled_from([None, 1, 4, 8]))
def test_padding_is_known_by_position(ids, side, multiple):
    collate = Collator(pad_token_id=END, token_labels=True, padding_side=side, pad_to_multiple_of=multiple)
    rows = [{**row, "labels": row["input_ids"]} for row in make_rows(ids)]
    batch = collate(rows)
    length = max(map(len, ids))
    assert batch["input_ids"].shape[1] == -(-length // (multiple or 1)) * (multiple or 1)
    for row, values in enumerate(ids):
        real = batch["attention_mask"][row].bool()
        assert int(real.sum()) == len(values)
        assert batch["input_ids"][row][real].tolist() == values
        assert batch["labels"][row][real].tolist() == values
        assert (batch["labels"][row][~real] == -100).all()
        assert (batch["input_ids"][row][~real] == END).all()
        ends = real[: len(values)] if side == "right" else real[-len(values) :]
        assert ends.all()


def test_end_token_that_also_pads_keeps_its_label():
    batch = Collator(pad_token_id=END, token_labels=True)(
        [{"input_ids": [1, END], "labels": [-100, END]}, {"input_ids": [1, 2, 3, END], "labels": [-100, 2, 3, END]}]
    )
    assert batch["labels"].tolist() == [[-100, END, -100, -100], [-100, 2, 3, END]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


def test_labels_of_an_encoder_decoder_have_their_own_length_and_side():
    collate = Collator(pad_token_id=0, token_labels=True, padding_side="left", labels_follow_inputs=False)
    batch = collate([{"input_ids": [1, 2, 3], "labels": [4]}, {"input_ids": [1], "labels": [4, 5]}])
    assert batch["labels"].tolist() == [[4, -100], [4, 5]]
    assert batch["input_ids"].tolist() == [[1, 2, 3], [0, 0, 1]]


def test_one_label_a_row():
    collate = Collator(pad_token_id=0, token_labels=False)
    whole = collate(make_rows([[1, 2]], labels=3))
    assert whole["labels"].dtype == torch.int64
    assert whole["labels"].tolist() == [3]
    number = collate(make_rows([[1, 2]], labels=0.5))
    assert number["labels"].dtype == torch.float32
    assert set(whole) == {"input_ids", "attention_mask", "labels"}  # no length


def test_token_types_are_padded():
    collate = Collator(pad_token_id=9, token_labels=False, pad_token_type_id=7)
    rows = [{"input_ids": [1, 2], "token_type_ids": [0, 1]}, {"input_ids": [1], "token_type_ids": [0]}]
    assert collate(rows)["token_type_ids"].tolist() == [[0, 1], [0, 7]]


def test_collator_can_be_pickled():
    collate = Collator(pad_token_id=1, token_labels=True)
    assert pickle.loads(pickle.dumps(collate)) == collate


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "at least one row"),
        ([{"input_ids": [1], "text": "x"}], "Encode the data with the task first"),
        ([{"length": 1}], "'input_ids' is needed"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": 2}], "different columns"),
    ],
)
def test_wrong_rows_are_refused(rows, message):
    with pytest.raises(DataError, match=message):
        Collator(pad_token_id=0, token_labels=False)(rows)


def test_wrong_options_are_refused():
    with pytest.raises(DataError, match="Did you mean 'right'"):
        Collator(pad_token_id=0, token_labels=False, padding_side="rigth")
    with pytest.raises(DataError, match="1 or more"):
        Collator(pad_token_id=0, token_labels=False, pad_to_multiple_of=0)
