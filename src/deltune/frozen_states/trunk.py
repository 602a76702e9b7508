"""The lowest layers of a model, in which nothing acts and nothing trains."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from deltune.attachment import BANK, Attachment
from deltune.backbone import Anatomy, Stack
from deltune.errors import StateError
from deltune.frozen_states.keys import bytes_of
from deltune.sites import Control, EntriesSite, Insertion, StatesForm

__all__ = ["Trunk", "digest", "parameters_below", "refuse_dropout"]


@dataclass(frozen=True)
class Trunk:
    """The lowest layers of a stack, in which nothing acts and nothing trains.

    Attributes:
        stack: the stack.
        depth: number of its lowest applications of a layer that belong to the trunk.
        kept: those of them whose output something above reads, in order.
    """

    stack: Stack
    depth: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, control: Control, attachments: Iterable[Attachment]) -> Trunk:
        """The trunk below what these attachments change.

        Raises:
            StateError: if there is none, or it is not known where their changes stand.
        """
        if len(anatomy.stacks) != 1:
            raise StateError(
                "States of frozen layers can be kept for models with one stack of layers; this one has "
                f"{', '.join(anatomy.stacks) or 'none that is known'}."
            )
        (stack,) = anatomy.stacks.values()
        layers = len(stack) * stack.repeats
        depth, lowest, unknown = layers, "", False
        read: set[int] = set()
        for attachment in attachments:
            for place, layer, form in _places(anatomy, stack, attachment):
                if isinstance(form, StatesForm):
                    read.update(index - 1 for index in form.reads(layers) if index)
                elif layer is not None and not control.acts(layer, training=False):
                    continue
                elif layer is None or layer < depth:
                    depth, lowest, unknown = layer or 0, place, layer is None
        if not depth:
            if unknown:
                raise StateError(
                    f"Something acts or trains at {lowest}, of which it is not known that it stands above all layers, "
                    "so there may be no layer below it. Choose a method that leaves it alone, or train without keeping "
                    "states of frozen layers."
                )
            raise StateError(
                f"Something acts at {lowest}, below which no layer is frozen, so there are no states to keep. Let the "
                "method act in higher layers only, for example with targets 'attention.* layers=4:', or with "
                "drop_layers."
            )
        return cls(stack, depth, tuple(sorted({index for index in read if index < depth} | {depth - 1})))


def _places(anatomy: Anatomy, stack: Stack, attachment: Attachment) -> Iterator[tuple[str, int | None, Any]]:
    """Where an attachment changes something: a name, the layer (None: before all layers) and the form, if any."""
    for key, site, form in attachment.sites:
        if site.insertion is Insertion.REPLACE:
            yield key, len(stack), form
        elif not isinstance(site, EntriesSite):  # its parameters are among the selected names
            yield key, _layer_of(anatomy, stack, site.part.module), form
    for name in attachment.selected_names:
        yield name, _layer_of(anatomy, stack, name), None


def _layer_of(anatomy: Anatomy, stack: Stack, name: str) -> int | None:
    """The layer that holds a module or parameter; L above the layers, None before them or where that is not known."""
    for index, layer in enumerate(stack.layers):
        if f"{name}.".startswith(f"{layer}."):
            return index if stack.repeats == 1 else 0
    above = filter(None, (*anatomy.head, anatomy.language_model_head, stack.final_norm))
    return len(stack) * stack.repeats if any(f"{name}.".startswith(f"{module}.") for module in above) else None


def refuse_dropout(model: nn.Module, trunk: Trunk) -> None:
    """Refuse frozen layers that make something else each time in training.

    Raises:
        StateError: naming the module that drops values.
    """
    upper = trunk.stack.layers[trunk.depth :] if trunk.stack.repeats == 1 else ()
    above = {module for layer in upper for module in model.get_submodule(layer).modules()}
    prefix = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        in_base = not prefix or not hasattr(model, prefix) or f"{name}.".startswith(f"{prefix}.")
        if module in above or f".{BANK}." in f".{name}." or not in_base:
            continue
        for attribute, value in vars(module).items():
            drops = "drop" in attribute or (isinstance(module, nn.Dropout) and attribute == "p")
            if drops and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                raise StateError(
                    f"{name} drops values at random in training ({attribute}={value:g}), so that the frozen layers "
                    "make something else each time. Load the model with every dropout at zero: "
                    "task.load_model(path, dropout=0.0), or --model-dropout 0; where that does not reach it, in the "
                    "model's configuration."
                )


def parameters_below(model: nn.Module, anatomy: Anatomy, trunk: Trunk) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in the trunk and before it; those of forms there do not act."""
    for name, value in model.named_parameters(remove_duplicate=False):
        layer = _layer_of(anatomy, trunk.stack, name)
        if f".{BANK}." not in f".{name}" and (layer is None or layer < trunk.depth):
            yield name, value


def digest(model: nn.Module, anatomy: Anatomy, trunk: Trunk) -> str:
    """Of all values of the trunk and what stands before it."""
    found = hashlib.blake2b(digest_size=16)
    for name, value in sorted(parameters_below(model, anatomy, trunk), key=lambda item: item[0]):
        found.update(name.encode())
        found.update(bytes_of(value.detach().cpu()))
    return found.hexdigest()
