"""Classification as a cloze: which token is learned where, which logits count, and what is refused.

Invariant 10 of the fact sheet of P-tuning is tested here, the others in tests/methods/test_p_tuning.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForMaskedLM, LlamaForCausalLM

import deltune
from deltune.errors import DataError, StateError, TrainingError
from deltune.tasks import Cloze, TextClassification, task_from_description
from deltune.tasks.template import FIRST_PSEUDO_TOKEN
from deltune.training import TrainingSettings, evaluate, predict
from tests.tasks.tiny import WORDS, byte_tokenizer, decoder, word_tokenizer
from tests.zoo import randomize

FILMS = Dataset.from_list(
    [
        {"text": "the film is very fine", "label": "positive"},
        {"text": "not", "label": "negative"},
        {"text": "plot and acting", "label": "positive"},
    ]
)
MASK = len(WORDS)
VOCABULARY = MASK + 1
GOOD, BAD, FINE, WAS = (WORDS.index(word) for word in ("good", "bad", "fine", "was"))
WORDED = ("negative=bad", "positive=good|fine")


def tokenizer():
    return word_tokenizer(mask_token="[MASK]")


def cloze(template="{text} was [MASK]", words=WORDED, **options):
    return Cloze(template=template, words=words, **options)


def byte_cloze(**options):
    return Cloze(**{"template": "{text}:", "words": ("negative=-", "positive=+|!"), **options})


def plain_decoder_task():
    """Its words stand right behind the text, so that a tokenizer of bytes has one token for each."""
    return byte_cloze(template="{text}:[MASK]")


def masked_model(seed=0, **options):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **options,
    )
    return BertForMaskedLM(config).eval()


# -- words and classes ---------------------------------------------------------------------------------------


def test_the_words_say_the_classes_and_the_data_must_agree():
    task = Cloze.from_data(FILMS, template="{text} [MASK]", words={"positive": ("good", "fine"), "negative": "bad"})
    assert task.label_names == ("positive", "negative")
    assert task.words == ("positive=good|fine", "negative=bad")
    assert task.verbalizer == {"positive": ("good", "fine"), "negative": ("bad",)}
    assert task == Cloze.from_data(FILMS, template="{text} [MASK]", words=task.words)
    with pytest.raises(DataError, match=r"label 'negative', which is not one of the classes.*Did you mean 'negativ'"):
        Cloze.from_data(FILMS, words=("positive=good", "negativ=bad"))


def test_without_words_the_names_of_the_classes_are_the_words():
    data = Dataset.from_list([{"text": "film", "label": "good"}, {"text": "plot", "label": "bad"}])
    task = Cloze.from_data(data, template="{text} [MASK]")
    assert task.label_names == ("bad", "good")
    assert task.resolve(tokenizer()).word_ids == (BAD, GOOD)


def test_labels_may_be_numbers_and_class_labels():
    features = Features({"text": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    data = Dataset.from_dict({"text": ["film", "plot"], "label": [1, 0]}, features=features)
    assert Cloze.from_data(data, words=WORDED).encode(data, tokenizer())[0]["labels"].count(GOOD) == 1
    numbers = Dataset.from_dict({"text": ["film", "plot"], "label": [0, 1]})
    task = Cloze.from_data(numbers, template="{text} [MASK]", words=("0=bad", "1=good"))
    assert [row["labels"][2] for row in task.encode(numbers, tokenizer())] == [BAD, GOOD]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": ("negative",)}, "'negative' does not say the word of a class. Write name=word"),
        ({"words": ("negative=", "positive=good")}, "does not say the word"),
        ({"words": ("negative=bad|", "positive=good")}, "does not say the word"),
        ({"words": ("a=bad", "a=good")}, "says the word of 'a' twice. Join several"),
        ({"words": ("a=bad", "b=bad")}, "'bad' stands twice"),
        ({"words": {"a": "b,c", "d": "e"}}, r"words of 'a' must be text without '=', '\|' and ','"),
        ({"words": {"a": 3, "d": "e"}}, "words of 'a' must be text"),
        ({"words": ("a=bad",)}, "at least two|same class|nothing to learn"),
        ({"words": WORDED, "label_names": ("negative", "positive", "other")}, "says no word for 'other'"),
        ({"words": WORDED, "label_names": ("negativ", "positive")}, "entry for 'negative', which is no class. Did you"),
        ({"words": WORDED, "language_model": "mask"}, "must be one of auto, masked, causal.*Did you mean 'masked'"),
        ({"words": WORDED, "template": "It was [MASK]"}, "reads no column"),
        ({"words": WORDED, "label": None}, "label must name a data column"),
        ({}, "classes are not known"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        Cloze(**options)


def test_a_missing_column_names_the_nearest():
    with pytest.raises(DataError, match=r"'cloze' reads the column 'txt', which the data do not have.*mean 'text'"):
        Cloze.from_data(FILMS, template="{txt} [MASK]", words=WORDED)
    with pytest.raises(DataError, match=r"no option 'templat'.*Did you mean 'template'"):
        Cloze.from_data(FILMS, templat="{text} [MASK]")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("a=good film", "b=bad"), r"The word 'good film' of the class 'a' must be one token .* is 2: 'good', 'film'"),
        (("a=excellent", "b=bad"), "'excellent' of the class 'a' is not in the model's vocabulary"),
    ],
)
def test_words_that_are_not_one_token_are_refused_with_their_pieces(words, message):
    with pytest.raises(DataError, match=message):
        cloze(words=words).resolve(tokenizer())


def test_words_of_the_same_token_are_refused():
    from tokenizers import normalizers

    made = tokenizer()
    made.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(DataError, match="The words 'good' and 'Good' are the same token"):
        cloze(words=("a=good", "b=Good")).resolve(made)


def test_pieces_of_a_byte_level_word_are_shown():
    with pytest.raises(DataError, match=r"'no' of the class 'a' must be one token .* is 3: 'Ġ', 'n', 'o'"):
        byte_cloze(words=("a=no", "b=yes")).resolve(byte_tokenizer())


# -- encoding ------------------------------------------------------------------------------------------------


def test_the_label_stands_at_the_mask_alone():
    task = cloze("[P] {text} was [MASK] and [P2]")
    encoded, report = task.encode_with_report(FILMS, tokenizer())
    row = encoded[1]
    assert row["input_ids"] == [
        *(2, FIRST_PSEUDO_TOKEN, WORDS.index("not"), WAS, MASK, WORDS.index("and")),
        *(FIRST_PSEUDO_TOKEN + 1, FIRST_PSEUDO_TOKEN + 2, 3),
    ]
    assert row["labels"] == [-100] * 4 + [BAD] + [-100] * 4
    assert row["token_type_ids"] == [0] * 9
    assert row["attention_mask"] == [1] * 9
    assert report.trained_tokens == 3
    unlabelled = task.encode(FILMS.remove_columns("label"), tokenizer(), labelled=False)
    assert "labels" not in unlabelled.column_names
    assert unlabelled[1]["input_ids"] == row["input_ids"]


def test_a_decoder_reads_the_word_last_and_learns_it_alone():
    task, made = plain_decoder_task(), byte_tokenizer(start=True, ends=True)
    row = task.encode(FILMS, made)[1]
    expected = [*made.convert_tokens_to_ids(["<start>", "n", "o", "t", ":"]), made.convert_tokens_to_ids("-")]
    assert row["input_ids"] == expected
    assert row["labels"] == [-100] * 5 + expected[-1:]
    unlabelled = task.encode(FILMS, made, labelled=False)[1]
    assert unlabelled["input_ids"] == expected[:-1]


def test_rows_that_are_too_long_keep_their_answer():
    made = byte_tokenizer()
    encoded, report = byte_cloze(template="{text}:[MASK]", max_length=6).encode_with_report(FILMS, made)
    assert report.truncated_rows == 2
    assert report.longest == 6
    assert [made.decode(row["input_ids"]) for row in encoded] == ["the :+", "not:-", "plot:+"]
    masked = cloze("[P2] {text} was [MASK]", max_length=8).encode(FILMS, tokenizer())
    assert masked[0]["input_ids"][-3:] == [WAS, MASK, 3]
    assert masked[0]["labels"][6] == GOOD


def test_the_kind_of_model_follows_the_tokenizer_and_is_kept():
    assert cloze().resolve(tokenizer()).language_model == "masked"
    resolved = plain_decoder_task().resolve(byte_tokenizer())
    assert resolved.language_model == "causal"
    assert task_from_description(resolved.describe()) == resolved
    assert resolved.resolve(byte_tokenizer()) == resolved
    with pytest.raises(DataError, match="something follows"):
        cloze("{text} [MASK].").resolve(byte_tokenizer())
    with pytest.raises(DataError, match="has no mask token"):
        cloze(language_model="masked").resolve(byte_tokenizer())


def test_another_tokenizer_is_refused():
    resolved = cloze().resolve(tokenizer())
    other = byte_tokenizer(mask_token="<start>")
    with pytest.raises(DataError, match=r"have the ids .* but this tokenizer gives|must be one token"):
        resolved.resolve(other)
    with pytest.raises(DataError, match=r"have the ids 5, 4, 6, but this tokenizer gives 5, 6, 4"):
        cloze(words=("negative=bad", "positive=fine|good"), word_ids=(5, 4, 6)).resolve(tokenizer())


# -- loss and metrics ----------------------------------------------------------------------------------------


def batch_of(task, made, data=FILMS, side="right", labelled=True):
    rows = list(task.encode(data, made, labelled=labelled))
    return task.collator(made, padding_side=side)(rows), rows


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_the_loss_is_that_of_the_word_over_the_vocabulary(kind):
    """The model's own loss, and that of the task, are both -log p(word | row), averaged over rows."""
    task, made, model = both(kind)
    batch, _ = batch_of(task, made)
    with torch.no_grad():
        output = model(**batch)
    place = (batch["labels"] != -100).long().argmax(1) - int(kind == "causal")
    words = [task.word_ids[1], task.word_ids[0], task.word_ids[1]]
    naive = -sum(output.logits[row].log_softmax(-1)[place[row], word] for row, word in enumerate(words)) / 3
    assert output.loss == pytest.approx(float(naive), rel=1e-5)
    assert task.metrics(task.reduce_logits(output.logits, batch["labels"]))["loss"] == pytest.approx(
        float(naive), rel=1e-5
    )


