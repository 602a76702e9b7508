"""What a folder holds of the model's own parameters: the task head, biases, modules that were trained whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from deltune.checkpoints.expressions import method_selecting
from deltune.checkpoints.peft.contents import Contents
from deltune.errors import CheckpointError
from deltune.methods import Method
from deltune.methods.selective.bitfit import BitFit
from deltune.methods.selective.full_finetuning import FullFineTuning

__all__ = ["read_selected"]


def read_selected(
    contents: Contents, added: Mapping[str, Tensor]
) -> tuple[list[Method], dict[str, Tensor], frozenset[str]]:
    """Take all tensors that are left.

    Args:
        contents: the folder.
        added: what is added to the biases of modules, by module.

    Returns:
        Methods that select the parameters beside the head, all values by full name, names of those of the head.

    Raises:
        CheckpointError: if a tensor is of no parameter of the model, or its parameter cannot be selected alone.
    """
    heads = tuple(f"{name}." for name in contents.anatomy.head)
    values: dict[str, Tensor] = {}
    head: set[str] = set()
    changed: set[str] = set()
    for key, module, attribute, value in contents.plain():
        own = None if module is None else contents.modules[module]._parameters.get(attribute)
        name = f"{module}.{attribute}"
        if own is None and _of_a_head(key, contents):
            head.add(key)
            values[key] = value
        elif own is None:
            contents.unexpected(key)
        elif contents.fits(key, value, tuple(own.shape)):
            if name.startswith(heads):
                head.add(name)
            elif ".base_layer." in key:
                # an embedding, which peft stores beside its change and reads into the model's own
                if torch.equal(value.to(own), own.detach()):
                    continue
                changed.add(name)
            values[name] = value
    contents.finish()
    _refuse_tied(contents, {name: value for name, value in values.items() if name not in changed})
    _complete_head(contents, values, head)
    for module, bias in added.items():
        name, own = f"{module}.bias", contents.modules[module]._parameters.get("bias")
        before = values.get(name, own)
        values[name] = bias if before is None else before.detach().to(bias) + bias
    return (
        _methods(contents, {name: value for name, value in values.items() if name not in head}),
        values,
        frozenset(head),
    )


def _of_a_head(key: str, contents: Contents) -> bool:
    """Whether a tensor that the model has no place for is of a head that it lacks."""
    names = (*(contents.config.get("modules_to_save") or ()), "classifier", "score")
    return any(f".{name}." in key for name in names)


def _refuse_tied(contents: Contents, values: Mapping[str, Tensor]) -> None:
    """Refuse a parameter that was trained apart from one that it is tied to in this model.

    Raises:
        CheckpointError: if there is one.
    """
    for name in values:
        owner, _, attribute = name.rpartition(".")
        own = contents.modules[owner]._parameters.get(attribute) if owner in contents.modules else None
        others = [
            f"{module}.{other}"
            for module, holder in contents.modules.items()
            for other, value in holder._parameters.items()
            if value is own and own is not None and f"{module}.{other}" != name
        ]
        apart = [other for other in others if other not in values or not torch.equal(values[other], values[name])]
        if apart:
            raise CheckpointError(
                f"{contents.folder} has values of {name} alone, which is tied to {apart[0]} in this model. Load the "
                "model with tie_word_embeddings=False."
            )


def _complete_head(contents: Contents, values: dict[str, Tensor], head: set[str]) -> None:
    """Where the folder has a part of the head alone, the rest stays as it is in the model."""
    if not head:
        return
    rest = [
        f"{module}.{name}"
        for module in contents.anatomy.head
        for name, _ in contents.modules[module].named_parameters()
        if f"{module}.{name}" not in values
    ]
    for name in rest:
        owner, _, attribute = name.rpartition(".")
        values[name] = contents.modules[owner].get_parameter(attribute).detach().clone()
        head.add(name)
    if rest:
        contents.notes.append(
            f"it holds a part of the task head alone; {', '.join(rest)} stay as they are in the model."
        )


def _methods(contents: Contents, names: Iterable[str]) -> list[Method]:
    """Methods that select exactly these parameters: biases as such, all of a module's parameters together."""
    by_module: dict[str, set[str]] = {}
    for name in names:
        owner, _, attribute = name.rpartition(".")
        by_module.setdefault(owner, set()).add(attribute)
    whole: list[str] = []
    biases: list[str] = []
    for module, attributes in by_module.items():
        own: Any = {name for name, value in contents.modules[module]._parameters.items() if value is not None}
        if attributes == own and attributes != {"bias"}:
            whole.extend(f"{module}.{attribute}" for attribute in attributes)
        elif attributes == {"bias"}:
            biases.append(f"{module}.bias")
        else:
            raise CheckpointError(
                f"{contents.folder} has values of {', '.join(sorted(attributes))} of {module}, but not of its other "
                "parameters, which deltune cannot train apart."
            )
    model, anatomy = contents.model, contents.anatomy
    methods: list[Method] = []
    if biases:
        absent = any(contents.modules[name.rpartition(".")[0]]._parameters["bias"] is None for name in biases)
        missing = "add" if absent else "refuse"
        methods.append(
            method_selecting(
                lambda targets: BitFit(missing=missing, targets=targets), biases, model, anatomy, everything=True
            )
        )
    if whole:
        methods.append(method_selecting(lambda targets: FullFineTuning(targets=targets), whole, model, anatomy))
    return methods
