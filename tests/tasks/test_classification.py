from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError, DeltuneError, TrainingError
from deltune.tasks import TextClassification, TextRegression, task_from_description
from tests.tasks.tiny import decoder, encoder, word_tokenizer

FILMS = Dataset.from_list(
    [
        {"text": "the film is very good", "label": "positive"},
        {"text": "bad", "label": "negative"},
        {"text": "fine plot and fine acting", "label": "positive"},
    ]
)


def labelled(*labels, **more):
    return Dataset.from_dict({"text": ["good"] * len(labels), "label": list(labels), **more})


def test_encodes_text_and_sorted_names():
    task = TextClassification.from_data(FILMS)
    assert task.label_names == ("negative", "positive")
    encoded = task.encode(FILMS, word_tokenizer())
    assert set(encoded.column_names) == {"input_ids", "token_type_ids", "attention_mask", "labels", "length"}
    assert list(encoded["labels"]) == [1, 0, 1]
    assert list(encoded["length"]) == [7, 3, 7]
    assert encoded[1]["input_ids"] == [2, 5, 3]


@pytest.mark.parametrize(
    ("labels", "names", "encoded"),
    [
        ([3, 1, 3, 20], ("1", "3", "20"), [1, 0, 1, 2]),
        (["b", "a"], ("a", "b"), [1, 0]),
        (list("hgfedcba"), tuple("abcdefgh"), [7, 6, 5, 4, 3, 2, 1, 0]),
        ([True, False], ("False", "True"), [1, 0]),
    ],
)
def test_classes_are_found(labels, names, encoded):
    task = TextClassification.from_data(labelled(*labels))
    assert task.label_names == names
    assert list(task.encode(labelled(*labels), word_tokenizer())["labels"]) == encoded


def test_class_label_columns_are_matched_by_name():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["pos", "neg"])})
    train = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]}, features=features)
    task = TextClassification.from_data(train)
    assert task.label_names == ("pos", "neg")
    other = features.copy()
    other["label"] = ClassLabel(names=["neg", "pos"])
    turned = Dataset.from_dict({"text": ["bad", "good"], "label": [0, 1]}, features=other)
    assert list(task.encode(turned, word_tokenizer())["labels"]) == [1, 0]
    assert list(task.encode(labelled("neg", "pos"), word_tokenizer())["labels"]) == [1, 0]
    assert list(task.encode(labelled(1, 0), word_tokenizer())["labels"]) == [1, 0]


def test_given_names_stand_for_positions():
    task = TextClassification.from_data(labelled(0, 2, 1), label_names=("no", "perhaps", "yes"))
    assert list(task.encode(labelled(2), word_tokenizer())["labels"]) == [2]


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["same", "same"], "same class 'same'.*at least two classes"),
        ([1, None, 0], "Row 2 has no label in column 'label'. Fill it in"),
        (["a", " ", "b"], "Row 2 has no label"),
        ([0.5, 1.5], "Row 1 holds 0.5 .float.*use the task 'text-regression'"),
    ],
)
def test_unusable_labels_are_refused(labels, message):
    with pytest.raises(DataError, match="(?s)" + message):
        TextClassification.from_data(labelled(*labels))


def test_unlabelled_class_label_is_refused():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    with pytest.raises(DataError, match="Row 1 has no label"):
        TextClassification.from_data(Dataset.from_dict({"text": ["a", "b"], "label": [-1, 1]}, features=features))


