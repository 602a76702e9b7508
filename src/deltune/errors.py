"""Errors that deltune raises for people.

Each message says what was given, what was expected, the nearest valid choice where there is one, and
what to do. The command line prints the message alone, without a traceback, and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CheckpointError",
    "DataError",
    "DeltuneError",
    "MethodError",
    "StateError",
    "TargetError",
    "TrainingError",
    "nearest",
    "suggestion",
]


class DeltuneError(Exception):
    """Base of every error that deltune raises on purpose."""


class MethodError(DeltuneError, ValueError):
    """A method does not exist, has no such option, or an option's value makes no sense."""


class TargetError(DeltuneError, ValueError):
    """A target expression is malformed, or selects nothing in this model."""


class DataError(DeltuneError, ValueError):
    """Data cannot be read, lacks a column, or holds values that the task cannot use."""


class CheckpointError(DeltuneError, ValueError):
    """A saved delta is missing, damaged, or belongs to another model or method."""


class StateError(DeltuneError, RuntimeError):
    """An operation is not possible in the present state, such as merging twice."""


class TrainingError(DeltuneError, RuntimeError):
    """Training cannot go on, for example because the loss is not a number."""


def nearest(word: str, choices: Iterable[str], limit: int = 3) -> list[str]:
    """The choices closest in spelling to ``word``, best first; at most ``limit``, possibly none."""
    options = list(choices)
    lowered = {option.lower(): option for option in options}
    found = difflib.get_close_matches(word.lower(), lowered, n=limit, cutoff=0.4)
    return [lowered[option] for option in found]


def suggestion(word: str, choices: Iterable[str], limit: int = 3) -> str:
    """A sentence that names the nearest choices, or all of them where none is near and they are few."""
    options = list(choices)
    found = nearest(word, options, limit)
    if found:
        return f"Did you mean {' or '.join(repr(option) for option in found)}?"
    if len(options) <= 12:
        return f"Choose from: {', '.join(options)}." if options else "There is nothing to choose from."
    return f"There are {len(options)} choices, the first of them: {', '.join(options[:8])}."
