"""Writes what forms say into entries of the model's own parameters, and gathers gradients from there.

See :mod:`deltune.sites.entries`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.sites.base import Control, Site, Tap
from deltune.sites.written import Writer

if TYPE_CHECKING:
    from deltune.sites.entries import EntriesForm, EntriesSite, Piece

__all__ = ["EntriesTap", "parameter_at"]


@dataclass
class _Original:
    """What the model itself has in the written entries of one parameter; ``places`` None for all of them."""

    places: Tensor | None
    values: Tensor


#: Of each parameter the forms that change it, with their weights and the entries that they change.
_Changes = dict[str, list[tuple["EntriesForm", float, "Piece"]]]


class EntriesTap(Tap, Writer):
    """Writes the live forms' values into the parameters, and gathers the gradients."""

    weighted: ClassVar[bool] = True
    site: EntriesSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._modules: Mapping[str, nn.Module] = {}
        #: What was written over, by parameter.
        self._originals: dict[str, _Original] = {}
        self._changed: _Changes = {}
        #: The states of the live forms that stand in the parameters; None if none do.
        self._written: list[Any] | None = None
        #: Names of the parameters whose gradients are gathered.
        self._training: set[str] = set()
        #: Whether the state that is being loaded is that of the bare model, and whose values are in it.
        self._bare = False
        self._loaded: frozenset[str] = frozenset()

    def __getstate__(self) -> dict[str, Any]:
        # the forms of a copy are other objects
        return {**vars(self), "_changed": {}, "_written": None}

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Write, and hook the model so that changed values are written before its next call."""
        self._modules = {name.rpartition(".")[0]: modules[name.rpartition(".")[0]] for name in self.site.names}
        self._handles.extend(self.watch(modules, self.site.calls))
        self.refresh()

    def uninstall(self) -> None:
        """Put the original entries back."""
        if self.installed:
            self._write({})
            self._written = None
            self._stop(self._training)
            self._training = set()
            self.stop_following()
        super().uninstall()

    def refresh(self, stepped: bool = False) -> None:
        """Write what has changed since it was last written, and see that gradients come."""
        if self.installed:
            self.follow_steps()
        forms = [form for form, _ in self._live_forms()]
        if any(value.is_meta for form in forms for value in form.parameters()):
            return  # a model without values
        states = self._states()
        if stepped or self._written != states:
            self._write(self._changes())
            self._written = states
        used = {
            name
            for name, several in self._changed.items()
            if any(value.requires_grad for form, _, _ in several for value in form.parameters())
        }
        self._stop(self._training - used)
        for name in used:
            parameter = parameter_at(self._modules, name)
            parameter.requires_grad_(True)
            _hook(parameter, self, name)
        self._training = used

    def trained(self) -> Iterator[Tensor]:
        """What the live forms train."""
        for form, _ in self._live_forms():
            yield from form.parameters()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Write what a step of ``optimizer`` has changed, if it trains any of the live forms."""
        trained = {id(value) for group in optimizer.param_groups for value in group["params"]}
        forms = [form for form, _ in self._live_forms() if any(id(value) in trained for value in form.parameters())]
        for form in forms:
            form.stepped()
        if forms:
            self.refresh(stepped=True)

    def before_loading(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Put the originals back, and note those of the entries that will be selected."""
        self._write({})
        # a tied parameter may come under any of its names
        coming_in = {id(value) for key, value in model.named_parameters(remove_duplicate=False) if key in state}
        self._loaded = frozenset(name for name in self.site.names if id(parameter_at(self._modules, name)) in coming_in)
        names = {id(module): f"{name}." for name, module in model.named_modules()}
        self._bare = True
        coming: _Changes = {}
        for form, weight in self._live_forms():
            prefix = names[id(form)]
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            self._bare = self._bare and not own
            for piece in form.pieces(own):
                coming.setdefault(piece.name, []).append((form, weight, piece))
        self._originals = {name: self._take(name, _places(several)) for name, several in coming.items()}

    def after_loading(self) -> None:
        """What was loaded stands, whether it was the bare model's or holds the values already."""
        if self._bare:
            self._originals = {name: self._take(name, old.places) for name, old in self._originals.items()}
        self._changed = self._changes()
        self._written = self._states()
        with torch.no_grad():
            for name, several in self._changed.items():
                if name not in self._loaded:  # it holds the original, which was put back
                    places = _places(several)
                    self._originals[name] = self._take(name, places)
                    self._put(name, places, _sum(several, self._originals[name]))

    def gradient(self, name: str, parameter: Tensor) -> None:
        """Gather the complete gradient of a parameter, and drop it."""
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        flat = gradient.reshape(-1)
        for form, weight, piece in self._changed.get(name, ()):
            own = piece.of(flat)
            form.collect(piece, own if weight == 1.0 else weight * own)

    def _states(self) -> list[Any]:
        return [(id(form), weight, form.state()) for form, weight in self._live_forms()]

    def _changes(self) -> _Changes:
        changes: _Changes = {}
        for form, weight in self._live_forms():
            for piece in form.pieces():
                changes.setdefault(piece.name, []).append((form, weight, piece))
        return changes

    def _stop(self, names: Iterable[str]) -> None:
        """Gather the gradients of these parameters no longer."""
        for name in names:
            parameter = parameter_at(self._modules, name)
            parameter.requires_grad_(False)
            _unhook(parameter, self)

    def _live_forms(self) -> Iterator[tuple[EntriesForm, float]]:
        yield from self.live()  # type: ignore[misc]

    @torch.no_grad()
    def _write(self, changes: _Changes) -> None:
        """Write these changes, and put back what stood in entries that are not among them."""
        before, self._originals, self._changed = self._originals, {}, changes
        for name, original in before.items():
            # what is written over again needs no restoring
            if name not in changes or not _same(original.places, _places(changes[name])):
                self._put(name, original.places, original.values)
        for name, several in changes.items():
            places = _places(several)
            old = before.get(name)
            known = old is not None and _same(old.places, places)
            original = old if old is not None and known else self._take(name, places)
            self._originals[name] = original
            self._put(name, places, _sum(several, original))

    def _take(self, name: str, places: Tensor | None) -> _Original:
        flat = parameter_at(self._modules, name).detach().reshape(-1)
        return _Original(places, flat.clone() if places is None else flat[places.to(flat.device)])

    def _put(self, name: str, places: Tensor | None, values: Tensor) -> None:
        # not through the parameter itself: a graph that holds it may still have its backward pass to come
        flat = parameter_at(self._modules, name).data.view(-1)
        flat[slice(None) if places is None else places.to(flat.device)] = values.to(flat)


def _places(several: Sequence[tuple[EntriesForm, float, Piece]]) -> Tensor | None:
    """All entries of one parameter that any of these change; None for the whole parameter."""
    found = [piece.places for _, _, piece in several if piece.places is not None]
    if len(found) < len(several):
        return None
    return found[0] if len(found) == 1 else torch.unique(torch.cat(found))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.device == other.device and torch.equal(one, other)


def _sum(several: Sequence[tuple[EntriesForm, float, Piece]], original: _Original) -> Tensor:
    """What is to stand in the entries of one parameter: the original and all changes of it."""
    (form, weight, piece), *others = several
    if not others and weight == 1.0:
        return form.written(piece, original.values.to(_device(form)))
    wide = torch.promote_types(original.values.dtype, torch.float32)
    base = original.values.to(_device(form), wide)
    values = base.clone()
    for form, weight, piece in several:
        own: slice | Tensor = slice(None)
        if piece.places is not None:
            own = piece.places if original.places is None else torch.searchsorted(original.places, piece.places)
        values[own] += weight * (form.written(piece, base[own]).to(values) - base[own])
    return values


def _device(form: EntriesForm) -> torch.device:
    return next(form.parameters()).device


@dataclass(eq=False)
class _Gather:
    """Behind a parameter's gradient; Python could not free a parameter that held its tap, which holds its module."""

    tap: weakref.ref[EntriesTap]
    name: str

    def __call__(self, parameter: Tensor) -> None:
        tap = self.tap()
        if tap is not None:
            tap.gradient(self.name, parameter)


def _hook(parameter: nn.Parameter, tap: EntriesTap, name: str) -> None:
    """Gather the parameter's gradient, unless it is gathered already; a copy of a model has lost its hooks."""
    present = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    if not any(isinstance(hook, _Gather) and hook.tap() is tap for hook in present.values()):
        register: Any = parameter.register_post_accumulate_grad_hook
        register(_Gather(weakref.ref(tap), name))


def _unhook(parameter: nn.Parameter, tap: EntriesTap) -> None:
    present = getattr(parameter, "_post_accumulate_grad_hooks", None) or {}
    for key in [key for key, hook in present.items() if isinstance(hook, _Gather) and hook.tap() is tap]:
        del present[key]


def parameter_at(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    """The parameter of that full name, of a module that has it itself."""
    owner, _, attribute = name.rpartition(".")
    parameter = modules[owner]._parameters[attribute]
    assert parameter is not None
    return parameter
