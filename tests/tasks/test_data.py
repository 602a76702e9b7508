from __future__ import annotations

import json
import subprocess
import sys

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from hypothesis import example, given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks import drop_empty_rows, fingerprint, read_dataset, split_dataset

ROWS = [
    {"text": 'a "quoted", comma', "label": 1, "score": 0.5},
    {"text": "two\nlines 中文", "label": 0, "score": -2.25},
    {"text": "plain", "label": 1, "score": 3e-05},
]


@pytest.fixture
def folder(tmp_path):
    dataset = Dataset.from_list(ROWS)
    dataset.to_parquet(tmp_path / "rows.parquet")
    dataset.to_csv(tmp_path / "rows.csv", index=False)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (tmp_path / "rows.json").write_text(json.dumps(ROWS, ensure_ascii=False, indent=1), encoding="utf-8-sig")
    return tmp_path


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.json", "rows.parquet"])
def test_every_format_gives_the_same_rows_and_fingerprint(folder, name):
    dataset = read_dataset(folder / name)
    assert list(dataset) == ROWS
    assert fingerprint(dataset) == fingerprint(Dataset.from_list(ROWS))
    assert len(read_dataset(folder / name, limit=2)) == 2
    assert len(read_dataset(str(folder / name), limit=99)) == 3


def test_tsv_takes_quotes_as_they_are(tmp_path):
    path = tmp_path / "rows.tsv"
    path.write_bytes(b'sentence\tlabel\r\n"unclosed quote\t1\r\nfine\t\r\n')
    assert list(read_dataset(path)) == [
        {"sentence": '"unclosed quote', "label": 1},
        {"sentence": "fine", "label": None},
    ]


def test_csv_keeps_text_that_looks_like_a_number_in_part(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(",code,long,mixed\n0,007,1,1\n1,12,123456789012345678901,x\n")
    assert list(read_dataset(path)) == [
        {"index": 0, "code": "007", "long": 1.0, "mixed": "1"},
        {"index": 1, "code": "12", "long": 1.2345678901234568e20, "mixed": "x"},
    ]


def test_long_fields_are_read(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(f"text,label\n{'x' * 200_000},1\n")
    assert len(read_dataset(path)[0]["text"]) == 200_000


def test_json_rows_may_lack_fields_and_hold_line_separators(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": "x\u2028y"}\n\n{"b": [1, 2]}\n', encoding="utf-8")
    assert list(read_dataset(path)) == [{"a": "x\u2028y", "b": None}, {"a": None, "b": [1, 2]}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "is empty. Give a file with at least one row"),
        ("a.jsonl", b" \n ", "is empty"),
        ("a.parquet", b"", "is empty"),
        ("a.csv", b"text,label\n", "has a header but no rows"),
        ("a.json", b"[]", "empty array"),
        ("a.csv", b"great,1\nbad,0\n", "seems to have no header: .* field 2 is the number 1.*text,label"),
        ("a.csv", b"text,text\na,b\n", "'text' occurs more than once"),
        ("a.tsv", b"text\t\na\tb\n", "field 2 is empty.*text<TAB>label"),
        ("a.csv", b'text,label\n"two\nlines",1\nred,blue,2\n', "line 4: 3 fields where the header names 2 columns"),
        ("a.tsv", b"text\tlabel\nx\n", "line 2: 1 fields .*separated by tabs"),
        ("a.csv", b'text,label\na,1\n"never closed,1\n', "from line 3 on.*double quote"),
        ("a.csv", b"text\nok\ncaf\xe9\n", r"byte 0xe9 at position 11 \(line 3\).*Save the file as UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a": }\n', "line 2, column 7: not JSON"),
        ("a.json", b'[{"a": 1},\n]', "line 2, column 1: not JSON.*without a comma behind the last"),
        ("a.jsonl", b'{"a": 1}\n[2]\n', r"line 2: \[2\] where an object"),
        ("a.json", b'["x"]', "element 1: 'x' where an object"),
        ("a.jsonl", b"{}\n", "no row has a field"),
        ("a.jsonl", b'{"a": 1}\n{"a": "x"}\n', "row 2, column 'a': 'x' is str where earlier rows have int"),
        ("a.parquet", b"no parquet", "not a readable Parquet file"),
        ("a.xlsx", b"x", "ending '.xlsx'; data files end in .csv, .tsv, .json, .jsonl, .parquet"),
    ],
)
def test_unusable_files_are_explained(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match="(?s)" + message):
        read_dataset(path)


def test_missing_file_names_the_nearest(folder):
    with pytest.raises(DataError, match=r"There is no file .*Did you mean 'rows.jsonl'"):
        read_dataset(folder / "row.jsonl")
    with pytest.raises(DataError, match=r"does not exist. Check the path"):
        read_dataset(folder / "nowhere" / "a.csv")
    (folder / "bare").mkdir()
    with pytest.raises(DataError, match="nor any data file"):
        read_dataset(folder / "bare" / "a.csv")


def test_names_folders_and_splits(folder):
    with pytest.raises(DataError, match=r"neither a file here nor a dataset.*Give a file that ends in \.csv"):
        read_dataset("no-such-dataset:config")
    with pytest.raises(DataError, match=r"no dataset was saved to.*Name one of its files: rows.csv"):
        read_dataset(folder)
    with pytest.raises(DataError, match="has no splits"):
        read_dataset(folder / "rows.csv", split="train")
    parts = DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))
    parts.save_to_disk(folder / "saved")
    assert list(read_dataset(folder / "saved", split="test")) == ROWS[:1]
    with pytest.raises(DataError, match=r"has the splits train, test. Say which"):
        read_dataset(folder / "saved")
    with pytest.raises(DataError, match=r"no split 'tes'.*Did you mean 'test'"):
        read_dataset(folder / "saved", split="tes")


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_wrong_limits_are_refused(folder, limit):
    with pytest.raises(DataError, match="limit must be a whole number"):
        read_dataset(folder / "rows.csv", limit=limit)


