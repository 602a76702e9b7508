"""Layers below everything that trains run once for each text; what they made is found again, and is the same."""

from __future__ import annotations

import copy
import logging
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import CheckpointError, StateError
from tests.methods.common import build
from tests.zoo import ARCHITECTURES

METHODS = ("freeze(layers=1)", "ladder-side-tuning(reduction=2)", "attention-fusion(dropout=0)")
#: Methods and models of one stack of layers with a head that has a loss. There is no ladder for ALBERT and DeBERTa, and
#: below ALBERT's only layer, which is applied several times, none is frozen.
CASES = [
    (name, method)
    for method in METHODS
    for name, architecture in ARCHITECTURES.items()
    if architecture.kind in ("encoder", "decoder", "vision") and "classification" in architecture.heads
    if not (method.startswith("ladder") and name in ("albert", "deberta-v2"))
    if not (method.startswith("freeze") and name == "albert")
]


def trained(name: str, method: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """A method on a random model in training, and a batch of texts that differ in length, with labels."""
    architecture = ARCHITECTURES[name]
    model = build(name, "classification", **options)
    torch.manual_seed(1)
    tuned = deltune.attach(model, method)
    tuned.model.train()
    batch = architecture.batch(4, head="classification", padding="right" if architecture.pads else "none")
    return tuned, {**batch, "labels": architecture.labels("classification", batch)}


def rows(batch: dict[str, Tensor], *chosen: int) -> dict[str, Tensor]:
    return {name: value[list(chosen)] for name, value in batch.items()}


def losses_and_gradients(tuned: deltune.Tuned, batches: list[dict[str, Tensor]]) -> list[Tensor]:
    """The losses of some batches, and the sum of their gradients."""
    tuned.model.zero_grad(set_to_none=True)
    found = []
    for batch in batches:
        loss = tuned.model(**batch).loss
        loss.backward()
        found.append(loss.detach())
    return [*found, *(value.grad for value in tuned.trainable_parameters() if value.grad is not None)]


class Ran:
    """Counts the calls of a module inside a layer."""

    def __init__(self, tuned: deltune.Tuned, layer: int) -> None:
        (stack,) = tuned.anatomy.stacks.values()
        inner = next(iter(tuned.model.get_submodule(stack.layers[layer]).children()))
        self.count = 0
        inner.register_forward_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@pytest.mark.parametrize(("name", "method"), CASES)
def test_every_pass_is_that_of_the_whole_model(name: str, method: str, tmp_path: Path) -> None:
    tuned, batch = trained(name, method)
    # the same texts again, in other company
    passes = [rows(batch, *chosen) for chosen in ((0, 1), (2, 3), (1, 2), (3, 0), (0, 1, 2, 3))]
    expected = losses_and_gradients(tuned, passes)
    ran = Ran(tuned, 0)
    with tuned.frozen_states(tmp_path / "states") as states:
        found = losses_and_gradients(tuned, passes)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        if len(next(iter(tuned.anatomy.stacks.values()))) > 1:
            assert ran.count == 3  # of five passes: two for the texts, one to compare
        assert (states.computed, states.reused) == (6, 6)
    assert any(value.abs().max() > 0 for value in found[len(passes) :])
    assert all("forward" not in vars(module) for module in tuned.model.modules())


def test_one_layer_is_kept_for_upper_layers_and_those_read_for_side_networks(tmp_path: Path) -> None:
    for method, depth, kept in (
        ("freeze(layers=1)", 3, (2,)),
        ("lora(targets='attention.* layers=1:')", 1, (0,)),
        ("ladder-side-tuning(reduction=2, targets='layer layers=1,3')", 4, (1, 3)),
        ("attention-fusion", 4, (0, 1, 2, 3)),
    ):
        tuned, _ = trained("bert", method, num_hidden_layers=4)
        with tuned.frozen_states(tmp_path / method[:6]) as states:
            assert (states.trunk.depth, states.trunk.kept) == (depth, kept), method
        tuned.detach()


def test_adapters_whose_lowest_are_dropped_train_on_kept_states(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "sequential-adapter(width=4, train_norms=false)", num_hidden_layers=4)
    with pytest.raises(StateError, match=r"acts at encoder\.0.*drop_layers"), tuned.frozen_states(tmp_path / "none"):
        pass
    tuned.drop_layers(2)
    expected = losses_and_gradients(tuned, [batch] * 3)
    with tuned.frozen_states(tmp_path / "states") as states:
        torch.testing.assert_close(losses_and_gradients(tuned, [batch] * 3), expected, rtol=1e-4, atol=1e-6)
        assert (states.trunk.depth, states.reused) == (2, 4)


def test_padding_on_the_left_is_no_reason_to_miss_or_to_confuse(tmp_path: Path) -> None:
    tuned, _ = trained("llama", "freeze(layers=1)")
    architecture = ARCHITECTURES["llama"]
    left = architecture.batch(4, head="classification", padding="left")
    batch = {**left, "labels": architecture.labels("classification", left)}
    expected = losses_and_gradients(tuned, [batch] * 3)
    with tuned.frozen_states(tmp_path) as states:
        torch.testing.assert_close(losses_and_gradients(tuned, [batch] * 3), expected, rtol=1e-4, atol=1e-6)
        assert states.reused == 4
        # the same words behind other padding have other positions
        moved = {name: torch.cat([value[:, :1] * 0, value], dim=1) for name, value in left.items()}
        with torch.no_grad():
            found = tuned.model(**moved).logits
        assert states.reused == 4
    with torch.no_grad():
        torch.testing.assert_close(found, tuned.model(**moved).logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_goes_on(reentrant: bool, tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)", num_hidden_layers=3)
    tuned.model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
    expected = losses_and_gradients(tuned, [batch] * 3)
    assert len(expected) > 3
    with tuned.frozen_states(tmp_path) as states:
        torch.testing.assert_close(losses_and_gradients(tuned, [batch] * 3), expected, rtol=1e-4, atol=1e-6)
        assert states.reused == 4


def test_a_later_run_reuses_them_after_comparing_once(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "ladder-side-tuning(reduction=2)")
    expected = losses_and_gradients(tuned, [batch])
    with tuned.frozen_states(tmp_path):
        losses_and_gradients(tuned, [batch])
    ran = Ran(tuned, 0)
    with tuned.frozen_states(tmp_path) as states:
        for _ in range(3):
            torch.testing.assert_close(losses_and_gradients(tuned, [batch]), expected, rtol=1e-4, atol=1e-6)
        assert (states.computed, states.reused, ran.count) == (4, 8, 1)


def test_states_of_other_weights_or_other_layers_are_refused(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)", num_hidden_layers=3)
    with tuned.frozen_states(tmp_path):
        tuned.model(**batch)
    with torch.no_grad():
        next(iter(tuned.model.base_model.encoder.layer[0].parameters()))[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"of another model.*weights is"), tuned.frozen_states(tmp_path):
        pass
    other, _ = trained("bert", "freeze(layers=2)", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"layers is \[1\] there, \[0\] here"), other.frozen_states(tmp_path):
        pass


def test_what_is_random_below_is_noticed_whatever_its_name(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    tuned.model.bert.embeddings.register_forward_hook(lambda module, args, output: output + torch.randn_like(output))
    with tuned.frozen_states(tmp_path):
        tuned.model(**batch)
        with pytest.raises(CheckpointError, match="something else each time"):
            tuned.model(**batch)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_cache_that_is_filled_is_never_mistaken_for_none(name: str, tmp_path: Path) -> None:
    tuned = deltune.attach(build(name, "language"), "freeze(layers=1)")
    token = torch.tensor([[7], [7]])
    prefixes = [torch.randint(10, 90, (2, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def continued(prefix: Tensor) -> Tensor:
        past = tuned.model(input_ids=prefix, use_cache=True).past_key_values
        logits: Tensor = tuned.model(input_ids=token, past_key_values=past, use_cache=True).logits
        return logits

    with torch.no_grad():
        expected = [continued(prefix) for prefix in prefixes]
        with tuned.frozen_states(tmp_path):
            for _ in range(3):
                torch.testing.assert_close([continued(prefix) for prefix in prefixes], expected)
            for prefix in prefixes:
                options = {"max_new_tokens": 4, "do_sample": False}
                assert tuned.model.generate(prefix, **options).shape == (2, 10)


def test_all_states_are_right_where_they_are_asked_for(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)", num_hidden_layers=4)
    expected = tuned.model(**batch, output_hidden_states=True).hidden_states
    with tuned.frozen_states(tmp_path):
        for _ in range(3):
            tuned.model(**batch)
        torch.testing.assert_close(tuned.model(**batch, output_hidden_states=True).hidden_states, expected)
        tuned.model.config.output_hidden_states = True
        torch.testing.assert_close(tuned.model(**batch).hidden_states, expected)
        tuned.model.config.output_hidden_states = False


def test_masks_in_a_mapping_are_told_apart(tmp_path: Path) -> None:
    tuned = deltune.attach(build("gemma2", "language"), "freeze(layers=1)")
    batch = ARCHITECTURES["gemma2"].batch(2, head="language")
    ids = batch["input_ids"]
    causal = torch.ones(ids.shape[1], ids.shape[1]).tril().bool()[None, None]
    narrow = causal & ~causal.tril(-2)
    with torch.no_grad(), tuned.frozen_states(tmp_path) as states:
        found = []
        for mask in (causal, narrow, causal, narrow, narrow):
            masks = {"full_attention": mask, "sliding_attention": mask}
            found.append(tuned.model(input_ids=ids, attention_mask=masks, use_cache=False).logits)
        assert states.reused == 4
    torch.testing.assert_close(found[2:], [found[0], found[1], found[1]])
    assert (found[0] - found[1]).abs().max() > 0.1


def test_a_gradient_that_is_wanted_below_is_there(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    ids = batch.pop("input_ids")
    with tuned.frozen_states(tmp_path) as states:
        for _ in range(3):
            embeds = tuned.model.get_input_embeddings()(ids).detach().requires_grad_()
            tuned.model(**batch, inputs_embeds=embeds).loss.backward()
            assert embeds.grad is not None
            assert all(row.any() for row in embeds.grad)
        batch["input_ids"] = ids
        for _ in range(3):
            tuned.model(**batch)
        assert states.reused == 4
        table = tuned.model.get_input_embeddings().weight.requires_grad_()
        tuned.model(**batch).loss.backward()
        assert table.grad is not None
        with torch.no_grad():  # it has changed: nothing kept is right any more
            table.add_(1.0)
            changed = tuned.model(**batch).logits
    with torch.no_grad():
        torch.testing.assert_close(tuned.model(**batch).logits, changed)
    with pytest.raises(StateError, match=r"word_embeddings\.weight trains"), tuned.frozen_states(tmp_path / "more"):
        pass


def test_numbers_that_the_type_cannot_hold_are_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tuned, batch = trained("llama", "freeze(layers=1)")
    with torch.no_grad():
        tuned.model.get_input_embeddings().weight.mul_(1e6)
    expected = losses_and_gradients(tuned, [batch] * 3)
    with tuned.frozen_states(tmp_path / "half", torch.float16) as states, caplog.at_level(logging.WARNING):
        torch.testing.assert_close(losses_and_gradients(tuned, [batch] * 3), expected)
        assert states.reused == 0
    assert caplog.text.count("too large for float16") == 1
    with pytest.raises(StateError, match="float32, float16 or bfloat16"), tuned.frozen_states(tmp_path, torch.int8):
        pass


def test_layers_that_give_a_tuple_of_one(tmp_path: Path) -> None:
    from transformers import MPNetConfig, MPNetForSequenceClassification

    torch.manual_seed(0)
    config = MPNetConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
    )
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, name, 0.0)
    tuned = deltune.attach(MPNetForSequenceClassification(config), "freeze(layers=1)")
    batch = {"input_ids": torch.randint(5, 50, (2, 6)), "labels": torch.tensor([0, 1])}
    expected = losses_and_gradients(tuned, [batch] * 3)
    with tuned.frozen_states(tmp_path) as states:
        torch.testing.assert_close(losses_and_gradients(tuned, [batch] * 3), expected, rtol=1e-4, atol=1e-6)
        assert states.reused == 2


def test_a_row_of_nothing_but_padding(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    batch["attention_mask"][1] = 0
    with torch.no_grad(), tuned.frozen_states(tmp_path) as states:
        found = [tuned.model(**batch).logits for _ in range(3)]
        assert states.reused == 4
    torch.testing.assert_close(found[2], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_arithmetic_is_part_of_what_is_found_again(dtype: torch.dtype, tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    with torch.no_grad(), tuned.frozen_states(tmp_path) as states:
        for _ in range(3):
            tuned.model(**batch)
        assert states.reused == 4
        for _ in range(2):
            with torch.autocast("cpu", dtype=dtype):
                tuned.model(**batch)
        assert states.reused == 8
        assert len(states.store) == 8


def test_threads_share_the_kept_states(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "ladder-side-tuning(reduction=2)")
    with torch.no_grad():
        expected = [tuned.model(**rows(batch, row)).logits for row in range(4)]
    with tuned.frozen_states(tmp_path) as states, ThreadPoolExecutor(4) as pool:

        def work(number: int) -> Tensor:
            with torch.no_grad():
                logits: Tensor = tuned.model(**rows(batch, number % 4)).logits
            return logits

        for number, found in enumerate(pool.map(work, range(80))):
            torch.testing.assert_close(found, expected[number % 4], rtol=1e-4, atol=1e-5)
        assert states.reused > 60


def test_rows_with_attachments_of_their_own_and_sums(tmp_path: Path) -> None:
    tuned, batch = trained(
        "bert", "lora(targets='attention.query layers=1:') + p-tuning-v2(targets='attention layers=2')"
    )
    tuned.attach("lora(rank=2, targets='attention.value layers=2')", "other")
    tuned.model.eval()
    with torch.no_grad(), tuned.routed(["default", "other", None, "default"]):
        expected = tuned.model(**batch).logits
        with tuned.frozen_states(tmp_path) as states:
            assert states.trunk.depth == 1
            for _ in range(3):
                torch.testing.assert_close(tuned.model(**batch).logits, expected, rtol=1e-4, atol=1e-5)
            assert states.reused == 4
    with tuned.frozen_states(tmp_path / "one"), tuned.one_pass("default", "other"), pytest.raises(StateError):
        tuned.model(**{name: value for name, value in batch.items() if name != "labels"})


def test_half_the_space_at_half_the_precision(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    expected = losses_and_gradients(tuned, [batch] * 2)
    with tuned.frozen_states(tmp_path / "half", torch.float16) as half:
        found = losses_and_gradients(tuned, [batch] * 2)
    with tuned.frozen_states(tmp_path / "full") as full:
        losses_and_gradients(tuned, [batch] * 2)
    assert 2 * half.store.bytes == full.store.bytes
    assert 0 < (found[1] - expected[1]).abs() < 1e-2


def test_dropout_below_is_refused_in_training_and_none_is_wanted_above(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)", dropout=0.1)
    with tuned.frozen_states(tmp_path):
        with pytest.raises(StateError, match=r"embeddings\.dropout drops values.*dropout=0"):
            tuned.model(**batch)
        tuned.model.eval()
        tuned.model(**batch)
    for module in tuned.model.base_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    tuned.model.train()
    assert tuned.model.dropout.p == 0.1  # that of the head
    with tuned.frozen_states(tmp_path) as states:
        tuned.model(**batch), tuned.model(**batch)
        assert states.reused == 4


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    tuned.attach("freeze(layers=2)", "other")
    tuned.activate("default")
    with tuned.frozen_states(tmp_path / "a"):
        for part in (tuned.model, tuned.model.bert, tuned.model.bert.encoder.layer[0]):
            with pytest.raises(StateError, match="cannot be copied"):
                copy.deepcopy(part)
            with pytest.raises(StateError, match="cannot be copied"):
                pickle.dumps(part)
        with pytest.raises(StateError, match="Another training uses"), tuned.frozen_states(tmp_path / "a"):
            pass
        tuned.activate("other")
        with pytest.raises(StateError, match="switched"):
            tuned.model(**batch)
    with tuned.disabled(), pytest.raises(StateError, match="Nothing is active"), tuned.frozen_states(tmp_path / "b"):
        pass
    prompt, _ = trained("bert", "prompt-tuning(length=2)")
    with pytest.raises(StateError, match="not known that it stands above"), prompt.frozen_states(tmp_path / "b"):
        pass
    biases, _ = trained("bert", "bitfit")
    with (
        pytest.raises(StateError, match=r"acts or trains at bert\.|below which"),
        biases.frozen_states(tmp_path / "b"),
    ):
        pass
    pair = deltune.attach(build("t5", "language"), "freeze(layers=1)")
    with pytest.raises(StateError, match="one stack"), pair.frozen_states(tmp_path / "b"):
        pass


def test_generation_inside_is_that_outside(tmp_path: Path) -> None:
    model = build("llama", "language")
    torch.manual_seed(1)
    tuned = deltune.attach(model, "freeze(layers=1)")
    batch = ARCHITECTURES["llama"].batch(2, head="language")
    options = {"max_new_tokens": 5, "do_sample": False}
    expected = tuned.model.generate(**batch, **options)
    with tuned.frozen_states(tmp_path) as states:
        for _ in range(3):
            assert torch.equal(tuned.model.generate(**batch, **options), expected)
            tuned.model(**batch, labels=batch["input_ids"])
        assert torch.equal(tuned.model.generate(**batch, **options, use_cache=False), expected)
        assert states.reused > 0


def test_an_error_in_a_pass_leaves_nothing_behind(tmp_path: Path) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    expected = tuned.model(**batch).loss
    with tuned.frozen_states(tmp_path) as states:
        with pytest.raises(IndexError):
            tuned.model(**{**batch, "input_ids": batch["input_ids"] + 10_000})
        assert len(states.store) == 0
        for _ in range(3):
            torch.testing.assert_close(tuned.model(**batch).loss, expected)


def test_a_full_disk_costs_nothing_but_the_saving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tuned, batch = trained("bert", "freeze(layers=1)")
    expected = tuned.model(**batch).loss
    with tuned.frozen_states(tmp_path) as states, caplog.at_level(logging.WARNING):
        monkeypatch.setattr(states.store, "_file", _Full(states.store._file))
        for _ in range(2):
            torch.testing.assert_close(tuned.model(**batch).loss, expected)
        assert states.reused == 0
    assert "No space left on device" in caplog.text


class _Full:
    """A file on a disk without space."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def seek(self, place: int) -> None:
        self.file.seek(place)

    def write(self, content: Any) -> int:
        raise OSError(28, "No space left on device")
