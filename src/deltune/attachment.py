"""One method attached to one model under a name: its forms at their sites, its selected parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.base import Method
from deltune.sites import Form, ParameterSite, Selection, SelectionForm, Site
from deltune.sites.base import BANK

__all__ = ["BANK", "Attachment", "Bank"]


class Bank(nn.Module):
    """Holds the forms of one layer: first by attachment, then by site."""

    def forward(self, x: Tensor) -> Tensor:
        """``x`` itself, so that a container which calls its children in turn (nn.Sequential) may hold a bank."""
        return x


@dataclass
class Placed:
    """A form, the site it acts at (None for a shared module), and the module that owns it."""

    key: str
    form: Form
    site: Site | None
    owner: str


@dataclass
class Attachment:
    """A method, its forms by key, and the model's own parameters that it trains.

    Keys are those of the sites (``encoder.3.attention.query``), preceded by the part's number in a sum (by
    several numbers in a sum of sums: ``1.0.encoder.3.ffn``).
    """

    name: str
    method: Method
    placed: dict[str, Placed]
    selection: Selection
    head_names: tuple[str, ...]
    #: Selected parameters that a form writes to files in its own way.
    recorded: frozenset[str] = frozenset()
    task: dict[str, Any] | None = None
    steps: int = field(default=0)

    @classmethod
    def build(
        cls, name: str, method: Method, model: nn.Module, anatomy: Anatomy, reversible: bool, train_head: bool
    ) -> Attachment:
        """Place ``method`` on ``model``, without touching it.

        Raises:
            MethodError: if the method would train nothing but the head although it is meant to.
            TargetError: if a target selects nothing.
        """
        placed: dict[str, Placed] = {}
        selected: list[ParameterSite] = []
        #: names of selected parameters, and a form that remembers them, by the part of a sum
        names: dict[str, list[str]] = {}
        records: dict[str, SelectionForm] = {}
        for placement in method.place(model, anatomy):
            if isinstance(placement.site, ParameterSite):
                selected.append(placement.site)
                names.setdefault(placement.part, []).append(placement.site.name)
                continue
            if placement.form is None:
                raise MethodError(f"{method.name} places no form at {placement.site}.")
            key = placement.key
            if key in placed:
                raise TargetError(f"{method.name} acts twice at {key!r}: name each target once.")
            owner = "" if placement.site is None else _owner(placement.site, anatomy, model)
            placed[key] = Placed(key, placement.form, placement.site, owner)
            if isinstance(placement.form, SelectionForm):
                records[placement.part] = placement.form
        head = _head_parameters(model, anatomy) if train_head else ()
        only_selects = bool(selected)
        selection = Selection(
            model, [*selected, *(ParameterSite(item) for item in head)], reversible or not only_selects
        )
        head_names = tuple(item for item in head if item in selection.values)
        recorded = _recorded(selection, names, records, method)
        return cls(name, method, placed, selection, head_names, recorded)

    @property
    def forms(self) -> dict[str, Form]:
        """Every form by key."""
        return {key: placed.form for key, placed in self.placed.items()}

    @property
    def sites(self) -> Iterator[tuple[str, Site, Form]]:
        """Every form that acts at a site."""
        for key, placed in self.placed.items():
            if placed.site is not None:
                yield key, placed.site, placed.form

    @property
    def selected_names(self) -> list[str]:
        """Parameters of the model itself, beside the task head, of which this attachment has its own values.

        All of them, or of some entries.
        """
        whole = [name for name, _ in self.selection if name not in self.head_names]
        partly = (name for _, site, form in self.sites for name in site.selected(form))
        return list(dict.fromkeys([*whole, *partly]))

    def selected_counts(self) -> dict[str, int]:
        """How many entries of each parameter of :attr:`selection` are trained, by full name: all, or what is left."""
        counts = {name: value.numel() for name, value in self.selection}
        for form in self.forms.values():
            if isinstance(form, SelectionForm):
                counts |= form.counts()
        return counts

    def set_rank(self, rank: int) -> None:
        """Cut every form to ``rank``; see :meth:`deltune.Tuned.set_rank`.

        Raises:
            MethodError: if the method does not train smaller ranks, or the rank is out of range.
        """
        forms: list[Any] = [form for form in self.forms.values() if hasattr(form, "set_rank")]
        if not forms:
            raise MethodError(
                f"{self.method.name} cannot be cut to a rank: it does not train smaller ranks along with its own. Use "
                "dylora, or attach with the rank that you want."
            )
        largest = min(form.rank for form in forms)
        if not isinstance(rank, int) or not 1 <= rank <= largest:
            raise MethodError(
                f"{self.name!r} can be cut to the ranks 1 to {largest}, not to {rank!r}. A larger rank must be trained."
            )
        for form in forms:
            form.set_rank(rank)

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Everything that this attachment trains: ``key.parameter`` for forms, full names for selected ones."""
        yield from self.form_parameters()
        yield from self.selection

    def form_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What its forms train: ``key.parameter``."""
        for key, placed in self.placed.items():
            for name, parameter in placed.form.named_parameters():
                yield f"{key}.{name}", parameter

    def written(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the selected parameters that are written to files whole, by full name."""
        whole = {name for form in self.forms.values() if isinstance(form, SelectionForm) for name in form.whole()}
        return ((name, value) for name, value in self.selection if name not in self.recorded or name in whole)

    def trainable(self, trainable: bool) -> None:
        """Let the optimizer see this attachment's parameters, or not."""
        for placed in self.placed.values():
            placed.form.requires_grad_(trainable)
        for _, parameter in self.selection:
            parameter.requires_grad_(trainable)

    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """Move the forms to where their modules are and give them their mode, which may have changed meanwhile."""
        for placed in self.placed.values():
            owner = modules[placed.owner]
            _follow(placed.form, owner if placed.site is None else modules[placed.site.part.module])
            placed.form.train(owner.training)

    def refuse_unmergeable(self) -> None:
        """Refuse to fold in what is not a change of weights.

        Raises:
            StateError: if the method cannot be merged.
        """
        if not self.method.mergeable:
            raise StateError(
                f"{self.method.name} cannot be merged: its change is not a change of weights. Keep it attached, or "
                "use a method that can be merged, such as lora."
            )

    def merged(self, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The model's parameters with this attachment folded in, by full name.

        Raises:
            StateError: if the method cannot be merged, or two of its forms change one matrix.
        """
        self.refuse_unmergeable()
        values = self.selection.merged()
        for _, site, form in self.sites:
            for name, value in site.merge(form, modules).items():
                if name in values:
                    # a second part of a fused matrix: add its own change to what is merged already
                    original = modules[name.rpartition(".")[0]].get_parameter(name.rpartition(".")[2])
                    value = values[name] + (value - original.detach())
                values[name] = value
        return values

    def penalty(self) -> Tensor | None:
        """The method's additional loss, if it has one."""
        return self.method.penalty(self.forms)

    @property
    def settled(self) -> bool:
        """Whether what evaluation measures now is what would be written."""
        return self.method.settled(self.forms)


def _owner(site: Site, anatomy: Anatomy, model: nn.Module) -> str:
    """The layer that holds the site, or "" for the model itself."""
    holding = anatomy.layer_of(site.part.module)
    if holding is None:
        return ""
    # a child of a container that calls its children would be called too
    return "" if isinstance(model.get_submodule(holding[1]), nn.Sequential | nn.ModuleList) else holding[1]


def _recorded(
    selection: Selection,
    names: Mapping[str, list[str]],
    records: Mapping[str, SelectionForm],
    method: Method,
) -> frozenset[str]:
    """Give the forms that remember selected parameters theirs; the names of all of these.

    Raises:
        MethodError: if two parts of a sum select one parameter, of which one remembers what it was.
    """
    recorded: dict[str, str] = {}
    for part, form in records.items():
        known = (selection.known[name] for name in names.get(part, ()))
        own = {name: selection.values[name] for name in known}
        form.select(own)
        recorded.update(dict.fromkeys(own, part))
    for part, others in names.items():
        twice = [name for name in others if recorded.get(selection.known[name], part) != part]
        if twice:
            raise MethodError(f"{method}: two parts select {twice[0]}. Give them different targets.")
    return frozenset(recorded)


def _follow(form: Form, module: nn.Module) -> None:
    """Move ``form`` to the device of ``module``."""
    place = next((value.device for value in module.parameters()), None)
    # read without names, of which a route to many attachments would make thousands
    values = (value for part in form.modules() for own in (part._parameters, part._buffers) for value in own.values())
    if place is not None and any(value is not None and value.device != place for value in values):
        form.to(place)


def _head_parameters(model: nn.Module, anatomy: Anatomy) -> tuple[str, ...]:
    return tuple(
        f"{module}.{name}" for module in anatomy.head for name, _ in model.get_submodule(module).named_parameters()
    )