def test_fingerprint_sees_content_and_order_only():
    base = fingerprint(Dataset.from_list(ROWS))
    assert base == fingerprint(Dataset.from_list([dict(reversed(row.items())) for row in ROWS]))
    assert base == fingerprint(Dataset.from_list([*ROWS, *ROWS]).select(range(3)))
    assert base != fingerprint(Dataset.from_list(ROWS[::-1]))
    assert base != fingerprint(Dataset.from_list(ROWS).rename_column("text", "texts"))
    assert base != fingerprint(Dataset.from_list([{**ROWS[0], "label": 0}, *ROWS[1:]]))


def test_fingerprint_is_the_same_in_another_process(folder):
    code = f"from deltune.tasks import *; print(fingerprint(read_dataset({str(folder / 'rows.json')!r})))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == fingerprint(read_dataset(folder / "rows.csv"))


texts = st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.integers(0, 2)), min_size=8, max_size=80)


@settings(deadline=None, max_examples=40)
@given(texts, st.integers(0, 9), st.sampled_from([0.1, 0.3, 0.5]), st.sampled_from([None, "label"]))
@example([*[("a", 0)] * 4, *[(text, 1) for text in "bcde"], *[(text, 2) for text in "fgh"]], 0, 0.1, "label")
@example([(text, number % 3) for number, text in enumerate("abcdefgh") for _ in range(10)], 0, 0.1, "label")
def test_split_is_disjoint_complete_and_keeps_repeated_texts_together(rows, seed, share, stratify):
    dataset = Dataset.from_list([{"text": t, "label": label, "row": n} for n, (t, label) in enumerate(rows)])
    try:
        train, evaluation = split_dataset(dataset, share, seed=seed, stratify=stratify, texts=["text"])
    except DataError as error:
        assert len({text for text, _ in rows}) < 8, error  # noqa: PT017
        return
    assert sorted([*train["row"], *evaluation["row"]]) == list(range(len(rows)))
    assert list(train["row"]) == sorted(train["row"])
    assert not set(train["text"]) & set(evaluation["text"])


