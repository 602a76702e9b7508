"""The tags of a dataset: read, checked against the words and against a scheme, and turned into positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from deltune.errors import DataError, suggestion
from deltune.tasks._spans import BIO, IOB1, OUTSIDE, is_tag, needless_begin, stray_inside, to_bio
from deltune.tasks._words import read_lists

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["check_label_names", "positions_of", "read_tags", "scheme_of"]

#: Letters that begin the tags of schemes which are not read.
_OTHER_LETTERS = {"E": "BIOES", "S": "BIOES", "L": "BILOU", "U": "BILOU"}


def read_tags(dataset: Dataset, column: str, words: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """The tags of all rows as they are written in the data.

    Args:
        dataset: the data.
        column: name of the column of tags.
        words: the words of the same rows.
        names: the tags that whole numbers stand for, where the column itself names none.

    Raises:
        DataError: A row has not as many tags as words, or an item is no tag.
    """
    names = _class_names(dataset, column) or names
    rows = []
    for row, (items, row_words) in enumerate(zip(read_lists(dataset, column, "tags"), words, strict=True), start=1):
        if len(items) != len(row_words):
            raise DataError(
                f"Row {row} has {len(row_words)} words and, in column {column!r}, {len(items)} tags. Give one tag for "
                "each word."
            )
        rows.append(
            [
                _tag(item, names, f"Row {row}, column {column!r}: the tag of word {place}, {word!r}, is")
                for place, (item, word) in enumerate(zip(items, row_words, strict=True), start=1)
            ]
        )
    return rows


def _tag(item: Any, names: Sequence[str], where: str) -> str:
    """One tag as text; ``where`` begins the sentence of an error."""
    if isinstance(item, int) and not isinstance(item, bool):
        if not names:
            raise DataError(
                f"{where} the number {item}, and nothing says which tag that is. Give the tags in their order with "
                "label_names, such as O,B-person,I-person."
            )
        if not 0 <= item < len(names):
            raise DataError(
                f"{where} the number {item}, which is out of range: there are {len(names)} tags, 0 to "
                f"{len(names) - 1} ({', '.join(names[:12])}). Correct it or remove the row."
            )
        item = names[item]
    if not isinstance(item, str):
        raise DataError(f"{where} {item!r} ({type(item).__name__}), where text is expected.")
    if not is_tag(item):
        other = _OTHER_LETTERS.get(item[:1]) if item[1:2] in ("", "-") else None
        raise DataError(
            f"{where} {item!r}. Tags are O, B-type or I-type (BIO or IOB1). "
            + (
                f"These look like {other}: convert them to BIO."
                if other
                else "Tags of single words, such as parts of speech, are not spans and cannot be learned by this task."
            )
        )
    return item


def scheme_of(rows: Sequence[Sequence[str]], column: str) -> str:
    """The scheme that the tags of all rows follow: BIO if they can, else IOB1.

    Raises:
        DataError: They follow neither, because some spans begin with ``I-`` and others needlessly with ``B-``.
    """
    found = ((row, stray_inside(tags)) for row, tags in enumerate(rows))
    first = next(((row, place) for row, place in found if place is not None), None)
    if first is None:
        return BIO
    for tags in rows:
        begun = needless_begin(tags)
        if begun is not None:
            raise _stray(
                rows[first[0]],
                *first,
                column,
                f"but other spans begin with {tags[begun]!r}. That is neither BIO nor IOB1.",
            )
    return IOB1


def positions_of(rows: Sequence[Sequence[str]], scheme: str, names: Sequence[str], column: str) -> list[list[int]]:
    """The tags of all rows, rewritten as BIO, by their positions among ``names``.

    Raises:
        DataError: A tag is not among them, or breaks the scheme.
    """
    places = {name: place for place, name in enumerate(names)}
    found = []
    for row, tags in enumerate(rows):
        wrong = stray_inside(tags) if scheme == BIO else None
        if wrong is not None:
            raise _stray(tags, row, wrong, column, "which the scheme BIO forbids.")
        written = to_bio(tags)
        for place, tag in enumerate(written):
            if tag not in places:
                raise DataError(
                    f"Row {row + 1}, column {column!r}: the tag of word {place + 1} is {tags[place]!r}, which is not "
                    f"one of the task's tags: the training data have no such type. {suggestion(tag, names)}"
                )
        found.append([places[tag] for tag in written])
    return found


def check_label_names(names: Any) -> None:
    """Refuses names with which spans cannot be written as BIO."""
    if not isinstance(names, tuple) or not all(isinstance(name, str) and is_tag(name) for name in names):
        raise DataError(f"label_names must be a tuple of tags (O, B-type and I-type), not {names!r}.")
    if not names:
        raise DataError(
            "The tags are not known. Use TokenTagging.from_data(training_data), or give label_names, such as "
            "('O', 'B-person', 'I-person')."
        )
    if len(set(names)) != len(names):
        raise DataError(f"label_names repeat a tag: {', '.join(names)}. Give each tag once.")
    needed = [OUTSIDE, *(f"B{name[1:]}" for name in names if name != OUTSIDE)]
    missing = [name for name in dict.fromkeys(needed) if name not in names] or (["B-type"] if len(names) == 1 else [])
    if missing:
        raise DataError(
            f"label_names {', '.join(names)} lack {', '.join(missing)}. Spans are learned as BIO, which needs O, and a "
            "tag that begins with B for each type."
        )


def _stray(tags: Sequence[str], row: int, place: int, column: str, problem: str) -> DataError:
    """The error for an ``I-`` at ``place`` of ``row``, both counting from 0, that continues nothing."""
    before = f"behind {tags[place - 1]!r}" if place else "at the beginning"
    return DataError(
        f"Row {row + 1}, column {column!r}: the tag of word {place + 1} is {tags[place]!r} {before}, {problem} Correct "
        "the tags; or give scheme='IOB1' (--scheme IOB1), by which such a tag begins a span."
    )


def _class_names(dataset: Dataset, column: str) -> Sequence[str]:
    """The names that a column of lists of ``ClassLabel`` carries."""
    from datasets import ClassLabel

    item = getattr(dataset.features[column], "feature", None)
    return tuple(item.names) if isinstance(item, ClassLabel) else ()