def both(kind):
    """A resolved task, a tokenizer and a model."""
    if kind == "masked":
        made, model = tokenizer(), masked_model()
        task = cloze().resolve(made)
    else:
        made, model = byte_tokenizer(pad_token="<end>"), decoder()
        task = plain_decoder_task().resolve(made)
    randomize(model, 2)
    return task, made, model


def test_words_of_one_class_count_together():
    task = cloze().resolve(tokenizer())
    logits = torch.zeros(VOCABULARY)
    logits[BAD], logits[GOOD], logits[FINE], logits[7] = math.log(3), math.log(2), math.log(2), 9.0
    assert torch.allclose(task.class_scores(logits).exp(), torch.tensor([3.0, 4.0]))
    (row,) = task.predict(task.class_scores(logits)[None])
    assert row["label"] == "positive"
    assert row["probabilities"] == pytest.approx({"negative": 3 / 7, "positive": 4 / 7})


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_invariant_10_only_the_words_logits_at_the_place_count(kind, side, monkeypatch):
    """Everywhere else logits may be anything, on whichever side the rows are padded."""
    task, made, _ = both(kind)
    monkeypatch.setattr(Cloze, "prediction_padding_side", side)
    batch, rows = batch_of(task, made, side=side)
    plain, plain_rows = batch_of(task, made, side=side, labelled=False)
    wanted = torch.tensor([[0.5, 2.0], [3.0, 1.0], [1.0, 1.5]])
    predictions, reduced = [], []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for inputs, found in ((batch, reduced), (plain, predictions)):
            logits = 50 * torch.randn(*inputs["input_ids"].shape, made.vocab_size + 9, generator=generator)
            for row, data_row in enumerate(rows if found is reduced else plain_rows):
                offset = inputs["input_ids"].shape[1] - len(data_row["input_ids"]) if side == "left" else 0
                ids = data_row["input_ids"]
                place = ids.index(MASK) if kind == "masked" else len(ids) - (2 if found is reduced else 1)
                others = logits[row, offset + place]
                others[list(task.word_ids)] = torch.tensor([wanted[row, 0], wanted[row, 1], -1e9])
            if found is reduced:
                found.append(task.reduce_logits(logits, inputs["labels"]))
            else:
                found.append(task.predict_rows(logits, plain_rows, made))
    for kept in reduced:
        assert torch.allclose(kept[:, :2], wanted)
        assert kept[:, 2].tolist() == [1, 0, 1]
        metrics = task.metrics(kept)
        assert metrics["accuracy"] == 1
    assert predictions[0] == predictions[1]
    assert [row["label"] for row in predictions[0]] == ["positive", "negative", "positive"]
    shares = wanted.double().softmax(-1)
    for row, expected in zip(predictions[0], shares, strict=True):
        assert list(row["probabilities"].values()) == pytest.approx(expected.tolist())


