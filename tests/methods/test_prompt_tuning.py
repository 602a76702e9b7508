"""Prompt tuning, against its fact sheet and against Hugging Face peft.

In tests/laws/test_batches.py, over every architecture: 4 (padding) and 6 (generation equals teacher forcing).
In tests/prompting/test_ensemble.py: 10 (ensembles). What starts from prompts of other tasks: test_multitask_prompts.py.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import deltune
from deltune.errors import MethodError, StateError
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.tasks.tiny import byte_tokenizer, word_tokenizer
from tests.zoo import ARCHITECTURES

SMALL = "prompt-tuning(length=3)"
DECODERS = ["gpt2", "gpt_neox", "llama-gqa", "mistral", "qwen3", "gemma2", "phi3"]


def rows_of(tuned: deltune.Tuned) -> torch.nn.Parameter:
    (form,) = tuned.attachments["default"].forms.values()
    return form.rows  # type: ignore[return-value]


@pytest.mark.parametrize("name", DECODERS)
def test_1_equals_the_frozen_model_on_embedded_input(name: str) -> None:
    """[E_p; X] with a mask of ones in front and the model's own positions."""
    tuned, batch = attached(name, SMALL, dtype=torch.float64)
    rows = rows_of(tuned).detach()
    ours = output(tuned.model, batch)
    frozen = build(name, dtype=torch.float64)
    with torch.no_grad():
        text = frozen.get_input_embeddings()(batch["input_ids"])
        joined = torch.cat([rows.expand(3, -1, -1), text], dim=1)
        expected = frozen(inputs_embeds=joined, attention_mask=torch.ones(3, joined.shape[1])).logits
    assert ours.shape == (3, 7, 100)
    # rotary tables and norms of some files are float32 whatever the model is
    assert relative_error(ours, expected[:, 3:]) < 1e-12


def test_2_exactly_p_times_d_values_train() -> None:
    tuned, batch = attached("gpt2", SMALL)
    assert [tuple(value.shape) for value in tuned.trainable_parameters()] == [(3, 32)]
    loss_of(tuned.model, batch).backward()
    assert [value.shape for value in tuned.model.parameters() if value.grad is not None] == [(3, 32)]
    assert (rows_of(tuned).grad.abs().amax(1) > 0).all()  # type: ignore[union-attr]


def test_2_published_counts() -> None:
    for length, expected in ((20, 15_360), (100, 76_800)):
        assert BERT_BASE.count(f"prompt-tuning(length={length})") == expected
    for length, expected in ((20, 11_520), (100, 57_600)):
        assert LLAMA.count(f"prompt-tuning(length={length})") == expected


@pytest.mark.parametrize("name", [*DECODERS, "t5"])
def test_3_rows_of_real_tokens_are_those_tokens(name: str) -> None:
    """Gemma scales its embeddings, so the rows must be scaled alike."""
    tuned, batch = attached(name, SMALL)
    words = torch.tensor([20, 21, 22])
    table = tuned.model.get_input_embeddings()
    with torch.no_grad():
        rows_of(tuned).copy_(table(words))
    longer = torch.cat([words.expand(3, -1), batch["input_ids"]], dim=1)
    read = {**batch, "input_ids": longer, "attention_mask": torch.ones_like(longer)}
    expected = output(build(name), read)
    expected = expected if name == "t5" else expected[:, 3:]
    assert relative_error(output(tuned.model, batch), expected) < 1e-6


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5", "bert"])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_4_what_stands_in_the_padding_does_not_matter(name: str, padding: str) -> None:
    tuned, _ = attached(name, SMALL, head="base" if name == "bert" else None)
    batch = ARCHITECTURES[name].batch(padding=padding)  # type: ignore[arg-type]
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 55)}
    real = ARCHITECTURES[name].real(batch)
    assert relative_error(output(tuned.model, other)[real], output(tuned.model, batch)[real]) < 1e-6


def test_5_the_prompt_is_in_no_loss_and_in_no_generated_text() -> None:
    tuned, batch = attached("llama-gqa", SMALL)
    labels = batch["input_ids"].clone()
    with torch.no_grad():
        result = tuned.model(**batch, labels=labels)
    by_hand = torch.nn.functional.cross_entropy(result.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert torch.allclose(result.loss, by_hand)
    tokens = tuned.model.generate(**batch, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert tokens.shape == (3, 11)
    assert torch.equal(tokens[:, :7], batch["input_ids"])


def test_7_rows_are_distinct_members_of_the_beginning_of_the_table() -> None:
    model = build("llama-gqa", vocab_size=6000)
    tuned = deltune.attach(model, "prompt-tuning(length=200)")
    table = model.get_input_embeddings().weight
    ids = [(table == row).all(1).nonzero() for row in rows_of(tuned)]
    assert all(len(found) == 1 for found in ids)
    members = torch.cat(ids).flatten()
    assert members.unique().numel() == 200
    assert members.max() < 5000
    assert members.max() > 4000


def test_7_rows_are_copies_and_not_views() -> None:
    model = build("gpt2")
    before = model.get_input_embeddings().weight.detach().clone()
    tuned = deltune.attach(model, SMALL)
    train(tuned, ARCHITECTURES["gpt2"].batch())
    assert torch.equal(model.get_input_embeddings().weight, before)


# -- rows from text and labels -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a tokenizer of whole words: good 4, bad 5, fine 6, film 7."""
    folder = tmp_path_factory.mktemp("words")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "t5", "bert"])
