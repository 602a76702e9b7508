"""P-tuning, against its fact sheet.

In tests/tasks/test_cloze.py: 10 (only the words' logits at the place of the answer). The laws test the placement in
front of a text, as they do that of every prompt; templates are laid down here and,
as to those laws, in test_p_tuning_templates.py.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.additive.p_tuning import BidirectionalLSTM, PromptEncoder
from deltune.sites import pseudo_token_sites
from deltune.tasks._template_rows import TemplateFiller
from deltune.tasks.template import FIRST_PSEUDO_TOKEN, Template
from tests.methods.common import bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.templated import (
    DECODERS,
    FRONT,
    READERS,
    TEMPLATE,
    attached,
    disturb,
    form_of,
    name_of,
    templated,
)
from tests.tasks.tiny import word_tokenizer
from tests.zoo import ARCHITECTURES, Architecture

# -- the encoder ---------------------------------------------------------------------------------------------


def lstm_by_hand(x: Tensor, weights: list[Tensor]) -> Tensor:
    """One direction of an LSTM, position by position and gate by gate."""
    input_weight, hidden_weight, input_bias, hidden_bias = weights
    width = hidden_weight.shape[1]
    hidden, cell = torch.zeros(width, dtype=x.dtype), torch.zeros(width, dtype=x.dtype)
    states = []
    for position in x:
        sums = []
        for unit in range(4 * width):
            entering = sum(input_weight[unit, i] * position[i] for i in range(len(position)))
            kept = sum(hidden_weight[unit, i] * hidden[i] for i in range(width))
            sums.append(entering + kept + input_bias[unit] + hidden_bias[unit])
        i, f, g, o = (torch.stack(sums[gate * width : (gate + 1) * width]) for gate in range(4))
        cell = 1 / (1 + torch.exp(-f)) * cell + 1 / (1 + torch.exp(-i)) * torch.tanh(g)
        hidden = 1 / (1 + torch.exp(-o)) * torch.tanh(cell)
        states.append(hidden)
    return torch.stack(states)


def encoder_by_hand(form: PromptEncoder) -> Tensor:
    x = form.rows
    for layer in form.lstm:
        values = [layer.input_weight, layer.hidden_weight, layer.input_bias, layer.hidden_bias]
        forward = lstm_by_hand(x, [value[0] for value in values])
        backward = lstm_by_hand(x.flip(0), [value[1] for value in values]).flip(0)
        x = torch.cat([forward, backward], dim=1)
    hidden = x @ form.inner.weight.T + form.inner.bias
    return hidden * (hidden > 0) @ form.outer.weight.T + form.outer.bias


@pytest.mark.parametrize(("width", "lstm_width"), [(6, 3), (4, 4), (6, None)])
def test_invariant_01_the_encoder_is_its_equations(width: int, lstm_width: int | None) -> None:
    """The forms of knowledge probing and of the few-shot experiments, and that without an LSTM."""
    torch.manual_seed(0)
    form = PromptEncoder(5, 8, width, lstm_width, torch.float64)
    with torch.no_grad():
        expected = encoder_by_hand(form)
        assert form().shape == (5, 8)
        assert (form() - expected).abs().max() < 1e-10
        assert expected.std(0).min() > 1e-3  # positions differ


def test_invariant_01_the_lstm_is_pytorchs_values_and_gradients() -> None:
    torch.manual_seed(0)
    ours = BidirectionalLSTM(6, 4, torch.float64)
    theirs = nn.LSTM(6, 4, bidirectional=True, dtype=torch.float64)
    with torch.no_grad():
        for direction, suffix in enumerate(("", "_reverse")):
            theirs.get_parameter(f"weight_ih_l0{suffix}").copy_(ours.input_weight[direction])
            theirs.get_parameter(f"weight_hh_l0{suffix}").copy_(ours.hidden_weight[direction])
            theirs.get_parameter(f"bias_ih_l0{suffix}").copy_(ours.input_bias[direction])
            theirs.get_parameter(f"bias_hh_l0{suffix}").copy_(ours.hidden_bias[direction])
    x = torch.randn(7, 6, dtype=torch.float64)
    expected, _ = theirs(x)
    assert (ours(x) - expected).abs().max() < 1e-10
    direction_of_loss = torch.randn_like(expected)
    (ours(x) * direction_of_loss).sum().backward()
    (expected * direction_of_loss).sum().backward()
    assert (ours.hidden_weight.grad[1] - theirs.weight_hh_l0_reverse.grad).abs().max() < 1e-10  # type: ignore[index]
    assert (ours.input_bias.grad[0] - theirs.bias_ih_l0.grad).abs().max() < 1e-10  # type: ignore[index]


def test_initial_values_are_pytorchs_defaults() -> None:
    torch.manual_seed(0)
    form = PromptEncoder(200, 64, 64, 16, torch.float32)
    assert abs(float(form.rows.mean())) < 0.05
    assert float(form.rows.std()) == pytest.approx(1, abs=0.05)
    for value in form.lstm.parameters():
        assert value.abs().max() <= 0.25
        assert value.abs().max() > 0.23
    assert form.inner.weight.abs().max() <= 32**-0.5


def test_invariant_08_every_position_sees_every_other() -> None:
    torch.manual_seed(0)
    form = PromptEncoder(4, 6, 6, 3, torch.float64)
    with torch.no_grad():
        before = form()
        for changed, seen in ((3, 0), (0, 3)):
            form.rows[changed] += 1
            assert (form()[seen] - before[seen]).abs().max() > 1e-6
            form.rows[changed] -= 1


def test_invariant_07_published_counts() -> None:
    assert BERT_BASE.count("p-tuning(length=9)") == 8_278_272
    assert BERT_BASE.count("p-tuning(length=9, placement=template)") == 8_278_272
    assert LLAMA.count("p-tuning(length=9)") == 4_660_416
    assert BERT_BASE.count("p-tuning(length=9, encoder=none)") == 6_912
    assert LLAMA.count("p-tuning(length=9, encoder=none)") == 5_184
    d, h, w = 768, 128, 128  # the few-shot network: hidden width h per direction, then 2h to h to d
    lstm = 2 * 4 * w * (h + w + 2) + 2 * 4 * w * (2 * w + w + 2)
    expected = 9 * h + lstm + (2 * w * h + h) + (h * d + d)
    assert BERT_BASE.count("p-tuning(length=9, width=128, lstm_width=128)") == expected
    assert BERT_BASE.count("p-tuning(length=9, encoder=mlp, width=128)") == 9 * h + (h * h + h) + (h * d + d)


def test_the_default_length_is_that_of_the_published_counts() -> None:
    assert deltune.PTuning().length == 9


# -- where the rows go ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("architecture", READERS, ids=name_of)
def test_invariant_02_marked_positions_are_the_encoders_and_others_the_tables(
    architecture: Architecture, padding: str
) -> None:
    """Bit for bit, in order, in every row, in every architecture with a table of token embeddings."""
    model = architecture.build("base" if "base" in architecture.heads else "language")
    bare = copy.deepcopy(model)
    torch.manual_seed(1)
    tuned = deltune.attach(model, TEMPLATE)
    (site,) = pseudo_token_sites(bare, tuned.anatomy, None)
    batch = templated(architecture, padding=padding)
    key = "input_ids" if "input_ids" in batch else "decoder_input_ids"
    seen: list[tuple[Tensor, Tensor]] = []
    for name in site.tables:
        model.get_submodule(name).register_forward_hook(
            lambda module, args, result: seen.append((args[0], result.clone()))
        )
    with torch.no_grad():
        model(**batch)
        rows = form_of(tuned)()
        pseudo = batch[key] >= FIRST_PSEUDO_TOKEN
        table = bare.get_submodule(site.tables[0])
        expected = table(batch[key].masked_fill(pseudo, 0))
    found = next(result for ids, result in seen if ids.shape == batch[key].shape)
    assert pseudo.sum(1).tolist() == [3, 3, 3]
    assert torch.equal(found[~pseudo], expected[~pseudo])
    for row in range(3):
        assert torch.equal(found[row][pseudo[row]], rows)
    assert batch[key].max() == FIRST_PSEUDO_TOKEN + 2  # the ids that were given are not written to


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert", "electra", "albert", "deberta-v2", *DECODERS])
def test_invariant_02_the_model_equals_the_frozen_one_on_embedded_input(name: str, padding: str) -> None:
    tuned, batch = attached(name, head="language", padding=padding, dtype=torch.float64)
    ours = output(tuned.model, batch)
    frozen = build(name, "language", dtype=torch.float64)
    table = frozen.get_input_embeddings()
    with torch.no_grad():
        pseudo = batch["input_ids"] >= FIRST_PSEUDO_TOKEN
        embedded = table(batch["input_ids"].masked_fill(pseudo, 0))
        embedded[pseudo] = form_of(tuned)().repeat(3, 1)
        given = {key: value for key, value in batch.items() if key != "input_ids"}
        if name == "roberta":  # counts positions over tokens that are not padding, from the padding's id + 1
            mask = batch["attention_mask"]
            given["position_ids"] = mask.cumsum(1) * mask + 1
        expected = frozen(inputs_embeds=embedded, **given).logits
    real = batch["attention_mask"].bool()
    assert relative_error(ours[real], expected[real]) < 1e-12


def test_a_decoder_that_is_given_the_encoders_ids_reads_the_same_rows() -> None:
    """BART's decoder reads the shifted input where it is given none, through a table of its own that is tied."""
    tuned, batch = attached("bart", head="base", dtype=torch.float64)
    ids = batch["input_ids"]
    ours = output(tuned.model, {"input_ids": ids})
    frozen = build("bart", "base", dtype=torch.float64)
    with torch.no_grad():
        start = torch.full_like(ids[:, :1], frozen.config.decoder_start_token_id)
        embedded = []
        for given in (ids, torch.cat([start, ids[:, :-1]], dim=1)):
            pseudo = given >= FIRST_PSEUDO_TOKEN
            rows = frozen.get_input_embeddings()(given.masked_fill(pseudo, 0))
            rows[pseudo] = form_of(tuned)().repeat(3, 1)
            embedded.append(rows)
        expected = frozen(inputs_embeds=embedded[0], decoder_inputs_embeds=embedded[1]).last_hidden_state
    assert relative_error(ours, expected) < 1e-12


