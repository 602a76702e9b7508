"""Single entries of the model's own parameters, trained as one compact vector.

Letters: N entries of all parameters together, k of them selected.

The parameters stay where they are. While an attachment is live its values stand in the selected entries, written into
the model's own tensors; the rest of each parameter is not touched, and the original entries come back bit for bit. A
parameter's gradient is gathered into that of the vector as soon as it is complete and then dropped, so that no more
than one of them is held at a time, and the optimizer keeps state for k numbers, not N.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.errors import TargetError
from deltune.sites.base import BANK, Control, Form, Insertion, Site
from deltune.sites.entries_tap import EntriesTap, parameter_at
from deltune.sites.parameter import parameter_modules

__all__ = ["EntriesForm", "EntriesSite", "Piece", "entries_below", "entries_site"]


@dataclass(frozen=True)
class Piece:
    """The entries of one parameter that a form changes.

    Attributes:
        name: of the parameter.
        part: where these entries are in the form's vectors.
        places: which of the flattened parameter's entries they are, ascending; None for all of them.
    """

    name: str
    part: slice
    places: Tensor | None

    def of(self, flat: Tensor) -> Tensor:
        """These entries of a flattened parameter."""
        return flat if self.places is None else flat[self.places.to(flat.device)]


class EntriesForm(Form):
    """Values of k selected entries.

    A form of another kind, of more vectors or of whole parameters, says by :meth:`pieces` which entries it changes, by
    :meth:`written` what is to stand there, and by :meth:`collect` what their gradient is for what it trains.

    Args:
        site: whose entries.
        indices: of the entries, (k,), each in 0 to N - 1, ascending: positions in the site's parameters, flattened and
            put one behind the other.
        values: (k,), what stands there at the start.
        relative: whether the values are differences from what the model has there, and not what stands there itself.
    """

    formula: ClassVar[str] = "{x} - theta_0 in k entries"

    saved_buffers = ("indices",)

    def __init__(self, site: EntriesSite, indices: Tensor, values: Tensor, relative: bool = False) -> None:
        super().__init__()
        self.site = site
        self.relative = relative
        self.values = nn.Parameter(values.detach().clone())
        self.indices: Tensor
        self.register_buffer("indices", indices.clone(), persistent=True)

    @torch.no_grad()
    def select(self, indices: Tensor, values: Tensor) -> None:
        """Select as many other entries, with these values."""
        order = indices.argsort()
        self.indices.copy_(indices[order])
        self.values.copy_(values[order])

    def pieces(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """The changed entries of each parameter that has some.

        Args:
            tensors: the form's state by name, if it is about to have another.
        """
        indices = self.indices if tensors is None else tensors.get("indices", self.indices)
        for name, part, places in self.site.split(indices.to(self.indices.device)):
            yield Piece(name, part, places)

    def written(self, piece: Piece, originals: Tensor) -> Tensor:
        """What is to stand in the entries of ``piece``, where the model has ``originals``; both (entries,)."""
        values = self.values.detach()[piece.part]
        if not self.relative:
            return values
        # entries of another type than the sum's are rounded once, when they are written
        wide = torch.promote_types(torch.promote_types(originals.dtype, values.dtype), torch.float32)
        return originals.to(wide) + values.to(wide)

    def collect(self, piece: Piece, gradient: Tensor) -> None:
        """Add the gradient of the entries of ``piece``, (entries,), to those of what is trained."""
        self.add_gradient(self.values, piece.part, gradient)

    @staticmethod
    def add_gradient(parameter: nn.Parameter, part: slice | int, gradient: Tensor) -> None:
        """Add to a part of a parameter's gradient, if it has one at all."""
        if parameter.requires_grad:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            parameter.grad[part] += gradient.to(parameter.dtype)

    def state(self) -> tuple[tuple[int, int], ...]:
        """Equal as long as what is to stand in the entries is the same."""
        return ((id(self.values), self.values._version), (id(self.indices), self.indices._version))

    def stepped(self) -> None:
        """Called after each step of an optimizer that trains this form; nothing by default."""


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
    reads: ClassVar[str] = "theta"

    @property
    def modified(self) -> str:
        """Some entries of some parameters."""
        return "entries of parameters"

    def combination(self, factor: str) -> str:
        """As that of whole parameters."""
        return "theta_0 + dh"

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
        meta = any(value.is_meta for value in form.parameters())
        return self.names if meta else tuple(piece.name for piece in form.pieces())

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
        """The parameters with the values in them, as evaluation has them."""
        assert isinstance(form, EntriesForm)
        merged, training = {}, form.training
        form.eval()
        for piece in form.pieces():
            value = parameter_at(modules, piece.name).detach().clone()
            flat = value.view(-1)
            changed = form.written(piece, piece.of(flat)).to(flat)
            flat[slice(None) if piece.places is None else piece.places.to(flat.device)] = changed
            merged[piece.name] = value
        form.train(training)
        return merged


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