def test_positions_that_a_method_puts_in_front_are_passed_over():
    task, made, _ = both("masked")
    batch, rows = batch_of(task, made)
    logits = torch.randn(3, batch["input_ids"].shape[1], VOCABULARY)
    longer = torch.cat([torch.randn(3, 2, VOCABULARY), logits], dim=1)
    assert torch.equal(task.reduce_logits(longer, batch["labels"]), task.reduce_logits(logits, batch["labels"]))
    assert task.predict_rows(longer, rows, made) == task.predict_rows(logits, rows, made)


def test_metrics_are_those_of_text_classification():
    task = cloze().resolve(tokenizer())
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]])
    true = torch.tensor([0, 1, 1, 1])
    rows = torch.cat([scores, true[:, None].float(), torch.tensor([[1.0], [2.0], [3.0], [6.0]])], dim=1)
    plain = TextClassification(label_names=task.label_names).metrics(scores, true)
    assert task.metrics(rows) == {"loss": 3.0, **plain}
    assert plain["accuracy"] == 0.75


def test_outputs_that_do_not_fit_are_refused():
    task, made, _ = both("masked")
    batch, rows = batch_of(task, made)
    logits = torch.zeros(3, batch["input_ids"].shape[1], VOCABULARY)
    with pytest.raises(TrainingError, match="has one label, that of its word"):
        task.reduce_logits(logits, torch.full_like(batch["labels"], -100))
    with pytest.raises(TrainingError, match="none of the words"):
        task.reduce_logits(logits, batch["labels"].masked_fill(batch["labels"] == GOOD, WAS))
    with pytest.raises(TrainingError, match="do not belong to 3 rows"):
        task.reduce_logits(logits[:, 1:], batch["labels"])
    with pytest.raises(DataError, match=r"Predictions have the shape \[3, 2\], where \[rows, 4\]"):
        task.metrics(torch.zeros(3, 2))
    with pytest.raises(DataError, match="Use predict_rows for the logits"):
        task.predict(logits)
    with pytest.raises(DataError, match="needs the tokenizer"):
        task.predict_rows(logits, rows)
    with pytest.raises(DataError, match=r"Call task\.resolve"):
        cloze().class_scores(logits)