@pytest.mark.parametrize("name", [item.name for item in READERS if "classification" in item.heads])
def test_task_heads_that_look_for_tokens_work(name: str) -> None:
    """For the last that is not padding, for the end token: pseudo tokens are neither."""
    tuned, _ = attached(name, head="classification")
    batch = templated(ARCHITECTURES[name], "classification", padding="right")
    together = output(tuned.model, batch)
    for row in range(3):
        alone = output(tuned.model, ARCHITECTURES[name].alone(batch, row))[0]
        assert relative_error(together[row], alone) < 2e-5
    disturb(form_of(tuned))
    assert ((output(tuned.model, batch) - together).abs().amax(1) > 1e-4).all()


def test_the_front_placement_is_prompt_tuning_with_the_encoders_rows() -> None:
    for name in ("bert", "gpt2", "t5"):
        architecture = ARCHITECTURES[name]
        head = "language"
        batch = architecture.batch(head=head)  # type: ignore[arg-type]
        torch.manual_seed(1)
        tuned = deltune.attach(build(name, head), FRONT)
        prompt = deltune.attach(build(name, head), "prompt-tuning(length=3)")
        with torch.no_grad():
            form_of(prompt).rows.copy_(form_of(tuned)())
        assert torch.equal(output(tuned.model, batch), output(prompt.model, batch))