@pytest.mark.parametrize(
    ("names", "label", "message"),
    [
        (("negative", "positive"), "positif", "Row 1 has the label 'positif'.*Did you mean 'positive'"),
        (("0", "1"), 7, "Row 1 has the label 7, which is out of range.*Choose from: 0, 1"),
        (("no", "yes"), 2, "Row 1 has the label 2, which is out of range: there are 2 classes, 0 to 1"),
        (("no", "yes"), -1, "out of range"),
    ],
)
def test_unknown_labels_are_refused(names, label, message):
    with pytest.raises(DataError, match=message):
        TextClassification(label_names=names).encode(labelled(label), word_tokenizer())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "from_data"),
        ({"label_names": ("a",)}, "at least two classes"),
        ({"label_names": ("a", "a")}, "repeat a name"),
        ({"label_names": ["a", "b"]}, "must be a tuple"),
        ({"label_names": ("a", "b"), "max_length": 0}, "max_length must be a whole number of at least 1"),
        ({"label_names": ("a", "b"), "text": ""}, "text must be the name of a data column"),
        ({"label_names": ("a", "b"), "label": None}, "only text_pair may be none"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        TextClassification(**options)


def test_unknown_option_names_the_nearest():
    with pytest.raises(DataError, match=r"no option 'text_column'.*Did you mean 'text'"):
        TextClassification.from_data(FILMS, text_column="text")


def test_missing_column_names_those_present():
    with pytest.raises(DataError, match=r"'texts', which the data do not have. Columns present: text, label. Did you"):
        TextClassification.from_data(FILMS, text="texts")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("  ", "row 2, column 'text', is empty and gives no tokens.*drop_empty_rows"),
        (None, "Row 2 has no value in column 'text'"),
    ],
)
def test_texts_without_tokens_are_refused(value, message):
    data = Dataset.from_dict({"text": ["good", value], "label": [0, 1]})
    with pytest.raises(DataError, match=message):
        TextClassification.from_data(data).encode(data, word_tokenizer())


def test_text_that_the_tokenizer_drops_is_refused():
    from tokenizers import normalizers

    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("#", "")
    data = Dataset.from_dict({"a": ["good", "bad"], "b": ["good", "#"], "label": [0, 1]})
    with pytest.raises(DataError, match="row 2, column 'b', gives no tokens: the tokenizer drops"):
        TextClassification.from_data(data, text="a", text_pair="b").encode(data, tokenizer)


def test_numbers_as_text_are_refused():
    data = Dataset.from_dict({"text": [1, 2], "label": [0, 1]})
    with pytest.raises(DataError, match=r"Row 1 holds 1 \(int\) in column 'text', where text is expected"):
        TextClassification.from_data(data).encode(data, word_tokenizer())


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="no rows"):
        TextClassification.from_data(FILMS.select([]))


def test_pairs_have_token_types_and_are_cut_longest_first(caplog):
    data = Dataset.from_dict({"a": ["good " * 9, "bad"], "b": ["bad fine", "good"], "label": ["x", "y"]})
    task = TextClassification.from_data(data, text="a", text_pair="b", max_length=8)
    encoded, report = task.encode_with_report(data, word_tokenizer())
    assert encoded[0]["input_ids"] == [2, 4, 4, 4, 3, 5, 6, 3]
    assert encoded[0]["token_type_ids"] == [0, 0, 0, 0, 0, 1, 1, 1]
    assert (report.rows, report.truncated_rows, report.dropped_rows, report.longest) == (2, 1, (), 8)
    assert (report.tokens, report.trained_tokens) == (13, 2)
    task.encode(data, word_tokenizer())
    assert "1 of 2 rows cut to 8 tokens" in caplog.text
    with pytest.raises(DataError, match=r"max_length 4 leaves no room.*Use at least 5"):
        TextClassification.from_data(data, text="a", text_pair="b", max_length=4).encode(data, word_tokenizer())


def test_max_length_follows_the_tokenizer(caplog):
    task = TextClassification.from_data(FILMS)
    assert task.resolve(word_tokenizer(model_max_length=20)).max_length == 20
    assert task.resolve(word_tokenizer(model_max_length=10**30)).max_length == 512
    assert not caplog.text
    longer = TextClassification.from_data(FILMS, max_length=100)
    assert longer.resolve(word_tokenizer(model_max_length=20)).max_length == 100
    assert "beyond the 20 tokens" in caplog.text


