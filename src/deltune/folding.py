"""Fold attachments into a model's weights, and take them out again bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.errors import StateError

__all__ = ["Folded", "fold", "refuse_tied"]


@dataclass
class Folded:
    """Weights that were replaced: every place (module, attribute) with its original parameter."""

    originals: list[tuple[nn.Module, str, nn.Parameter | None]]

    def undo(self) -> None:
        """Put the original parameters back."""
        for module, attribute, parameter in self.originals:
            module._parameters[attribute] = parameter
        self.originals.clear()


def fold(attachments: Iterable[Attachment], modules: Mapping[str, nn.Module]) -> Folded:
    """Replace the weights that ``attachments`` change by the changed ones.

    The attachments must not be live. Nothing is replaced if an error is raised.

    Raises:
        StateError: if a method cannot be merged, two attachments change one tensor, or a changed matrix is tied
            to another module's.
    """
    values: dict[str, Tensor] = {}
    for attachment in attachments:
        for name, value in attachment.merged(modules).items():
            if name in values:
                raise StateError(
                    f"Several active attachments change {name}; merge them one after the other with reversible=False."
                )
            refuse_tied(attachment, name, modules)
            values[name] = value
    originals: list[tuple[nn.Module, str, nn.Parameter | None]] = []
    for name, value in values.items():
        parameter = nn.Parameter(value, requires_grad=False)
        for module, attribute in _places(name, modules):
            originals.append((module, attribute, module._parameters[attribute]))
            module._parameters[attribute] = parameter
    return Folded(originals)


def refuse_tied(attachment: Attachment, name: str, modules: Mapping[str, nn.Module]) -> None:
    """Refuse to change a parameter that another module has too, unless the method changes the parameter itself.

    Raises:
        StateError: if so.
    """
    own = (*attachment.selection.values, *attachment.selected_names)
    if name not in own and len(_places(name, modules)) > 1:
        raise StateError(f"{name} is tied to another parameter; merging would change that one too.")


def _places(name: str, modules: Mapping[str, nn.Module]) -> list[tuple[nn.Module, str]]:
    """Every place of the parameter of that name: several if it is tied."""
    owner, _, attribute = name.rpartition(".")
    parameter = modules[owner]._parameters[attribute]
    if parameter is None:
        return [(modules[owner], attribute)]
    return [
        (module, other)
        for module in modules.values()
        for other, value in module._parameters.items()
        if value is parameter
    ]
