"""Spans of words and the tags that write them: BIO and IOB1.

``O`` is a word outside of all spans, ``B-type`` the first word of a span, ``I-type`` a further one. Ramshaw and Marcus
(1995, arXiv cmp-lg/9505040) begin a span with ``I-`` unless it follows another of its type at once (here IOB1); BIO,
also called IOB2, begins every span with ``B-``. Where there is one type only, the tags may be ``B`` and ``I`` alone.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

__all__ = [
    "BIO",
    "IOB1",
    "OUTSIDE",
    "SCHEMES",
    "Span",
    "is_tag",
    "label_set",
    "needless_begin",
    "spans_of",
    "stray_inside",
    "to_bio",
]

OUTSIDE = "O"
BIO = "BIO"
IOB1 = "IOB1"
SCHEMES = (BIO, IOB1)

_TAG = re.compile(r"O|[BI](-.+)?", re.DOTALL)
#: Type of spans whose tags name none.
_NO_TYPE = "_"


class Span(NamedTuple):
    """Words ``start`` to ``end`` (not included), counting from 0, and the type of the span that they are."""

    type: str
    start: int
    end: int


def is_tag(tag: str) -> bool:
    """Whether ``tag`` is ``O``, ``B`` or ``I``, the latter two perhaps with a type."""
    return _TAG.fullmatch(tag) is not None


def spans_of(tags: Sequence[str]) -> list[Span]:
    """The spans of a row, in order, read as the CoNLL script ``conlleval`` does.

    ``B-`` begins a span; ``I-`` continues one of its own type and otherwise begins one. This reads BIO and IOB1 alike,
    and whatever a model predicts.
    """
    spans: list[Span] = []
    begun: int | None = None
    for place, tag in enumerate([*tags, OUTSIDE]):
        if begun is not None and not _continues(tags[place - 1], tag):
            spans.append(Span(tags[begun][2:] or _NO_TYPE, begun, place))
            begun = None
        if begun is None and tag != OUTSIDE:
            begun = place
    return spans


def to_bio(tags: Sequence[str]) -> list[str]:
    """The same spans in BIO: their first words get ``B-``."""
    written = list(tags)
    for span in spans_of(tags):
        written[span.start] = f"B{tags[span.start][1:]}"
    return written


def stray_inside(tags: Sequence[str]) -> int | None:
    """Position of the first ``I-`` that continues no span, which BIO forbids; none if there is none."""
    return next((span.start for span in spans_of(tags) if tags[span.start].startswith("I")), None)


def needless_begin(tags: Sequence[str]) -> int | None:
    """Position of the first ``B-`` that stands behind no span of its type, which IOB1 forbids; none if none."""
    for place, tag in enumerate(tags):
        if tag.startswith("B") and (place == 0 or tags[place - 1] == OUTSIDE or tags[place - 1][1:] != tag[1:]):
            return place
    return None


def label_set(tags: Iterable[str]) -> tuple[str, ...]:
    """``O``, then ``B-`` and ``I-`` of every type that occurs, types in alphabetical order.

    Both tags of a type are there even if one does not occur: other data of the same kind may have it.
    """
    types = sorted({tag[1:] for tag in tags if tag != OUTSIDE})
    return (OUTSIDE, *(f"{letter}{kind}" for kind in types for letter in "BI"))


def _continues(before: str, tag: str) -> bool:
    """Whether a word belongs to the span of the word before it, which is in one."""
    return tag.startswith("I") and before[1:] == tag[1:]
