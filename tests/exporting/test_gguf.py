"""A LoRA for llama.cpp: names, order of rows and scales, undone here by transformers' own reader of such files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

import deltune
from deltune.errors import StateError
from deltune.exporting import Drift, probe_logits
from tests.zoo import ARCHITECTURES, randomize

ARCHITECTURE = ARCHITECTURES["llama-gqa"]
#: Of float32 where the change is added to the matrix and not to its result.
ROUNDING = 1e-4
EVERY = "attention.*,ffn.*"
#: llama.cpp's names of the matrices of a layer.
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def model(**options: Any) -> Any:
    made = ARCHITECTURE.build("language", **options)
    randomize(made, 5)
    return made.eval()


def tuned_with(method: str, **options: Any) -> deltune.Tuned:
    torch.manual_seed(1)
    tuned = deltune.attach(model(**options), method)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in tuned.trainable_parameters():
            value.copy_(0.2 * torch.randn(value.shape, generator=generator))
    return tuned


def read(folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    reader = gguf.GGUFReader(folder / "adapter.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    return fields, {tensor.name: np.array(tensor.data) for tensor in reader.tensors}


def merged_by_hand(folder: Path) -> Any:
    """A fresh model with what the file changes, read without deltune."""
    fields, tensors = read(folder)
    made = model()
    rows = LlamaTensorProcessor(
        {key: getattr(made.config, key) for key in ("num_attention_heads", "num_key_value_heads")}
    )
    for name in [key.removesuffix(".lora_a") for key in tensors if key.endswith(".lora_a")]:
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        assert block
        A, B = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        change = fields["adapter.lora.alpha"] / A.shape[0] * (B @ A)
        weight = made.model.layers[int(block[1])].get_submodule(NAMES[block[2]]).weight
        with torch.no_grad():
            weight += torch.from_numpy(rows.process(change, name).weights.copy())
    return made


@pytest.mark.parametrize(
    "method",
    [
        "lora(rank=4)",
        f"lora(rank=4, alpha=2, targets='{EVERY}')",
        f"lora(rank=4, rank_stabilized=true, targets='{EVERY}', rank_pattern='ffn.up -> 2')",
        f"lora(rank=3, initialization=pissa, targets='{EVERY}')",
        "adalora(initial_rank=4, target_rank=2)",
        "dylora(rank=4)",
    ],
)
def test_what_the_file_changes_is_what_the_delta_changes(method: str, tmp_path: Path) -> None:
    tuned = tuned_with(method)
    expected = probe_logits(tuned.model)

    found = deltune.export(tuned, tmp_path / "out", "gguf")

    assert [item.name for item in (tmp_path / "out").iterdir()] == ["adapter.gguf"]
    fields, tensors = read(tmp_path / "out")
    assert fields["general.type"] == "adapter"
    assert fields["general.architecture"] == "llama"
    assert fields["adapter.type"] == "lora"
    assert len(tensors) == 2 * sum(1 for _, site, form in tuned.attachments["default"].sites if form.stored())
    by_hand = Drift.between(expected, probe_logits(merged_by_hand(tmp_path / "out")))
    assert by_hand.relative < ROUNDING
    assert by_hand.agreement == 1
    assert found.drift.relative < ROUNDING
    assert torch.equal(probe_logits(tuned.model), expected)  # the live model is as before
    assert "--lora" in found.use


def test_rows_of_queries_and_keys_are_in_llama_cpps_order(tmp_path: Path) -> None:
    """Otherwise the test above could pass with two errors that undo each other."""
    tuned = tuned_with("lora(rank=4, targets='attention.query,attention.key,attention.value')")
    deltune.export(tuned, tmp_path / "out", "gguf")
    _, tensors = read(tmp_path / "out")
    forms = {site.module: form for _, site, form in tuned.attachments["default"].sites}
    config = tuned.model.config
    half = config.hidden_size // config.num_attention_heads // 2
    for gguf_name, name in (("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj")):
        here = forms[f"model.layers.0.self_attn.{name}"].B.detach().numpy()
        there = tensors[f"blk.0.{gguf_name}.weight.lora_b"]
        if name == "v_proj":
            assert np.array_equal(here, there)
            continue
        for head in range(len(here) // (2 * half)):
            for feature in range(half):  # the pairs that one rotation turns: neighbours there, half a head apart here
                row = head * 2 * half
                assert np.array_equal(there[row + 2 * feature], here[row + feature])
                assert np.array_equal(there[row + 2 * feature + 1], here[row + half + feature])


def test_a_narrow_model_is_compared_in_its_own_type(tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4)")
    tuned.model.to(torch.bfloat16)
    found = deltune.export(tuned, tmp_path / "out", "gguf")
    assert found.drift.largest == 0  # the file's float32 holds the same numbers
    assert read(tmp_path / "out")[1]["blk.0.attn_q.weight.lora_a"].dtype == np.float32


def test_a_file_that_does_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from deltune.exporting import gguf as module

    tuned = tuned_with("lora(rank=4)")
    expected = probe_logits(tuned.model)
    write = module._write

    def wrong(factors: Any, model: Any, name: str, file: Path) -> None:
        write([module.Factors(item.module, item.A, item.B.flip(0), item.scale) for item in factors], model, name, file)

    monkeypatch.setattr(module, "_write", wrong)
    with pytest.raises(StateError, match="It is gone"):
        deltune.export(tuned, tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []
    assert tuned.active == ("default",)
    assert torch.equal(probe_logits(tuned.model), expected)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("full", "changes model"),
        ("prefix-tuning(length=2)", "no sum with a product of two thin matrices"),
        ("krona", "no sum with a product of two thin matrices"),
        ("lora(rank=2, weight_decomposed=true)", "no sum with a product of two thin matrices"),
        ("lora(rank=2, targets=embeddings)", "is an embedding"),
    ],
)
def test_what_is_no_lora_is_refused_with_what_to_do(method: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=message) as raised:
        deltune.export(tuned_with(method), tmp_path / "out", "gguf")
    assert "--format merged" in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_other_models_are_pointed_to_the_converter(tmp_path: Path) -> None:
    architecture = ARCHITECTURES["gpt2"]
    tuned = deltune.attach(architecture.build("language"), "lora(rank=2)")
    with pytest.raises(StateError, match=r"kinds llama, not for gpt2.*convert_lora_to_gguf\.py"):
        deltune.export(tuned, tmp_path / "out", "gguf")


def test_a_trained_head_has_no_place(tmp_path: Path) -> None:
    tuned = deltune.attach(ARCHITECTURE.build("classification"), "lora(rank=2)")
    with pytest.raises(StateError, match="no place for a trained task head"):
        deltune.export(tuned, tmp_path / "out", "gguf")


def test_the_output_matrix_is_exported_unless_it_is_tied(tmp_path: Path) -> None:
    method = "lora(rank=2, targets='lm_head')"
    tuned = tuned_with(method, tie_word_embeddings=False)
    deltune.export(tuned, tmp_path / "out", "gguf")
    assert set(read(tmp_path / "out")[1]) == {"output.weight.lora_a", "output.weight.lora_b"}
    tied = tuned_with(method, tie_word_embeddings=True)
    with pytest.raises(StateError, match="takes no change of lm_head"):
        deltune.export(tied, tmp_path / "tied", "gguf")


def test_one_of_several_is_exported_and_the_others_stay_live(tmp_path: Path) -> None:
    tuned = tuned_with("lora(rank=4)")
    expected = probe_logits(tuned.model)
    tuned.attach("lora(rank=2)", "other")
    tuned.activate("default", "other", weights=[0.5, 2.0])
    both = probe_logits(tuned.model)
    deltune.export(tuned, tmp_path / "out", "gguf", name="default")
    assert Drift.between(expected, probe_logits(merged_by_hand(tmp_path / "out"))).relative < ROUNDING
    assert tuned.active == ("default", "other")
    assert torch.equal(probe_logits(tuned.model), both)
    with pytest.raises(StateError, match="Say which attachment to export"):
        deltune.export(tuned, tmp_path / "two", "gguf")
