"""Target expressions: reading, writing, selecting, and what they say when they select nothing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltune.backbone import PROJECTION_ROLES, ROLES, Targets
from deltune.errors import TargetError
from tests.backbone.recording import example

SIGNED = st.integers(-12, 12)
BOUND = st.one_of(st.just(""), SIGNED.map(str))
STEP = st.one_of(st.just(""), st.just(":"), SIGNED.filter(bool).map(lambda step: f":{step}"))
SLICES = st.builds("{}:{}{}".format, BOUND, BOUND, STEP)
LAYERS = st.lists(st.one_of(SIGNED.map(str), SLICES), max_size=3, unique=True).map(tuple)
NAME = st.text("abc*._[]?0", min_size=1, max_size=8)
TARGETS = st.builds(
    Targets,
    st.lists(st.one_of(st.sampled_from(list(ROLES)), NAME), min_size=1, max_size=3, unique=True).map(tuple),
    LAYERS,
    st.lists(st.sampled_from(["encoder", "decoder", "cross"]), max_size=2, unique=True).map(tuple),
)


def select(name: str, expression: str, roles: tuple[str, ...] = (), modules: bool = True) -> list[str]:
    _, model, anatomy = example(name)
    names = [module for module, _ in model.named_modules()] if modules else []
    return [part.key for part in Targets.parse(expression).select(anatomy, names, roles)]


@given(TARGETS)
def test_what_is_written_is_read_back(targets: Targets) -> None:
    assert Targets.parse(str(targets)) == targets
    assert Targets.parse(targets) is targets


@given(LAYERS.filter(bool))
def test_layers_are_those_of_python(layers: tuple[str, ...]) -> None:
    count = 3
    expected = set()
    for piece in layers:
        if ":" in piece:
            bounds = [int(bound) if bound else None for bound in piece.split(":")]
            chosen = list(range(count))[slice(*bounds)]
        else:
            chosen = [layer for layer in range(count) if int(piece) in (layer, layer - count)]
        if not chosen:
            with pytest.raises(TargetError, match="selects no layer"):
                select("bert", f"layer layers={','.join(layers)}")
            return
        expected |= set(chosen)
    assert select("bert", f"layer layers={','.join(layers)}") == [
        f"encoder.{layer}.layer" for layer in sorted(expected)
    ]


def test_sequences_may_hold_clauses() -> None:
    assert Targets.parse(["ffn.up", "ffn.down layers=0"]) == Targets(("ffn.up", "ffn.down"), ("0",))
    assert Targets.parse(" ffn.up; layer=0,1 ;stack=decoder") == Targets(("ffn.up",), ("0", "1"), ("decoder",))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("", "names no role"),
        ("layers=1", "names no role"),
        ("ffn layers=", "selects no layer"),
        ("ffn layers=one", "no selection of layers"),
        ("ffn layers=1.5", "no selection of layers"),
        ("ffn layers=-:", "no selection of layers"),
        ("ffn layers=::0", "no selection of layers"),
        ("ffn layers=1:2:3:4", "no selection of layers"),
        ("ffn stacks=", "selects no stack"),
        ("ffn layrs=1", "no clause 'layrs'.*'layers'"),
    ],
)
def test_malformed_expressions(expression: str, message: str) -> None:
    with pytest.raises(TargetError, match=message):
        Targets.parse(expression)


def test_layers_end_before_zero() -> None:
    assert select("bert", "layer layers=-3:2") == ["encoder.0.layer", "encoder.1.layer"]
    with pytest.raises(TargetError, match=r"layers=4:0 selects no layer: encoder has layers 0 to 2"):
        select("bert", "layer layers=4:0")


def test_globs_select_among_the_roles_of_the_method() -> None:
    everything = select("llama", "*")
    assert {key.split(".", 2)[-1] for key in everything if key.startswith("decoder.0.")} >= set(PROJECTION_ROLES)
    assert select("llama", "ffn.* layers=0", PROJECTION_ROLES) == [
        "decoder.0.ffn.up",
        "decoder.0.ffn.gate",
        "decoder.0.ffn.down",
    ]
    assert select("llama", "* layers=1", ("attention", "ffn")) == ["decoder.1.attention", "decoder.1.ffn"]


def test_several_stacks() -> None:
    assert len(select("t5", "attention.query")) == 3 + 2 + 2
    assert select("t5", "attention.query stacks=cross,decoder layers=-1") == [
        "decoder.1.attention.query",
        "cross.1.attention.query",
    ]
    assert select("t5", "ffn layers=2") == ["encoder.2.ffn"]


def test_module_patterns_alone_and_mixed_with_roles() -> None:
    assert select("llama", "q_proj layers=0,-1") == ["layers.0.self_attn.q_proj", "layers.2.self_attn.q_proj"]
    assert select("llama", "layers.1*.k_proj") == ["layers.1.self_attn.k_proj"]
    assert select("llama", "ffn,*.v_proj layers=1") == ["decoder.1.ffn", "layers.1.self_attn.v_proj"]
    assert select("t5", "EncDecAttention.q stacks=decoder") == [
        f"decoder.block.{index}.layer.1.EncDecAttention.q" for index in (0, 1)
    ]


def test_nothing_is_selected_twice() -> None:
    once = select("bert", "attention.query")
    assert select("bert", "attention.query,attention.q*,attention.query") == once


@pytest.mark.parametrize(
    ("name", "expression", "roles", "message"),
    [
        ("bert", "ffn.gate", (), "has no role 'ffn.gate'.*ffn.up"),
        ("bert", "atention.query", (), "matches no role and no module.*'attention.query'"),
        ("bert", "attention.query", ("ffn", "attention"), "cannot act on the role 'attention.query'.*'attention'"),
        ("bert", "attention.*", ("ffn", "norm"), r"any role that 'attention.\*' names \(attention.query"),
        ("bert", "ffn stacks=decoder", (), "no stack 'decoder'.*'encoder'"),
        ("bert", "ffn layers=3", (), "layers=3 selects no layer: encoder has layers 0 to 2"),
        ("bert", "ffn layers=0,7", (), "layers=7 selects no layer"),
        ("bert", "embeddings layers=0", (), "outside of the layers"),
        ("t5", "ffn stacks=cross", (), "selects nothing in the stacks cross: this model has it in encoder, decoder"),
        ("t5", "ffn layers=2 stacks=decoder", (), "layers=2 selects no layer: decoder has layers 0 to 1"),
        ("t5", "EncDecAttention layers=2", (), "'EncDecAttention' selects nothing in layers 2: decoder has"),
        ("clip-image", "head stacks=vision", (), "belongs to no stack"),
    ],
)
def test_selecting_nothing_says_what_there_is(name: str, expression: str, roles: tuple[str, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        select(name, expression, roles)


def test_without_module_names_patterns_select_nothing() -> None:
    with pytest.raises(TargetError, match="matches no role and no module"):
        select("bert", "*.self.query", modules=False)
