"""All methods by name.

Each file below :mod:`deltune.methods` that registers a class is found by itself. Methods of other packages
come in through the entry-point group ``deltune.methods`` or the environment variable ``DELTUNE_METHODS``,
which lists modules or Python files, joined by the path separator.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from deltune.errors import MethodError, suggestion
from deltune.methods.base import Method, Sum
from deltune.methods.options import split

__all__ = ["all_methods", "all_variants", "get", "parse", "register", "split_specifications", "variant"]

_REGISTERED: dict[str, type[Method]] = {}
_VARIANTS: dict[str, Method] = {}
_BRANCHES = ("selective", "additive", "reparameterized", "hybrid")
#: How an option begins.
_OPTION = re.compile(r"\s*\w+\s*=")
_loaded = False

MethodType = TypeVar("MethodType", bound=type[Method])
Named = TypeVar("Named", bound=Method)


def register(method: MethodType) -> MethodType:
    """Class decorator: make a method known under its ``name``.

    Raises:
        MethodError: if the name is taken by another class, or a class attribute is missing.
    """
    for attribute in ("name", "branch", "insertion", "paper", "learning_rate"):
        if not hasattr(method, attribute):
            raise MethodError(f"The method class {method.__name__} does not define {attribute!r}.")
    present = _REGISTERED.get(method.name)
    if present is not None and (present.__module__, present.__qualname__) != (
        method.__module__,
        method.__qualname__,
    ):
        raise MethodError(
            f"Two methods are named {method.name!r}: {present.__module__}.{present.__qualname__} and "
            f"{method.__module__}.{method.__qualname__}. Rename one."
        )
    _REGISTERED[method.name] = method
    return method


def variant(name: str, method: Named) -> Named:
    """Make a method with certain options known by a name of its own; the method itself.

    Raises:
        MethodError: if another method has that name.
    """
    if _VARIANTS.get(name, method) != method or name in _REGISTERED:
        raise MethodError(f"Two methods are named {name!r}. Rename one.")
    _VARIANTS[name] = method
    return method


def all_variants() -> dict[str, Method]:
    """Every method with certain options that has a name of its own, by that name, sorted."""
    _load()
    return dict(sorted(_VARIANTS.items()))


def all_methods() -> dict[str, type[Method]]:
    """Every known method by name, sorted by branch and name."""
    _load()
    found = sorted(
        _REGISTERED.values(), key=lambda method: ([*_BRANCHES, method.branch].index(method.branch), method.name)
    )
    return {method.name: method for method in found}


def get(name: str) -> type[Method]:
    """The method class of that name (``lora``) or class name (``LoRA``).

    Raises:
        MethodError: if there is none; the message lists the nearest.
    """
    methods = all_methods()
    by_class = {method.__name__: method for method in methods.values()}
    found = methods.get(name) or by_class.get(name)
    if found is None:
        if name in _VARIANTS:
            raise MethodError(f"{name!r} is {_VARIANTS[name]}, and has no class of its own. Name a method in it.")
        known = [*methods, *_VARIANTS]
        raise MethodError(f"There is no method {name!r}. {suggestion(name, known)} `deltune methods` lists all.")
    return found


def parse(specification: str | dict[str, Any] | Method) -> Method:
    """A method from text: ``lora``, ``lora(rank=16, alpha=32)``, a variant, or several.

    Several are a sum, ``lora + bitfit``, or a gated one, ``gated(lora, prefix-tuning(length=5), gate=scalar)``.

    Args:
        specification: text, the dictionary of :meth:`Method.to_dict`, or a method, which is returned as it is.

    Raises:
        MethodError: if the text is malformed, or names an unknown method or option.
    """
    if isinstance(specification, Method):
        return specification
    if isinstance(specification, dict):
        options = dict(specification)
        if "methods" in options:
            options["methods"] = tuple(parse(part) for part in options["methods"])
        return get(str(options.pop("name", ""))).from_options(options)
    terms = split(specification, "+")
    methods = [_parse_term(term) for term in terms]
    total = methods[0]
    for method in methods[1:]:
        total = total + method
    return total


def _parse_term(text: str) -> Method:
    match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", text, flags=re.DOTALL)
    if match is None:
        raise MethodError(f"{text!r} is no method. Write a name, or a name with options: lora(rank=16, alpha=32).")
    name, inside = match.groups()
    named = all_variants().get(name)
    kind = get(name) if named is None else type(named)
    options: dict[str, Any] = {}
    of_methods = named is None and issubclass(kind, Sum)
    pieces = split_specifications(inside or "") if of_methods else _split_options(inside or "")
    if of_methods:
        options["methods"] = tuple(parse(piece) for piece in pieces if not _OPTION.match(piece))
        pieces = [piece for piece in pieces if _OPTION.match(piece)]
    for piece in pieces:
        if not piece.strip():
            continue
        key, equals, value = piece.partition("=")
        if not equals:
            raise MethodError(f"{piece.strip()!r} in {text!r} is no option. Write option=value, such as rank=16.")
        options[key.strip().replace("-", "_")] = value.strip().strip("'\"")
    if named is None:
        return kind.from_options(options)
    if not options:
        return named
    if len(named.parts) > 1:
        raise MethodError(f"{name} is {named}. Write that, with the options where they belong.")
    return type(named).from_options({**_values(named), **options})


def _values(method: Method) -> dict[str, Any]:
    return {item.name: getattr(method, item.name) for item in dataclasses.fields(method)}


def split_specifications(text: str) -> list[str]:
    """Split a list of methods at the commas that are not inside parentheses or quotes.

    Example:
        >>> split_specifications("full, lora(rank=8, alpha=16),bitfit")
        ['full', 'lora(rank=8, alpha=16)', 'bitfit']
    """
    return [piece.strip() for piece in split(text, ",") if piece.strip()]


def _split_options(text: str) -> list[str]:
    """Split options at their commas.

    One that is not followed by ``name=`` belongs to the value before it
    (``targets=attention.query,attention.value``).
    """
    options: list[str] = []
    for piece in split(text, ","):
        if options and piece.strip() and not _OPTION.match(piece):
            options[-1] += f",{piece}"
        else:
            options.append(piece)
    return options


def _load() -> None:
    """Import every file below this package, then the methods of others, once."""
    global _loaded  # noqa: PLW0603
    if _loaded:
        return
    _loaded = True
    for module in pkgutil.walk_packages([str(Path(__file__).parent)], "deltune.methods."):
        importlib.import_module(module.name)
    for entry in entry_points(group="deltune.methods"):
        entry.load()
    for item in filter(None, os.environ.get("DELTUNE_METHODS", "").split(os.pathsep)):
        _load_other(item)


def _load_other(item: str) -> None:
    path = Path(item)
    if path.suffix != ".py":
        importlib.import_module(item)
        return
    if not path.is_file():
        raise MethodError(f"DELTUNE_METHODS names {item!r}, which does not exist.")
    name = path.stem
    if any(inspect.getfile(method) == str(path) for method in _REGISTERED.values()):
        return
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)


register(Sum)
