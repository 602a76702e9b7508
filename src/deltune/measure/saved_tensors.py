"""What a forward pass keeps for its backward pass, counted tensor by tensor.

Memory of a whole process hides behind weights and allocators; this count is exact, the same on every machine, and
says which tensors they are.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["SavedTensors"]


class SavedTensors:
    """Context manager that notes every tensor that autograd keeps in the block inside it.

    Each storage counts once, however many tensors are views of it, and at its full size, because all of it stays.
    Weights are there anyway: give them as ``besides`` to leave them out.

    Args:
        besides: tensors that do not count.

    Attributes:
        tensors: every tensor that was kept, in order, those of ``besides`` left out.

    Example:
        >>> import torch
        >>> x, w = torch.ones(10, 20), torch.ones(20, 5, requires_grad=True)
        >>> with SavedTensors(besides=[w]) as saved:
        ...     y = x @ w
        >>> saved.bytes  # x, in float32
        800
    """

    def __init__(self, besides: Iterable[Tensor] = ()) -> None:
        self.tensors: list[Tensor] = []
        self._besides = {_storage(tensor) for tensor in besides}
        self._hooks: Any = None

    def __enter__(self) -> SavedTensors:
        import torch

        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, traceback)

    @property
    def bytes(self) -> int:
        """Size of all that was kept."""
        sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in self.tensors}
        return sum(sizes.values())

    def holds(self, tensor: Tensor) -> bool:
        """Whether the storage of ``tensor`` was kept."""
        return any(_storage(kept) == _storage(tensor) for kept in self.tensors)

    def _pack(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._besides:
            self.tensors.append(tensor)
        return tensor


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _unpack(tensor: Tensor) -> Tensor:
    return tensor
