"""Attention fusion, against its fact sheet.

Independent references: transformers' own ``hidden_states`` and plain loops over tokens, in float64.
In tests/laws, over every architecture: nothing of the backbone moves or gets a gradient (4, test_unchanged), padding
changes nothing at real positions (8, test_batches), cached generation (test_batches), files (test_files).
"""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.additive.attention_fusion import LayerAttention
from deltune.sites import StackStates
from tests.methods.common import attached, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

PLAIN = "attention-fusion(dropout=0, normalization=none)"
FINAL = "attention-fusion(dropout=0)"
#: Whose stack ends with a norm, by where it is.
NORMS = {
    "gpt2": "ln_f",
    "llama-gqa": "norm",
    "gpt_neox": "final_layer_norm",
    "vit": "layernorm",
    "modernbert": "final_norm",
}


def form_of(tuned: deltune.Tuned) -> LayerAttention:
    (form,) = tuned.attachments["default"].forms.values()
    assert isinstance(form, LayerAttention)
    return form


def random_query(tuned: deltune.Tuned, size: float = 0.3) -> Tensor:
    form = form_of(tuned)
    with torch.no_grad():
        form.query.copy_(torch.randn(form.query.shape, generator=torch.Generator().manual_seed(7)) * size)
    return form.query.detach().clone()


def fused(hidden: list[Tensor], query: Tensor, scale: float = 1.0) -> Tensor:
    """Token by token."""
    result = torch.empty_like(hidden[0])
    for row in range(result.shape[0]):
        for token in range(result.shape[1]):
            states = torch.stack([state[row, token] for state in hidden])
            result[row, token] = torch.softmax(states @ query * scale, 0) @ states
    return result


def bare_states(name: str, batch: dict[str, Tensor], head: str = "base") -> tuple[Any, list[Tensor]]:
    """A bare model in float64, and its states as transformers lists them, the embedding output first."""
    model = build(name, head, dtype=torch.float64)
    with torch.no_grad():
        result = model(**batch, output_hidden_states=True)
    return model, [*result.hidden_states[:-1], result.last_hidden_state]


@pytest.mark.parametrize(
    "name", ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "gpt2", "llama-gqa"]
)
def test_invariant_01_a_query_of_zeros_is_the_mean_over_layers(name: str) -> None:
    tuned, batch = attached(name, PLAIN, "base", dtype=torch.float64)
    _, hidden = bare_states(name, batch)
    assert relative_error(output(tuned.model, batch), sum(hidden[1:]) / len(hidden[1:])) < 1e-12  # type: ignore[operator]


@pytest.mark.parametrize("name", ["bert", "distilbert", "deberta-v2", "albert", "gpt2", "llama-gqa"])
def test_the_formula_against_a_loop_over_tokens(name: str) -> None:
    tuned, batch = attached(name, PLAIN, "base", dtype=torch.float64)
    query = random_query(tuned)
    _, hidden = bare_states(name, batch)
    assert relative_error(output(tuned.model, batch), fused(hidden[1:], query)) < 1e-12
    assert relative_error(output(tuned.model, batch), hidden[-1]) > 1e-2


@pytest.mark.parametrize("name", NORMS)
def test_states_pass_through_the_final_norm_where_there_is_one(name: str) -> None:
    tuned, batch = attached(name, FINAL, "base", dtype=torch.float64)
    query = random_query(tuned)
    model, hidden = bare_states(name, batch)
    with torch.no_grad():
        states = [*(model.get_submodule(NORMS[name])(state) for state in hidden[1:-1]), hidden[-1]]
    # rotary tables and norms of some files are float32 whatever the model is
    assert relative_error(output(tuned.model, batch), fused(states, query)) < 1e-6


def test_automatic_is_none_where_norms_come_after_sublayers() -> None:
    assert not form_of(attached("bert", FINAL)[0]).reads_normalized
    assert form_of(attached("llama-gqa", FINAL)[0]).reads_normalized


