"""A cloze with P-tuning from the command line: tune, eval and predict on a tiny masked language model and a decoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import BertForMaskedLM

from tests.cli.conftest import Command, write_csv
from tests.tasks.tiny import WORDS, byte_tokenizer, decoder, word_tokenizer
from tests.training import tiny
from tests.zoo import randomize

WORDED = ("--words", "negative=bad,positive=good|fine")
TEMPLATE = ("--template", "[P2] {text} was [P] [MASK].")


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a masked language model, and reviews."""
    folder = tmp_path_factory.mktemp("masked")
    torch.manual_seed(0)
    config = tiny.config(dropout=0.0)
    config.vocab_size = len(WORDS) + 1
    model = BertForMaskedLM(config)
    randomize(model, 5)
    model.save_pretrained(folder / "model")
    word_tokenizer(mask_token="[MASK]").save_pretrained(folder / "model")
    write_csv(folder / "train.csv", list(tiny.reviews(60)))
    write_csv(folder / "test.csv", list(tiny.reviews(30, seed=1)))
    return folder


def tune(folder: Path, output: Path, *more: object) -> list[object]:
    return [
        *("tune", "--task", "cloze", "--model", folder / "model", "--data", folder / "train.csv"),
        *("--evaluation", folder / "test.csv", "--output", output, "--threads", 1, "--json", *more),
    ]


def test_p_tuning_is_tuned_measured_and_predicts(masked: Path, deltune: Command, tmp_path: Path) -> None:
    method = ("--method", "p-tuning", "--placement", "template", "--length", 3)
    ended = deltune(*tune(masked, tmp_path / "run", *WORDED, *TEMPLATE, *method, "--steps", 4))
    assert ended.status == 0, ended.err
    options = ended.json["provenance"]["task"]["options"]
    assert options["label_names"] == ["negative", "positive"]
    assert options["language_model"] == "masked"
    assert options["word_ids"] == [WORDS.index(word) for word in ("bad", "good", "fine")]
    assert ended.json["parameters"]["head"] == 0
    assert {"loss", "accuracy", "macro_f1", "matthews"} == set(ended.json["metrics"])
    stored = json.loads((tmp_path / "run" / "deltune.json").read_text())
    assert stored["tensors"] == {"encoder.embeddings.rows": ["float32", 3, 16]}

    loaded = ("--model", masked / "model", "--delta", tmp_path / "run")
    measured = deltune("eval", *loaded, "--data", masked / "test.csv", "--json")
    assert measured.status == 0, measured.err
    for name, value in ended.json["metrics"].items():
        assert measured.json["metrics"][name] == pytest.approx(value, abs=1e-6)
    predicted = deltune("predict", *loaded, "--text", "the film was good")
    assert predicted.status == 0, predicted.err
    assert sum(predicted.json["probabilities"].values()) == pytest.approx(1)
    assert predicted.json["label"] in ("negative", "positive")
    many = deltune("predict", *loaded, "--data", masked / "test.csv", "--output", tmp_path / "found.jsonl")
    assert many.status == 0, many.err
    labels = [json.loads(line)["label"] for line in (tmp_path / "found.jsonl").read_text().splitlines()]
    true = [row["label"] for row in tiny.reviews(30, seed=1)]
    right = sum(one == other for one, other in zip(labels, true, strict=True)) / 30
    assert right == pytest.approx(measured.json["metrics"]["accuracy"])


def test_the_language_model_is_tuned_along(masked: Path, deltune: Command, tmp_path: Path) -> None:
    method = ("--method", "p-tuning(placement=template, length=3) + full", "--steps", 4)
    ended = deltune(*tune(masked, tmp_path / "run", *WORDED, *TEMPLATE, *method))
    assert ended.status == 0, ended.err
    stored = json.loads((tmp_path / "run" / "deltune.json").read_text())["tensors"]
    assert stored["0.encoder.embeddings.rows"] == ["float32", 3, 16]
    assert "bert.embeddings.word_embeddings.weight" in stored
    loaded = ("--model", masked / "model", "--delta", tmp_path / "run")
    measured = deltune("eval", *loaded, "--data", masked / "test.csv", "--json")
    for name, value in ended.json["metrics"].items():
        assert measured.json["metrics"][name] == pytest.approx(value, abs=1e-6)


def test_any_method_may_answer_a_template_without_pseudo_tokens(masked: Path, deltune: Command, tmp_path: Path) -> None:
    template = ("--template", "{text} was [MASK]")
    for method in ("lora", "p-tuning"):
        ended = deltune(*tune(masked, tmp_path / method, *WORDED, *template, "--method", method, "--steps", 2))
        assert ended.status == 0, ended.err
        assert "accuracy" in ended.json["metrics"]


def test_a_decoder_answers_with_the_next_token(deltune: Command, tmp_path: Path) -> None:
    decoder().save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": text, "label": label} for text, label in (("good", "yes"), ("bad", "no"))] * 8
    write_csv(tmp_path / "train.csv", rows)
    write_csv(tmp_path / "test.csv", rows[:4])
    template = ("--template", "{text}[P3]:[MASK]", "--words", "no=-,yes=+")
    method = ("--method", "p-tuning(placement=template, length=3) + full", "--learning-rate", 0.01, "--steps", 40)
    ended = deltune(*tune(tmp_path, tmp_path / "run", *template, *method))
    assert ended.status == 0, ended.err
    assert ended.json["metrics"]["accuracy"] == 1
    loaded = ("--model", tmp_path / "model", "--delta", tmp_path / "run")
    for text, label in (("good", "yes"), ("bad", "no")):
        assert deltune("predict", *loaded, "--text", text).json["label"] == label


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((*WORDED, *TEMPLATE, "--method", "lora"), "has 3 pseudo tokens, but the live methods make none"),
        ((*WORDED, *TEMPLATE, "--method", "p-tuning(placement=template)"), "but the live methods make 9"),
        ((*WORDED, "--template", "{text} was [MASK"), "is never closed"),
        ((*WORDED, "--template", "{txt} was [MASK]"), "Did you mean 'text'"),
        (("--template", "{text} was [MASK]"), "'negative' of the class 'negative' is not in the model's vocabulary"),
        ((*WORDED, "--text", "text"), "no option 'text'"),
    ],
)
def test_wrong_input_is_said(
    options: tuple[object, ...], message: str, masked: Path, deltune: Command, tmp_path: Path
) -> None:
    ended = deltune(*tune(masked, tmp_path / "run", *options, "--steps", 1))
    assert ended.status == 2
    assert message in " ".join(ended.err.split())
