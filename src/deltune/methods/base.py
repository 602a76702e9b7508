"""What a method is: frozen hyperparameters, and where it places which forms.

A method is one file: a frozen dataclass deriving from :class:`Method`, registered by its name, with the forms
that it needs. Everything else (command line, comparison, saving, pages) reads what stands here.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError, suggestion
from deltune.methods.options import check, converted, type_name
from deltune.quantization import NF4
from deltune.sites import Form, Insertion, ParameterSite, Site

__all__ = ["Branch", "Method", "Paper", "Placement", "Sum"]

#: The branches of the field: what is added, selected or reparameterised, and mixtures.
Branch = str


@dataclass(frozen=True)
class Paper:
    """Where a method comes from."""

    authors: str
    title: str
    year: int
    arxiv: str = ""

    def __str__(self) -> str:
        text = f"{self.authors} ({self.year}), {self.title}"
        return f"{text}, arXiv:{self.arxiv}" if self.arxiv else text


@dataclass(frozen=True)
class Placement:
    """A form at a site; or one of the model's own parameters that is to train.

    ``site`` is a :class:`Site` with its ``form``, a :class:`ParameterSite` without, or None for a module that
    several forms share and that is kept under the name ``shared``. ``part`` is the number of the method in a sum; of
    a sum inside of another, the numbers on the way to it: ``1.0``.
    """

    site: Site | ParameterSite | None
    form: Form | None = None
    shared: str = ""
    part: str = ""

    def within(self, number: int) -> Placement:
        """This placement as that of the ``number``-th method of a sum."""
        return replace(self, part=f"{number}.{self.part}" if self.part else str(number))

    @property
    def key(self) -> str:
        """Under which the attachment keeps the form."""
        key = self.shared if self.site is None else self.site.key
        return f"{self.part}.{key}" if self.part else key


@dataclass(frozen=True)
class Method(ABC):
    """A way to tune a model: its hyperparameters are its fields, with the paper's defaults.

    Class attributes that every method defines:
        name: on the command line and in files.
        branch: ``reparameterized``, ``additive``, ``selective`` or ``hybrid``.
        insertion: what its forms read and change, see :class:`deltune.sites.Insertion`.
        paper: its source.
        learning_rate: default peak rate for AdamW.
        weight_decay: default.
        unchanged_at_start: whether a freshly attached method leaves the outputs exactly as they were.
        mergeable: whether it can be folded into the model's weights.
        specimen: options, as text, with which it is shown where it cannot be built from its defaults.

    Raises:
        MethodError: when built with a value of the wrong type or out of bounds.
    """

    name: ClassVar[str]
    branch: ClassVar[Branch]
    insertion: ClassVar[Insertion]
    paper: ClassVar[Paper]
    learning_rate: ClassVar[float]
    weight_decay: ClassVar[float] = 0.0
    unchanged_at_start: ClassVar[bool] = True
    mergeable: ClassVar[bool] = False
    specimen: ClassVar[str] = ""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = converted(getattr(self, item.name), hints[item.name])
            object.__setattr__(self, item.name, value)
            check(self.name, item, value, hints[item.name])

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that act in it: of a sum its parts, of any other itself."""
        return (self,)

    @classmethod
    def insertions(cls) -> tuple[Insertion, ...]:
        """:attr:`insertion`; those of the parts, each once, where the class is made of several methods."""
        return (cls.insertion,)

    @abstractmethod
    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Every form at its site, newly initialised, for ``model``.

        Raises:
            TargetError: if a target selects nothing in this model.
            MethodError: if a hyperparameter does not fit this model.
        """

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The method under which its stored forms are written, see :meth:`Form.stored`; itself by default.

        Args:
            forms: the forms of this attachment by key, whose shapes training may have changed.
        """
        return self

    @property
    def base_format(self) -> NF4 | None:
        """How the frozen model is to be stored where deltune loads it; None, the default, for as it is."""
        return None

    def prepare(  # noqa: B027
        self, model: nn.Module, forms: Mapping[str, Form], batches: Iterable[Mapping[str, Any]]
    ) -> None:
        """Set-up from data, before training; nothing by default."""

    def penalty(self, forms: Mapping[str, Form]) -> Tensor | None:
        """Loss to add while training: the sum of the forms' own penalties, None if there is none."""
        penalties = [penalty for form in forms.values() if (penalty := form.penalty()) is not None]
        return sum(penalties[1:], penalties[0]) if penalties else None

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:  # noqa: B027
        """Called once an optimizer is bound, before its first step; nothing by default.

        Args:
            forms: the forms of this attachment by key.
            steps: number of steps that training will have; None if nobody said.

        Raises:
            MethodError: if the method's schedule does not fit into that many steps, or needs to know them.
        """

    def before_step(  # noqa: B027
        self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called before each step of the bound optimizer, with the gradients there; nothing by default.

        Args:
            forms: the forms of this attachment by key.
            step: the number of the step to come, from 1.
            optimizer: the optimizer.
        """

    def after_step(  # noqa: B027
        self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer
    ) -> None:
        """Called after each step of the bound optimizer, with the gradients still there; nothing by default.

        What a schedule has to remember belongs into buffers of the forms: training checkpoints hold these.

        Args:
            forms: the forms of this attachment by key.
            step: number of steps taken, from 1.
            optimizer: the optimizer.
        """

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether what evaluation measures now is what would be written, and within its budget; True by default.

        While it is not, ``deltune.fit`` does not take the weights for the best.

        Args:
            forms: the forms of this attachment by key.
        """
        return True

    def to_dict(self) -> dict[str, Any]:
        """Name and hyperparameters as plain values, for files."""
        values: dict[str, Any] = {"name": self.name}
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, Targets):
                value = str(value)
            values[item.name] = list(value) if isinstance(value, tuple) else value
        return values

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Method:
        """Build from named values, which may be text as typed on a command line.

        Raises:
            MethodError: if a name is unknown or a value invalid.
        """
        names = [item.name for item in dataclasses.fields(cls)]
        for given in options:
            if given not in names:
                raise MethodError(
                    f"{cls.name} has no option {given!r}. {suggestion(given, names)} "
                    f"`deltune methods {cls.name}` shows all of them."
                )
        return cls(**options)

    @classmethod
    def options(cls) -> list[dict[str, Any]]:
        """Each hyperparameter: name, type, default, help and bounds, for pages and the command line."""
        hints = get_type_hints(cls)
        rows = []
        for item in dataclasses.fields(cls):
            default = item.default
            rows.append(
                {
                    "name": item.name,
                    "type": type_name(hints[item.name]),
                    "default": str(default) if isinstance(default, Targets) else default,
                    **{
                        key: value
                        for key, value in item.metadata.items()
                        if value is not None and value != () and value is not False
                    },
                }
            )
        return rows

    def __add__(self, other: Method) -> Sum:
        """Both methods at once, in one attachment."""
        terms = (method.methods if type(method) is Sum else (method,) for method in (self, other))
        return Sum(tuple(term for several in terms for term in several))

    def __str__(self) -> str:
        changed = [
            f"{item.name}={_typed(getattr(self, item.name))}"
            for item in dataclasses.fields(self)
            if getattr(self, item.name) != converted(item.default, get_type_hints(type(self))[item.name])
        ]
        return f"{self.name}({', '.join(changed)})" if changed else self.name


