"""Which norm stands before or after a sublayer, against what models compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deltune.backbone import Anatomy, Part, anatomy_of, describe
from deltune.backbone.families import FAMILIES
from tests.backbone.recording import CASES, NAMES, example, first_tensor, run
from tests.zoo import ARCHITECTURES, Head

SUBLAYERS = ("attention", "ffn")


def sublayers(anatomy: Anatomy) -> list[Part]:
    return [part for part in anatomy if part.role in SUBLAYERS]


def first_reader(anatomy: Anatomy, part: Part) -> str:
    """A module that reads what the sublayer starts from; DeBERTa's queries also read relative positions."""
    attention = "attention.value" if part.stack in anatomy.stacks else "attention.query"
    role = "ffn.up" if part.role == "ffn" else attention
    return next(other.module for other in anatomy.of(role, part.stack) if other.layer == part.layer)


@pytest.mark.parametrize(("name", "head"), CASES)
def test_every_sublayer_has_one_norm_before_or_after(name: str, head: Head) -> None:
    _, _, anatomy = example(name, head)
    norms = {part.module for part in anatomy.of("norm")}
    for part in sublayers(anatomy):
        assert (part.norm_before is None) != (part.norm_after is None), part.key
        # what ModernBERT has in front of its first attention is an identity, and no norm
        assert (part.norm_before or part.norm_after) in norms or part.key == "encoder.0.attention"
    assert len({part.norm_before or part.norm_after for part in sublayers(anatomy)}) == len(sublayers(anatomy))


class Recorded:
    """The last input and output of every module, in one forward pass."""

    def __init__(self, name: str, model: Any) -> None:
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        handles = []
        for path, module in model.named_modules():

            def hook(module: Any, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
                outputs = output if isinstance(output, tuple) else (output,)
                if values and isinstance(outputs[0], Tensor):
                    self.inputs[path], self.outputs[path] = values[0], first_tensor(output)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
        run(ARCHITECTURES[name], model)
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_norms_read_the_residual_stream(name: str) -> None:
    """Before: the sublayer reads the norm's output, and the layer's output is the norm's input plus the result.

    After: the norm reads the sum of the sublayer's input and its result.
    """
    _, model, anatomy = example(name)
    seen = Recorded(name, model)
    checked = 0
    for part in sublayers(anatomy):
        reader, result = first_reader(anatomy, part), part.result or part.module
        if reader not in seen.inputs:  # a stack that this class does not run
            continue
        checked += 1
        if part.norm_after is not None:
            torch.testing.assert_close(seen.inputs[part.norm_after], seen.inputs[reader] + seen.outputs[result])
            continue
        assert part.norm_before is not None
        assert part.layer is not None
        assert torch.equal(seen.outputs[part.norm_before], seen.inputs[reader]), part.key
        stream = seen.inputs[part.norm_before]
        if part.role == "attention" and part.stack in anatomy.stacks:
            layer = anatomy.stack_of(part).layers[part.layer]
            assert torch.equal(stream, seen.inputs[layer]), part.key
        if part.role == "ffn":
            total = stream + seen.outputs[result]
            if name == "gpt_neox":  # both sublayers read the layer's input
                attention = next(p for p in anatomy.of("attention", part.stack) if p.layer == part.layer)
                total = total + seen.outputs[attention.result or ""]
            torch.testing.assert_close(seen.outputs[anatomy.stack_of(part).layers[part.layer]], total)
    assert checked >= 2


def test_a_cross_attention_has_its_own_norm() -> None:
    model = ARCHITECTURES["bert"].build(is_decoder=True, add_cross_attention=True)
    (part,) = (part for part in anatomy_of(model).of("attention", "cross") if part.layer == 1)
    assert part.norm_after == "encoder.layer.1.crossattention.output.LayerNorm"


def test_a_norm_that_a_model_lacks_is_not_known() -> None:
    model = ARCHITECTURES["llama"].build()
    del model.layers[0].post_attention_layernorm
    assert [part.norm_before for part in anatomy_of(model).of("ffn")][:2] == [None, "layers.1.post_attention_layernorm"]


def test_structure_does_not_tell_where_norms_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "FAMILIES", ())
    parts = sublayers(anatomy_of(ARCHITECTURES["llama-gqa"].build()))
    assert parts
    assert all(part.norm_before is None and part.norm_after is None for part in parts)


def test_every_row_says_it() -> None:
    for family in FAMILIES:
        for stack in family.stacks:
            for row in (stack.attention, stack.ffn, *([] if stack.cross is None else [stack.cross])):
                assert (row.norm_before is None) != (row.norm_after is None), family.name
