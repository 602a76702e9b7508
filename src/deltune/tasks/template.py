"""A small language for cloze templates: text with columns, pseudo tokens, and the place of the answer.

The grammar::

    {sentence} [P3] It was [MASK].

* ``{name}`` is the text of the column ``name``;
* ``[P]`` is a pseudo token, ``[P3]`` three of them: input positions whose embeddings a method makes;
* ``[MASK]`` is the place of the answer. A masked language model reads its mask token there. A decoder predicts the
  token that comes next, so there the template ends: with ``[MASK]`` or without it;
* everything else is text as it stands, the *anchors* of Liu et al. 2021 among it. ``{{``, ``}}``, ``[[`` and ``]]``
  stand for single braces and brackets.

White space next to ``[P]``, ``[MASK]`` and the ends is no token of its own. What it does is to say whether the text
behind it begins a word.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from deltune.errors import DataError, suggestion

__all__ = ["FIRST_PSEUDO_TOKEN", "Column", "Mask", "Piece", "PseudoTokens", "Template", "Text"]

#: Id of the first pseudo token of a row; the next ones follow. Beyond every vocabulary, so that no token is mistaken
#: for one, and the same for all models, so that encoded data do not depend on the size of an embedding table.
FIRST_PSEUDO_TOKEN = 1 << 24

_MARKER = re.compile(r"P(\d*)")
_WORDS = ("[P]", "[P3]", "[MASK]")
_BRACKETS = {"{": "}", "[": "]"}


@dataclass(frozen=True)
class Text:
    """Text that stands in every row."""

    text: str


@dataclass(frozen=True)
class Column:
    """The text of a column of the data."""

    name: str


@dataclass(frozen=True)
class PseudoTokens:
    """So many pseudo tokens, one after the other."""

    count: int


@dataclass(frozen=True)
class Mask:
    """The place of the answer."""


Piece = Text | Column | PseudoTokens | Mask


@dataclass(frozen=True)
class Template:
    """A template that has been read.

    Attributes:
        pieces: its parts in order; two texts never follow one another.
        source: the template as it was written.
    """

    pieces: tuple[Piece, ...]
    source: str

    @classmethod
    def parse(cls, text: str) -> Template:
        """Read a template.

        Raises:
            DataError: A brace or bracket has no partner, a marker is unknown, no column is named, or there is more than
                one ``[MASK]``.
        """
        return _parsed(text)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that the template reads, each once, in order."""
        return tuple(dict.fromkeys(piece.name for piece in self.pieces if isinstance(piece, Column)))

    @property
    def pseudo_tokens(self) -> int:
        """P, the number of pseudo tokens."""
        return sum(piece.count for piece in self.pieces if isinstance(piece, PseudoTokens))

    @property
    def has_mask(self) -> bool:
        """Whether the place of the answer is marked."""
        return Mask() in self.pieces

    def for_masked(self) -> Template:
        """The template itself, if a masked language model can use it.

        Raises:
            DataError: It has no ``[MASK]``.
        """
        if not self.has_mask:
            raise DataError(
                f"The template {self.source!r} has no [MASK], so a masked language model has no place to answer at. "
                "Write [MASK] where the label's word belongs, such as '{text} It was [MASK].'"
            )
        return self

    def for_causal(self) -> Template:
        """The template as a decoder reads it: what comes before the answer.

        Raises:
            DataError: Something follows ``[MASK]``, which a decoder would not have read when it answers.
        """
        if not self.has_mask:
            return self
        pieces = self.pieces if not _is_blank(self.pieces[-1]) else self.pieces[:-1]
        if pieces[-1] != Mask():
            raise DataError(
                f"In the template {self.source!r} something follows [MASK]. A decoder answers with the next token and "
                "has not read what follows, so end the template there, such as '{text} It was [MASK]'."
            )
        return Template(pieces[:-1], self.source)


def _is_blank(piece: Piece) -> bool:
    return isinstance(piece, Text) and not piece.text.strip()


@lru_cache(maxsize=64)
def _parsed(text: str) -> Template:
    if not isinstance(text, str):
        raise DataError(f"A template is text such as '{{text}} It was [MASK].', not {text!r}.")
    pieces: list[Piece] = []
    plain, place = "", 0
    while place < len(text):
        character = text[place]
        if character in "{}[]" and text[place : place + 2] == 2 * character:
            plain, place = plain + character, place + 2
            continue
        if character in _BRACKETS.values():
            raise DataError(
                f"Position {place + 1} of the template {text!r} has {character!r} without a partner. Write it twice, "
                f"{2 * character!r}, if it is text."
            )
        if character not in _BRACKETS:
            plain, place = plain + character, place + 1
            continue
        end = text.find(_BRACKETS[character], place)
        if end < 0:
            raise DataError(
                f"The {character!r} at position {place + 1} of the template {text!r} is never closed. Close it with "
                f"{_BRACKETS[character]!r}, or write it twice, {2 * character!r}, if it is text."
            )
        if plain:
            pieces.append(Text(plain))
            plain = ""
        inside = text[place + 1 : end]
        pieces.append(_column(inside, text) if character == "{" else _marker(inside, text))
        place = end + 1
    if plain:
        pieces.append(Text(plain))
    found = Template(tuple(pieces), text)
    if not found.columns:
        raise DataError(
            f"The template {text!r} reads no column, so that every row would look the same. Name one in braces, such "
            "as {text}."
        )
    if pieces.count(Mask()) > 1:
        raise DataError(f"The template {text!r} has {pieces.count(Mask())} [MASK]. An answer has one place: keep one.")
    return found


def _column(inside: str, template: str) -> Column:
    name = inside.strip()
    if not name or any(character in name for character in "{[]"):
        raise DataError(
            f"{{{inside}}} in the template {template!r} names no column. Write the name of a data column in braces, "
            "such as {text}; braces and brackets that are text are written twice."
        )
    return Column(name)


def _marker(inside: str, template: str) -> PseudoTokens | Mask:
    if inside == "MASK":
        return Mask()
    match = _MARKER.fullmatch(inside)
    if match is None:
        raise DataError(
            f"The template {template!r} has the unknown marker [{inside}]. {suggestion(f'[{inside}]', _WORDS)} "
            f"Brackets that are text are written twice: [[{inside}]]."
        )
    count = int(match.group(1) or 1)
    if not 1 <= count <= FIRST_PSEUDO_TOKEN:
        raise DataError(f"[{inside}] in the template {template!r} makes {count} pseudo tokens. Write [P] for one.")
    return PseudoTokens(count)
