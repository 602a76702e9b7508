"""Several attachments in one pass: a task head for each row of a batch, and each row for several tasks.

Letters: B rows of a batch, T tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from deltune.attachment import BANK, Attachment, Bank
from deltune.backbone import Anatomy
from deltune.errors import StateError
from deltune.sites import Control
from deltune.sites.base import rows_of

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_Arguments = tuple[tuple[Any, ...], dict[str, Any]]

__all__ = ["RoutedHead", "remove_routed_heads", "repeated_per_task", "routed_heads"]


class RoutedHead:
    """After a task head: its result again, of each attachment's rows, with that attachment's own values."""

    def __init__(self, control: Control, heads: Mapping[str, nn.Module]) -> None:
        self.control = control
        self.heads = dict(heads)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Replace the rows that belong to an attachment."""
        like = args[0] if args else next(value for value in kwargs.values() if isinstance(value, Tensor))
        batch = like.shape[0]
        places, results = [], []
        for name, head in self.heads.items():
            rows = self.control.routed.rows(name, batch, like.device)
            if rows is None:
                whole: Tensor = head(*args, **kwargs)
                return whole
            if rows.numel():
                places.append(rows)
                results.append(
                    head(
                        *(_taken(value, rows, batch) for value in args),
                        **{key: _taken(value, rows, batch) for key, value in kwargs.items()},
                    )
                )
        return output.index_copy(0, torch.cat(places), torch.cat(results)) if places else output


def routed_heads(
    model: nn.Module, anatomy: Anatomy, control: Control, attachments: Sequence[Attachment]
) -> Iterator[RemovableHandle]:
    """Put a :class:`RoutedHead` on every task head of which an attachment has its own values.

    The heads of the attachments are submodules of the model's bank, so that they move and change their mode with it.
    """
    for name in anatomy.head:
        module = model.get_submodule(name)
        heads = {}
        for attachment in attachments:
            values = {key: value for key, value in attachment.selection if key.startswith(f"{name}.")}
            if values:
                heads[attachment.name] = _with_values(module, name, values)
        if heads:
            bank = model._modules.setdefault(BANK, Bank())
            assert bank is not None
            for owner, head in heads.items():
                if owner not in bank._modules:
                    bank.add_module(owner, Bank())
                bank.get_submodule(owner).add_module(f"head_{name.replace('.', '_')}", head)
            yield module.register_forward_hook(RoutedHead(control, heads), with_kwargs=True)


def remove_routed_heads(model: nn.Module, names: Iterable[str]) -> None:
    """Undo what :func:`routed_heads` added to the bank for the attachments of these names."""
    bank = model._modules.get(BANK)
    if bank is None:
        return
    for name in names:
        owner = bank._modules.get(name)
        if owner is None:
            continue
        for key in [key for key in owner._modules if key.startswith("head_")]:
            del owner._modules[key]
        if not owner._modules:
            del bank._modules[name]
    if not bank._modules:
        del model._modules[BANK]


@dataclass
class _RepeatBatch:
    """Before the model: every argument that has a row for each of the batch, once for each task, tasks outermost."""

    tasks: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim()]
        batch = tensors[0].shape[0] if tensors else 0

        def repeated(value: Tensor) -> Tensor:
            return value.repeat(self.tasks, *(1,) * (value.dim() - 1)) if value.shape[0] == batch else value

        return _mapped(repeated, args), {key: _mapped(repeated, value) for key, value in kwargs.items()}


@dataclass
class _OneTask:
    """Before a layer in which nothing acts: the rows of one task, since all tasks have the same.

    The first layer gets the hidden states of all tasks, the others those that it left.
    """

    tasks: int
    first: bool

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        hidden = args[0] if args else kwargs["hidden_states"]
        batch = hidden.shape[0] // self.tasks if self.first else hidden.shape[0]

        def narrowed(value: Tensor) -> Tensor:
            return value[:batch] if value.dim() > 1 and value.shape[0] == self.tasks * batch else value

        return _mapped(narrowed, args), {key: _mapped(narrowed, value) for key, value in kwargs.items()}


@dataclass
class _EveryTask:
    """Before the lowest layer in which something acts: the hidden states of one task, once for each."""

    tasks: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments:
        if args:
            return (args[0].repeat(self.tasks, 1, 1), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].repeat(self.tasks, 1, 1)}


def _mapped(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """``value`` with ``function`` applied to its tensors that have a first dimension."""
    if isinstance(value, tuple | list):
        return type(value)(_mapped(function, item) for item in value)
    return function(value) if isinstance(value, Tensor) and value.dim() else value


@contextmanager
def repeated_per_task(
    model: nn.Module, anatomy: Anatomy, attachments: Sequence[Attachment], dropped: int = 0
) -> Iterator[None]:
    """Inside the block a batch of B rows becomes T x B rows, those of the first task first.

    Layers below the lowest one in which an attachment acts run once.

    Args:
        model: the model.
        anatomy: its parts.
        attachments: one for each task.
        dropped: number of the lowest layers in which nothing acts.

    Raises:
        StateError: if the model has several stacks, of which one reads the other, or an attachment acts before the
            layers.
    """
    if len(anatomy.stacks) != 1:
        raise StateError(
            "One pass for several tasks is possible in models with one stack of layers; this one has "
            f"{', '.join(anatomy.stacks) or 'none that is known'}. Repeat the batch yourself and route its rows."
        )
    (stack,) = anatomy.stacks.values()
    acting = [site.part for attachment in attachments for _, site, _ in attachment.sites]
    outside = next((part for part in acting if part.layer is None), None)
    if outside is not None:
        raise StateError(
            f"An attachment acts at {outside.key}, before the layers, so that tasks share nothing. Repeat the batch "
            "yourself and route its rows."
        )
    lowest = min(
        (part.layer for part in acting if part.layer is not None and part.layer >= dropped), default=len(stack) - 1
    )
    if stack.repeats > 1:
        raise StateError("One pass for several tasks is not possible in a model that applies a layer several times.")
    tasks = len(attachments)
    hooks: list[tuple[nn.Module, Any]] = [(model, _RepeatBatch(tasks))]
    layers = [model.get_submodule(name) for name in stack.layers]
    if lowest:
        hooks += [(layer, _OneTask(tasks, first=index == 0)) for index, layer in enumerate(layers[:lowest])]
        hooks.append((layers[lowest], _EveryTask(tasks)))
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _with_values(module: nn.Module, name: str, values: Mapping[str, nn.Parameter]) -> nn.Module:
    """A copy of a head that has these values, by full name; they themselves are not copied."""
    known: dict[int, Any] = {}
    for key, value in values.items():
        like = module.get_parameter(key.removeprefix(f"{name}."))
        if (value.device, value.dtype) != (like.device, like.dtype):
            value.data = value.data.to(like.device, like.dtype)  # the model was moved while it was off
        known[id(like)] = value
    return copy.deepcopy(module, known)


def _taken(value: Any, rows: Tensor, batch: int) -> Any:
    """These rows of an argument that has a row for each of the batch."""
    return rows_of(value, rows) if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch else value
