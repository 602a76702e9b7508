"""What a method is made of, as far as merging goes: the terms of its sum."""

from __future__ import annotations

from dataclasses import dataclass

from deltune.methods import Method, Preset, Sum
from deltune.methods.hybrid.gated import Gated

__all__ = ["Term", "term_of", "terms"]


@dataclass(frozen=True)
class Term:
    """A method that is merged by itself.

    Attributes:
        path: the numbers of parts that stand before its keys: ``1.`` or ``0.2.``; none if it is no part of a sum.
        method: it. A gated sum is one term, as its changes depend on the input and on each other's gates.
    """

    path: str
    method: Method

    @property
    def gated(self) -> bool:
        """Whether all that it changes is multiplied by gates."""
        return isinstance(self.method, Gated)


def terms(method: Method, path: str = "") -> tuple[Term, ...]:
    """The terms of a sum, of sums inside of it, and of presets; one for any other method.

    Args:
        method: as it is stored.
        path: what stands before its own keys.
    """
    while isinstance(method, Preset):
        method = method.whole
    if isinstance(method, Gated) or not isinstance(method, Sum):
        return (Term(path, method),)
    return tuple(term for number, part in enumerate(method.methods) for term in terms(part, f"{path}{number}."))


def term_of(method: Method, key: str) -> Term:
    """The term of ``method`` whose form, or gate, has this key."""
    return next(term for term in terms(method) if key.startswith(term.path))
