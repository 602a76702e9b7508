"""Which of its own parameters a model trains.

An attachment that selects has its own copy of each selected parameter. Making it live puts these copies in
the place of the model's parameters, and taking it off puts the originals back: nothing is copied, an
optimizer keeps its parameters, and the originals stay bit-identical.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Part, Targets
from deltune.errors import StateError, TargetError
from deltune.sites.base import Form, Insertion

__all__ = ["ParameterSite", "Selection", "SelectionForm", "parameter_modules"]

#: The roles that are modules of their own in every model. Sublayers are not: BERT's feed-forward sublayer has no
#: module but its layer.
_MODULE_ROLES = ("embeddings", *PROJECTION_ROLES, "norm", "layer", "head")


@dataclass(frozen=True)
class ParameterSite:
    """One of the model's own parameters, by full name.

    ``zeros`` gives the shape of a bias that does not exist yet and is to be added as zeros.
    """

    name: str
    zeros: tuple[int, ...] | None = None

    insertion: ClassVar[Insertion] = Insertion.SELECT
    reads: ClassVar[str] = "theta"
    #: The change as text, as forms have it for other sites.
    formula: ClassVar[str] = "theta - theta_0"

    def combination(self, factor: str = "") -> str:
        """What trains stands in the place of theta_0."""
        return "theta_0 + dh"

    @property
    def key(self) -> str:
        """Name used in tables."""
        return self.name


class SelectionForm(Form):
    """What a method remembers of the parameters that it selects, and what of them it writes to a file.

    A method places it as a shared form beside its :class:`ParameterSite`. It computes nothing: the parameters stand in
    the model. In files its stored form takes their place, and brings them back in :meth:`restored`.
    """

    def select(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take the parameters that the method selected, by full name, with their original values; called once."""

    def whole(self) -> Iterable[str]:
        """Names of those that are written whole all the same; by default none."""
        return ()

    def counts(self) -> dict[str, int]:
        """How many entries are trained of those that are not trained whole, by name; by default all are whole."""
        return {}


def parameter_modules(
    model: nn.Module, anatomy: Anatomy, targets: Targets, roles: tuple[str, ...] = _MODULE_ROLES
) -> tuple[str, ...]:
    """Names of the modules that ``targets`` selects, to train parameters of theirs.

    Raises:
        TargetError: if a target selects nothing, a role that is no module, or some of the rows of a fused matrix.
    """
    selected = targets.select(anatomy, tuple(name for name, _ in model.named_modules(remove_duplicate=False)), roles)
    chosen = {part.key for part in selected}
    for part in selected:
        if part.rows is not None:
            _refuse_some_rows(part, [other for other in anatomy if other.module == part.module], chosen)
    return tuple(dict.fromkeys(part.module for part in selected))


def _refuse_some_rows(part: Part, sharing: list[Part], chosen: set[str]) -> None:
    left_out = [other.role for other in sharing if other.key not in chosen]
    if left_out:
        raise TargetError(
            f"{part.key} is a part of {part.module}, whose other rows are {', '.join(left_out)}: its parameters cannot "
            "be selected alone. Select them all, or choose a method that changes rows, such as lora."
        )


class Selection:
    """The selected parameters of one attachment, and the originals while they are replaced.

    Args:
        model: the model they belong to.
        sites: the parameters to select; a tied parameter may be named by any of its names.
        reversible: whether to train copies. If False the model's own tensors are trained and the originals are
            lost: no copy is held, and the selection cannot be taken off.

    Raises:
        StateError: if a parameter does not exist or is not a floating-point tensor.
    """

    def __init__(self, model: nn.Module, sites: Iterable[ParameterSite], reversible: bool = True) -> None:
        self.reversible = reversible
        self.values: dict[str, nn.Parameter] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        self._originals: dict[str, nn.Parameter | None] = {}
        self._added: list[str] = []
        self.live = False
        places = _places(model)
        modules = dict(model.named_modules(remove_duplicate=False))
        #: Under which name each selected parameter is among the values, also by its other names.
        self.known: dict[str, str] = {}
        seen: dict[int, str] = {}
        for site in sites:
            if site.name in self.known:
                continue
            owner, _, attribute = site.name.rpartition(".")
            original = modules[owner]._parameters.get(attribute) if owner in modules else None
            if original is None:
                self._add_zeros(model, modules, site)
                self.known[site.name] = site.name
                continue
            self.known[site.name] = seen.setdefault(id(original), site.name)
            if self.known[site.name] != site.name:
                continue
            if not original.dtype.is_floating_point:
                raise StateError(
                    f"{site.name} is stored as {original.dtype} and cannot be trained itself. Use a method that adds "
                    "a delta, such as lora, or load the model unquantised."
                )
            self._places[site.name] = places[id(original)]
            self.values[site.name] = (
                nn.Parameter(original.detach().clone(), requires_grad=False) if reversible else original
            )

    def _add_zeros(self, model: nn.Module, modules: Mapping[str, nn.Module], site: ParameterSite) -> None:
        owner, _, attribute = site.name.rpartition(".")
        if site.zeros is None or owner not in modules or attribute not in modules[owner]._parameters:
            raise StateError(f"The model has no parameter {site.name!r}.")
        like = next(modules[owner].parameters())
        # packed weights have no type for a bias
        dtype = like.dtype if like.dtype.is_floating_point else torch.get_default_dtype()
        value = torch.zeros(site.zeros, dtype=dtype, device=like.device)
        self._places[site.name] = [(modules[owner], attribute)]
        self.values[site.name] = nn.Parameter(value, requires_grad=False)
        self._added.append(site.name)

    @property
    def added(self) -> tuple[nn.Parameter, ...]:
        """The selected parameters that the bare model does not have at all."""
        return tuple(self.values[name] for name in self._added)

    def __iter__(self) -> Iterator[tuple[str, nn.Parameter]]:
        yield from self.values.items()

    def __len__(self) -> int:
        return len(self.values)

    def swap_in(self) -> None:
        """Put the selected parameters in the place of the model's own."""
        if self.live:
            return
        for name, value in self.values.items():
            module, attribute = self._places[name][0]
            current = module._parameters[attribute]
            # the model may have been moved meanwhile; an added bias has no original and follows its module
            like = next(module.parameters()) if current is None else current
            dtype = like.dtype if like.dtype.is_floating_point else value.dtype
            if (like.device, dtype) != (value.device, value.dtype):
                value.data = value.data.to(like.device, dtype)
            self._originals[name] = current
            self._put(name, value)
        self.live = True

    def swap_out(self) -> None:
        """Put the model's own parameters back.

        Raises:
            StateError: if the selection is not reversible.
        """
        if not self.live:
            return
        if not self.reversible and self.values:
            raise StateError(
                "The original values were not kept (attached with reversible=False), so they cannot be restored. "
                "Attach with reversible=True to switch, disable or detach."
            )
        for name, original in self._originals.items():
            value = self.values[name]
            if original is not None and (original.device, original.dtype) != (value.device, value.dtype):
                original.data = original.data.to(value.device, value.dtype)
            self._put(name, original)
        self._originals.clear()
        self.live = False

    def merged(self) -> dict[str, Tensor]:
        """The selected values by full name, as new tensors."""
        return {name: value.detach().clone() for name, value in self.values.items()}

    def _put(self, name: str, parameter: nn.Parameter | None) -> None:
        for module, attribute in self._places[name]:
            module._parameters[attribute] = parameter


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Every place of every parameter: tied ones have several."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, attribute))
    return places
