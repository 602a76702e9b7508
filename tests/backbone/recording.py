"""What the tests of the backbone have in common: models, and records of what happens in them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from deltune.backbone import Anatomy, anatomy_of
from tests.zoo import ARCHITECTURES, Architecture, Head

CASES = [(name, head) for name, architecture in ARCHITECTURES.items() for head in architecture.heads]
NAMES = list(ARCHITECTURES)

IMPLEMENTATION = "backbone_test_recorder"
_CALLS: list[tuple[nn.Module, Tensor, Tensor, Tensor]] = []


def _record(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    _CALLS.append((module, query, key, value))
    return query.transpose(1, 2).contiguous(), None


AttentionInterface.register(IMPLEMENTATION, _record)


@contextmanager
def attention_calls(model: Any) -> Iterator[list[tuple[nn.Module, Tensor, Tensor, Tensor]]]:
    """Every call of the attention interface in a model: the module and the query, key and value it gives."""
    model.set_attn_implementation(IMPLEMENTATION)
    _CALLS.clear()
    yield _CALLS


@cache
def example(name: str, head: Head | None = None) -> tuple[Architecture, Any, Anatomy]:
    """An architecture, one of its models (which no test may change) and its anatomy."""
    architecture = ARCHITECTURES[name]
    model = architecture.build(head or architecture.heads[0])
    return architecture, model, anatomy_of(model)


def run(architecture: Architecture, model: Any, **sizes: Any) -> Any:
    """The outputs of a model for a batch."""
    head = next(head for head, cls in architecture.classes.items() if cls == type(model).__name__)
    with torch.no_grad():
        return model(**architecture.batch(head=head, **sizes))


def first_tensor(output: Any) -> Tensor:
    """The tensor that a module returns, alone or first of several."""
    return output if isinstance(output, Tensor) else next(iter(output.values() if isinstance(output, dict) else output))


@contextmanager
def inputs_of(model: nn.Module, names: set[str]) -> Iterator[dict[str, list[Tensor]]]:
    """The first input of every call of some modules, by name."""
    inputs: dict[str, list[Tensor]] = defaultdict(list)
    handles = []
    for name in names:

        def hook(module: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
            inputs[name].append(args[0] if args else next(iter(kwargs.values())))

        handles.append(model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True))
    yield inputs
    for handle in handles:
        handle.remove()
