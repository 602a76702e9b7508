"""What the rows say, against what models compute: fused rows, attention functions, results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.pytorch_utils import Conv1D

from deltune.backbone import Anatomy, Part, anatomy_of
from tests.backbone.recording import NAMES, attention_calls, example, first_tensor, inputs_of, run
from tests.zoo import ARCHITECTURES

DISPATCHING = [name for name in NAMES if ARCHITECTURES[name].dispatches]
#: Query and key have a norm between the matrix and the attention function.
NORMED = {"qwen3"}
#: Norms that read a sublayer's output, not the residual stream.
SANDWICHED = {"gemma2": ("post_attention_layernorm", "post_feedforward_layernorm")}
#: What queries are multiplied with before the attention function, by head width.
QUERY_SCALES: dict[str, Callable[[int], float]] = {"whisper": lambda width: width**-0.5}


def expected(model: nn.Module, part: Part, states: Tensor, head_dim: int) -> Tensor:
    """What the rows of ``part`` make of ``states``: (rows, heads, positions, head width)."""
    module: Any = model.get_submodule(part.module)
    weight = module.weight.T if isinstance(module, Conv1D) else module.weight
    bias = module.bias if module.bias is not None else weight.new_zeros(weight.shape[0])
    if part.rows is not None:
        weight = part.rows.view(weight, 0).reshape(part.rows.size, -1)
        bias = part.rows.view(bias, 0).reshape(part.rows.size)
    made = states @ weight.T + bias
    return made.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def parts_of(anatomy: Anatomy, block: Part) -> dict[str, Part]:
    """Query, key and value of one attention block."""
    return {
        role: part
        for role in ("query", "key", "value")
        for part in anatomy.of(f"attention.{role}", block.stack)
        if part.layer == block.layer
    }


@pytest.mark.parametrize("name", DISPATCHING)
def test_queries_keys_and_values_are_those_rows(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.heads[0])
    anatomy = anatomy_of(model)
    matrices = {part.module for part in anatomy if part.role in ("attention.query", "attention.key", "attention.value")}
    with torch.no_grad(), inputs_of(model, matrices) as inputs, attention_calls(model) as calls:
        run(architecture, model)
        given = {module: states for module, *states in calls}
        for block in anatomy.of("attention"):
            assert block.dispatches
            assert block.attention is not None
            states = dict(zip(("query", "key", "value"), given[model.get_submodule(block.module)], strict=True))
            heads = {"query": block.attention.heads}
            for role, part in parts_of(anatomy, block).items():
                made = expected(model, part, inputs[part.module][-1], block.attention.head_dim)
                assert made.shape[1] == heads.get(role, block.attention.key_value_heads)
                if role == "query" and name in QUERY_SCALES:
                    made = made * QUERY_SCALES[name](block.attention.head_dim)
                if role == "value":
                    torch.testing.assert_close(states[role], made)
                elif name not in NORMED:  # rotation leaves position 0 as it is
                    torch.testing.assert_close(states[role][:, :, 0], made[:, :, 0])


@pytest.mark.parametrize("name", NAMES)
def test_exactly_the_blocks_marked_so_call_the_attention_interface(name: str) -> None:
    architecture = ARCHITECTURES[name]
    model = architecture.build(architecture.heads[0])
    marked = {model.get_submodule(part.module) for part in anatomy_of(model).of("attention") if part.dispatches}
    assert bool(marked) == architecture.dispatches
    if not marked:
        return
    with attention_calls(model) as calls:
        run(architecture, model)
        assert {module for module, *_ in calls} == marked


class Products(TorchFunctionMode):
    """Records the operands of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.operands: list[tuple[Tensor, Tensor]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.matmul, torch.bmm):
            self.operands.append((args[0], args[1]))
        return func(*args, **(kwargs or {}))


