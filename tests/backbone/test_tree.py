"""The tree of roles that the command line prints."""

from __future__ import annotations

import subprocess
import sys
from io import StringIO

import pytest
from rich.console import Console

from deltune.backbone import Targets, render_tree
from tests.backbone.recording import CASES, example
from tests.zoo import Head


def rendered(name: str, targets: str = "", head: Head | None = None) -> str:
    _, model, anatomy = example(name, head)
    modules = [module for module, _ in model.named_modules()]
    selected = Targets.parse(targets).select(anatomy, modules) if targets else ()
    console = Console(file=StringIO(), width=160)
    console.print(render_tree(anatomy, model, selected))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_model_has_a_tree(name: str, head: Head) -> None:
    _, _, anatomy = example(name, head)
    text = rendered(name, head=head)
    assert anatomy.family in text
    assert all(f"{stack.name}: {len(stack)} layer" in text for stack in anatomy.stacks.values())
    assert all(role in text for role in anatomy.roles if role not in ("layer", "head"))
    assert "selected" not in text


def test_layers_that_look_the_same_are_one_range() -> None:
    text = rendered("llama")
    assert "layers 0-2" in text
    assert text.count("attention.query") == 1
    text = rendered("llama", "attention.query layers=0")
    assert "layer 0" in text
    assert "layers 1-2" in text
    assert text.count("● attention.query") == 1
    assert "1 part selected, 1,024 parameters" in text


def test_shapes_are_outputs_by_inputs() -> None:
    text = rendered("gpt2")
    assert "ffn.up  128 x 32  mlp.c_fc" in text
    assert "attention.key  32 x 32 (rows 32-63 of 96)  attn.c_attn" in text
    assert "attention.key  16 x 32 (rows 32-47 of 64)  self_attn.qkv_proj" in rendered("phi3")
    assert "4 heads of 8, 2 key/value heads" in rendered("phi3")
    assert "32 x 32 (4 blocks of 8 rows from 16, one every 24)" in rendered("gpt_neox")


def test_heads_and_repeats_are_shown() -> None:
    assert "applied 3 times" in rendered("albert")
    text = rendered("distilbert", head="classification")
    assert "pre_classifier" in text
    assert "language-model head  100 x 32  lm_head" in rendered("llama", head="language")


def test_cross_attention_is_inside_the_decoder() -> None:
    text = rendered("bart", "attention.query stacks=cross")
    assert "● cross: attention.query  32 x 32  encoder_attn.q_proj" in text
    assert "3 parts selected, 3,072 parameters" in text


def test_modules_chosen_by_name_are_shown_together() -> None:
    text = rendered("llama", "*.k_proj,norm layers=1:")
    assert "● layers.*.self_attn.k_proj (2 modules)  32 x 32" in text
    assert "6 parts selected" in text
    assert "● layers 0-2" not in rendered("llama", "ffn")
    assert "● layers 0-2" in rendered("llama", "layer")


def test_rich_is_imported_when_a_tree_is_made_only() -> None:
    code = "import sys, deltune.backbone.tree as t; sys.exit('rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
