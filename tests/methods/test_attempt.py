"""ATTEMPT, against the fact sheet's invariants 1 to 6 and 10.

The laws (tests/laws) run with the defaults, without sources; here they run with sources too.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deltune
from deltune.errors import CheckpointError, MethodError
from deltune.methods.additive.attempt import InstancePrompt, max_pooled
from tests.laws import test_batches as batches
from tests.laws import test_robustness as robustness
from tests.laws import test_unchanged as unchanged
from tests.laws.cases import METHODS, Case
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA, Published
from tests.zoo import ARCHITECTURES

#: A temperature at which the weights differ from row to row.
SMALL = "attempt(length=3, sources=2, width=4, temperature=2)"


def form_of(tuned: deltune.Tuned) -> InstancePrompt:
    (form,) = tuned.attachments["default"].forms.values()
    assert isinstance(form, InstancePrompt)
    return form


def example(sources: int = 3, **options: object) -> InstancePrompt:
    """P = 4, d = 6, w = 5, in float64, every value random."""
    torch.manual_seed(0)
    rows, others = torch.randn(4, 6, dtype=torch.float64), torch.randn(sources, 4, 6, dtype=torch.float64)
    form = InstancePrompt(rows, others, 5, **{"temperature": 1.7, "pool_padding": False, **options})  # type: ignore[arg-type]
    with torch.no_grad():
        for value in form.parameters():
            value.copy_(torch.randn(value.shape, dtype=torch.float64))
    return form


def naive(form: InstancePrompt, text: Tensor, real: list[int]) -> tuple[Tensor, list[float]]:
    """The equations of the sheet for one text (T, d), entry by entry."""
    d = text.shape[1]
    x = [max(float(text[t, j]) for t in real) for j in range(d)]
    down, up = form.down.weight.tolist(), form.up.weight.tolist()
    inner = [sum(w * v for w, v in zip(row, x, strict=True)) for row in down]
    inner = [value / (1 + math.exp(-value)) for value in inner]
    outer = [sum(w * v for w, v in zip(row, inner, strict=True)) for row in up]
    mean = sum(outer) / d
    deviation = math.sqrt(sum((value - mean) ** 2 for value in outer) / d + 1e-5)
    scale, shift = form.norm.weight.tolist(), form.norm.bias.tolist()
    h = [(value - mean) / deviation * scale[j] + shift[j] for j, value in enumerate(outer)]
    prompts = [*form.sources, form.target.detach()]
    keys = [[max(prompt[:, j].tolist()) for j in range(d)] for prompt in prompts]
    scores = [math.exp(sum(a * b for a, b in zip(h, key, strict=True)) / form.temperature) for key in keys]
    weights = [score / sum(scores) for score in scores]
    mixture = form.target.detach().clone()
    for weight, prompt in zip(weights, prompts, strict=True):
        mixture = mixture + weight * prompt
    return mixture, weights


def test_invariant_01_the_mixture_is_that_of_the_equations() -> None:
    form = example()
    text = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        prompts, weights = form(text, mask), form.weights(text, mask)
    assert prompts.shape == (3, 4, 6)
    for row in range(3):
        expected, expected_weights = naive(form, text[row], mask[row].nonzero().flatten().tolist())
        assert (prompts[row] - expected).abs().max() < 1e-12
        assert weights[row].tolist() == pytest.approx(expected_weights, abs=1e-12)


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_invariant_01_the_model_reads_the_mixture(name: str, padding: str) -> None:
    """Against the model with each text's prompt as plain prompt tuning, one text at a time."""
    head = "base" if name == "bert" else "language"
    tuned, _ = attached(name, SMALL, head, dtype=torch.float64)
    plain, _ = attached(name, "prompt-tuning(length=3)", head, dtype=torch.float64)
    architecture = ARCHITECTURES[name]
    batch = architecture.batch(padding=padding, head=head)  # type: ignore[arg-type]
    together = output(tuned.model, batch)
    embed = tuned.model.get_input_embeddings()
    (prompt,) = plain.attachments["default"].forms.values()
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        text = embed(batch["input_ids"][row]).detach()
        expected, _ = naive(form_of(tuned), text, real.nonzero().flatten().tolist())
        with torch.no_grad():
            prompt.rows.copy_(expected)  # type: ignore[operator, union-attr]
        alone = output(plain.model, architecture.alone(batch, row))
        places = architecture.real(batch)[row]
        assert relative_error(together[row][places], alone[0]) < 1e-9


