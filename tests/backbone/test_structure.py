"""Families without a row: what structure finds agrees with the row, or nothing is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Part, Targets, anatomy_of, describe
from deltune.errors import TargetError
from tests.backbone.recording import CASES, example
from tests.zoo import ARCHITECTURES, Head

#: Fused matrices, shared layers, or one stack that is not plain.
REFUSED = {"modernbert", "albert", "gpt2", "gpt_neox", "phi3", "blip", "blip-caption"}


def structural(model: Any, monkeypatch: pytest.MonkeyPatch) -> Anatomy:
    """The anatomy of a model as if no family had a row."""
    monkeypatch.setattr(describe, "FAMILIES", ())
    return anatomy_of(model)


def seen(part: Part) -> tuple[Any, ...]:
    return part.role, part.layer, part.module, part.rows, part.attention, part.dispatches


@pytest.mark.parametrize(("name", "head"), CASES)
def test_structure_agrees_with_the_row_or_refuses(name: str, head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    _, model, known = example(name, head)
    found = structural(model, monkeypatch)
    if name in REFUSED:
        assert found.stacks == {}
        assert found.family == model.config.model_type
        return
    assert found.family == "structure"
    roles = {*PROJECTION_ROLES, "attention", "layer"}
    assert {seen(part) for part in found if part.role in roles} == {seen(part) for part in known if part.role in roles}
    assert len({part.key for part in found}) == len(found.parts)
    assert all(part.module in {other.module for other in known} for part in found if part.role == "norm")
    assert {part.module for part in found.of("embeddings")} <= {part.module for part in known.of("embeddings")}
    assert found.language_model_head == known.language_model_head


UNKNOWN = {
    "OPTConfig": ("OPTForCausalLM", {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "OlmoConfig": ("OlmoForCausalLM", {"intermediate_size": 48, "pad_token_id": 0}),
    "GemmaConfig": ("GemmaForCausalLM", {"intermediate_size": 48, "head_dim": 8, "num_key_value_heads": 2}),
    "XLMRobertaXLConfig": ("XLMRobertaXLForSequenceClassification", {"intermediate_size": 48}),
}


@pytest.mark.parametrize("config", UNKNOWN)
def test_plain_families_without_a_row_are_read(config: str) -> None:
    class_name, options = UNKNOWN[config]
    sizes = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = getattr(transformers, class_name)(getattr(transformers, config)(**sizes, **options))
    anatomy = anatomy_of(model)
    assert anatomy.family == "structure"
    (stack,) = anatomy.stacks.values()
    assert len(stack) == 2
    shape = anatomy.of("attention")[0].attention
    assert shape is not None
    assert (shape.heads, shape.head_dim) == (4, 8)
    assert len(anatomy.of("ffn.up")) == len(anatomy.of("ffn.down")) == len(anatomy.of("attention.output")) == 2
    with torch.no_grad():
        model(input_ids=torch.arange(10, 15)[None])


def test_experts_are_refused_with_advice() -> None:
    config = transformers.MixtralConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
    )
    model = transformers.MixtralForCausalLM(config)
    anatomy = anatomy_of(model)
    names = [name for name, _ in model.named_modules()]
    assert (anatomy.stacks, anatomy.family) == ({}, "mixtral")
    assert anatomy.language_model_head == "lm_head"
    with pytest.raises(TargetError, match=r"'mixtral' are not described.*module patterns, such as '\*\."):
        Targets.parse("attention.query").select(anatomy, names)
    with pytest.raises(TargetError, match=r"No module matches 'qproj'.*'\*\.q_proj'"):
        Targets.parse("qproj").select(anatomy, names)
    with pytest.raises(TargetError, match="no numbered layers"):
        Targets.parse("q_proj layers=1").select(anatomy, names)
    parts = Targets.parse("q_proj").select(anatomy, names)
    assert [part.module for part in parts] == [f"model.layers.{index}.self_attn.q_proj" for index in (0, 1)]


def test_layers_that_differ_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"].build()
    model.layers[1].mlp = nn.Linear(32, 32)
    assert structural(model, monkeypatch).stacks == {}


def test_a_second_attention_without_a_telling_name_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"].build()
    for layer in model.layers:
        layer.other_attn = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("q_proj", "k_proj", "v_proj")})
        layer.other_attn["o_proj"] = nn.Linear(32, 32)
    assert structural(model, monkeypatch).stacks == {}


def test_a_module_that_is_no_transformers_model_is_left_alone() -> None:
    anatomy = anatomy_of(nn.Sequential(nn.Linear(2, 2)))
    assert (anatomy.family, anatomy.parts, anatomy.head) == ("Sequential", (), ())
    (part,) = Targets.parse("0").select(anatomy, ["", "0"])
    assert part.module == "0"