def products_in(module: nn.Module, forward: Callable[[], Any]) -> list[tuple[Tensor, Tensor]]:
    """The operands of all matrix products that a module makes while the model runs."""
    products = Products()

    def enter(module: nn.Module, args: Any) -> None:
        products.__enter__()

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        products.__exit__(None, None, None)

    handles = [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    forward()
    for handle in handles:
        handle.remove()
    return products.operands


@pytest.mark.parametrize("name", ["deberta-v2", "blip", "blip-caption"])
def test_products_of_attention_that_does_not_dispatch(name: str) -> None:
    architecture, model, anatomy = example(name)
    matrices = {part.module for part in anatomy if part.role.startswith("attention.")}
    for block in anatomy.of("attention"):
        assert not block.dispatches
        assert block.attention is not None
        with torch.no_grad(), inputs_of(model, matrices) as inputs:
            operands = products_in(model.get_submodule(block.module), lambda: run(architecture, model))
        parts = parts_of(anatomy, block)
        # DeBERTa's query and key matrices also map relative positions, after the states themselves
        made = {
            role: expected(model, part, inputs[part.module][0], block.attention.head_dim).detach()
            for role, part in parts.items()
        }
        torch.testing.assert_close(operands[0][0].reshape(made["query"].shape), made["query"])
        keys = operands[0][1].transpose(-1, -2).reshape(made["key"].shape)
        ratio = (keys / made["key"]).mean()
        torch.testing.assert_close(keys, made["key"] * ratio, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(operands[-1][1].reshape(made["value"].shape), made["value"])


def residual_points(model: Any, anatomy: Anatomy) -> tuple[list[Tensor], list[Any]]:
    """Records what every norm reads and every layer returns, in the order of the forward pass."""
    points: list[Tensor] = []
    handles = []
    for part in anatomy:
        module = model.get_submodule(part.module)
        if part.module.endswith(SANDWICHED.get(anatomy.family, ())):
            continue
        if part.role == "norm":
            handles.append(
                module.register_forward_pre_hook(
                    lambda module, args, kwargs: points.append(args[0] if args else kwargs["hidden_states"]),
                    with_kwargs=True,
                )
            )
        elif part.role == "layer":
            handles.append(
                module.register_forward_hook(lambda module, args, output: points.append(first_tensor(output)))
            )
    return points, handles


@pytest.mark.parametrize("name", NAMES)
def test_what_is_added_to_a_result_is_added_to_the_residual_stream(name: str) -> None:
    architecture, model, anatomy = example(name)
    points, handles = residual_points(model, anatomy)
    run(architecture, model)
    before = [point.clone() for point in points]
    for part in (*anatomy.of("attention"), *anatomy.of("ffn")):
        assert part.result is not None
        stack = anatomy.stack_of(part)
        constant = torch.linspace(-1, 1, stack.hidden_size)
        calls: list[Any] = []

        def add(
            module: nn.Module, args: Any, output: Any, constant: Tensor = constant, calls: list[Any] = calls
        ) -> Any:
            assert isinstance(output, Tensor)
            calls.append(module)
            return output + constant

        points.clear()
        handle = model.get_submodule(part.result).register_forward_hook(add)
        run(architecture, model)
        handle.remove()
        assert len(calls) == stack.repeats, "a module that runs twice gives the result of no one sublayer"
        changed = next(
            after - point for point, after in zip(before, points, strict=True) if not torch.equal(point, after)
        )
        torch.testing.assert_close(changed, constant.expand_as(changed), rtol=1e-4, atol=1e-4)
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("name", NAMES)
def test_the_block_of_a_feed_forward_sublayer_gets_what_its_matrices_get(name: str) -> None:
    architecture, model, anatomy = example(name)
    blocks = [part for part in anatomy.of("ffn") if part.module not in anatomy.stack_of(part).layers]
    ups = {(part.stack, part.layer): part.module for part in anatomy.of("ffn.up")}
    names = {part.module for part in blocks} | set(ups.values())
    with inputs_of(model, names) as inputs:
        run(architecture, model)
    for part in blocks:
        torch.testing.assert_close(inputs[part.module][0], inputs[ups[part.stack, part.layer]][0])


@pytest.mark.parametrize("name", NAMES)
def test_the_gate_is_the_half_that_is_activated(name: str) -> None:
    architecture, model, anatomy = example(name)
    for part in anatomy.of("ffn.gate"):
        layer = anatomy.stack_of(part).layers[part.layer or 0]
        activations = [
            f"{layer}.{path}"
            for path, module in model.get_submodule(layer).named_modules()
            if "act" in path.rsplit(".", 1)[-1]
        ]
        (activation,) = activations
        with torch.no_grad(), inputs_of(model, {activation, part.module}) as inputs:
            run(architecture, model)
            module = model.get_submodule(part.module)
            made = module(inputs[part.module][0])
            gate = made if part.rows is None else part.rows.view(made, -1)
        torch.testing.assert_close(inputs[activation][0], gate)
