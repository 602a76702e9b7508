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

    _step: RemovableHandle | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a copy follows optimizers by a hook of its own
        return {**vars(self), "_step": None}

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
        if self._step is None:
            self._step = register_optimizer_step_post_hook(_AfterStep(weakref.ref(self)))
            weakref.finalize(self, self._step.remove)

    def stop_following(self) -> None:
        """Undo :meth:`follow_steps`."""
        if self._step is not None:
            self._step.remove()
            self._step = None


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


@dataclass
class _AfterStep:
    """After a step of any optimizer.

    PyTorch holds this for all optimizers; it must not keep a model alive that nobody else has any more.
    """

    writer: weakref.ref[Writer]

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        writer = self.writer()
        if writer is not None:
            writer.after_step(optimizer)


@dataclass
class _BeforeLoading:
    """Before the model takes a state."""

    writer: Writer

    def __call__(self, module: nn.Module, state: Mapping[str, Any], *args: Any) -> None:
        self.writer.before_loading(module, state)


@dataclass
class _AfterLoading:
    """After the model has taken a state."""

    writer: Writer

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        self.writer.after_loading()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _refresh(writer: Writer) -> None:
    writer.refresh()