def test_8_a_label_starts_as_the_mean_of_its_tokens(name: str, words: str) -> None:
    """Gemma scales its embeddings, and so must the rows be."""
    method = deltune.PromptTuning(length=5, start_labels=("good", "bad film", "film film bad"), tokenizer=words)
    tuned, _ = attached(name, method, dtype=torch.float64)  # type: ignore[arg-type]
    rows, embed = rows_of(tuned).detach(), tuned.model.get_input_embeddings()
    with torch.no_grad():
        for row, ids in zip(rows, ([4], [5, 7], [7, 7, 5]), strict=False):
            expected = sum(embed(torch.tensor([token]))[0] for token in ids) / len(ids)
            assert relative_error(row, expected) < 1e-7
        everything = embed(torch.arange(100))
    for row in rows[3:]:  # more rows than labels
        assert (everything == row).all(1).any()


def test_8_labels_may_fill_the_prompt(words: str) -> None:
    tuned, _ = attached("gpt2", f"prompt-tuning(length=2, start_labels='good,bad', tokenizer={words})")
    assert torch.equal(rows_of(tuned), tuned.model.get_input_embeddings().weight[[4, 5]])


@pytest.mark.parametrize(("length", "ids"), [(2, [4, 7]), (3, [4, 7, 5]), (8, [4, 7, 5, 4, 7, 5, 4, 7])])
def test_text_is_repeated_or_cut(length: int, ids: list[int], words: str) -> None:
    tuned, _ = attached("gpt2", f"prompt-tuning(length={length}, start_text='good film bad', tokenizer={words})")
    assert torch.equal(rows_of(tuned), tuned.model.get_input_embeddings().weight[ids])
    assert tuned.attachments["default"].method.initialization == "text"  # type: ignore[attr-defined]


def test_the_tokenizer_is_that_of_the_models_folder(words: str) -> None:
    model = build("gpt2")
    model.config._name_or_path = words
    tuned = deltune.attach(model, "prompt-tuning(length=1, start_text=film)")
    assert torch.equal(rows_of(tuned)[0], model.get_input_embeddings().weight[7])


def test_without_a_tokenizer_it_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match=r"start_text needs.*not loaded from a folder.*tokenizer=FOLDER"):
        deltune.attach(build("gpt2"), "prompt-tuning(start_text=film)")
    method = deltune.PromptTuning(start_labels=("film",), tokenizer=str(tmp_path))
    with pytest.raises(MethodError, match=r"start_labels needs.*none that can be read.*tokenizer=FOLDER"):
        deltune.attach(build("gpt2"), method)


def test_text_without_a_place_in_the_table_is_refused(words: str, tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="no tokens of ' '"):
        deltune.attach(build("gpt2"), deltune.PromptTuning(start_text=" ", tokenizer=words))
    byte_tokenizer().save_pretrained(tmp_path)  # 261 tokens, the models embed 100
    with pytest.raises(MethodError, match=r"the model embeds 100 tokens.*of another model"):
        deltune.attach(build("gpt2"), deltune.PromptTuning(start_text="é", tokenizer=str(tmp_path)))
    with pytest.raises(MethodError, match="vision is not made of tokens"):
        deltune.attach(build("vit"), deltune.PromptTuning(start_text="film", tokenizer=words))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("initialization=text", "initialization=text needs the option start_text"),
        ("initialization=trained", "needs the option start_from"),
        ("initialization=uniform, start_text=a", "not from start_text and initialization=uniform"),
        ("start_text=a, start_labels='b,c'", "not from start_text and start_labels"),
        ("tokenizer=folder", "tokenizer is read for start_text or start_labels only"),
        ("length=1, start_labels='a,b'", "2 start_labels need as many rows, but length is 1. Use length=2"),
        ("similar_to=folder", "Give start_from and similar_to"),
        ("start_from=folder, nearest=1", "Give start_from and similar_to"),
        ("start_from='a,b', similar_to=c, nearest=3", "nearest is 3, but start_from has 2 folders"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: str, message: str) -> None:
    with pytest.raises(MethodError, match=message):
        deltune.methods.parse(f"prompt-tuning({options})")


def test_options_are_read_back_from_their_text() -> None:
    for method in (
        deltune.PromptTuning(start_text="Is it good, (or) bad?"),
        deltune.PromptTuning(start_labels=("very good", "bad")),
        deltune.PromptTuning(start_from=("runs/a", "runs/b"), similar_to="runs/short", nearest=1),
    ):
        assert deltune.methods.parse(str(method)) == deltune.methods.parse(method.to_dict()) == method


def test_12_a_saved_prompt_needs_no_tokenizer(words: str, tmp_path: Path) -> None:
    tuned, batch = attached("gpt2", f"prompt-tuning(length=3, start_text=film, tokenizer={words})")
    train(tuned, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build("gpt2"), tmp_path)
    assert loaded.attachments["default"].method == deltune.PromptTuning(length=3, initialization="uniform")
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


