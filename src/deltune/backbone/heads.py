"""Which modules of a model are its task head, and which its language-model head."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

__all__ = ["heads_of"]

#: Names of task heads in classes that keep the pretrained stacks beside the head instead of in a base model.
_TASK_HEADS = frozenset({"classifier", "classification_head", "score", "qa_outputs", "projector"})


def heads_of(model: nn.Module, pretrained: Collection[str] = ()) -> tuple[tuple[str, ...], str | None]:
    """The task head's modules, and the language-model head, of a transformers model.

    A task head is what a task class adds to the pretrained model and what is therefore new. A model that
    maps hidden states to the vocabulary has none: all that such a class adds was pretrained with it.

    Args:
        model: a transformers model.
        pretrained: names of modules beside the base model that are pretrained although a task class has them.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    output = None if getter is None else getter()
    if output is not None:
        return (), next((name for name, module in model.named_modules() if module is output), None)
    base = getattr(model, "base_model", model)
    task = [
        name
        for name, child in model.named_children()
        if child is not base
        and name not in pretrained
        and (base is not model or name in _TASK_HEADS)
        and next(child.parameters(), None) is not None
    ]
    return tuple(task), None
