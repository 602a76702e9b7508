"""The vocabulary of all sites: insertion, form, control, tap.

A *site* is a place of one model where a method acts. A *form* is the module that computes the change there
and knows nothing about models. A *tap* is the mechanism that joins the two: the only thing that touches the
model's modules. A *control*, shared by all taps of a model, says which attachments are live.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from deltune.backbone import Part
from deltune.errors import StateError
from deltune.sites.routed_rows import RoutedRows

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["BANK", "Control", "Form", "Gate", "Insertion", "Seen", "Site", "Tap"]

#: Name of the submodule that holds the forms, in each layer that has some and in the model itself.
BANK = "deltune"


class Insertion(str, Enum):
    """What a form reads and what it changes."""

    WEIGHT = "weight"
    PARALLEL = "parallel"
    SEQUENTIAL = "sequential"
    KEY_VALUE = "key_value"
    TOKENS = "tokens"
    REPLACE = "replace"
    SELECT = "select"


class Gate(Protocol):
    """How much of a change is used, computed from what the form reads."""

    def value(self, h: Tensor, rows: Tensor | None) -> Tensor:
        """G, (batch, 1, 1) or (batch, positions, 1), for ``h`` (batch, positions, features).

        ``rows`` are the indices of these rows in the whole batch; None where they are all of it.
        """
        ...


class Form(nn.Module):
    """Computes a change: ``forward`` returns dh. Subclasses know shapes, never models.

    Methods make the parameters in the type and on the device of the weights at the site (``site.dtype``). They may be
    kept in a wider type; forms cast them to the type of their input, so that a bfloat16 model is never computed in
    float32 because of its delta.
    """

    #: Names of buffers that are not trained but belong into the file, such as the prompts of other tasks.
    saved_buffers: tuple[str, ...] = ()
    #: The gate that the change is multiplied by, if it has one. In a tuple, so that it is no submodule: several forms
    #: may share a gate, and it has a place of its own.
    gated_by: tuple[Gate, ...] = ()
    #: dh as text for the table of all methods, without biases; ``{x}`` stands for what is read: ``{x} W_down W_up``.
    formula: ClassVar[str] = ""

    def as_text(self, x: str) -> str:
        """The change dh as text, ``x`` being what is read: :attr:`formula`, as this form's options have it."""
        return (self.formula or f"{type(self).__name__}({{x}})").format(x=x)

    def factor(self) -> str:
        """What multiplies dh, as text: its gate, and the number ``scale`` or ``s`` where that is trained."""
        scale = getattr(self, "scale", 1.0)
        own = "s" if isinstance(scale, Tensor) else "" if scale == 1.0 else f"{scale:g}"
        return f"G {own}".strip() if self.gated_by else own

    def stored(self) -> Form | None:
        """The form to write to a file: by default itself; a reparameterised form returns its flat equal.

        None for a form that serves training only and is not written.
        """
        return self

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the shapes of ``tensors``, by name, before they are copied; nothing by default.

        Forms that grow in training do, so that a run can go on from a checkpoint.
        """

    def restored(self) -> None:
        """Called after the form's values were read from a file; nothing by default."""

    def trained_count(self) -> int:
        """How many values it trains: all of its parameters, but those that a search has dropped."""
        return sum(value.numel() for value in self.parameters())

    def penalty(self) -> Tensor | None:
        """Additional loss of this form, a scalar; None if it has none."""
        return None


@dataclass
class Control:
    """Which attachments of one model are live, each with the weight of its change, for which rows and layers.

    Shared by every tap of the model, so that switching costs the same however many sites there are.

    Attributes:
        live: weight by name, in the order of activation.
        route: which attachment each row of a batch takes, None for none; empty where every row takes all of them. A
            batch that is a multiple as long repeats each entry, as beam search repeats each row.
        dropped: number of the lowest layers of each stack in which nothing acts (Rücklé et al. 2021).
        dropped_in_training: as ``dropped``, for forms that are in training mode.
        bound: number of optimizers that are followed.
        stacked: whether each of the live attachments reads what those before it have made of a result, not the result
            itself; it concerns changes of results alone.
        frozen: names of live attachments that do not train.
        drop_seed: where that number is drawn anew for each step of training, what the draws start from; else None.
    """

    live: dict[str, float] = field(default_factory=dict)
    route: tuple[str | None, ...] = ()
    dropped: int = 0
    dropped_in_training: int = 0
    drop_seed: int | None = None
    bound: int = 0
    stacked: bool = False
    frozen: frozenset[str] = frozenset()

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the live attachments that train."""
        return tuple(name for name in self.live if name not in self.frozen)

    _routed: RoutedRows = field(default_factory=lambda: RoutedRows(()), repr=False, compare=False)

    def acts(self, layer: int | None, training: bool) -> bool:
        """Whether forms in that layer, None for outside of the layers, act at present."""
        return layer is None or layer >= (max(self.dropped, self.dropped_in_training) if training else self.dropped)

    def routes(self, batch: int) -> tuple[str | None, ...]:
        """The attachment of each of ``batch`` rows, where rows are routed.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        return self.routed.names(batch)

    @property
    def routed(self) -> RoutedRows:
        """The rows under the present route."""
        if torch.compiler.is_compiling():
            return RoutedRows(self.route)
        routed = self._routed
        if routed.route is not self.route:
            routed = self._routed = RoutedRows(self.route)
        return routed