# -- several tasks in one batch ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "t5", "bert"])
def test_11_each_row_of_a_mixed_batch_has_its_own_prompt(name: str) -> None:
    tuned, batch = attached(name, "prompt-tuning(length=3)")
    torch.manual_seed(5)
    tuned.attach("prompt-tuning(length=3)", "other")
    alone = {}
    for task in ("default", "other"):
        tuned.activate(task)
        alone[task] = output(tuned.model, batch)
    with tuned.routed(["other", "default", "other"]):
        together = output(tuned.model, batch)
    for row, task in enumerate(("other", "default", "other")):
        assert relative_error(together[row], alone[task][row]) < 1e-5
    assert relative_error(alone["other"], alone["default"]) > 1e-3


def test_9_random_rows_stay_in_their_range_and_repeat() -> None:
    def rows(seed: int) -> torch.Tensor:
        model = build("gpt2")
        torch.manual_seed(seed)
        return rows_of(deltune.attach(model, "prompt-tuning(length=50, initialization=uniform)")).detach()

    first = rows(0)
    assert first.abs().max() <= 0.5
    assert first.max() > 0.49
    assert first.min() < -0.49
    assert torch.equal(first, rows(0))
    assert not torch.equal(first, rows(1))


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_12_the_file_holds_one_tensor_and_restores_its_bits(name: str, tmp_path: Path) -> None:
    model = build(name, "language")
    batch = ARCHITECTURES[name].batch(head="language")
    tuned = deltune.attach(model, SMALL, train_head=False)
    train(tuned, batch)
    tuned.save(tmp_path)
    (stored,) = load_file(tmp_path / "delta.safetensors").values()
    assert torch.equal(stored, rows_of(tuned))
    assert torch.equal(output(deltune.load(build(name, "language"), tmp_path).model, batch), output(model, batch))


# -- pitfalls ------------------------------------------------------------------------------------------------


def test_the_pooled_head_reads_its_token_and_not_the_prompt() -> None:
    """A peer's BERT head silently reads the first prompt row."""
    tuned, batch = attached("bert", SMALL, dtype=torch.float64)
    rows, ours = rows_of(tuned).detach(), output(tuned.model, batch)
    frozen = build("bert", dtype=torch.float64)
    bert = frozen.bert
    with torch.no_grad():
        words = bert.embeddings.word_embeddings(batch["input_ids"])
        joined = torch.cat([rows.expand(3, -1, -1), words], dim=1)
        hidden = bert.encoder(bert.embeddings(inputs_embeds=joined)).last_hidden_state
        pooled = bert.pooler.activation(bert.pooler.dense(hidden[:, 3]))
        expected = frozen.classifier(pooled)
    assert relative_error(ours, expected) < 1e-12


def test_too_long_for_the_positions_is_said_before_it_fails() -> None:
    model = build("gpt2", n_positions=12)
    deltune.attach(model, SMALL)
    assert output(model, ARCHITECTURES["gpt2"].batch(length=9)).shape[1] == 9
    with pytest.raises(StateError, match=r"12.*Shorten the text to 9"):
        output(model, ARCHITECTURES["gpt2"].batch(length=10))


def test_more_rows_than_words_are_refused() -> None:
    with pytest.raises(MethodError, match="initialization=uniform"):
        deltune.attach(build("gpt2"), "prompt-tuning(length=101)")


@pytest.mark.parametrize("new", [1, 3, 6])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral"])
def test_a_static_cache_is_refused_and_not_wrong(name: str, new: int) -> None:
    """It comes with sizes and masks that are already made for the narrower input."""
    tuned, batch = attached(name, SMALL)
    with pytest.raises(StateError, match="static cache"):
        tuned.model.generate(**batch, max_new_tokens=new, cache_implementation="static", disable_compile=True)


def test_only_the_encoder_of_an_encoder_decoder_reads_a_prompt() -> None:
    """A peer allocates and saves as many rows again, which never get a gradient."""
    tuned, batch = attached("t5", SMALL)
    assert list(tuned.attachments["default"].forms) == ["encoder.embeddings"]
    loss_of(tuned.model, batch).backward()
    assert (rows_of(tuned).grad.abs().amax(1) > 1e-7).all()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_equals_huggingface_peft(name: str) -> None:
    """Same rows: equal logits at the text's positions, and equal gradients."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    tuned, batch = attached(name, SMALL, dtype=torch.float64)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(name, dtype=torch.float64), config).double().eval()
    table = theirs.prompt_encoder["default"].embedding.weight
    table.data.copy_(rows_of(tuned).data)
    batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    expected = theirs(**batch).logits[:, 3:]
    ours = tuned.model(**batch).logits
    assert relative_error(ours, expected) < 1e-6
    direction = torch.randn_like(ours)
    (ours * direction).mean().backward()
    (expected * direction).mean().backward()
    assert relative_error(rows_of(tuned).grad, table.grad) < 1e-6  # type: ignore[arg-type]
