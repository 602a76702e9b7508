"""Every family's row, against models of every class: parts, matrices, heads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from deltune.backbone import PROJECTION_ROLES, anatomy_of, matrix_shape
from deltune.backbone.families import FAMILIES
from deltune.errors import TargetError
from tests.backbone.recording import CASES, NAMES, example
from tests.zoo import ARCHITECTURES, Head, randomize

GATED = {"modernbert", "llama", "llama-gqa", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "smollm3", "t5-gated"}
STACKS = {
    **dict.fromkeys(("t5", "t5-gated", "bart", "whisper"), ("encoder", "decoder", "cross")),
    "vit": ("vision",),
    "clip": ("text", "vision"),
    "clip-text": ("text",),
    "clip-vision": ("vision",),
    "clip-image": ("vision",),
    "blip": ("vision", "text"),
    "blip-caption": ("vision", "decoder", "cross"),
}
CLASSIFIERS = {
    "distilbert": ("pre_classifier", "classifier"),
    "deberta-v2": ("pooler", "classifier"),
    **dict.fromkeys(("t5", "t5-gated", "bart"), ("classification_head",)),
}
TAGGERS_WITH_CLASSIFIER = {"gpt2", "gpt_neox"}


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_layer_has_every_role(name: str, head: Head) -> None:
    architecture, _, anatomy = example(name, head)
    assert anatomy.family == architecture.family
    kind = architecture.kind
    assert anatomy.stack_names == STACKS.get(name, (kind,))
    attention = {role for role in PROJECTION_ROLES if role.startswith("attention.")} | {"attention"}
    ffn = {"ffn", "ffn.up", "ffn.down"} | ({"ffn.gate"} if name in GATED else set())
    for stack in anatomy.stack_names:
        assert anatomy.layer_count(stack) > 0
        for layer in range(anatomy.layer_count(stack)):
            roles = {part.role for part in anatomy if (part.stack, part.layer) == (stack, layer)}
            assert roles == (attention if stack == "cross" else attention | ffn | {"layer", "norm"})
    assert {part.stack for part in anatomy.of("embeddings")} == set(anatomy.stacks)
    assert len({part.key for part in anatomy}) == len(anatomy.parts)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_modules_exist_and_matrices_fit_together(name: str, head: Head) -> None:
    _, model, anatomy = example(name, head)
    modules = dict(model.named_modules(remove_duplicate=False))
    for part in anatomy:
        assert part.module in modules
        assert part.result is None or part.result in modules
    for block in anatomy.of("attention"):
        shape, width = block.attention, anatomy.stack_of(block).hidden_size
        assert shape is not None
        queries = shape.heads * shape.head_dim
        assert shape.heads % shape.key_value_heads == 0
        sizes = {
            "attention.query": (queries, width),
            "attention.key": (shape.key_value_features, width),
            "attention.value": (shape.key_value_features, width),
            "attention.output": (width, queries),
        }
        for role, expected in sizes.items():
            (part,) = (p for p in anatomy.of(role, block.stack) if p.layer == block.layer)
            assert _role_shape(modules[part.module], part) == expected
    for block in anatomy.of("ffn"):
        shapes = {
            part.role: _role_shape(modules[part.module], part)
            for part in anatomy
            if part.role.startswith("ffn.") and (part.stack, part.layer) == (block.stack, block.layer)
        }
        width = anatomy.stack_of(block).hidden_size
        inner = shapes["ffn.up"][0]
        assert shapes == {role: (width, inner) if role == "ffn.down" else (inner, width) for role in shapes}


def _role_shape(module: nn.Module, part: object) -> tuple[int, ...]:
    shape = matrix_shape(module)
    assert shape is not None
    rows = part.rows  # type: ignore[attr-defined]
    return shape if rows is None else (rows.size, *shape[1:])


@pytest.mark.parametrize("name", NAMES)
def test_fused_rows_cover_their_matrix_once(name: str) -> None:
    _, model, anatomy = example(name)
    owners: dict[str, torch.Tensor] = {}
    for part in anatomy:
        if part.rows is not None:
            total = matrix_shape(model.get_submodule(part.module))[0]  # type: ignore[index]
            counts = owners.setdefault(part.module, torch.zeros(total))
            view = part.rows.view(counts, 0)
            view += 1
            assert part.rows.split(torch.ones(part.rows.size), 0).shape == view.shape
    assert all(bool((counts == 1).all()) for counts in owners.values())


@pytest.mark.parametrize(("name", "head"), CASES)
def test_only_new_modules_are_a_task_head(name: str, head: Head) -> None:
    architecture, model, anatomy = example(name, head)
    generic = "classifier" if architecture.kind in ("encoder", "vision") else "score"
    if head == "classification":
        assert anatomy.head == CLASSIFIERS.get(name, (generic,))
    elif head == "tokens":
        assert anatomy.head == (("classifier",) if name in TAGGERS_WITH_CLASSIFIER else (generic,))
    else:
        assert anatomy.head == ()
    assert (anatomy.language_model_head is not None) == (head == "language")
    if anatomy.language_model_head is not None:
        assert matrix_shape(model.get_submodule(anatomy.language_model_head))[0] == 100  # type: ignore[index]
    assert [part.module for part in anatomy.of("head")] == list(anatomy.head)


OTHER_CLASSES = [
    ("bert", "BertForQuestionAnswering", ("qa_outputs",)),
    ("bert", "BertForMultipleChoice", ("classifier",)),
    ("bert", "BertForPreTraining", ()),
    ("bert", "BertForNextSentencePrediction", ()),
    ("electra", "ElectraForPreTraining", ()),
    ("electra", "ElectraForMultipleChoice", ("sequence_summary", "classifier")),
    ("albert", "AlbertForPreTraining", ()),
    ("modernbert", "ModernBertForTokenClassification", ("classifier",)),
    ("llama", "LlamaForQuestionAnswering", ("qa_outputs",)),
    ("t5", "T5EncoderModel", ()),
    ("t5", "T5ForTokenClassification", ("classifier",)),
    ("t5", "T5ForQuestionAnswering", ("qa_outputs",)),
    ("bart", "BartForQuestionAnswering", ("qa_outputs",)),
    ("bart", "BartForCausalLM", ()),
    ("whisper", "WhisperForCausalLM", ()),
    ("whisper", "WhisperForAudioClassification", ("projector", "classifier")),
    ("vit", "ViTForMaskedImageModeling", ()),
    ("clip-text", "CLIPTextModelWithProjection", ()),
    ("clip-vision", "CLIPVisionModelWithProjection", ()),
    ("blip", "BlipForQuestionAnswering", ()),
    ("blip", "BlipForImageTextRetrieval", ()),
]


@pytest.mark.parametrize(("name", "class_name", "head"), OTHER_CLASSES, ids=str)
def test_other_classes(name: str, class_name: str, head: tuple[str, ...]) -> None:
    model = getattr(transformers, class_name)(ARCHITECTURES[name].configuration())
    anatomy = anatomy_of(model)
    assert anatomy.family == ARCHITECTURES[name].family
    assert anatomy.head == head
    assert anatomy.stacks
    modules = dict(model.named_modules(remove_duplicate=False))
    assert all(part.module in modules and part.result in {None, *modules} for part in anatomy)
    assert len({part.key for part in anatomy}) == len(anatomy.parts)


def test_a_bert_decoder_has_cross_attention() -> None:
    model = ARCHITECTURES["bert"].build(is_decoder=True, add_cross_attention=True)
    anatomy = anatomy_of(model)
    assert anatomy.stack_names == ("encoder", "cross")
    part = anatomy.of("attention", "cross")[1]
    assert part.module == "encoder.layer.1.crossattention.self"
    assert anatomy.stack_of(part) is anatomy.stacks["encoder"]


def test_albert_shares_its_layers() -> None:
    architecture = ARCHITECTURES["albert"]
    stack = anatomy_of(architecture.build()).stacks["encoder"]
    assert (len(stack), stack.repeats) == (1, 3)
    groups = anatomy_of(architecture.build(num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2))
    assert (len(groups.stacks["encoder"]), groups.stacks["encoder"].repeats) == (4, 2)
    layer = "encoder.albert_layer_groups.1.albert_layers.0"
    assert groups.stacks["encoder"].layers[2] == layer


def test_shared_embeddings_are_found_under_the_name_of_the_stack() -> None:
    model = ARCHITECTURES["t5"].build("language")
    model.resize_token_embeddings(110)  # after this encoder and decoder hold one and the same module
    modules = dict(model.named_modules(remove_duplicate=False))
    assert [part.module for part in anatomy_of(model).of("embeddings")] == [
        "encoder.embed_tokens",
        "decoder.embed_tokens",
    ]
    assert modules["encoder.embed_tokens"] is modules["shared"]


def test_a_model_that_is_not_like_its_family_says_what_it_lacks() -> None:
    model = ARCHITECTURES["llama"].build()
    del model.layers[0].mlp.gate_proj
    with pytest.raises(TargetError, match=r"'llama' but is not built like it: .*layers\.0 has no mlp\.gate_proj"):
        anatomy_of(model)
    model = ARCHITECTURES["bert"].build()
    del model.encoder
    with pytest.raises(TargetError, match=r"it has no encoder\.layer"):
        anatomy_of(model)


def test_family_rows_are_consistent() -> None:
    names = [family.name for family in FAMILIES]
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(set(names)) == len(names)
    assert len(set(types)) == len(types)
    assert {architecture.family for architecture in ARCHITECTURES.values()} <= set(names)
    assert all(replace(row, name="x").name == "x" for family in FAMILIES for row in family.stacks)


def test_randomize_reaches_every_parameter() -> None:
    model = ARCHITECTURES["bert"].build()
    before = {name: value.clone() for name, value in model.named_parameters()}
    randomize(model, 7)
    assert all(not torch.equal(value, before[name]) for name, value in model.named_parameters())