WORDS_MODEL = {"vocab_size": 18}


def logits_of(template: str) -> Tensor:
    """At the mask, for a template with two pseudo tokens; the model and the rows are always the same."""
    tokenizer = word_tokenizer(mask_token="[MASK]")
    model = build("bert", "language", dtype=torch.float64, **WORDS_MODEL)
    torch.manual_seed(1)
    deltune.attach(model, "p-tuning(length=2, placement=template)")
    filler = TemplateFiller(Template.parse(template), tokenizer, masked=True, max_length=32)
    (row,) = filler.fill([{"text": "good film"}])
    return output(model, {"input_ids": torch.tensor([row.input_ids])})[0, row.answer]


def test_invariant_05_templates_in_front_between_and_behind_and_their_order_matters() -> None:
    templates = [
        "[P2] {text} was [MASK]",
        "{text} [P2] was [MASK]",
        "{text} was [P2] [MASK]",
        "{text} was [MASK] [P2]",
        "[P] {text} was [P] [MASK]",
        "[MASK] was [P2] {text}",
        "was {text} [P2] [MASK]",
    ]
    found = [logits_of(template) for template in templates]
    for number, one in enumerate(found):
        assert torch.isfinite(one).all()
        for other in found[:number]:
            assert (one - other).abs().max() > 1e-6
    assert torch.equal(found[0], logits_of("[P][P] {text} was [MASK]"))