def test_prediction_needs_no_labels():
    task = TextClassification(label_names=("a", "b"))
    encoded = task.encode(Dataset.from_dict({"text": ["good"]}), word_tokenizer(), labelled=False)
    batch = task.collator(word_tokenizer())([encoded[0]])
    assert "labels" not in batch


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.lists(st.sampled_from(["good", "bad", "fine", "film"]), min_size=1, max_size=80), min_size=1, max_size=9
    )
)
def test_encoding_keeps_rows_and_never_exceeds_the_limit(words):
    data = Dataset.from_dict({"text": [" ".join(row) for row in words], "label": [n % 2 for n in range(len(words))]})
    task = TextClassification(label_names=("0", "1"), max_length=16)
    encoded, report = task.encode_with_report(data, word_tokenizer())
    assert len(encoded) == len(words)
    assert report.truncated_rows == sum(len(row) + 2 > 16 for row in words)
    assert [len(ids) for ids in encoded["input_ids"]] == [min(len(row) + 2, 16) for row in words]
    assert list(encoded["length"]) == [len(ids) for ids in encoded["input_ids"]]
    assert all(ids[0] == 2 and ids[-1] == 3 for ids in encoded["input_ids"])


def test_metrics_by_hand():
    task = TextClassification(label_names=("a", "b", "c"))
    logits = np.eye(3)[[0, 0, 1, 1]]
    scores = task.metrics(logits, np.array([0, 1, 1, 1]))
    assert scores["accuracy"] == 0.75
    assert scores["macro_f1"] == pytest.approx((2 / 3 + 4 / 5) / 2)  # no row of class c occurs
    assert scores["matthews"] == pytest.approx(1 / 3**0.5)
    assert set(scores) == {"accuracy", "macro_f1", "matthews"}
    assert task.metric in scores


def test_outputs_that_are_no_numbers_are_refused():
    with pytest.raises(TrainingError, match="Lower the learning rate"):
        TextClassification(label_names=("a", "b")).metrics(np.array([[np.nan, 1.0]]), [0])


def test_predictions_for_people():
    task = TextClassification(label_names=("no", "yes"))
    (row,) = task.predict({"logits": torch.tensor([[0.0, 1.0]], dtype=torch.bfloat16)})
    assert row["label"] == "yes"
    assert row["probability"] == pytest.approx(0.7310586)
    assert sum(row["probabilities"].values()) == pytest.approx(1)
    assert set(row["probabilities"]) == {"no", "yes"}
    with pytest.raises(DataError, match="no 'logits'"):
        task.predict({"loss": torch.zeros(1)})


@pytest.mark.parametrize("labels", [(0, 2, 1), (2.0, 0.5, 1.0)])
def test_loads_the_right_head_and_computes_the_right_loss(tmp_path, labels):
    encoder().bert.to(torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    data = labelled(*labels)
    kind = TextClassification if isinstance(labels[0], int) else TextRegression
    task = kind.from_data(data)
    tokenizer = task.load_tokenizer(str(tmp_path))
    model = task.load_model(str(tmp_path), tokenizer=tokenizer).eval()
    assert model.dtype == torch.float32
    batch = task.collator(tokenizer)(list(task.encode(data, tokenizer)))
    outputs = model(**batch)
    if kind is TextClassification:
        assert model.config.id2label == {0: "0", 1: "1", 2: "2"}
        expected = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor(labels))
    else:
        assert model.config.num_labels == 1
        assert model.config.problem_type == "regression"
        expected = ((outputs.logits[:, 0] - torch.tensor(labels)) ** 2).mean()
    torch.testing.assert_close(outputs.loss, expected)
    assert task.metric in task.metrics(task.reduce_logits((outputs.logits, None), batch["labels"]), batch["labels"])
    with pytest.raises(DataError, match="sets num_labels itself"):
        task.load_model(str(tmp_path), num_labels=5)


def test_decoders_classify_in_batches(tmp_path):
    decoder(len(word_tokenizer())).save_pretrained(tmp_path)
    tokenizer = word_tokenizer(pad_token=None)
    task = TextClassification(label_names=("a", "b"))
    tokenizer.save_pretrained(tmp_path)
    tokenizer = task.load_tokenizer(str(tmp_path))
    assert tokenizer.pad_token == "[UNK]"
    assert len(tokenizer) == len(word_tokenizer())
    model = task.load_model(str(tmp_path), tokenizer=tokenizer).eval()
    rows = task.encode(Dataset.from_dict({"text": ["good bad film", "bad"]}), tokenizer, labelled=False)
    collate = task.collator(tokenizer)
    together = model(**collate([row_without_types(row) for row in rows])).logits
    alone = model(**collate([row_without_types(rows[1])])).logits
    torch.testing.assert_close(together[1:], alone)