@pytest.mark.parametrize("options", ["scaled=true", "embeddings=true", "normalization=standard", "scores=layer"])
def test_variants_against_their_formula(options: str) -> None:
    tuned, batch = attached("bert", f"attention-fusion(dropout=0, {options})", "base", dtype=torch.float64)
    query = random_query(tuned)
    _, hidden = bare_states("bert", batch)
    if options == "scaled=true":
        expected = fused(hidden[1:], query, 32**-0.5)
    elif options == "embeddings=true":
        expected = fused(hidden, query)
    elif options == "scores=layer":
        expected = sum(share * state for share, state in zip(torch.softmax(query, 0), hidden[1:], strict=True))  # type: ignore[assignment]
    else:
        normed = [
            (state - state.mean(-1, keepdim=True)) / (state.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
            for state in hidden[1:]
        ]
        expected = fused(normed, query)
    assert relative_error(output(tuned.model, batch), expected) < 1e-12


def test_projections_and_the_query_from_the_last_layer() -> None:
    tuned, batch = attached("bert", "attention-fusion(dropout=0, scores=projected)", "base", dtype=torch.float64)
    query = random_query(tuned)
    _, hidden = bare_states("bert", batch)
    # both projections start as the identity
    assert relative_error(output(tuned.model, batch), fused(hidden[1:], query)) < 1e-12
    form = form_of(tuned)
    assert form.key is not None
    assert form.value is not None
    with torch.no_grad():
        for linear in (form.key, form.value):
            linear.weight.copy_(torch.randn(32, 32) / 6)
            linear.bias.copy_(torch.randn(32))
        states = torch.stack(hidden[1:], dim=-2)  # (B, T, L, d)
        keys = states @ form.key.weight.T + form.key.bias
        shares = torch.softmax(keys @ query, dim=-1)
        expected = (shares[..., None] * (states @ form.value.weight.T + form.value.bias)).sum(-2)
    assert relative_error(output(tuned.model, batch), expected) < 1e-12

    tuned, batch = attached("bert", "attention-fusion(dropout=0, scores=last-layer)", "base", dtype=torch.float64)
    matrix = random_query(tuned, 0.1)
    shares = torch.softmax(torch.einsum("btld,bte,de->btl", states, states[:, :, -1], matrix), dim=-1)
    assert relative_error(output(tuned.model, batch), (shares[..., None] * states).sum(-2)) < 1e-12


def test_invariant_02_weights_are_shares() -> None:
    tuned, batch = attached("bert", FINAL, "base")
    random_query(tuned)
    model = build("bert", "base")
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        weights = form_of(tuned).weights(StackStates(hidden, hidden[-1]))
    assert weights.shape == (3, 7, 3)
    assert (weights >= 0).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-6
    assert weights.std(-1).max() > 0.01


def test_invariant_03_a_large_query_chooses_one_layer() -> None:
    tuned, batch = attached("bert", PLAIN, "base", dtype=torch.float64)
    _, hidden = bare_states("bert", batch)
    states = torch.stack([state[1, 4] for state in hidden[1:]])
    form = form_of(tuned)
    with torch.no_grad():
        # the least-norm query with logits 0, 40, 0 at this token
        form.query.copy_(torch.linalg.pinv(states) @ torch.tensor([0.0, 40.0, 0.0], dtype=torch.float64))
    weights = form.weights(StackStates(tuple(hidden), hidden[-1]))[1, 4]
    assert (weights - torch.tensor([0.0, 1.0, 0.0])).abs().max() < 1e-6
    assert (output(tuned.model, batch)[1, 4] - states[1]).abs().max() < 1e-6


@pytest.mark.parametrize("name", ["bert", "llama-gqa", "t5"])
def test_invariant_04_no_gradient_in_the_backbone(name: str) -> None:
    """Even where something of it would train: the states enter detached, and nothing of it is kept for backward."""
    tuned, batch = attached(name, FINAL)
    for parameter in tuned.model.parameters():
        parameter.requires_grad_(True)
    trained = {id(value) for value in tuned.trainable_parameters()}
    head = {id(value) for value in tuned.model.get_output_embeddings().parameters()} if name != "bert" else set()
    loss_of(tuned.model, batch).backward()
    norms = [module for part in tuned.anatomy.of("layer") for module in [tuned.model.get_submodule(part.module)]]
    inside = {id(value) for layer in norms for value in layer.parameters()}
    assert not inside & (trained | head)
    for layer in norms:
        assert all(value.grad is None for value in layer.parameters())
    assert form_of(tuned).query.grad is not None


def test_invariant_05_exactly_the_query_and_the_head_train() -> None:
    assert BERT_BASE.summary("attention-fusion", head=True).parameters == 768 + 1_538
    assert BERT_BASE.count("attention-fusion") == 768
    assert BERT_BASE.count("attention-fusion(scores=projected)") == 1_181_952
    assert BERT_BASE.count("attention-fusion(scores=layer)") == 12
    assert BERT_BASE.count("attention-fusion(scores=last-layer)") == 768 * 768
    assert BERT_BASE.count("attention-fusion(residual=true)") == 769
    assert LLAMA.count("attention-fusion") == 576
    assert LLAMA.count("attention-fusion(scores=projected)") == 665_280
    layers = sum(
        value.numel() for name, value in BERT_BASE.model().named_parameters() if name.startswith("bert.encoder")
    )
    assert f"{768 / layers:.4%}" == "0.0009%"


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_invariant_06_stored_states_give_the_same_bits(name: str) -> None:
    tuned, batch = attached(name, PLAIN, "base")
    random_query(tuned)
    with torch.no_grad():
        result = build(name, "base")(**batch, output_hidden_states=True)
        stored = [state.clone() for state in result.hidden_states]
        offline = form_of(tuned)(StackStates(tuple(stored), result.last_hidden_state.clone()))
    assert torch.equal(output(tuned.model, batch), offline)


def test_invariant_07_the_order_of_layers_does_not_matter() -> None:
    tuned, batch = attached("bert", PLAIN, "base", dtype=torch.float64)
    random_query(tuned)
    form = form_of(tuned)
    _, hidden = bare_states("bert", batch)
    one = StackStates(tuple(hidden), hidden[3])
    other = StackStates((hidden[0], hidden[3], hidden[1], hidden[2]), hidden[2])
    with torch.no_grad():
        assert relative_error(form.weights(other), form.weights(one)[..., [2, 0, 1]]) < 1e-14
        assert relative_error(form(other), form(one)) < 1e-14


def test_invariant_09_one_layer_is_the_last_layer() -> None:
    for name in ("bert", "llama-gqa"):
        model = build(name, "base", num_hidden_layers=1)
        batch = ARCHITECTURES[name].batch(head="base")
        before = output(model, batch)
        tuned = deltune.attach(model, FINAL)
        random_query(tuned)
        assert torch.equal(output(model, batch), before)


def test_invariant_10_the_gradient_of_the_query() -> None:
    """sum over tokens and layers of a (h - f)(h . g), and finite differences of the loss."""
    tuned, batch = attached("bert", PLAIN, "base", dtype=torch.float64)
    query = random_query(tuned)
    form = form_of(tuned)
    _, hidden = bare_states("bert", batch)
    result = tuned.model(**batch).last_hidden_state
    g = torch.randn(result.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    (result * g).sum().backward()
    states = torch.stack(hidden[1:], dim=-2)  # (B, T, L, d)
    a = torch.softmax(states @ query, dim=-1)
    f = (a[..., None] * states).sum(-2, keepdim=True)
    expected = (a[..., None] * (states - f) * (states * g[..., None, :]).sum(-1, keepdim=True)).sum((0, 1, 2))
    assert form.query.grad is not None
    assert relative_error(form.query.grad, expected) < 1e-12
    for index in (0, 13, 31):
        change = torch.zeros_like(query)
        change[index] = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                form.query.copy_(query + sign * change)
            values.append((output(tuned.model, batch) * g).sum())
            with torch.no_grad():
                form.query.copy_(query)
        numeric = (values[0] - values[1]) / 2e-6
        assert abs(numeric - form.query.grad[index]) < 1e-6 * form.query.grad.abs().max()


def test_residual_starts_at_the_last_layer_and_then_learns() -> None:
    method = deltune.AttentionFusion(residual=True, dropout=0)
    assert method.unchanged_at_start
    assert not deltune.AttentionFusion().unchanged_at_start
    model = build("bert")
    batch = ARCHITECTURES["bert"].batch(head="classification")
    before = output(model, batch)
    tuned = deltune.attach(model, method)
    assert torch.equal(output(model, batch), before)
    train(tuned, batch)
    form = form_of(tuned)
    assert form.weight is not None
    assert form.weight.abs() > 0
    assert form.query.abs().max() > 0


def test_the_pooler_reads_the_fused_states() -> None:
    tuned, batch = attached("bert", FINAL, "base")
    random_query(tuned)
    with torch.no_grad():
        result = tuned.model(**batch, output_hidden_states=True)
        assert torch.equal(result.pooler_output, tuned.model.pooler(result.last_hidden_state))
    assert torch.equal(result.hidden_states[-1], result.last_hidden_state)


def test_encoder_decoder_models_fuse_the_decoder_unless_told_otherwise() -> None:
    tuned, batch = attached("t5", FINAL, "base", dtype=torch.float64)
    assert list(tuned.attachments["default"].forms) == ["decoder.states"]
    query = random_query(tuned)
    model = build("t5", "base", dtype=torch.float64)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).decoder_hidden_states
        states = [*(model.decoder.final_layer_norm(state) for state in hidden[1:-1]), hidden[-1]]
    assert relative_error(output(tuned.model, batch), fused(states, query)) < 1e-6

    tuned, batch = attached("t5", "attention-fusion(dropout=0, stack=encoder)", "base")
    with torch.no_grad():
        encoder = tuned.model.encoder(batch["input_ids"], batch["attention_mask"]).last_hidden_state
        result = tuned.model(**batch)
    assert torch.equal(result.encoder_last_hidden_state, encoder)
    assert relative_error(encoder, build("t5", "base").encoder(batch["input_ids"]).last_hidden_state) > 1e-2


def test_two_towers_have_a_query_each() -> None:
    tuned, _ = attached("clip", FINAL, "base")
    assert list(tuned.attachments["default"].forms) == ["text.states", "vision.states"]
    tuned, _ = attached("clip", "attention-fusion(stack=vision)", "base")
    assert list(tuned.attachments["default"].forms) == ["vision.states"]


def test_errors_say_what_to_do() -> None:
    with pytest.raises(TargetError, match=r"has no stack 'encodr'\. Did you mean 'encoder'"):
        attached("t5", "attention-fusion(stack=encodr)")
    with pytest.raises(MethodError, match=r"scores cannot be 'queri'\. Did you mean 'query'"):
        deltune.AttentionFusion(scores="queri")
    with pytest.raises(TargetError, match="Nothing is known of the layers"):
        deltune.attach(torch.nn.Sequential(torch.nn.Linear(2, 2)), "attention-fusion")
    tuned, batch = attached("bert", FINAL)
    tuned.attach(FINAL, name="other", train_head=False)
    tuned.activate("default", "other")
    with pytest.raises(StateError, match=r"Two methods replace the final hidden states of the encoder"):
        output(tuned.model, batch)
    tuned.activate("default")
    output(tuned.model, batch)


def test_layers_dropped_at_random_are_noticed() -> None:
    tuned, batch = attached("bart", FINAL, decoder_layerdrop=1.0)
    tuned.model.train()
    with pytest.raises(StateError, match=r"0 of the 3 layers of the decoder ran.*layerdrop"):
        tuned.model(**batch)


def test_nothing_is_kept_after_a_call_or_an_error() -> None:
    tuned, batch = attached("bert", FINAL)
    (tap,) = tuned._taps.values()
    output(tuned.model, batch)
    assert tap._passes.records == []  # type: ignore[attr-defined]
    before = output(tuned.model, batch)
    handle = tuned.model.bert.encoder.layer[1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        tuned.model(**batch)
    handle.remove()
    assert torch.equal(output(tuned.model, batch), before)
    assert tap._passes.records == []  # type: ignore[attr-defined]


def test_threads_do_not_see_each_others_states() -> None:
    tuned, _ = attached("bert", FINAL)
    random_query(tuned)
    batches = [ARCHITECTURES["bert"].batch(seed=seed, head="classification") for seed in range(4)]
    expected = [output(tuned.model, batch) for batch in batches]
    found: list[list[Tensor]] = [[] for _ in batches]

    def work(index: int) -> None:
        for _ in range(10):
            found[index].append(output(tuned.model, batches[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, results in enumerate(found):
        assert len(results) == 10
        assert all(torch.equal(result, expected[index]) for result in results)
