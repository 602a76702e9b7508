"""Single entries of the model's own parameters, trained as one compact vector.

Letters: N entries of all parameters together, k of them selected.

The parameters stay where they are. While an attachment is live its values stand in the selected entries, written into
the model's own tensors; the rest of each parameter is not touched, and the original entries come back bit for bit. A
parameter's gradient is gathered into that of the vector as soon as it is complete and then dropped, so that no more
than one of them is held at a time, and the optimizer keeps state for k numbers, not N.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.errors import TargetError
from deltune.sites.base import BANK, Control, Form, Insertion, Site, Tap
from deltune.sites.parameter import parameter_modules
from deltune.sites.written import Writer

__all__ = ["EntriesForm", "EntriesSite", "entries_below", "entries_site"]


class EntriesForm(Form):
    """Values of k selected entries.

    Args:
        site: whose entries.
        indices: of the entries, (k,), each in 0 to N - 1, ascending: positions in the site's parameters, flattened and
            put one behind the other.
        values: (k,), what stands there at the start.
    """

    saved_buffers = ("indices",)

    def __init__(self, site: EntriesSite, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.site = site
        self.values = nn.Parameter(values.detach().clone())
        self.indices: Tensor
        self.register_buffer("indices", indices.clone(), persistent=True)

    @torch.no_grad()
    def select(self, indices: Tensor, values: Tensor) -> None:
        """Select as many other entries, with these values."""
        order = indices.argsort()
        self.indices.copy_(indices[order])
        self.values.copy_(values[order])


@dataclass(frozen=True)
class EntriesSite(Site):
    """The entries of a model's parameters.

    Attributes:
        names: full names of the parameters, each tied one once.
        calls: modules that may be called by themselves, the model ("") among them.
        sizes: number of entries of each.
        dtype: type that holds the values of all of them.
        device: of the first.
    """

    names: tuple[str, ...]
    calls: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.SELECT

    @property
    def key(self) -> str:
        """Name of the place."""
        return "entries"

    def tap(self, control: Control) -> EntriesTap:
        """A tap on the parameters."""
        return EntriesTap(self, control)

    @property
    def starts(self) -> dict[str, int]:
        """Index of the first entry of each parameter."""
        return dict(zip(self.names, itertools.accumulate(self.sizes, initial=0), strict=False))

    def selected(self, form: Form) -> tuple[str, ...]:
        """Names of the parameters of which the form has entries; all where it has no values yet (meta)."""
        assert isinstance(form, EntriesForm)
        return self.names if form.indices.is_meta else tuple(name for name, _, _ in self.split(form.indices))

    def split(self, indices: Tensor) -> Iterator[tuple[str, slice, Tensor]]:
        """Of each parameter with selected entries: name, where they are in ``indices``, and their places in it."""
        start = position = 0
        for name, size in zip(self.names, self.sizes, strict=True):
            end = int(torch.searchsorted(indices, start + size))
            if end > position:
                yield name, slice(position, end), indices[position:end] - start
            start, position = start + size, end

    def gather(self, parameters: Mapping[str, Tensor], indices: Tensor) -> Tensor:
        """The values of these entries, (k,), in ``dtype``; ``indices`` ascending."""
        if indices.is_meta:
            return torch.empty(indices.shape, dtype=self.dtype, device=indices.device)
        parts = []
        for name, _, places in self.split(indices):
            flat = parameters[name].detach().reshape(-1)
            parts.append(flat[places.to(flat.device)].to(indices.device, self.dtype))
        return torch.cat(parts) if parts else indices.new_zeros(0, dtype=self.dtype)

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The parameters with the values in them."""
        assert isinstance(form, EntriesForm)
        merged = {}
        for name, part, places in self.split(form.indices):
            value = _parameter(modules, name).detach().clone()
            value.view(-1)[places] = form.values.detach()[part].to(value.dtype)
            merged[name] = value
        return merged


@dataclass
class _Written:
    """What stands in the parameters: entries, their originals, and of which values, by form."""

    indices: Tensor
    originals: Tensor
    versions: list[tuple[int, int]]


