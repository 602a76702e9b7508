"""Methods that are a combination of others under a name of their own, with its own options and defaults."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.methods.base import Method, Placement
from deltune.quantization import NF4
from deltune.sites import Form, Insertion

__all__ = ["Preset"]


@dataclass(frozen=True)
class Preset(Method):
    """A method that is said by others: its options give a :meth:`definition`, which acts in its place.

    A subclass has the options, ``definition``, and the class attributes of every method but ``insertion``, which is
    that of its parts. It must be possible to build it without options. ``unchanged_at_start`` and ``mergeable`` are
    those of the definition; the class says them for its defaults.
    """

    #: As a :class:`deltune.methods.Sum` has; ``insertions`` says those of the parts.
    insertion: ClassVar[Insertion] = Insertion.PARALLEL

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "unchanged_at_start", self.whole.unchanged_at_start)
        object.__setattr__(self, "mergeable", self.whole.mergeable)

    @abstractmethod
    def definition(self) -> Method:
        """The method that these options say, such as a sum.

        Raises:
            MethodError: if a part cannot have such a value.
        """

    @cached_property
    def whole(self) -> Method:
        """The :meth:`definition`, made once."""
        return self.definition()

    @property
    def parts(self) -> tuple[Method, ...]:
        """The methods that act in the definition."""
        return self.whole.parts

    @classmethod
    def insertions(cls) -> tuple[Insertion, ...]:
        """Those of the parts, each once."""
        return tuple(dict.fromkeys(found for part in cls().parts for found in part.insertions()))

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The definition's."""
        yield from self.whole.place(model, anatomy)

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The definition as it is stored."""
        return self.whole.stored(forms)

    @property
    def base_format(self) -> NF4 | None:
        """The definition's."""
        return self.whole.base_format

    def prepare(self, model: nn.Module, forms: Mapping[str, Form], batches: Iterable[Mapping[str, Any]]) -> None:
        """The definition's."""
        self.whole.prepare(model, forms, batches)

    def penalty(self, forms: Mapping[str, Form]) -> Tensor | None:
        """The definition's."""
        return self.whole.penalty(forms)

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """The definition's."""
        self.whole.begin(forms, steps)

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """The definition's."""
        self.whole.before_step(forms, step, optimizer)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """The definition's."""
        self.whole.after_step(forms, step, optimizer)

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether the definition is."""
        return self.whole.settled(forms)