def _typed(value: Any) -> Any:
    """A value as it is typed in a method's text."""
    if isinstance(value, tuple):
        return _typed(",".join(map(str, value)))
    if isinstance(value, str) and re.search(r"[^\w./-]", value):
        return f"'{value}'" if "'" not in value else f'"{value}"'
    return value


@dataclass(frozen=True)
class Sum(Method):
    """The sum of methods: ``LoRA(rank=8) + PrefixTuning(length=10)``.

    Each part acts where it would alone; where two parts change the same representation their changes are
    added. Default learning rate and weight decay are the smallest of the parts'.
    """

    methods: tuple[Method, ...] = ()

    name: ClassVar[str] = "sum"
    branch: ClassVar[str] = "hybrid"
    insertion: ClassVar[Insertion] = Insertion.PARALLEL
    paper: ClassVar[Paper] = Paper(
        "He et al.", "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, "2110.04366"
    )
    learning_rate: ClassVar[float] = 1e-3

    def __post_init__(self) -> None:
        if len(self.methods) < 2:
            raise MethodError("A sum needs at least two methods: LoRA(rank=8) + BitFit().")
        object.__setattr__(self, "methods", tuple(self.methods))
        object.__setattr__(self, "learning_rate", min(method.learning_rate for method in self.methods))
        object.__setattr__(self, "weight_decay", min(method.weight_decay for method in self.methods))
        object.__setattr__(self, "unchanged_at_start", all(method.unchanged_at_start for method in self.methods))
        object.__setattr__(self, "mergeable", all(method.mergeable for method in self.methods))

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that act in it, those of its parts included."""
        return tuple(part for method in self.methods for part in method.parts)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The placements of every part, numbered by part, so that equal sites do not clash."""
        for number, method in enumerate(self.methods):
            for placement in method.place(model, anatomy):
                yield placement.within(number)

    def with_forms(self, forms: Mapping[str, Form]) -> Iterator[tuple[Method, dict[str, Form]]]:
        """Each part with its own of ``forms``, by the keys that it gave them."""
        for number, method in enumerate(self.methods):
            prefix = f"{number}."
            yield method, {key.removeprefix(prefix): form for key, form in forms.items() if key.startswith(prefix)}

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The sum of the parts as they are stored."""
        return Sum(tuple(method.stored(own) for method, own in self.with_forms(forms)))

    @property
    def base_format(self) -> NF4 | None:
        """That of the parts that say one.

        Raises:
            MethodError: if they say different ones.
        """
        formats = list(dict.fromkeys(found for method in self.methods if (found := method.base_format) is not None))
        if len(formats) > 1:
            raise MethodError(f"{self} asks for a model that is quantised in two ways: {formats[0]} and {formats[1]}.")
        return formats[0] if formats else None

    def prepare(self, model: nn.Module, forms: Mapping[str, Form], batches: Iterable[Mapping[str, Any]]) -> None:
        """Every part's own set-up, all from the same batches."""
        batches = list(batches)
        for method, own in self.with_forms(forms):
            method.prepare(model, own, batches)

    def penalty(self, forms: Mapping[str, Form]) -> Tensor | None:
        """Sum of the parts' penalties."""
        penalties = [penalty for method, own in self.with_forms(forms) if (penalty := method.penalty(own)) is not None]
        return sum(penalties[1:], penalties[0]) if penalties else None

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Every part's own."""
        for method, own in self.with_forms(forms):
            method.begin(own, steps)

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Every part's own schedule."""
        for method, own in self.with_forms(forms):
            method.before_step(own, step, optimizer)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Every part's own schedule."""
        for method, own in self.with_forms(forms):
            method.after_step(own, step, optimizer)

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether all parts are."""
        return all(method.settled(own) for method, own in self.with_forms(forms))

    def to_dict(self) -> dict[str, Any]:
        """Name and the parts' own dictionaries."""
        return {"name": self.name, "methods": [method.to_dict() for method in self.methods]}

    def __str__(self) -> str:
        return " + ".join(str(method) for method in self.methods)