class EntriesTap(Tap, Writer):
    """Writes the live forms' values into the parameters, and gathers the gradients."""

    weighted: ClassVar[bool] = True
    site: EntriesSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._modules: Mapping[str, nn.Module] = {}
        self._written: _Written | None = None
        #: Names of the parameters whose gradients are gathered.
        self._training: set[str] = set()
        #: Whether the state that is being loaded is that of the bare model.
        self._bare = False

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Write, and hook the model so that changed values are written before its next call."""
        self._modules = {name.rpartition(".")[0]: modules[name.rpartition(".")[0]] for name in self.site.names}
        self._handles.extend(self.watch(modules, self.site.calls))
        self.refresh()

    def uninstall(self) -> None:
        """Put the original entries back."""
        if self.installed:
            self._restore()
            self._stop(self._training)
            self._training = set()
            self.stop_following()
        super().uninstall()

    def refresh(self, stepped: bool = False) -> None:
        """Write what has changed since it was last written, and see that gradients come."""
        if self.installed:
            self.follow_steps()
        if any(form.indices.is_meta for form, _ in self._live_forms()):
            return  # a model without values
        forms = list(self._live_forms())
        versions = self._versions()
        if stepped or self._written is None or self._written.versions != versions:
            self._restore()
            self._write(forms, versions)
        trained = [form for form, _ in forms if form.values.requires_grad]
        used = {name for form in trained for name, _, _ in self.site.split(form.indices)}
        self._stop(self._training - used)
        for name in used:
            parameter = _parameter(self._modules, name)
            parameter.requires_grad_(True)
            _hook(parameter, self, name)
        self._training = used

    def trained(self) -> Iterator[Tensor]:
        """The live forms' values."""
        for form, _ in self._live_forms():
            yield form.values

    def before_loading(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """Put the originals back, and note those of the entries that will be selected."""
        self._restore()
        names = {id(buffer): name for name, buffer in model.named_buffers()}
        keys = [names.get(id(form.indices), "") for form, _ in self._live_forms()]
        prefixes = tuple(f"{key.rpartition('.')[0]}." for key in keys)
        self._bare = not any(key.startswith(prefixes) for key in state)
        found = [state.get(key, form.indices) for key, (form, _) in zip(keys, self._live_forms(), strict=True)]
        if found:
            indices = torch.unique(torch.cat([value.to(self.site.device) for value in found]))
            self._written = _Written(indices, self.site.gather(self._parameters(), indices), [])

    def after_loading(self) -> None:
        """What was loaded stands, whether it was the bare model's or holds the values already."""
        if self._written is None:
            return
        if self._bare:
            self._written.originals = self.site.gather(self._parameters(), self._written.indices)
        self._written.versions = self._versions()

    def gradient(self, name: str, parameter: Tensor) -> None:
        """Gather the complete gradient of a parameter, and drop it."""
        gradient = parameter.grad
        if gradient is None:
            return
        parameter.grad = None
        flat = gradient.reshape(-1)
        for form, weight in self._live_forms():
            values = form.values
            if not values.requires_grad:
                continue
            for other, part, places in self.site.split(form.indices):
                if other == name:
                    if values.grad is None:
                        values.grad = torch.zeros_like(values)
                    values.grad[part] += weight * flat[places].to(values.dtype)

    def _parameters(self) -> dict[str, nn.Parameter]:
        return {name: _parameter(self._modules, name) for name in self.site.names}

    def _versions(self) -> list[tuple[int, int]]:
        return [(form.values._version, form.indices._version) for form, _ in self._live_forms()]

    def _stop(self, names: Iterable[str]) -> None:
        """Gather the gradients of these parameters no longer."""
        for name in names:
            parameter = _parameter(self._modules, name)
            parameter.requires_grad_(False)
            _unhook(parameter, self)

    def _live_forms(self) -> Iterator[tuple[EntriesForm, float]]:
        for form, weight in self.live():
            assert isinstance(form, EntriesForm)
            yield form, weight

    @torch.no_grad()
    def _write(self, forms: Sequence[tuple[EntriesForm, float]], versions: list[tuple[int, int]]) -> None:
        indices = torch.unique(torch.cat([form.indices for form, _ in forms])) if forms else None
        if indices is None:
            return
        originals = self.site.gather(self._parameters(), indices)
        values = originals.clone()
        for form, weight in forms:
            places = torch.searchsorted(indices, form.indices)
            own = form.values.detach().to(values)
            if len(forms) == 1 and weight == 1.0:
                values[places] = own
            else:
                values[places] += weight * (own - originals[places])
        self._put(indices, values)
        self._written = _Written(indices, originals, versions)

    @torch.no_grad()
    def _restore(self) -> None:
        if self._written is not None:
            self._put(self._written.indices, self._written.originals)
            self._written = None

    def _put(self, indices: Tensor, values: Tensor) -> None:
        for name, part, places in self.site.split(indices):
            parameter = _parameter(self._modules, name)
            # not through the parameter itself: a graph that holds it may still have its backward pass to come
            flat = parameter.data.view(-1)
            flat[places.to(flat.device)] = values[part].to(flat)


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


def _parameter(modules: Mapping[str, nn.Module], name: str) -> nn.Parameter:
    owner, _, attribute = name.rpartition(".")
    parameter = modules[owner]._parameters[attribute]
    assert parameter is not None
    return parameter


def entries_site(model: nn.Module, anatomy: Anatomy) -> EntriesSite:
    """The entries of all of a model's parameters but its task head's; the same place for every attachment.

    Raises:
        TargetError: if there is none that can be trained.
    """
    head = tuple(f"{name}." for name in anatomy.head) or ("\0",)
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if parameter.dtype.is_floating_point and not name.startswith(head) and f".{BANK}." not in f".{name}"
    ]
    if not named:
        raise TargetError("The model has no parameters that can be trained: are they all quantised?")
    dtype = named[0][1].dtype
    for _, parameter in named:
        dtype = torch.promote_types(dtype, parameter.dtype)
    return EntriesSite(
        Part("entries", "", None, ""),
        tuple(name for name, _ in named),
        ("", *dict.fromkeys(stack.entry for stack in anatomy.stacks.values() if stack.entry)),
        tuple(parameter.numel() for _, parameter in named),
        dtype,
        named[0][1].device,
    )


def entries_below(model: nn.Module, anatomy: Anatomy, site: EntriesSite, targets: Targets | None) -> tuple[str, ...]:
    """Which of the site's parameters belong to the modules that ``targets`` selects; all for None.

    Raises:
        TargetError: if a target selects nothing.
    """
    if targets is None:
        return site.names
    chosen = {
        id(parameter)
        for name in parameter_modules(model, anatomy, targets)
        for parameter in model.get_submodule(name).parameters()
    }
    return tuple(name for name in site.names if id(model.get_parameter(name)) in chosen)
