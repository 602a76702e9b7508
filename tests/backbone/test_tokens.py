"""Where additional input positions enter and leave, and how many there may be."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from deltune.backbone import anatomy_of
from tests.backbone.recording import NAMES, example, first_tensor, run
from tests.zoo import ARCHITECTURES


@pytest.mark.parametrize("name", NAMES)
def test_the_entry_gets_the_input_and_the_exit_returns_every_position(name: str) -> None:
    architecture, model, anatomy = example(name)
    for stack in anatomy.stacks.values():
        tokens = stack.tokens
        if (name, stack.name) == ("whisper", "encoder"):
            assert tokens is None
            continue
        assert tokens is not None
        entry = model.get_submodule(tokens.entry)
        names = tuple(inspect.signature(entry.forward).parameters)
        given: dict[str, Any] = {}
        left: list[Any] = []

        def enter(module: Any, args: Any, kwargs: Any, names: Any = names, given: Any = given) -> None:
            given.update(dict(zip(names, args, strict=False)) | kwargs)

        handles = [entry.register_forward_pre_hook(enter, with_kwargs=True)]
        leaving = tokens.exit if tokens.exit is not None else tokens.entry
        handles.append(
            model.get_submodule(leaving).register_forward_hook(lambda _m, _a, out, left=left: left.append(out))
        )
        if tokens.embeddings is None:
            assert "inputs_embeds" in names
        else:
            made: list[Any] = []
            handles.append(
                model.get_submodule(tokens.embeddings).register_forward_hook(
                    lambda _m, _a, out, made=made: made.append(first_tensor(out))
                )
            )
        run(architecture, model)
        for handle in handles:
            handle.remove()
        length = given["input_ids"].shape[1] if "input_ids" in given else 5
        assert {"input_ids", "pixel_values"} & set(given)
        assert len(left) == 1
        assert first_tensor(left[0]).shape[1:] == (length, stack.hidden_size)
        if tokens.embeddings is not None:
            assert made[0].shape[1:] == (length, tokens.width)


@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart"])
def test_the_positions_of_an_encoder_stay_where_a_decoder_reads_them(name: str) -> None:
    architecture, model, anatomy = example(name)
    tokens = anatomy.stacks["encoder"].tokens
    assert tokens is not None
    assert (tokens.exit, tokens.reader) == (None, "decoder")
    given: dict[str, Any] = {}
    handle = model.get_submodule("decoder").register_forward_pre_hook(
        lambda _m, _a, kwargs: given.update(kwargs), with_kwargs=True
    )
    run(architecture, model, padding="right")
    handle.remove()
    assert given["encoder_attention_mask"].shape == given["encoder_hidden_states"].shape[:2]


def test_the_positions_of_an_encoder_alone_leave_it() -> None:
    import transformers

    model = transformers.T5EncoderModel(ARCHITECTURES["t5"].configuration())
    tokens = anatomy_of(model).stacks["encoder"].tokens
    assert tokens is not None
    assert (tokens.entry, tokens.exit, tokens.reader) == ("encoder", "encoder", None)


LEARNED = {
    **dict.fromkeys(("bert", "distilbert", "electra", "albert", "gpt2"), 64),
    "roberta": 62,
    "bart": 64,
    "whisper": 64,
    "blip": 64,
    "blip-caption": 64,
}


@pytest.mark.parametrize("name", NAMES)
def test_positions_end_where_the_table_does(name: str) -> None:
    architecture, model, anatomy = example(name)
    stacks = [stack for stack in anatomy.stacks.values() if stack.tokens and not stack.tokens.embeddings]
    for stack in stacks:
        assert stack.tokens is not None
        assert stack.tokens.positions == LEARNED.get(name)
    if not stacks or name == "whisper":
        return
    longest = LEARNED.get(name)
    with torch.no_grad():
        model(**architecture.batch(1, longest or 80))
        if longest is not None:
            with pytest.raises((IndexError, RuntimeError)):
                model(**architecture.batch(1, longest + 1))


def test_deberta_with_absolute_positions_has_a_table() -> None:
    model = ARCHITECTURES["deberta-v2"].build(position_biased_input=True)
    tokens = anatomy_of(model).stacks["encoder"].tokens
    assert tokens is not None
    assert tokens.positions == 64


@pytest.mark.parametrize(("name", "width"), [("albert", 20), ("electra", 20), ("bert", 32), ("t5", 32)])
def test_the_width_of_an_input_position(name: str, width: int) -> None:
    for stack in example(name)[2].stacks.values():
        assert stack.tokens is not None
        assert stack.tokens.width == width


def test_roberta_counts_positions_after_its_padding_id() -> None:
    tokens = example("roberta")[2].stacks["encoder"].tokens
    assert tokens is not None
    assert tokens.padding_offset == 2


@pytest.mark.parametrize(
    ("name", "exit_module"),
    [
        ("bert", "bert.encoder"),
        ("roberta", "roberta.encoder"),
        ("distilbert", "distilbert.transformer"),
        ("llama", "model"),
        ("gpt2", "transformer"),
        ("vit", "vit.layernorm"),
    ],
)
def test_names_include_the_base_model(name: str, exit_module: str) -> None:
    anatomy = example(name, "classification")[2]
    (stack,) = anatomy.stacks.values()
    assert stack.tokens is not None
    assert stack.tokens.exit == exit_module
