"""Full fine-tuning, against its fact sheet.

Elsewhere: 6, the groups of decay, which belong to the trainer (tests/training).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import deltune
from tests.methods.common import attached, bits, build, loss_of, output, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

MODELS = ["bert", "gpt2", "llama-gqa", "t5", "bart"]


@pytest.mark.parametrize("name", MODELS)
def test_1_every_parameter_trains(name: str) -> None:
    tuned, _ = attached(name, "full")
    assert all(value.requires_grad for value in tuned.model.parameters())
    assert tuned.summary().parameters == sum(value.numel() for value in build(name).parameters())
    assert tuned.summary().share == 1


def test_1_published_counts() -> None:
    assert BERT_BASE.count("full") == BERT_BASE.summary("full", head=True).parameters == 109_483_778
    assert LLAMA.count("full") == 134_515_008
    assert LLAMA.summary("full").bytes == 4 * 134_515_008


@pytest.mark.parametrize("name", MODELS)
def test_2_whatever_has_a_gradient_moves(name: str) -> None:
    tuned, batch = attached(name, "full")
    before = {key: value.detach().clone() for key, value in tuned.named_trainable_parameters()}
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=1.0)
    loss_of(tuned.model, batch).backward()
    optimizer.step()
    for key, value in tuned.named_trainable_parameters():
        # a step too small for a weight's last bit moves nothing
        if value.grad is not None and value.grad.abs().max() > 1e-6:
            assert not torch.equal(value, before[key]), key


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_3_rows_of_unused_words_move_by_decay_alone(decay: float) -> None:
    tuned, batch = attached("bert", "full")
    table = tuned.model.get_input_embeddings().weight
    before = table.detach().clone()
    train(tuned, batch, steps=1, weight_decay=decay)
    used = torch.zeros(len(table), dtype=torch.bool)
    used[batch["input_ids"].flatten()] = True
    assert (table[used] != before[used]).any(1).all()
    assert torch.allclose(table[~used], before[~used] * (1 - 1e-2 * decay), rtol=1e-6)
    assert torch.equal(table[~used], before[~used]) == (decay == 0)


@pytest.mark.parametrize("name", MODELS)
def test_4_saved_and_loaded_bit_for_bit(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, "full")
    train(tuned, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name), tmp_path)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))


@pytest.mark.parametrize("name", ["gpt2", "t5", "bart"])
def test_5_tied_tensors_stay_one(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name, "full")

    def tied(model: Any) -> bool:
        same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        assert same == (name in ("gpt2", "t5", "bart"))
        return same

    assert tied(tuned.model)
    parameters = tuned.trainable_parameters()
    assert len({id(value) for value in parameters}) == len({value.data_ptr() for value in parameters})
    assert len(parameters) == len(list(build(name).parameters()))
    train(tuned, batch)
    assert tied(tuned.model)
    tuned.save(tmp_path)
    stored = load_file(tmp_path / "delta.safetensors")
    assert sum(value.numel() for value in stored.values()) == tuned.summary().parameters
    assert tied(deltune.load(build(name), tmp_path).model)
    assert tied(tuned.detach())


def test_7_a_rate_of_zero_leaves_every_bit() -> None:
    model = build("gpt2")
    before = bits(model)
    tuned = deltune.attach(model, "full")
    train(tuned, ARCHITECTURES["gpt2"].batch(), lr=0.0, weight_decay=0.5)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_8_accumulated_gradients_equal_those_of_one_batch() -> None:
    tuned, _ = attached("gpt2", "full")
    batch = ARCHITECTURES["gpt2"].batch(batch_size=4)

    def gradients(pieces: int) -> list[Tensor]:
        tuned.model.zero_grad()
        for rows in torch.arange(4).chunk(pieces):
            logits = tuned.model(**{name: value[rows] for name, value in batch.items()}).logits
            (logits.square().mean() / pieces).backward()
        return [value.grad.clone() for value in tuned.trainable_parameters()]  # type: ignore[union-attr]

    for whole, summed in zip(gradients(1), gradients(4), strict=True):
        assert (whole - summed).abs().max() <= 1e-6 * max(1.0, float(whole.abs().max()))


def test_9_clipping_holds_its_limit() -> None:
    tuned, batch = attached("bert", "full")
    (1e3 * loss_of(tuned.model, batch)).backward()
    before = torch.nn.utils.clip_grad_norm_(tuned.trainable_parameters(), 0.5)
    norms = [value.grad.norm() for value in tuned.trainable_parameters() if value.grad is not None]
    assert before > 0.5
    assert torch.stack(norms).norm() <= 0.5 * (1 + 1e-6)


def test_10_seeded_runs_repeat_exactly() -> None:
    def run() -> dict[str, Tensor]:
        tuned, batch = attached("bert", "full", dropout=0.1)
        tuned.model.train()
        torch.manual_seed(4)
        train(tuned, batch)
        return bits(tuned.model)

    first, second = run(), run()
    assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_11_the_file_is_the_task_model_and_its_difference_is_the_delta(tmp_path: Path) -> None:
    tuned, batch = attached("gpt2", "full")
    train(tuned, batch)
    tuned.save(tmp_path)
    base, task = build("gpt2").state_dict(), tuned.model.state_dict()
    for key, value in load_file(tmp_path / "delta.safetensors").items():
        assert torch.equal(value, task[key]), key
        assert (base[key] + (value - base[key]) - task[key]).abs().max() <= 1e-6, key


@pytest.mark.parametrize("flags", [True, False])
def test_detaching_restores_what_required_a_gradient(flags: bool) -> None:
    model = build("bert")
    model.requires_grad_(flags)
    model.classifier.requires_grad_(True)
    deltune.attach(model, "full").detach()
    assert {key: value.requires_grad for key, value in model.named_parameters()} == {
        key: flags or key.startswith("classifier") for key, _ in model.named_parameters()
    }


def test_not_reversible_trains_the_tensors_themselves() -> None:
    model = build("bert")
    own = {id(value) for value in model.parameters()}
    tuned = deltune.attach(model, "full", reversible=False)
    assert {id(value) for value in tuned.trainable_parameters()} == own
    with pytest.raises(deltune.errors.StateError, match="reversible=True"):
        tuned.detach()


def test_some_modules_alone_train_with_targets() -> None:
    tuned, _ = attached("bert", "full(targets='ffn.up layers=0')", head="base")
    assert {name for name, _ in tuned.named_trainable_parameters()} == {
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.intermediate.dense.bias",
    }
    with_norms, _ = attached("gpt2", "lora + full(targets=norm,*.wpe)")
    selected = with_norms.attachments["default"].selected_names
    assert "transformer.wpe.weight" in selected
    assert len(selected) == 1 + 2 * 7