# -- models --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    masked_model().save_pretrained(folder / "masked")
    tokenizer().save_pretrained(folder / "masked")
    decoder().save_pretrained(folder / "decoder")
    byte_tokenizer().save_pretrained(folder / "decoder")
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(vocab_size=VOCABULARY, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **sizes)
    BartForConditionalGeneration(config).save_pretrained(folder / "encoder-decoder")
    tokenizer().save_pretrained(folder / "encoder-decoder")
    return folder


def test_loads_a_masked_model_or_a_decoder(models):
    task = cloze()
    assert isinstance(task.load_model(models / "masked"), BertForMaskedLM)
    made = task.load_tokenizer(models / "masked")
    assert isinstance(task.load_model(models / "masked", tokenizer=made, dropout=0.0), BertForMaskedLM)
    assert isinstance(plain_decoder_task().load_model(models / "decoder"), LlamaForCausalLM)
    with pytest.raises(DataError, match=r"is an encoder-decoder.*'sequence-to-sequence'"):
        task.load_model(models / "encoder-decoder")


@pytest.mark.parametrize("kind", ["masked", "causal"])
def test_learns_measures_and_predicts(kind):
    """The task as it was made and as it was resolved are measured alike, and predictions are what was measured."""
    task, made, model = both(kind)
    unresolved = cloze() if kind == "masked" else plain_decoder_task()
    data = Dataset.from_list(
        [{"text": text, "label": label} for text, label in (("film", "positive"), ("plot", "negative"))] * 8
    )
    tuned = deltune.attach(model, "full", reversible=False)
    settings = TrainingSettings(steps=30, batch_size=8, learning_rate=1e-2, threads=1, keep_best=False)
    result = deltune.fit(tuned, unresolved, data, data, tokenizer=made, settings=settings)
    assert result.metrics["accuracy"] == 1
    assert result.metrics["loss"] < 0.5
    assert tuple(result.provenance["task"]["options"]["word_ids"]) == task.word_ids
    assert evaluate(tuned, unresolved, data, made) == evaluate(tuned, task, data, made)
    found = predict(tuned, unresolved, data.remove_columns("label"), made, batch_size=3)
    assert [row["label"] for row in found] == list(data["label"])


