"""Quantised models in folders: what was written is what is read, by deltune and by transformers."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import deltune
from deltune.errors import CheckpointError, StateError
from deltune.quantization import dense_weight, dequantize, format_of, is_quantized, load_quantized
from tests.methods.common import build, output, train
from tests.quantization.test_quantize import engines, needs_bitsandbytes, quantized
from tests.zoo import randomize

BLOCK = 32
_COMMON: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
#: Of widths that the block divides.
MODELS: dict[str, tuple[str, Any]] = {
    "bert": ("BertForSequenceClassification", transformers.BertConfig(**_COMMON, intermediate_size=64, num_labels=3)),
    "gpt2": ("GPT2LMHeadModel", transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2)),
    "gpt_neox": ("GPTNeoXForCausalLM", transformers.GPTNeoXConfig(**_COMMON, intermediate_size=64)),
    "llama": (
        "LlamaForCausalLM",
        transformers.LlamaConfig(**_COMMON, intermediate_size=64, num_key_value_heads=1),
    ),
    "t5": (
        "T5ForConditionalGeneration",
        transformers.T5Config(vocab_size=64, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2),
    ),
}


def made(name: str, format: deltune.NF4, class_name: str = "") -> Any:
    """A quantised model."""
    torch.manual_seed(3)
    usual, config = MODELS[name]
    model = getattr(transformers, class_name or usual)(copy.deepcopy(config)).eval()
    return deltune.quantize(randomize(model, 3) or model, format)


def batch_of(name: str) -> dict[str, Tensor]:
    ids = torch.arange(4, 20).view(2, 8)
    return {"input_ids": ids, "decoder_input_ids": ids[:, :5]} if name == "t5" else {"input_ids": ids}


def small(engine: str = "torch", **options: Any) -> deltune.NF4:
    return deltune.NF4(block=BLOCK, engine=engine, **options)


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {name: dense_weight(module) for name, module in model.named_modules() if is_quantized(module)}


def assert_same_matrices(one: nn.Module, other: nn.Module) -> None:
    first, second = matrices(one), matrices(other)
    assert first.keys() == second.keys()
    assert first
    for name, value in first.items():
        assert torch.equal(value.float(), second[name].float()), name


@engines
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_13_a_saved_model_is_read_bit_for_bit(name: str, double: bool, engine: str, tmp_path: Path) -> None:
    model = made(name, small(engine, double_quantization=double))
    before = set(vars(model.config))
    model.save_pretrained(tmp_path)
    assert set(vars(model.config)) - before <= {"dtype", "architectures"}
    found = load_quantized(tmp_path, type(model), small(engine, double_quantization=double))
    batch = batch_of(name)
    assert torch.equal(output(found, batch), output(model, batch))
    assert_same_matrices(found, model)
    assert format_of(found) == format_of(model)
    # and again
    found.save_pretrained(tmp_path / "second")
    one, two = load_file(tmp_path / "model.safetensors"), load_file(tmp_path / "second" / "model.safetensors")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@needs_bitsandbytes
@engines
@pytest.mark.parametrize("name", MODELS)
def test_transformers_reads_it_too(name: str, engine: str, tmp_path: Path) -> None:
    model = made(name, small(engine))
    model.save_pretrained(tmp_path)
    found = type(model).from_pretrained(tmp_path)
    assert_same_matrices(found, model)
    for module in found.modules():
        if is_quantized(module):
            module.support_avx512bf16_for_cpu = False  # otherwise it computes in bfloat16 on some processors
    batch = batch_of(name)
    assert torch.allclose(output(found.eval(), batch), output(model, batch), atol=1e-5)


@needs_bitsandbytes
def test_either_engine_writes_the_same_and_reads_the_others(tmp_path: Path) -> None:
    """Scales in 8 bits may differ by one step between the engines, so plain ones here."""
    for engine in ("torch", "bitsandbytes"):
        made("llama", small(engine, double_quantization=False)).save_pretrained(tmp_path / engine)
    one, other = (load_file(tmp_path / engine / "model.safetensors") for engine in ("torch", "bitsandbytes"))
    assert one.keys() == other.keys()
    for key, value in one.items():
        if not key.endswith("bitsandbytes__nf4"):
            assert torch.equal(value, other[key]), key
            continue
        records = [json.loads(bytes(item[key].tolist())) for item in (one, other)]
        assert records[0] == records[1]
    kind = transformers.LlamaForCausalLM
    for engine, reader in (("torch", "bitsandbytes"), ("bitsandbytes", "torch")):
        found = load_quantized(tmp_path / engine, kind, small(reader, double_quantization=False))
        stored = format_of(found)
        assert stored is not None
        assert stored.engine == reader
        assert_same_matrices(found, made("llama", small(engine, double_quantization=False)))


def test_a_folder_in_several_files(tmp_path: Path) -> None:
    model = made("llama", small())
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_same_matrices(load_quantized(tmp_path, type(model), small()), model)


def test_with_another_head(tmp_path: Path) -> None:
    made("bert", small(), "BertModel").save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="new, to be trained"):
        found = load_quantized(tmp_path, transformers.BertForSequenceClassification, small(), num_labels=5)
    assert type(found.classifier) is nn.Linear
    assert matrices(found)


def test_copies_save_themselves_and_dequantised_models_as_before(tmp_path: Path) -> None:
    model = made("llama", small())
    for number, twin in enumerate((copy.deepcopy(model), pickle.loads(pickle.dumps(model)))):
        assert twin.save_pretrained.model is twin
        twin.model.layers[0].input_layernorm.weight.data.fill_(number + 5)
        twin.save_pretrained(tmp_path / str(number))
        found = load_file(tmp_path / str(number) / "model.safetensors")
        assert found["model.layers.0.input_layernorm.weight"].unique().tolist() == [number + 5]
    dequantize(model).save_pretrained(tmp_path / "plain")
    again = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "plain")
    assert not matrices(again)


def test_a_delta_beside_it_is_not_written(tmp_path: Path) -> None:
    model = made("llama", small())
    tuned = deltune.attach(model, "qlora(rank=4)")
    batch = {**batch_of("llama"), "labels": batch_of("llama")["input_ids"]}
    train(tuned, batch)
    model.save_pretrained(tmp_path / "model")
    tuned.save(tmp_path / "delta")
    found = load_quantized(tmp_path / "model", type(model), small())
    assert torch.equal(output(deltune.load(found, tmp_path / "delta").model, batch), output(model, batch))
    assert not any("deltune" in key for key in load_file(tmp_path / "model" / "model.safetensors"))


def test_blocks_over_the_ends_of_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="32 inputs, which blocks of 64"):
        quantized("llama", "language").save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = made("llama", small())
    model.save_pretrained(tmp_path)
    kind = type(model)
    with pytest.raises(CheckpointError, match="quantised already, with block=32"):
        load_quantized(tmp_path, kind, deltune.NF4(engine="torch"))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    key = "model.layers.0.mlp.up_proj.weight"
    record = f"{key}.quant_state.bitsandbytes__nf4"
    save_file({**tensors, record: tensors[record][:9].clone()}, file)
    with pytest.raises(CheckpointError, match="up_proj is quantised, but"):
        load_quantized(tmp_path, kind, small())
    save_file({**tensors, f"{key}.quant_map": tensors[f"{key}.quant_map"] + 1}, file)
    with pytest.raises(CheckpointError, match="other levels"):
        load_quantized(tmp_path, kind, small())
    save_file(tensors, file)
    described = json.loads((tmp_path / "config.json").read_text())
    described["quantization_config"]["bnb_4bit_quant_type"] = "fp4"
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(CheckpointError, match="not in NF4"):
        load_quantized(tmp_path, kind, small())


def test_a_plain_model_keeps_its_own_way_of_saving() -> None:
    assert "save_pretrained" not in vars(build("llama"))