class Seen(threading.local):
    """Tensors that one thread has read and waits to use, if any; copies and pickles hold none."""

    def __init__(self) -> None:
        # a list that is changed in place: torch.compile does not follow a new value of an attribute
        self.inputs: list[Tensor] = []

    def __reduce__(self) -> tuple[type[Seen], tuple[()]]:
        return Seen, ()


class Tap(ABC):
    """Applies the live forms of one site. Installed on the model, or entirely absent from it."""

    #: Whether several attachments can be live here at once with a weight other than one.
    weighted: ClassVar[bool] = False
    #: Whether it is on while anything is live, also where it has no live form, to refuse what would go wrong then.
    watches: ClassVar[bool] = False

    def __init__(self, site: Site, control: Control) -> None:
        self.site = site
        self.control = control
        self.forms: dict[str, list[Form]] = {}
        self._handles: list[RemovableHandle] = []

    def live(self) -> Iterator[tuple[Form, float]]:
        """The live forms here and their weights, in the order in which they were activated, whatever their rows."""
        for _, form, weight in self._acting():
            yield form, weight

    def changes(self, x: Tensor, but: Collection[Form] = ()) -> Iterator[tuple[Form, float, Tensor | None]]:
        """As :meth:`live`, with the indices of the rows of ``x`` (batch, ...) that each form changes; None for all.

        Args:
            x: what has a row for each of the batch.
            but: forms to leave out.

        Raises:
            StateError: if the rows cannot be matched with the route.
        """
        for name, form, weight in self._acting():
            if form in but:
                continue
            if not self.control.route:
                yield form, weight, None
                continue
            rows = self.control.routed.rows(name, x.shape[0], x.device)
            if rows is None or rows.numel():
                yield form, weight, rows

    def reads_anew(self, form: Form, before: Form | None) -> bool:
        """Whether ``form`` reads what the forms up to ``before`` have changed: the first of a stacked attachment."""
        return self.control.stacked and before is not None and self._owner(form) != self._owner(before)

    def _owner(self, form: Form) -> str:
        return next(name for name, forms in self.forms.items() if any(other is form for other in forms))

    def _acting(self) -> Iterator[tuple[str, Form, float]]:
        layer = self.site.part.layer
        for name, weight in self.control.live.items():
            for form in self.forms.get(name, ()):
                if self.control.acts(layer, form.training):
                    yield name, form, weight

    def scales(self, form: Form) -> bool:
        """Whether the change of ``form`` can have a weight other than one."""
        return self.weighted

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
    #: Whether a gate can scale the changes here.
    gateable: ClassVar[bool] = False
    #: What forms read here, as formulas name it: x, the input of what is changed; h, the result itself.
    reads: ClassVar[str] = "x"

    @property
    def modified(self) -> str:
        """What is changed, in words."""
        return self.part.key if self.part.role == "module" else self.part.role

    def combination(self, factor: str) -> str:
        """How dh is combined with what it changes, as text; ``factor`` is that of the form."""
        return f"h + {factor} dh" if factor else "h + dh"

    @property
    def key(self) -> str:
        """Stable name of the place, used in files and tables."""
        return self.part.key

    @property
    def identity(self) -> str:
        """Name under which attachments share one tap: insertion and place."""
        return f"{self.insertion.value}:{self.key}"

    @property
    def order(self) -> int:
        """Whose hooks come first: a change of a matrix before one that reads the matrix's result, and so on."""
        return list(Insertion).index(self.insertion)

    @abstractmethod
    def tap(self, control: Control) -> Tap:
        """A new, uninstalled tap for this site."""

    def selected(self, form: Form) -> tuple[str, ...]:
        """Full names of the model's own parameters in which ``form`` has values, where there are such."""
        return ()

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The model's parameters as they are with ``form`` folded in: full names to new tensors.

        Raises:
            StateError: if a change at this kind of site cannot be folded into weights.
        """
        raise StateError(
            f"The change at {self.key} ({self.insertion.value}) is not a change of weights and cannot be merged."
        )


def gated(form: Form, weight: float, read: Tensor, rows: Tensor | None) -> float | Tensor:
    """The weight of a form's change, times its gate if it has one: (b, 1, 1) or (b, positions, 1) then.

    Args:
        form: the form.
        weight: of its attachment.
        read: what the form reads in its b rows, (b, positions, features).
        rows: indices of these rows; None for all of the batch.
    """
    if not form.gated_by:
        return weight
    (gate,) = form.gated_by
    value = gate.value(read, rows)
    return value if weight == 1.0 else weight * value


def rows_of(x: Tensor, rows: Tensor | None) -> Tensor:
    """These rows of ``x``; ``x`` itself for None."""
    return x if rows is None else x.index_select(0, rows)


def weighted(change: Tensor, weight: float | Tensor) -> Tensor:
    """``weight`` times ``change``."""
    return weight * change if isinstance(weight, Tensor) or weight != 1.0 else change


def with_change(h: Tensor, change: Tensor, weight: float | Tensor = 1.0, rows: Tensor | None = None) -> Tensor:
    """``h`` plus ``weight`` times ``change``, which is of these rows of it; of all for None."""
    change = weighted(change, weight)
    return h + change if rows is None else h.index_add(0, rows, change.to(h.dtype))


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