def test_accumulated_batches_equal_one_batch():
    """Each row counts once, whatever the length of its batch."""
    first_steps = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        task, made, model = both("masked")
        tuned = deltune.attach(model, "bitfit")
        options = {"batch_size": batch_size, "gradient_accumulation": accumulation, "length_buckets": False}
        settings = TrainingSettings(steps=1, threads=1, **options)
        data = Dataset.from_list([*FILMS, {"text": "acting", "label": "negative"}])
        first_steps.append(deltune.fit(tuned, task, data, tokenizer=made, settings=settings).history[0])
    for name in ("loss", "gradient_norm"):
        assert first_steps[0][name] == pytest.approx(first_steps[1][name], rel=1e-4)


def test_pseudo_tokens_that_nothing_makes_are_refused_before_the_model_fails():
    task, made, model = cloze("[P2] {text} was [MASK]"), tokenizer(), masked_model()
    settings = TrainingSettings(steps=1, threads=1)
    tuned = deltune.attach(model, "lora")
    message = r"has 2 pseudo tokens, but the live methods make none. Attach p-tuning\(placement=template, length=2\)"
    with pytest.raises(StateError, match=message):
        deltune.fit(tuned, task, FILMS, tokenizer=made, settings=settings)
    with pytest.raises(StateError, match=message):
        evaluate(tuned, task, FILMS, made)
    with pytest.raises(StateError, match=message):
        predict(tuned, task, FILMS, made)
    tuned.attach("p-tuning(placement=template, length=3)", name="three")
    with pytest.raises(StateError, match="has 2 pseudo tokens, but the live methods make 3"):
        evaluate(tuned, task, FILMS, made)
    with pytest.raises(StateError, match=r"makes 3 pseudo tokens .* the task 'cloze' has none"):
        evaluate(tuned, cloze(), FILMS, made)
    tuned.attach("p-tuning(placement=template, length=2)", name="two")
    assert 0 <= evaluate(tuned, task, FILMS, made)["accuracy"] <= 1