# -- what is refused -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5", "modernbert"])
def test_invariant_03_the_number_of_pseudo_tokens_must_be_p(name: str) -> None:
    tuned, batch = attached(name, head="language")
    output(tuned.model, batch)
    ids = batch["input_ids"]
    plain = ARCHITECTURES[name].batch(head="language")["input_ids"]
    fewer, more, disordered = ids.clone(), ids.clone(), ids.clone()
    fewer[1, 3] = plain[1, 3]
    more[2, 1] = FIRST_PSEUDO_TOKEN + 3
    disordered[0, [0, 2]] = disordered[0, [2, 0]]
    for wrong, message in (
        (plain, r"Row 1 .* has no pseudo tokens, but the active ones make 3\..*\[P3\].*placement=front"),
        (fewer, r"Row 2 .* has 2 pseudo tokens, but the active ones make 3\..* length=2"),
        (more, r"Row 3 .* has 4 pseudo tokens, but the active ones make 3\."),
        (disordered, "row 1 .* are not in their order"),
    ):
        with pytest.raises(StateError, match=message):
            output(tuned.model, {**batch, "input_ids": wrong})


def test_invariant_03_embeddings_say_nothing_of_pseudo_tokens() -> None:
    tuned, batch = attached("llama-gqa")
    embedded = torch.zeros(3, 7, 32)
    with pytest.raises(StateError, match=r"was given no input_ids\. Pseudo tokens are known by their ids"):
        tuned.model(inputs_embeds=embedded, attention_mask=batch["attention_mask"])


def test_pseudo_tokens_that_nothing_active_makes_are_said() -> None:
    tuned, batch = attached("bert", head="language")
    tuned.attach("lora", name="other")
    with pytest.raises(StateError, match=r"3 pseudo tokens, but nothing that is active .*placement=template"):
        output(tuned.model, batch)
    plain = ARCHITECTURES["bert"].batch(head="language")
    assert torch.isfinite(output(tuned.model, plain)).all()
    tuned.activate("default")
    output(tuned.model, batch)


@pytest.mark.parametrize(
    ("name", "method", "message"),
    [
        ("vit", TEMPLATE, "no table of token embeddings"),
        ("clip", TEMPLATE, "finds the end of its text by the ids.*placement=front"),
        (
            "clip-text",
            "p-tuning(placement=template, targets=*.token_embedding)",
            "finds the end of its text by the ids",
        ),
        ("bert", "p-tuning(placement=template, targets=*.LayerNorm)", "is a LayerNorm, not a table"),
        ("t5", "p-tuning(placement=template, targets=embeddings)", r"share one table.*stacks="),
        ("bart", "p-tuning(placement=template, targets=embeddings)", r"share one table.*stacks="),
    ],
)
def test_what_reads_no_pseudo_tokens_is_refused(name: str, method: str, message: str) -> None:
    head = "base" if "base" in ARCHITECTURES[name].heads else None
    with pytest.raises(TargetError, match=message):
        deltune.attach(build(name, head), method)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "mlp", "lstm_width": 4}, "lstm_width is given, but encoder=mlp has no LSTM"),
        ({"encoder": "none", "width": 4}, "width is given, but encoder=none has no network"),
        ({"placement": "behind"}, "placement cannot be 'behind'"),
        ({"length": 0}, "at least 1"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(MethodError, match=message):
        deltune.PTuning(**options)


def test_an_odd_width_needs_the_width_of_the_lstm() -> None:
    with pytest.raises(MethodError, match=r"width 7 is odd.*Give lstm_width"):
        deltune.attach(build("bert"), "p-tuning(width=7)")
    deltune.attach(build("bert"), "p-tuning(width=7, lstm_width=3)")


# -- training and saving -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [TEMPLATE, FRONT, "p-tuning(length=3, placement=template, encoder=mlp)"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa", "t5"])
def test_invariant_04_the_stored_table_gives_the_same_bits(name: str, method: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, method, head="language")
    if "template" not in method:
        batch = ARCHITECTURES[name].batch(head="language")
    train(tuned, batch)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    (stored,) = load_file(tmp_path / "delta.safetensors").values()
    assert stored.shape == (3, 32)
    loaded = deltune.load(build(name, "language"), tmp_path)
    assert loaded.attachments["default"].method.encoder == "none"  # type: ignore[attr-defined]
    assert loaded.attachments["default"].method.placement == deltune.methods.parse(method).placement
    assert torch.equal(output(loaded.model, batch), expected)
    assert loaded.summary().parameters == 96


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_invariant_04_in_other_types(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, batch = attached("llama-gqa", dtype=dtype)
    expected = output(tuned.model, batch)
    assert expected.dtype == dtype
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build("llama-gqa", dtype=dtype), tmp_path).model, batch), expected)


