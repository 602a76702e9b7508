"""Loading a folder straight into 4 bits: the same model as quantising afterwards, without the memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

import deltune
from deltune.errors import CheckpointError, DeltuneError
from deltune.quantization import NF4Linear, load_quantized
from tests.methods.common import build, output
from tests.quantization.test_quantize import TORCH, engines, head_of
from tests.zoo import ARCHITECTURES


def saved(name: str, folder: Path, head: str | None = None, **options: Any) -> Any:
    model = build(name, head or head_of(name))
    with torch.no_grad():
        for key, buffer in model.state_dict().items():
            if key.endswith("running_mean"):
                buffer.add_(1)
    model.save_pretrained(folder, **options)
    return model


def class_of(name: str) -> Any:
    return getattr(transformers, ARCHITECTURES[name].classes[head_of(name)])


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    present, expected = one.state_dict(), other.state_dict()
    assert present.keys() == expected.keys()
    for key, value in expected.items():
        assert present[key].dtype == value.dtype, key
        assert torch.equal(present[key], value), key
    buffers = dict(other.named_buffers())
    assert {key for key, _ in one.named_buffers()} == buffers.keys()
    assert all(torch.equal(value, buffers[key]) for key, value in one.named_buffers())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_quantising_the_loaded_model(name: str, tmp_path: Path) -> None:
    architecture = ARCHITECTURES[name]
    saved(name, tmp_path)
    expected = deltune.quantize(class_of(name).from_pretrained(tmp_path).eval(), TORCH)
    found = load_quantized(tmp_path, class_of(name), TORCH)
    assert_equal(found, expected)
    assert not any(value.is_meta for value in (*found.parameters(), *found.buffers()))
    assert not found.training
    batch = architecture.batch(head=head_of(name))
    with torch.no_grad():
        assert torch.equal(architecture.output(found(**batch)), architecture.output(expected(**batch)))


@engines
def test_by_either_engine_and_an_automatic_class(engine: str, tmp_path: Path) -> None:
    saved("llama-gqa", tmp_path)
    format = deltune.NF4(engine=engine)
    found = load_quantized(tmp_path, transformers.AutoModelForCausalLM, format)
    expected = deltune.quantize(transformers.AutoModelForCausalLM.from_pretrained(tmp_path), format)
    batch = ARCHITECTURES["llama-gqa"].batch(head="language")
    assert torch.equal(output(found, batch), output(expected, batch))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_in_another_type(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    saved(name, tmp_path)
    found = load_quantized(tmp_path, class_of(name), TORCH, dtype=dtype)
    expected = deltune.quantize(class_of(name).from_pretrained(tmp_path, dtype=dtype).eval(), TORCH)
    assert_equal(found, expected)


def test_tied_tensors_stay_tied(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    found = load_quantized(tmp_path, transformers.GPT2LMHeadModel, TORCH)
    assert found.lm_head.weight is found.transformer.wte.weight


def test_values_that_contradict_a_tie_are_refused(tmp_path: Path) -> None:
    saved("gpt2", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    save_file(tensors, tmp_path / "model.safetensors")
    load_quantized(tmp_path, transformers.GPT2LMHeadModel, TORCH)
    tensors["lm_head.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings=False"):
        load_quantized(tmp_path, transformers.GPT2LMHeadModel, TORCH)
    model = load_quantized(tmp_path, transformers.GPT2LMHeadModel, TORCH, tie_word_embeddings=False)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])


def test_a_folder_in_several_files(tmp_path: Path) -> None:
    saved("llama", tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    found = load_quantized(tmp_path, transformers.LlamaForCausalLM, TORCH)
    assert_equal(found, deltune.quantize(transformers.LlamaForCausalLM.from_pretrained(tmp_path), TORCH))


def test_another_head_is_new_and_named(tmp_path: Path) -> None:
    """A language model's file for classification, and a bare model's file for the same."""
    for name, head in (("bert", "language"), ("bert", "base"), ("llama", "language")):
        folder = tmp_path / f"{name}-{head}"
        before = saved(name, folder, head=head)
        model_class = getattr(transformers, ARCHITECTURES[name].classes["classification"])
        with pytest.warns(UserWarning, match="new, to be trained: .*(classifier|score).weight"):
            found = load_quantized(folder, model_class, TORCH, num_labels=5)
        head_module = found.classifier if name == "bert" else found.score
        assert head_module.out_features == 5
        assert 0 < head_module.weight.std() < 0.1  # the configuration's initializer_range is 0.02
        assert not any(value.is_meta for value in found.parameters())
        table = found.get_input_embeddings().weight
        assert torch.equal(table, before.get_input_embeddings().weight)


def test_generation_options_come_along(tmp_path: Path) -> None:
    model = build("llama", "language")
    model.generation_config.max_new_tokens = 3
    model.save_pretrained(tmp_path)
    found = load_quantized(tmp_path, transformers.LlamaForCausalLM, TORCH)
    assert found.generation_config.max_new_tokens == 3
    assert found.generate(torch.tensor([[11, 12]])).shape[1] <= 5


def test_what_is_built_meanwhile_in_other_ways_has_values(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    load_quantized(tmp_path, transformers.LlamaForCausalLM, TORCH)
    assert not nn.Linear(2, 2).weight.is_meta
    assert not build("llama").lm_head.weight.is_meta


def test_wrong_folders_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    kind = transformers.LlamaForCausalLM

    save_file({key: value for key, value in tensors.items() if "layers.1.mlp" not in key}, file)
    with pytest.raises(CheckpointError, match=r"lack 3 tensors.*layers\.1\.mlp.*from_pretrained"):
        load_quantized(tmp_path, kind, TORCH)
    save_file({**tensors, "model.norm.weight": torch.ones(5)}, file)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is \(5,\) in the files and \(32,\)"):
        load_quantized(tmp_path, kind, TORCH)
    file.write_bytes(b"\x01\x02")
    with pytest.raises(CheckpointError, match="damaged"):
        load_quantized(tmp_path, kind, TORCH)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\.safetensors"):
        load_quantized(tmp_path, kind, TORCH)


def test_a_name_on_the_hub_is_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    downloaded = tmp_path / "models--someone--small-model"
    saved("llama", downloaded / "snapshots" / "abc")
    (downloaded / "refs").mkdir()
    (downloaded / "refs" / "main").write_text("abc")
    found = load_quantized("someone/small-model", class_of("llama"), TORCH)
    assert_equal(found, load_quantized(downloaded / "snapshots" / "abc", class_of("llama"), TORCH))
    assert found.config._name_or_path == "someone/small-model"
    for name in ("someone/another", "no/such/folder", str(tmp_path / "nothing")):
        with pytest.raises(CheckpointError, match=r"no folder .* no model of that name"):
            load_quantized(name, class_of("llama"), TORCH)


def test_a_missing_engine_is_said_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(DeltuneError, match=r"deltune\[quant\]"):
        load_quantized(tmp_path / "nowhere", transformers.LlamaForCausalLM)


# -- memory ----------------------------------------------------------------------------------------------------

MEASURE = """
import json, sys, torch, transformers, deltune
from deltune.measure.memory import PeakMemory, release_memory
from deltune.quantization import load_quantized
format = deltune.NF4(engine="torch")
def small(folder): return load_quantized(folder, transformers.LlamaForCausalLM, format)
def large(folder): return deltune.quantize(transformers.LlamaForCausalLM.from_pretrained(folder), format)
grown = {}
for name, build in (("load", small), ("quantize", large)):
    build(sys.argv[1] + "/tiny")  # now the modules are imported
    release_memory()
    with PeakMemory(interval=0.002) as memory:
        model = build(sys.argv[1] + "/medium")
    grown[name] = memory.use.resident_peak - memory.use.resident_baseline
    del model
print(json.dumps(grown))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's mark of the highest memory is set back")
def test_the_float_model_never_stands_whole_in_memory(tmp_path: Path) -> None:
    """32 M parameters: 128 MB in float32, 17 MB quantised."""
    options = {"vocab_size": 200, "hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8}
    config = transformers.LlamaConfig(**options, num_hidden_layers=10)  # type: ignore[arg-type]
    model = transformers.LlamaForCausalLM(config)
    model.save_pretrained(tmp_path / "medium")
    saved("llama", tmp_path / "tiny")
    whole = sum(value.numel() * value.element_size() for value in model.parameters())
    # what is freed goes back to the system at once, so that the figure is what is in use
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    process = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], check=True, capture_output=True, text=True, env=environment
    )
    grown = json.loads(process.stdout.splitlines()[-1])
    assert whole > 125e6
    assert grown["load"] < 0.4 * whole, grown
    assert grown["quantize"] > whole, grown  # the measure would have seen it


def test_the_layers_are_deltunes_own(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    found = load_quantized(tmp_path, transformers.LlamaForCausalLM, TORCH)
    assert sum(isinstance(module, NF4Linear) for module in found.modules()) == 21
