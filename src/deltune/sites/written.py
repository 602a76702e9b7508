"""When values that stand in a model's own parameters are written anew: as soon as what they are made of has changed.

That is seen before the model, or a part of it, is called and before its state is read, and after a step of an
optimizer; what a model loads may be its own values or those of what they are made of.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Writer", "versions_of"]


class Writer(ABC):
    """Writes values into the parameters of one model, for as long as it watches that model."""

    @abstractmethod
    def refresh(self, stepped: bool = False) -> None:
        """Write what has changed since it was last written.

        Args:
            stepped: whether an optimizer took a step; fused ones do not count up a tensor's version.
        """

    @abstractmethod
    def trained(self) -> Iterator[Tensor]:
        """What the written values are made of, as far as it trains."""

    @abstractmethod
    def before_loading(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """The model is about to load ``state``."""

    @abstractmethod
    def after_loading(self) -> None:
        """It has."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Refresh, if ``optimizer`` trains what the written values are made of."""
        ours = {id(value) for value in self.trained()}
        if any(id(value) in ours for group in optimizer.param_groups for value in group["params"]):
            self.refresh(stepped=True)

    def watch(self, modules: Mapping[str, nn.Module], calls: Iterable[str]) -> list[RemovableHandle]:
        """Hook the model.

        Args:
            modules: the model's, by dotted name.
            calls: those that may be called by themselves, the model ("") among them.
        """
        handles = [modules[name].register_forward_pre_hook(Refresh(self)) for name in calls]
        model: Any = modules[""]
        handles.append(model.register_state_dict_pre_hook(Refresh(self)))
        handles.append(model.register_load_state_dict_pre_hook(_BeforeLoading(self)))
        handles.append(model.register_load_state_dict_post_hook(_AfterLoading(self)))
        return handles

    def follow_steps(self) -> None:
        """Refresh after each step that changes what is trained: whoever reads the parameters then finds them so."""
        _following.add(self)

    def stop_following(self) -> None:
        """Undo :meth:`follow_steps`."""
        _following.discard(self)


def versions_of(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """By which it is seen that one of the tensors was written to, or replaced."""
    # those made in inference mode have no version, and cannot be written to outside of it
    return [(id(tensor), 0 if tensor.is_inference() else tensor._version) for tensor in tensors]


@dataclass
class Refresh:
    """Before the model, or what reads its parameters: they hold what the forms say."""

    writer: Writer

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Refresh."""
        _refresh(self.writer)


#: Writers that follow optimizers, as long as somebody has them.
_following: weakref.WeakSet[Writer] = weakref.WeakSet()


def _after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """After a step of any optimizer."""
    for writer in list(_following):
        writer.after_step(optimizer)


# once for all: PyTorch goes through its hooks when a step ends, and none may come or go meanwhile
register_optimizer_step_post_hook(_after_step)


@dataclass
class _BeforeLoading:
    """Before the model takes a state."""

    writer: Writer

    def __call__(self, module: nn.Module, state: Mapping[str, Any], prefix: str = "", *args: Any) -> None:
        # a model that is part of another one finds its values under a prefix
        own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        self.writer.before_loading(module, own)


@dataclass
class _AfterLoading:
    """After the model has taken a state."""

    writer: Writer

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.writer.after_loading()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refresh(writer: Writer) -> None:
    writer.refresh()