@settings(deadline=None, max_examples=20)
@given(st.integers(20, 120), st.integers(0, 99), st.floats(0.05, 0.6))
def test_split_meets_the_share_exactly_and_stratified(count, seed, share):
    dataset = Dataset.from_list([{"text": f"text {n}", "label": int(n % 4 == 0)} for n in range(count)])
    train, evaluation = split_dataset(dataset, share, seed=seed, stratify="label")
    assert len(evaluation) == max(1, round(share * count))
    assert len(train) + len(evaluation) == count
    expected = sum(dataset["label"]) * len(evaluation) / count
    assert abs(sum(evaluation["label"]) - expected) < 1
    assert list(split_dataset(dataset, share, seed=seed, stratify="label").evaluation) == list(evaluation)


def test_split_depends_on_content_and_seed_alone():
    dataset = Dataset.from_list([{"text": f"text {n}"} for n in range(50)])
    backwards = dataset.select(range(49, -1, -1))
    chosen = set(split_dataset(dataset, 10, seed=1).evaluation["text"])
    assert chosen == set(split_dataset(backwards, 10, seed=1).evaluation["text"])
    assert chosen != set(split_dataset(dataset, 10, seed=2).evaluation["text"])
    assert len(chosen) == 10


def test_split_ignores_case_and_white_space():
    rows = [{"text": f"  Text\t{n}"} for n in range(20)] + [{"text": f"text {n} "} for n in range(20)]
    train, evaluation = split_dataset(Dataset.from_list(rows), 0.5)
    clean = [{text.strip().lower().replace("\t", " ") for text in part["text"]} for part in (train, evaluation)]
    assert not clean[0] & clean[1]


@pytest.mark.parametrize("evaluation", [0.0, 1.0, 0, 4, -0.5, True, "half"])
def test_wrong_shares_are_refused(evaluation):
    with pytest.raises(DataError, match="a share between 0 and 1 or a number of rows from 1 to 3"):
        split_dataset(Dataset.from_list([{"text": str(n)} for n in range(4)]), evaluation)


def test_unsplittable_data_are_refused():
    with pytest.raises(DataError, match=r"leaves no .* data. Give more rows"):
        split_dataset(Dataset.from_list([{"text": "same"}] * 4), 0.5)
    with pytest.raises(DataError, match="no rows"):
        split_dataset(Dataset.from_dict({"text": []}), 0.5)
    with pytest.raises(DataError, match=r"'labels', which the data do not have.*Did you mean 'label'"):
        split_dataset(Dataset.from_list([{"text": "a", "label": 0}]), 0.5, stratify="labels")
    with pytest.raises(DataError, match="Name some with texts"):
        split_dataset(Dataset.from_list([{"label": n} for n in range(4)]), 0.5, stratify="label")


def test_empty_rows_are_dropped_on_demand():
    dataset = Dataset.from_dict({"text": ["a", " ", None, "b"], "other": ["", "x", "y", "z"]})
    kept, dropped = drop_empty_rows(dataset, ["text"])
    assert list(kept["text"]) == ["a", "b"]
    assert dropped == (1, 2)
    assert drop_empty_rows(kept, ["text"]).dropped == ()
    with pytest.raises(DataError, match="Every row is empty"):
        drop_empty_rows(dataset.select([1, 2]), ["text"])
    with pytest.raises(DataError, match="Did you mean 'text'"):
        drop_empty_rows(dataset, ["txt"])


def test_class_names_survive_parquet(tmp_path):
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    Dataset.from_dict({"text": ["a", "b"], "label": [0, 1]}, features=features).to_parquet(tmp_path / "a.parquet")
    assert read_dataset(tmp_path / "a.parquet").features["label"].names == ["no", "yes"]