def row_without_types(row):
    return {name: value for name, value in row.items() if name != "token_type_ids"}


def test_models_that_cannot_be_loaded_are_explained(tmp_path):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    task = TextClassification(label_names=("a", "b"))
    with pytest.raises(DeltuneError, match=r"No model can be loaded from .*folder that holds a saved model"):
        task.load_model(str(tmp_path))
    with pytest.raises(DeltuneError, match=r"No model can be loaded from .*There is no such folder\."):
        task.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(DeltuneError, match="No tokenizer can be loaded from"):
        task.load_tokenizer(str(tmp_path))
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    CLIPVisionModel(CLIPVisionConfig(image_size=8, patch_size=4, **size)).save_pretrained(tmp_path)
    with pytest.raises(DeltuneError, match=r"cannot do 'text-classification'.*Choose another model"):
        task.load_model(str(tmp_path))


def test_a_head_of_another_size_is_explained(tmp_path):
    encoder(num_labels=5).save_pretrained(tmp_path)
    task = TextClassification(label_names=("a", "b"))
    with pytest.raises(DeltuneError, match=r"head of another size.*ignore_mismatched_sizes=True"):
        task.load_model(str(tmp_path))
    assert task.load_model(str(tmp_path), ignore_mismatched_sizes=True).config.num_labels == 2


def test_tokenizer_without_any_special_token_is_refused(tmp_path):
    word_tokenizer(pad_token=None, unk_token=None, sep_token=None, cls_token=None).save_pretrained(tmp_path)
    task = TextClassification(label_names=("a", "b"))
    with pytest.raises(DataError, match=r"Set one, for example: tokenizer.pad_token"):
        task.load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match=r"no padding token. Load it with task.load_tokenizer"):
        task.collator(word_tokenizer(pad_token=None))


def test_description_rebuilds_the_task():
    task = TextClassification.from_data(FILMS).resolve(word_tokenizer())
    report = task.encode_with_report(FILMS, word_tokenizer()).report
    description = json.loads(json.dumps(task.describe({"train": report})))
    assert task_from_description(description) == task
    assert description["options"]["label_names"] == ["negative", "positive"]
    assert description["options"]["max_length"] == 64
    assert description["encoding"]["train"]["rows"] == 3
    assert description["metric"] == "accuracy"
    assert "cross entropy" in description["loss"]


# -- regression ---------------------------------------------------------------------------------------


def test_regression_metrics_by_hand():
    scores = TextRegression().metrics(np.array([[1.0], [2.0], [4.0]]), np.array([1.0, 2.0, 3.0]))
    assert scores["mean_squared_error"] == pytest.approx(1 / 3)
    assert scores["spearman"] == pytest.approx(1)
    assert scores["pearson"] == pytest.approx(np.corrcoef([1, 2, 4], [1, 2, 3])[0, 1])
    flat = TextRegression().metrics(np.zeros((3, 1)), np.array([1.0, 2.0, 3.0]))
    assert (flat["pearson"], flat["spearman"]) == (0, 0)
    assert TextRegression().predict(torch.tensor([[0.5], [2]])) == [{"value": 0.5}, {"value": 2.0}]


def test_whole_numbers_become_fractions():
    encoded = TextRegression.from_data(labelled(1, 3)).encode(labelled(1, 3), word_tokenizer())
    assert list(encoded["labels"]) == [1.0, 3.0]
    assert encoded.features["labels"].dtype == "float32"


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["1", "2"], r"Row 1 holds '1' \(str\).*where a number is expected"),
        ([1.0, None], "Row 2 has no label"),
        ([1.0, float("nan")], "Row 2 has the label nan.*finite"),
        ([2.0, 2.0], "All values in column 'label' are 2.0"),
        ([True, False], "where a number is expected"),
    ],
)
def test_unusable_numbers_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        TextRegression.from_data(labelled(*labels))
