"""P-tuning v2, against its fact sheet; numbers are its invariants.

Starting from text or from another prefix, and shifted positions in general: tests/methods/test_prefix_words.py. Forms
and their network: tests/methods/test_prefix_tuning.py. 7 and 10 are laws too (tests/laws).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertModel, LlamaConfig, LlamaForSequenceClassification

import deltune
from deltune.errors import MethodError, TargetError
from deltune.methods.additive.prefix_forms import Prefix, joined_prefixes, split_prefixes
from tests.laws.gate_form import naive_attention, prefixes_of
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, BERT_LARGE, LLAMA, Published
from tests.zoo import ARCHITECTURES

SMALL = "p-tuning-v2(length=3, dropout=0)"
BERT = ARCHITECTURES["bert"]


def test_defaults_are_those_of_deep_prompts() -> None:
    method = deltune.PTuningV2()
    assert (method.length, method.reparameterize, method.width, method.dropout) == (20, False, 512, 0.1)
    assert (method.learning_rate, method.weight_decay) == (1e-2, 0.0)
    tuned, _ = attached("bert", "p-tuning-v2")
    forms = tuned.attachments["default"].forms
    assert {(type(form), form.keys.shape, form.dropout) for form in forms.values()} == {(Prefix, (4, 20, 8), 0.1)}
    started = torch.cat([value.detach().flatten() for form in forms.values() for value in form.parameters()])
    assert abs(float(started.mean())) < 0.05
    assert abs(float(started.std()) - 1) < 0.05


@pytest.mark.parametrize("padding", ["none", "right"])
def test_invariant_01_the_output_has_no_prompt_positions(padding: Any) -> None:
    tuned, _ = attached("bert", SMALL, "tokens")
    batch = BERT.batch(length=7, padding=padding)
    with torch.no_grad():
        result = tuned.model(**batch, output_hidden_states=True)
    assert result.logits.shape == (3, 7, 3)
    assert {state.shape for state in result.hidden_states} == {(3, 7, 32)}

    tuned, _ = attached("bert", SMALL, "classification")
    read: list[Tensor] = []
    tuned.model.bert.pooler.register_forward_hook(lambda module, args, made: read.append(args[0]))
    ids = batch["input_ids"].clone()
    output(tuned.model, batch)
    assert read[0].shape[1] == 7
    # the pooler reads the state at 0, which is that of the first token: with layers that change nothing it is all that
    # the head sees
    for layer in tuned.model.bert.encoder.layer:
        layer.register_forward_hook(lambda module, args, made: args[0])
    ids[:, 1:] = 11
    assert torch.equal(output(tuned.model, batch), output(tuned.model, {**batch, "input_ids": ids}))
    ids[:, 0] = 12
    assert not torch.equal(output(tuned.model, batch), output(tuned.model, {**batch, "input_ids": ids}))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "right"])
def test_invariant_02_the_maths_is_that_of_a_flat_prefix(padding: Any, implementation: str) -> None:
    options = {"dtype": torch.float64, "attn_implementation": implementation}
    tuned, _ = attached("bert", SMALL, "tokens", **options)
    other, _ = attached("bert", "prefix-tuning(length=3, reparameterize=false)", "tokens", **options)
    batch = BERT.batch(padding=padding)
    ours = output(tuned.model, batch)
    assert torch.equal(output(other.model, batch), ours)
    reference = build("bert", "tokens", dtype=torch.float64, attn_implementation="eager")
    for name, value in tuned.attachments["default"].selection:
        reference.get_parameter(name).data.copy_(value)
    with naive_attention(reference, prefixes_of(tuned)):
        expected = output(reference, batch)
    real = batch["attention_mask"].bool()
    assert relative_error(ours[real], expected[real]) < 1e-12


def test_invariant_03_layout_round_trip() -> None:
    layers, heads, length, head_dim = 3, 2, 5, 4
    pairs = [(torch.randn(heads, length, head_dim), torch.randn(heads, length, head_dim)) for _ in range(layers)]
    table = joined_prefixes(pairs)
    assert table.shape == (length, 2 * layers * heads * head_dim)
    for position in range(length):
        slices = table[position].split(heads * head_dim)
        for layer, (keys, values) in enumerate(pairs):
            for head in range(heads):
                place = slice(head * head_dim, (head + 1) * head_dim)
                assert torch.equal(slices[2 * layer][place], keys[head, position])
                assert torch.equal(slices[2 * layer + 1][place], values[head, position])
    for (keys, values), (first, second) in zip(split_prefixes(table, heads, head_dim), pairs, strict=True):
        assert torch.equal(keys, first)
        assert torch.equal(values, second)
    with pytest.raises(MethodError, match=r"multiple of 16, not one of shape \(5, 40\)"):
        split_prefixes(table[:, :40], heads, head_dim)


def test_invariant_03_a_table_of_the_authors_layout_gives_their_cache() -> None:
    """Their steps: (B, P, 2 L, heads, D), permuted to (2 L, B, heads, P, D), in pairs."""
    table = torch.randn(5, 2 * 3 * 2 * 4)
    theirs = table.expand(1, -1, -1).view(1, 5, 6, 2, 4).permute(2, 0, 3, 1, 4).split(2)
    for (keys, values), cache in zip(split_prefixes(table, 2, 4), theirs, strict=True):
        assert torch.equal(keys, cache[0][0])
        assert torch.equal(values, cache[1][0])


def test_invariant_04_published_counts() -> None:
    method = "p-tuning-v2(length={})"
    assert BERT_BASE.count(method.format(20)) == 368_640
    assert BERT_BASE.count(method.format(128)) == 2_359_296
    assert BERT_LARGE.count(method.format(20)) == 983_040
    assert LLAMA.count(method.format(20)) == 230_400
    assert LLAMA.count(method.format(128)) == 1_474_560
    with_head = BERT_BASE.summary(method.format(20), head=True)
    assert (with_head.head_parameters, with_head.parameters) == (1_538, 368_640 + 1_538)
    config = LlamaConfig(**{**LLAMA.config.to_dict(), "num_labels": 2})
    classifier = Published(LlamaForSequenceClassification, config)
    assert classifier.summary(method.format(20), head=True).head_parameters == 1_152


@pytest.mark.parametrize("padding", ["none", "right"])
def test_invariant_05_a_shift_by_p_reproduces_the_official_encoder(padding: Any) -> None:
    """Theirs numbers the text from P, because it takes the prompt for a past; padding included."""
    batch = BERT.batch(padding=padding)
    rows, length = batch["input_ids"].shape
    shifted, _ = attached("bert", SMALL.replace(")", ", shift_positions=true)"), dtype=torch.float64)
    unshifted, _ = attached("bert", SMALL, dtype=torch.float64)
    official = build("bert", dtype=torch.float64, attn_implementation="eager")
    for name, value in unshifted.attachments["default"].selection:
        official.get_parameter(name).data.copy_(value)
    prefixes = prefixes_of(unshifted)
    with naive_attention(official, prefixes):
        positions = torch.arange(3, 3 + length).expand(rows, -1)
        expected = output(official, {**batch, "position_ids": positions})
    assert relative_error(output(shifted.model, batch), expected) < 1e-12
    assert relative_error(output(unshifted.model, batch), expected) > 1e-3


def test_invariant_06_one_prompt_for_all_rows_whose_gradients_add_up() -> None:
    tuned, _ = attached("bert", SMALL, dtype=torch.float64)
    batch = BERT.batch(padding="right")
    direction = torch.randn(3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradients(rows: slice) -> list[Tensor]:
        tuned.model.zero_grad()
        logits = tuned.model(**{name: value[rows] for name, value in batch.items()}).logits
        (logits * direction).sum().backward()
        return [value.grad.clone() for value in tuned.trainable_parameters()]

    whole = gradients(slice(0, 3))
    single = [gradients(slice(row, row + 1)) for row in range(3)]
    for total, parts in zip(whole, zip(*single, strict=True), strict=True):
        assert relative_error(sum(parts[1:], parts[0]), total) < 1e-12
    same = {name: value[:1].expand(3, -1) for name, value in batch.items()}
    logits = output(tuned.model, same)
    assert relative_error(logits, logits[:1].expand(3, -1)) < 1e-12


def test_invariant_07_dropout_is_in_training_alone() -> None:
    tuned, batch = attached("bert", "p-tuning-v2(length=3, dropout=0.5)")
    without, _ = attached("bert", SMALL)
    expected = output(without.model, batch)
    assert torch.equal(output(tuned.model, batch), expected)
    # the zoo's models have no dropout of their own, so that all randomness is the prompt's
    tuned.model.train()
    without.model.train()
    assert not torch.equal(output(tuned.model, batch), output(tuned.model, batch))
    assert torch.equal(output(without.model, batch), output(without.model, batch))
    tuned.model.eval()
    assert torch.equal(output(tuned.model, batch), expected)


def test_invariant_08_other_layers_see_no_prompt() -> None:
    tuned, batch = attached(
        "bert", "p-tuning-v2(length=3, dropout=0, targets='attention layers=1:2')", attn_implementation="eager"
    )
    frozen = build("bert", attn_implementation="eager")
    options = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        ours, theirs = tuned.model(**batch, **options), frozen(**batch, **options)
    length = batch["input_ids"].shape[1]
    assert [weights.shape[-1] for weights in ours.attentions] == [length, length + 3, length]
    assert torch.equal(ours.hidden_states[1], theirs.hidden_states[1])
    assert not torch.equal(ours.hidden_states[2], theirs.hidden_states[2])
    # no layer left: exactly the frozen model
    tuned.drop_layers(3)
    assert torch.equal(output(tuned.model, batch), _with_head_of(tuned, frozen, batch))
    with pytest.raises(TargetError, match="selects no layer"):
        deltune.attach(build("bert"), "p-tuning-v2(targets='attention layers=3:')")


def _with_head_of(tuned: deltune.Tuned, model: Any, batch: dict[str, Tensor]) -> Tensor:
    for name, value in tuned.attachments["default"].selection:
        model.get_parameter(name).data.copy_(value)
    return output(model, batch)


def test_invariant_09_ignored_tokens_have_no_loss_and_no_gradient() -> None:
    tuned, _ = attached("bert", SMALL, "tokens")
    batch = BERT.batch(length=7, padding="right")
    labels = BERT.labels("tokens", batch)
    labels[:, 2:4] = -100
    result = tuned.model(**batch, labels=labels)
    kept = labels != -100
    expected = nn.functional.cross_entropy(result.logits[kept], labels[kept])
    assert torch.allclose(result.loss, expected)
    result.logits.retain_grad()
    result.loss.backward()
    assert not result.logits.grad[~kept].any()
    assert (result.logits.grad[kept].abs().sum(-1) > 0).all()
    ours = [value.grad.clone() for value in tuned.trainable_parameters()]
    tuned.model.zero_grad()
    nn.functional.cross_entropy(tuned.model(**batch).logits[kept], labels[kept]).backward()
    for value, other in zip(tuned.trainable_parameters(), ours, strict=True):
        assert torch.allclose(value.grad, other, atol=1e-7)


def test_invariant_10_the_backbone_and_its_pooler_stay() -> None:
    model = build("bert")
    before = bits(model)
    tuned = deltune.attach(model, SMALL)
    head = tuned.attachments["default"].head_names
    assert head == ("classifier.weight", "classifier.bias")
    assert not any(value.requires_grad for value in model.bert.pooler.parameters())
    train(tuned, BERT.batch())
    moved = {name: value.clone() for name, value in model.state_dict().items() if name in before}
    assert {name for name, value in moved.items() if not torch.equal(value, before[name])} == set(head)
    assert any(name.startswith("bert.pooler") for name in moved)


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_invariant_11_a_network_is_stored_flat(name: str, tmp_path: Path) -> None:
    method = "p-tuning-v2(length=3, dropout=0, reparameterize=true, width=6)"
    tuned, batch = attached(name, method, "classification")
    train(tuned, batch)
    expected = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name, "classification"), tmp_path)
    assert torch.equal(output(loaded.model, batch), expected)
    stored = load_file(tmp_path / "delta.safetensors")
    assert {key.rsplit(".", 1)[1] for key in stored if key.startswith(("encoder", "decoder"))} == {"keys", "values"}


# -- several tasks -------------------------------------------------------------------------------------------


class TwoTasks(nn.Module):
    """One encoder under two heads: pairs of classes for whole texts, and tags for tokens."""

    def __init__(self, encoder: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.text, self.tags = nn.Linear(32, 3), nn.Linear(32, 3)

    def forward(self, task: str, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        """The task's loss."""
        states = self.encoder(**batch).last_hidden_state
        logits = self.text(states[:, 0]) if task == "text" else self.tags(states)
        return nn.functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def test_a_prompt_trained_on_several_tasks_starts_each_of_them(tmp_path: Path) -> None:
    """The multi-task stage: one prompt, a head for each task; then each task goes on with a head of its own."""
    classifier = build("bert", "classification")
    encoder = BertModel(classifier.config)
    encoder.load_state_dict(classifier.bert.state_dict())
    shared = deltune.attach(encoder.eval(), SMALL)
    torch.manual_seed(0)
    both = TwoTasks(encoder)
    heads = [*both.text.parameters(), *both.tags.parameters()]
    optimizer = torch.optim.AdamW([*shared.trainable_parameters(), *heads], lr=1e-2)
    batch = BERT.batch()
    labels = {"text": BERT.labels("classification", batch), "tags": BERT.labels("tokens", batch)}
    before = sum(float(both(task, batch, labels[task]).detach()) for task in labels)
    for _ in range(10):
        for task, wanted in labels.items():
            optimizer.zero_grad()
            both(task, batch, wanted).backward()
            optimizer.step()
    assert sum(float(both(task, batch, labels[task]).detach()) for task in labels) < 0.9 * before
    folder = shared.save(tmp_path / "shared")
    trained = load_file(folder / "delta.safetensors")
    assert not any("text" in key or "tags" in key or "classifier" in key for key in trained)

    start = f"p-tuning-v2(dropout=0, start_from={folder})"
    for head in ("classification", "tokens"):
        model = build("bert", head)
        model.bert.load_state_dict(classifier.bert.state_dict(), strict=False)
        fresh = {key: value.clone() for key, value in model.classifier.state_dict().items()}
        tuned = deltune.attach(model, start)
        own = dict(tuned.attachments["default"].parameters())
        assert all(torch.equal(own[key], value) for key, value in trained.items())
        assert all(torch.equal(own[f"classifier.{key}"], value) for key, value in fresh.items())
        train(tuned, BERT.batch(head=head), steps=1)
        assert not any(torch.equal(value, trained[key]) for key, value in own.items() if key in trained)
        assert not any(torch.equal(own[f"classifier.{key}"], value) for key, value in fresh.items())


def test_a_second_task_starts_from_the_first_with_another_head(tmp_path: Path) -> None:
    tuned, batch = attached("bert", SMALL, "classification")
    train(tuned, batch)
    folder = tuned.save(tmp_path)
    trained = load_file(folder / "delta.safetensors")
    model = build("bert", "tokens")
    model.bert.load_state_dict(tuned.model.bert.state_dict(), strict=False)
    second = deltune.attach(model, f"p-tuning-v2(dropout=0, start_from={folder})")
    own = dict(second.attachments["default"].parameters())
    prompt = [key for key in trained if not key.startswith("classifier")]
    assert len(prompt) == 6
    assert all(torch.equal(own[key], trained[key]) for key in prompt)
    assert not torch.equal(own["classifier.weight"], trained["classifier.weight"])
    loss_of(model, BERT.batch()).backward()
    assert all(own[key].grad.abs().max() > 0 for key in own)
