"""QLoRA: LoRA beside a quantised model. Numbers are those of the sheet."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import deltune
from deltune.errors import MethodError, StateError
from deltune.quantization import dense_weight, dequantize, is_quantized
from tests.methods.common import bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.quantization.test_quantize import TORCH, engines, head_of, quantized
from tests.zoo import ARCHITECTURES

LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]


def attached(name: str, method: str = "qlora(rank=4)", **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    model = quantized(name, head_of(name), **options)
    torch.manual_seed(1)
    return deltune.attach(model, method), ARCHITECTURES[name].batch(head=head_of(name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_11_step_0_is_exactly_the_quantised_model(name: str) -> None:
    model, batch = quantized(name, head_of(name)), ARCHITECTURES[name].batch(head=head_of(name))
    before = output(model, batch)
    tuned = deltune.attach(model, "qlora")
    assert torch.equal(output(model, batch), before)
    assert not torch.allclose(before, output(build(name, head_of(name)), batch), atol=1e-5)
    tuned.detach()
    assert torch.equal(output(model, batch), before)


@engines
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_10_only_lora_gets_gradients_and_frozen_bits_stay(name: str, engine: str) -> None:
    model = quantized(name, head_of(name), deltune.NF4(engine=engine))
    before = bits(model)
    tuned = deltune.attach(model, "qlora(rank=4)", train_head=False)
    assert {key.rsplit(".", 1)[1] for key, _ in tuned.named_trainable_parameters()} == {"A", "B"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    model.train()
    batch = ARCHITECTURES[name].batch(head=head_of(name))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()
    trained = {id(value) for value in tuned.trainable_parameters()}
    for key, value in model.named_parameters():
        assert (value.grad is not None) == (id(value) in trained), key
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.any(), key
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_change_is_that_of_lora_on_the_dequantised_model(name: str, tmp_path: Path) -> None:
    """Output and gradients, in fused and in transposed matrices."""
    tuned, batch = attached(name)
    train(tuned, batch)
    tuned.save(tmp_path)
    dense = dequantize(quantized(name, head_of(name)))
    other = deltune.load(dense, tmp_path)
    assert relative_error(output(other.model, batch), output(tuned.model, batch)) < 1e-5
    for one in (tuned, other):
        one.model.zero_grad()
        loss_of(one.model, batch).backward()
    for (key, value), (_, twin) in zip(
        tuned.named_trainable_parameters(), other.named_trainable_parameters(), strict=True
    ):
        assert torch.allclose(value.grad, twin.grad, atol=1e-6, rtol=1e-4), key  # type: ignore[arg-type]
    other.merge()
    assert relative_error(output(other.model, batch), output(tuned.model, batch)) < 1e-5


def test_the_counts_are_the_published_ones() -> None:
    assert BERT_BASE.count("qlora(rank=64)") == 10_616_832
    assert LLAMA.count("qlora(rank=64)") == 19_537_920
    assert BERT_BASE.count("qlora(rank=8)") == 1_327_104
    assert LLAMA.count("qlora(rank=8)") == 2_442_240


def test_the_defaults_are_the_papers_but_for_the_rank() -> None:
    method = deltune.QLoRA()
    assert (method.rank, method.alpha, method.dropout, method.learning_rate) == (16, 16, 0.1, 2e-4)
    assert method.targets.names == ("attention.*", "ffn.*")


def test_on_a_plain_model_it_is_lora() -> None:
    batch = ARCHITECTURES["llama"].batch(head="language")
    outputs = []
    for method in ("qlora(rank=4, dropout=0)", "lora(rank=4, targets='attention.* ffn.*')"):
        torch.manual_seed(1)
        tuned = deltune.attach(build("llama"), method)
        train(tuned, batch)
        outputs.append(output(tuned.model, batch))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_13_saved_and_loaded_onto_a_model_that_is_quantised_again(name: str, tmp_path: Path) -> None:
    tuned, batch = attached(name)
    train(tuned, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(quantized(name, head_of(name)), tmp_path)
    assert torch.equal(output(loaded.model, batch), output(tuned.model, batch))
    assert loaded.attachments["default"].method == deltune.QLoRA(rank=4)
    # the model that it was trained on is known again whether it is quantised or not
    deltune.load(build(name, head_of(name)), tmp_path)


@engines
def test_merging_into_four_bits_is_refused_and_says_what_to_do(engine: str) -> None:
    tuned, batch = attached("llama", format=deltune.NF4(engine=engine))
    before = output(tuned.model, batch)
    with pytest.raises(StateError, match="dequantize"):
        tuned.merge()
    assert tuned.active == ("default",)
    assert torch.equal(output(tuned.model, batch), before)


@pytest.mark.parametrize("method", ["lora(rank=2, weight_decomposed=true)", "lora(rank=2, initialization=pissa)"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_forms_that_read_the_matrix_read_the_dequantised_one(name: str, method: str) -> None:
    tuned, batch = attached(name, method)
    train(tuned, batch)
    torch.manual_seed(1)
    other = deltune.attach(dequantize(quantized(name, head_of(name))), method)
    train(other, batch)
    assert relative_error(output(tuned.model, batch), output(other.model, batch)) < 1e-4


def test_checkpointing_copies_and_several_attachments() -> None:
    tuned, batch = attached("llama-gqa", "qlora(rank=4, dropout=0)")
    train(tuned, batch)
    tuned.model.zero_grad()
    loss_of(tuned.model, batch).backward()
    before = [value.grad.clone() for value in tuned.trainable_parameters()]  # type: ignore[union-attr]
    tuned.model.zero_grad()
    tuned.model.activation_checkpointing_enable()
    tuned.model.train()
    loss_of(tuned.model, batch).backward()
    for value, expected in zip(tuned.trainable_parameters(), before, strict=True):
        assert torch.allclose(value.grad, expected, atol=1e-6)  # type: ignore[arg-type]
    tuned.model.eval()
    expected = output(tuned.model, batch)
    tuned.model.disable_input_require_grads()
    for model in (copy.deepcopy(tuned.model), pickle.loads(pickle.dumps(tuned.model))):
        assert torch.equal(output(model, batch), expected)
    tuned.attach("lora(rank=2)", "second")
    tuned.activate("default", "second")
    train(tuned, batch)
    tuned.activate("default")
    tuned.activate("default", weights=(0.5,))
    assert not torch.equal(output(tuned.model, batch), expected)


@pytest.mark.parametrize("compute", [torch.bfloat16, torch.float32])
def test_other_types_of_the_model(compute: torch.dtype) -> None:
    format = deltune.NF4(compute_dtype=compute, engine="torch")
    tuned, batch = attached("llama-gqa", format=format, dtype=torch.bfloat16)
    assert {value.dtype for value in tuned.trainable_parameters()} == {torch.float32}
    train(tuned, batch)
    found = output(tuned.model, batch)
    assert found.dtype == torch.bfloat16
    assert torch.isfinite(found).all()


@engines
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_training_goes_on_after_evaluating(name: str, engine: str) -> None:
    """In evaluation, bitsandbytes would repack the weights on some processors, and then give no gradient."""
    tuned, batch = attached(name, "qlora(rank=4, dropout=0)", format=deltune.NF4(engine=engine))
    before = bits(tuned.model)
    train(tuned, batch)
    tuned.model.zero_grad()
    loss_of(tuned.model, batch).backward()
    expected = [value.grad.clone() for value in tuned.trainable_parameters()]  # type: ignore[union-attr]
    tuned.model.zero_grad()
    tuned.model.eval()
    evaluated = output(tuned.model, batch)
    tuned.model.train()
    loss_of(tuned.model, batch).backward()
    for value, gradient in zip(tuned.trainable_parameters(), expected, strict=True):
        assert torch.equal(value.grad, gradient)  # type: ignore[arg-type]
    state = tuned.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items() if ".deltune." not in key)
    twin = copy.deepcopy(tuned.model)
    assert torch.equal(output(twin.eval(), batch), evaluated)


@engines
def test_a_dequantised_model_can_be_merged_whichever_engine(engine: str, tmp_path: Path) -> None:
    format = deltune.NF4(engine=engine)
    tuned, batch = attached("gpt2", "lora(rank=2, weight_decomposed=true)", format=format)
    train(tuned, batch)
    tuned.save(tmp_path)
    other = deltune.load(dequantize(quantized("gpt2", format=format)), tmp_path)
    other.merge()
    assert relative_error(output(other.model, batch), output(tuned.model, batch)) < 1e-5


def test_training_makes_the_loss_smaller() -> None:
    tuned, batch = attached("llama-gqa", "qlora(rank=8, dropout=0)")
    with torch.no_grad():
        before = loss_of(tuned.model, batch)
    train(tuned, batch, steps=10)
    assert loss_of(tuned.model, batch) < before - 0.01


def test_the_selection_of_a_packed_matrix_is_refused() -> None:
    with pytest.raises((StateError, MethodError), match=r"uint8"):
        deltune.attach(quantized("bert"), "full")


def test_the_dense_weight_of_a_plain_module_is_its_own() -> None:
    model = build("llama")
    assert not any(is_quantized(module) for module in model.modules())
    module = model.model.layers[0].mlp.up_proj
    assert dense_weight(module) is module.weight
    assert TORCH.engine == "torch"
