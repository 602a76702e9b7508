"""Target expressions for modules that are known by name, as other libraries' files have them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import product

from torch import nn

from deltune.backbone import Anatomy, Targets, place_lookup
from deltune.errors import CheckpointError, MethodError, TargetError
from deltune.methods import Method
from deltune.sites import ParameterSite, WeightSite, weight_sites
from deltune.sites.weight import Kind

__all__ = ["method_selecting", "sites_at"]

#: Roles that are no module of their own in every model, or hold other parts.
_NO_MODULES = ("attention", "ffn", "layer")


def _expressions(modules: Sequence[str], anatomy: Anatomy) -> Iterator[Targets]:
    """Expressions that may select exactly these modules, the most general first: roles, endings of names, names."""
    by_module = {
        part.module: part for part in anatomy if part.rows is None and part.role not in (*_NO_MODULES, "module")
    }
    place_of = place_lookup(anatomy)
    parts = [by_module.get(module) for module in modules]
    places = [
        place_of(module) if part is None else (part.stack, part.layer)
        for module, part in zip(modules, parts, strict=True)
    ]
    numbers = {layer for _, layer in places}
    layers = tuple(str(number) for number in sorted(number for number in numbers if number is not None))
    some_layers = ((), layers) if None not in numbers else ((),)
    stacks = tuple(dict.fromkeys(stack for stack, _ in places if stack))
    some_stacks = ((), stacks) if all(stack for stack, _ in places) else ((),)
    endings = tuple(dict.fromkeys(module.rpartition(".")[2] for module in modules))
    names = [endings]
    if all(part is not None for part in parts):
        names.insert(0, tuple(dict.fromkeys(part.role for part in parts if part is not None)))
    for chosen, of_layers, of_stacks in product(names, some_layers, some_stacks):
        yield Targets(chosen, of_layers, of_stacks)
    yield Targets(tuple(modules))


def sites_at(
    modules: Collection[str], model: nn.Module, anatomy: Anatomy, kinds: Sequence[Kind]
) -> tuple[Targets, dict[str, WeightSite]]:
    """A target expression for exactly these modules, and the sites of their whole matrices by module.

    Args:
        modules: full names.
        model: the model.
        anatomy: its parts.
        kinds: what they may be.

    Raises:
        CheckpointError: if a module is of another kind, or no expression selects them alone.
    """
    reason = ""
    for targets in _expressions(sorted(modules, key=_natural(model)), anatomy):
        try:
            sites = weight_sites(model, anatomy, targets, kinds)
        except TargetError as error:
            reason = f" {error}"
            continue
        found = {site.module: site for site in sites if site.rows is None}
        if len(sites) == len(found) and found.keys() == set(modules):
            return targets, found
    raise CheckpointError(f"No target expression selects exactly {_some(modules)}.{reason}")


def method_selecting(
    build: Callable[[Targets | None], Method],
    parameters: Collection[str],
    model: nn.Module,
    anatomy: Anatomy,
    everything: bool = False,
) -> Method:
    """The method that selects exactly these of the model's own parameters.

    Args:
        build: the method for a target expression.
        parameters: full names.
        model: the model.
        anatomy: its parts.
        everything: whether it may do without an expression.

    Raises:
        CheckpointError: if no expression selects them alone.
    """
    modules = sorted({name.rpartition(".")[0] for name in parameters}, key=_natural(model))
    first: list[Targets | None] = [None] if everything else []
    for targets in (*first, *_expressions(modules, anatomy)):
        method = build(targets)
        try:
            sites = [placement.site for placement in method.place(model, anatomy)]
        except (TargetError, MethodError):
            continue
        if {site.name for site in sites if isinstance(site, ParameterSite)} == set(parameters):
            return method
    raise CheckpointError(f"No target expression selects exactly the parameters {_some(parameters)}.")


def _natural(model: nn.Module) -> Callable[[str], int]:
    """The order of the model's modules."""
    order = {name: number for number, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    return lambda name: order.get(name, len(order))


def _some(names: Collection[str]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "")
