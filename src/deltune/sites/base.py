"""The vocabulary of all sites: insertion, form, control, tap.

A *site* is a place of one model where a method acts. A *form* is the module that computes the change there
and knows nothing about models. A *tap* is the mechanism that joins the two: the only thing that touches the
model's modules. A *control*, shared by all taps of a model, says which attachments are live.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from deltune.backbone import Part
from deltune.errors import StateError

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Control", "Form", "Insertion", "Site", "Tap"]


class Insertion(str, Enum):
    """What a form reads and what it changes."""

    WEIGHT = "weight"
    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    KEY_VALUE = "key_value"
    TOKENS = "tokens"
    REPLACE = "replace"
    SELECT = "select"


class Form(nn.Module):
    """Computes a change: ``forward`` returns dh. Subclasses know shapes, never models.

    Methods make the parameters in the type and on the device of the weights at the site (``site.dtype``). They may be
    kept in a wider type; forms cast them to the type of their input, so that a bfloat16 model is never computed in
    float32 because of its delta.
    """

    def stored(self) -> Form | None:
        """The form to write to a file: by default itself; a reparameterised form returns its flat equal.

        None for a form that serves training only and is not written.
        """
        return self

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the shapes of ``tensors``, by name, before they are copied; nothing by default.

        Forms that grow in training do, so that a run can go on from a checkpoint.
        """

    def penalty(self) -> Tensor | None:
        """Additional loss of this form, a scalar; None if it has none."""
        return None


@dataclass
class Control:
    """Which attachments of one model are live, each with the weight of its change.

    Shared by every tap of the model, so that switching costs the same however many sites there are.
    """

    live: dict[str, float] = field(default_factory=dict)


class Tap(ABC):
    """Applies the live forms of one site. Installed on the model, or entirely absent from it."""

    #: Whether several attachments can be live here at once with a weight other than one.
    weighted: ClassVar[bool] = False

    def __init__(self, site: Site, control: Control) -> None:
        self.site = site
        self.control = control
        self.forms: dict[str, list[Form]] = {}
        self._handles: list[RemovableHandle] = []

    def live(self) -> Iterator[tuple[Form, float]]:
        """The live forms here and their weights, in the order in which they were activated."""
        for name, weight in self.control.live.items():
            for form in self.forms.get(name, ()):
                yield form, weight

    @property
    def installed(self) -> bool:
        """Whether the model's modules know of this tap at present."""
        return bool(self._handles)

    @abstractmethod
    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the hooks on; ``modules`` maps dotted names to the model's modules."""

    def uninstall(self) -> None:
        """Take every hook off again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


@dataclass(frozen=True)
class Site(ABC):
    """A place of one model where a method acts, with the facts that a form needs to be built."""

    part: Part

    insertion: ClassVar[Insertion]

    @property
    def key(self) -> str:
        """Stable name of the place, used in files and tables."""
        return self.part.key

    @property
    def identity(self) -> str:
        """Name under which attachments share one tap: insertion and place."""
        return f"{self.insertion.value}:{self.key}"

    @abstractmethod
    def tap(self, control: Control) -> Tap:
        """A new, uninstalled tap for this site."""

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The model's parameters as they are with ``form`` folded in: full names to new tensors.

        Raises:
            StateError: if a change at this kind of site cannot be folded into weights.
        """
        raise StateError(
            f"The change at {self.key} ({self.insertion.value}) is not a change of weights and cannot be merged."
        )


def named_arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name; ``names`` are those of the module's ``forward``, in order."""
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def first_tensor(output: Any) -> Tensor:
    """The tensor of a module's output: itself, or the first entry of a tuple or model output."""
    return output if isinstance(output, Tensor) else output[0]


def with_first_tensor(output: Any, tensor: Tensor) -> Any:
    """``output`` with its first tensor replaced, its type kept."""
    if isinstance(output, Tensor):
        return tensor
    if isinstance(output, tuple):
        return (tensor, *output[1:])
    key = next(iter(output.keys()))
    output[key] = tensor
    return output