def test_the_encoder_is_computed_in_float32_at_least() -> None:
    torch.manual_seed(0)
    form = PromptEncoder(3, 8, 8, 4, torch.float32)
    expected = form()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(form(), expected)
    half = copy.deepcopy(form).to(torch.bfloat16)
    assert half().dtype == torch.float32
    wide = copy.deepcopy(half).to(torch.float32)
    assert torch.equal(half(), wide())


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_invariant_06_prompt_only_leaves_the_language_model_alone(name: str) -> None:
    tuned, batch = attached(name, head="language")
    with tuned.disabled():
        before = bits(tuned.model)
    start = [value.detach().clone() for value in tuned.trainable_parameters()]
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.abs().max() > 0, key
    assert all(value.grad is None for value in tuned.model.parameters() if not value.requires_grad)
    train(tuned, batch)
    assert not any(torch.equal(*pair) for pair in zip(start, tuned.trainable_parameters(), strict=True))
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


def test_invariant_06_a_tuned_language_model_moves_with_its_own_rate() -> None:
    """The first step of Adam moves every value by its rate, as long as the gradient is not tiny."""
    tuned, batch = attached("bert", f"{TEMPLATE} + full", head="language")
    attachment = tuned.attachments["default"]
    prompt = [value for form in attachment.forms.values() for value in form.parameters()]
    language_model = [value for _, value in attachment.selection]
    assert len(prompt) + len(language_model) == len(tuned.trainable_parameters())
    start = [[value.detach().clone() for value in group] for group in (prompt, language_model)]
    groups = [{"params": prompt, "lr": 1e-2}, {"params": language_model, "lr": 1e-4}]
    optimizer = torch.optim.Adam(groups, eps=1e-30)
    loss_of(tuned.model, batch).backward()
    optimizer.step()
    for before, group, rate in ((start[0], prompt, 1e-2), (start[1], language_model, 1e-4)):
        moves = [(new - old).abs().max() for old, new in zip(before, group, strict=True) if new.grad.abs().max() > 1e-7]
        assert len(moves) > 5
        for move in moves:
            assert float(move) == pytest.approx(rate, rel=0.05)
    with tuned.disabled():
        fresh = build("bert", "language")
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in tuned.model.state_dict().items())


def test_invariant_09_anchors_keep_their_embedding_and_get_no_gradient() -> None:
    """Where the table trains along, a pseudo token gives no gradient to the id that stands in for it."""
    tuned, batch = attached("gpt2")
    table = tuned.model.get_input_embeddings().weight
    before = table.detach().clone()
    train(tuned, batch)
    assert table.grad is None
    assert torch.equal(table, before)

    tuned, batch = attached("llama-gqa", f"{TEMPLATE} + full")
    table = tuned.model.get_input_embeddings().weight
    loss_of(tuned.model, batch).backward()
    pseudo = batch["input_ids"] >= FIRST_PSEUDO_TOKEN
    seen = set(batch["input_ids"][~pseudo].tolist())
    got = set(table.grad.abs().amax(1).nonzero().flatten().tolist())
    assert got == seen


def test_it_learns_a_word_for_a_frozen_model() -> None:
    """The rows alone move the answer at the mask to a given word."""
    tuned, batch = attached("bert", head="language")
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, 1] = 42
    optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=3e-2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = tuned.model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