@pytest.mark.parametrize("sources", [1, 2, 6])
def test_invariant_02_weights_sum_to_one_and_a_higher_temperature_flattens_them(sources: int) -> None:
    text = torch.randn(8, 5, 6, dtype=torch.float64)
    entropies = []
    for temperature in (1.7, 3.4):
        with torch.no_grad():
            weights = example(sources, temperature=temperature).weights(text, None)
        assert weights.shape == (8, sources + 1)
        assert (weights > 0).all()
        assert (weights.sum(1) - 1).abs().max() < 1e-6
        entropies.append(-(weights * weights.log()).sum(1))
    assert (entropies[1] > entropies[0]).all()


def test_invariant_03_equal_prompts_give_twice_that_prompt() -> None:
    form = example()
    with torch.no_grad():
        form.sources.copy_(form.target.expand_as(form.sources))
        prompts = form(torch.randn(2, 5, 6, dtype=torch.float64), None)
    assert (prompts - 2 * form.target).abs().max() < 1e-12


def test_invariant_04_without_sources_it_is_twice_the_target() -> None:
    form = example(sources=0)
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(form(text, None), 2 * form.target)
    assert [name for name, _ in form.named_parameters()] == ["target"]  # a network that weights one prompt is none
    form(text, None).sum().backward()
    assert torch.equal(form.target.grad, torch.full_like(form.target, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["bert", "t5", "vit"])
def test_invariant_05_sources_are_frozen_and_all_else_trains(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    form = form_of(tuned)
    sources = form.sources.clone()
    start = {key: value.detach().clone() for key, value in form.named_parameters()}
    assert set(start) == {"target", "down.weight", "up.weight", "norm.weight", "norm.bias"}
    loss_of(tuned.model, batch).backward()
    for key, value in form.named_parameters():
        assert value.grad is not None
        assert value.grad.abs().max() > 0, key
    owned = {id(value) for value in tuned.trainable_parameters()}
    assert all(value.grad is None for value in tuned.model.parameters() if id(value) not in owned)
    train(tuned, batch)
    assert torch.equal(form.sources, sources)
    assert all(not torch.equal(value, start[key]) for key, value in form.named_parameters())


@pytest.mark.parametrize("name", ["bert", "t5"])
@pytest.mark.parametrize("official", [False, True])
def test_invariant_06_padding_matters_in_the_authors_way_only(name: str, official: bool) -> None:
    tuned, batch = attached(name, SMALL.replace(")", f", pool_padding={official})"))
    padding = torch.full((3, 2), ARCHITECTURES[name].pad_token)
    padded = {
        **batch,
        "input_ids": torch.cat([batch["input_ids"], padding], 1),
        "attention_mask": torch.cat([batch["attention_mask"], torch.zeros_like(padding)], 1),
    }
    difference = relative_error(output(tuned.model, padded), output(tuned.model, batch))
    assert (difference > 1e-4) if official else (difference < 1e-5)


def test_invariant_10_counts() -> None:
    from transformers import LlamaForSequenceClassification

    method = "attempt(length=100, sources=1)"
    assert BERT_BASE.count(method) == 231_936
    llama = Published(LlamaForSequenceClassification, LLAMA.config)
    assert llama.count(method) == 173_952
    assert LLAMA.count("attempt(length=100)") == 57_600  # without sources there is no network


def test_the_temperature_is_that_of_the_authors_code() -> None:
    """T = d e, which for T5-base is 2087.6; at that the weights are nearly uniform."""
    from deltune.attachment import Attachment

    method = deltune.ATTEMPT(sources=1)
    model = BERT_BASE.model()
    attachment = Attachment.build("default", method, model, deltune.anatomy_of(model), True, False)
    (form,) = attachment.forms.values()
    assert form.temperature == pytest.approx(2087.6, abs=0.05)
    tuned, batch = attached("bert", "attempt(length=3, sources=2)")
    with torch.no_grad():
        embedded = tuned.model.get_input_embeddings()(batch["input_ids"])
        assert (form_of(tuned).weights(embedded, None) - 1 / 3).abs().max() < 0.1


def test_the_maximum_leaves_out_padding() -> None:
    text = torch.tensor([[[1.0, -5.0], [3.0, -7.0], [9.0, 9.0]]])
    assert max_pooled(text, None).tolist() == [[9.0, 9.0]]
    assert max_pooled(text, torch.tensor([[1, 1, 0]])).tolist() == [[3.0, -5.0]]
    assert max_pooled(text, torch.tensor([[False, True, False]])).tolist() == [[3.0, -7.0]]
    assert max_pooled(text, torch.tensor([[0, 0, 0]])).tolist() == [[0.0, 0.0]]


def test_weights_are_computed_in_float32() -> None:
    """Half precision and autocast must not round the scores."""
    form = example()
    text = torch.randn(4, 5, 6, dtype=torch.float64).bfloat16()
    expected = form.weights(text.double(), None)
    half = form.bfloat16()
    weights = half.weights(text, None)
    assert weights.dtype == torch.float32
    assert (weights - expected).abs().max() < 0.05  # parameters are rounded, what follows is not
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(half.weights(text, None), weights)


# -- sources in files ----------------------------------------------------------------------------------------


def sources_of(folder: Path, name: str, count: int) -> list[str]:
    """Folders of trained prompts."""
    found = []
    for seed in range(count):
        model = build(name)
        torch.manual_seed(seed)
        tuned = deltune.attach(model, "prompt-tuning(length=3, initialization=uniform)")
        found.append(str(tuned.save(folder / f"source-{seed}")))
    return found


@pytest.mark.parametrize("name", ["bert", "t5"])
def test_a_saved_delta_holds_its_sources(name: str, tmp_path: Path) -> None:
    folders = sources_of(tmp_path, name, 2)
    stored = [next(v for k, v in load_file(f"{item}/delta.safetensors").items() if "rows" in k) for item in folders]
    method = deltune.ATTEMPT(length=3, width=4, temperature=2, sources=tuple(folders), start_from=(folders[0],))
    tuned, batch = attached(name, method)  # type: ignore[arg-type]
    assert torch.equal(form_of(tuned).sources, torch.stack(stored))
    assert torch.equal(form_of(tuned).target, stored[0])
    train(tuned, batch)
    tuned.save(tmp_path / "attempt")
    for number, item in enumerate(folders):
        Path(item).rename(tmp_path / f"gone-{number}")
    loaded = deltune.load(build(name), tmp_path / "attempt")
    assert loaded.attachments["default"].method.sources == 2  # type: ignore[attr-defined]
    assert torch.equal(form_of(loaded).sources, torch.stack(stored))
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    tensors = load_file(tmp_path / "attempt" / "delta.safetensors")
    trained = {key for key, _ in tuned.named_trainable_parameters()}
    assert tensors.keys() - trained == {"encoder.embeddings.sources"}
    loaded.save(tmp_path / "again")
    again = load_file(tmp_path / "again" / "delta.safetensors")
    assert all(torch.equal(again[key], value) for key, value in tensors.items())


def test_a_file_without_its_sources_is_refused(tmp_path: Path) -> None:
    """A frozen tensor is as needed as a trained one."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    tuned, _ = attached("bert", SMALL)
    file = tuned.save(tmp_path) / "delta.safetensors"
    with safe_open(str(file), "pt") as stream:
        header = stream.metadata()
    tensors = load_file(file)
    del tensors["encoder.embeddings.sources"]
    save_file(tensors, file, header)
    with pytest.raises(CheckpointError, match=r"missing: encoder\.embeddings\.sources"):
        deltune.load(build("bert"), tmp_path)


def test_sources_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    (folder,) = sources_of(tmp_path, "bert", 1)
    with pytest.raises(CheckpointError, match="Use length=3"):
        attached("bert", f"attempt(sources={folder})")
    with pytest.raises(CheckpointError, match="trained on another model"):
        deltune.attach(build("bert", seed=1), f"attempt(length=3, sources={folder})")


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_language_model_must_not_see_the_answer(name: str) -> None:
    """The whole text is in the mixture, so that a decoder would read what it is to predict."""
    with pytest.raises(MethodError, match=r"see what the model is to predict.*prompt-tuning with start_from"):
        attached(name, SMALL)
    attached(name, "attempt(length=3)")  # nothing depends on the text
    attached(name, SMALL, "classification")
    with pytest.raises(MethodError, match="see what the model is to predict"):
        attached("t5", SMALL.replace(")", ", targets='embeddings stack=decoder')"))


def test_where_padding_cannot_be_told_it_is_said() -> None:
    with pytest.raises(MethodError, match="cannot tell padding from text in the text of clip"):
        attached("clip", SMALL, "base")
    tuned, batch = attached("clip-text", SMALL.replace(")", ", pool_padding=true)"), "base")
    loss_of(tuned.model, batch).backward()
    assert form_of(tuned).down.weight.grad.abs().max() > 0  # type: ignore[union-attr]


# -- the laws, with sources ----------------------------------------------------------------------------------


@pytest.fixture
def with_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "attempt", SMALL)


@pytest.mark.usefixtures("with_sources")
@pytest.mark.parametrize("name", ["bert", "t5", "bart", "roberta", "modernbert", "albert", "deberta-v2"])
class TestLaws:
    def test_2_disabled_and_detached_are_the_bare_model(self, name: str) -> None:
        unchanged.test_disabled_and_detached_are_the_bare_model(Case("attempt", ARCHITECTURES[name]))

    def test_3_only_the_trainable_part_moves(self, name: str) -> None:
        unchanged.test_only_the_trainable_part_moves(Case("attempt", ARCHITECTURES[name]))

    @pytest.mark.parametrize("padding", ["left", "right"])
    def test_4_padding_and_batch_mates(self, name: str, padding: str) -> None:
        if padding == "right" or ARCHITECTURES[name].left_padding:
            batches.test_a_row_does_not_depend_on_padding_or_batch_mates(Case("attempt", ARCHITECTURES[name]), padding)

    def test_4_routed_rows_read_their_own_texts(self, name: str) -> None:
        if name != "deberta-v2":  # as in the law itself
            batches.test_a_routed_batch_equals_each_row_alone(Case("attempt", ARCHITECTURES[name]))

    def test_10_bfloat16(self, name: str) -> None:
        robustness.test_bfloat16(Case("attempt", ARCHITECTURES[name]))

    def test_10_autocast(self, name: str) -> None:
        robustness.test_autocast(Case("attempt", ARCHITECTURES[name]))

    def test_10_copies_are_independent(self, name: str) -> None:
        robustness.test_copies_are_independent(Case("attempt", ARCHITECTURES[name]))


@pytest.mark.usefixtures("with_sources")
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_law_5_cached_generation_equals_uncached(name: str) -> None:
    batches.test_cached_generation_equals_uncached(Case("attempt", ARCHITECTURES[name]), "left")


@pytest.mark.usefixtures("with_sources")
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_law_10_pickles_and_threads(name: str) -> None:
    case = Case("attempt", ARCHITECTURES[name])
    robustness.test_pickled_and_back(case)
    robustness.test_threads_on_one_model_do_not_disturb_each_other(case)


@pytest.mark.slow
@pytest.mark.usefixtures("with_sources")
@pytest.mark.parametrize("name", ["bert", "t5"])
def test_law_10_compilation(name: str) -> None:
    robustness.test_compiles_with_as_many_graphs_as_the_bare_model(Case("attempt", ARCHITECTURES[name]))
