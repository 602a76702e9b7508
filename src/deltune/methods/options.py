"""Hyperparameters of methods: declared with help and bounds, read from text, checked when built."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import field
from typing import Any, get_args, get_origin

from deltune.backbone import Targets
from deltune.errors import MethodError, suggestion

__all__ = ["check", "check_steps", "converted", "fits", "number_of_steps", "option", "split", "type_name"]


def option(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    choices: Iterable[str] = (),
    exclusive: bool = False,
) -> Any:
    """A hyperparameter: its default, one sentence of help, and its bounds, checked when a method is built.

    Args:
        default: the value where none is given.
        help: one sentence, shown on the command line and on the method's page.
        minimum: smallest valid number (with ``exclusive``: the value must be greater).
        maximum: greatest valid number.
        choices: the valid words.
        exclusive: whether ``minimum`` itself is invalid.
    """
    metadata = {
        "help": help,
        "minimum": minimum,
        "maximum": maximum,
        "choices": tuple(choices),
        "exclusive": exclusive,
    }
    return field(default=default, metadata=metadata)


def check(owner: str, item: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    """Refuse a value of the wrong type or out of bounds.

    Raises:
        MethodError: naming ``owner``, the option, what was given and what is valid.
    """
    label = f"{owner}: {item.name}"
    if not fits(value, hint):
        raise MethodError(f"{label} must be {type_name(hint)}, not {value!r}.")
    choices = item.metadata.get("choices", ())
    if choices and value not in choices:
        raise MethodError(f"{label} cannot be {value!r}. {suggestion(str(value), choices)}")
    minimum, maximum = item.metadata.get("minimum"), item.metadata.get("maximum")
    if value is None or not isinstance(value, int | float):
        return
    exclusive = item.metadata.get("exclusive", False)
    if minimum is not None and (value < minimum or (exclusive and value == minimum)):
        raise MethodError(f"{label} must be {'greater than' if exclusive else 'at least'} {minimum}, not {value}.")
    if maximum is not None and value > maximum:
        raise MethodError(f"{label} must be at most {maximum}, not {value}.")


def check_steps(owner: str, **values: float) -> None:
    """Refuse what is neither a share of all steps, below 1, nor a number of steps.

    Raises:
        MethodError: naming ``owner`` and the option.
    """
    for label, value in values.items():
        if value >= 1 and value != int(value):
            raise MethodError(f"{owner}: {label} is {value}: give a share below 1, or a whole number of steps.")


def number_of_steps(value: float, total: int) -> int:
    """A number of steps, given as such or, below 1, as a share of ``total``."""
    return int(value if value >= 1 else value * total)


def _members(hint: Any) -> tuple[Any, ...]:
    """The members of a union type; the type alone otherwise."""
    arguments = get_args(hint)
    return arguments if arguments and get_origin(hint) is not tuple else (hint,)


def converted(value: Any, hint: Any) -> Any:
    """Text, as typed on a command line or in a file, as the value that the type asks for."""
    members = _members(hint)
    if type(None) in members and isinstance(value, str) and value.strip().lower() in ("none", "null"):
        return None
    if Targets in members:
        return Targets.parse(value) if value is not None else value
    if not isinstance(value, str):
        if float in members and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, list) and any(get_origin(member) is tuple for member in members):
            return tuple(value)
        return value
    text = value.strip()
    if bool in members and text.lower() in ("true", "false", "yes", "no"):
        return text.lower() in ("true", "yes")
    for kind in (int, float):
        if kind in members:
            try:
                return kind(text)
            except ValueError:
                continue
    if any(get_origin(member) is tuple for member in members):
        return tuple(piece.strip() for piece in split(text, ",") if piece.strip())
    return value


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of the type, or of one member of a union."""
    for member in _members(hint):
        kind = get_origin(member) or member
        if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
            return True
        if kind is int and isinstance(value, bool):
            continue
        if isinstance(value, kind):
            return True
    return False


def type_name(hint: Any) -> str:
    """The type in plain words."""
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a word",
        Targets: "targets",
    }
    words = [names.get(member, "nothing" if member is type(None) else "a list") for member in _members(hint)]
    return " or ".join(words)


def split(text: str, separator: str) -> list[str]:
    """Split at ``separator`` where it stands outside of parentheses and quotes."""
    pieces, depth, quote = [""], 0, ""
    for character in text:
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"":
            quote = character
        elif character in "([":
            depth += 1
        elif character in ")]":
            depth -= 1
        elif character == separator and depth == 0:
            pieces.append("")
            continue
        pieces[-1] += character
    return pieces
