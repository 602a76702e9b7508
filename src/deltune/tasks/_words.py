"""Rows of words: reading them, and their tokens."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from deltune.errors import DataError
from deltune.tasks._columns import wrong_type
from deltune.tasks._encoding import EncodingReport
from deltune.tasks._spans import OUTSIDE
from deltune.tasks._tokens import CHUNK
from deltune.tasks.collation import Collator

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

__all__ = [
    "CUT",
    "WORDS",
    "WORD_STARTS",
    "TokenizedWords",
    "WordCollator",
    "WordReport",
    "read_lists",
    "read_words",
    "tokenize_words",
]

logger = logging.getLogger(__name__)

CUT = -1
"""Position of a word that was cut off."""

WORDS = "words"
"""Column of the words themselves in rows that were encoded to predict from."""

WORD_STARTS = "word_starts"
"""Column beside it: positions of the words' first tokens, ``CUT`` for words that were cut off."""


@dataclass(frozen=True)
class WordReport(EncodingReport):
    """Counts of one encoding of words.

    Attributes:
        words: Words given.
        cut_words: Words that were cut off, because their rows are too long.
    """

    words: int = 0
    cut_words: int = 0

    def sentence(self) -> str:
        """One line for people: rows, tokens, and how many words were cut."""
        text = super().sentence()
        if self.cut_words:
            text += (
                f"; {self.cut_words} of {self.words} words cut: they are neither learned nor measured, and their "
                f"predicted tag is {OUTSIDE!r}. Raise max_length, or divide long rows, to keep them"
            )
        return text


@dataclass(frozen=True, kw_only=True)
class WordCollator(Collator):
    """Leaves out the columns of words, which are not for the model."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Builds a batch, as ``Collator`` does."""
        return super().__call__(
            [{name: value for name, value in row.items() if name not in (WORDS, WORD_STARTS)} for row in rows]
        )


class TokenizedWords(NamedTuple):
    """The tokens of a row of words.

    Attributes:
        columns: ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``; equally long.
        starts: position of the first token of each word, ``CUT`` for those that were cut off.
        truncated: whether tokens were cut off, be it only the end of the last word.
    """

    columns: dict[str, list[int]]
    starts: list[int]
    truncated: bool


def read_lists(dataset: Dataset, column: str, items: str) -> list[list[Any]]:
    """A column of lists; text counts as the list of its pieces between white space.

    Args:
        dataset: the data.
        column: name of the column.
        items: what the lists hold, for messages.

    Raises:
        DataError: A value is missing, empty, or no such list; or one of a list's items is missing or a list itself.
    """
    found = []
    for row, value in enumerate(dataset[column], start=1):
        if value is None:
            raise DataError(f"Row {row} has no value in column {column!r}. Fill it in or remove the row.")
        values = value.split() if isinstance(value, str) else value
        if not isinstance(values, list):
            raise wrong_type(value, row, column, f"a list of {items}, or text with blanks between them, is")
        if not values:
            raise DataError(f"Row {row} has no {items} in column {column!r}. Fill them in or remove the row.")
        for place, item in enumerate(values, start=1):
            if item is None:
                raise DataError(f"Row {row}, column {column!r}: item {place} has no value. Fill it in or remove it.")
            if isinstance(item, list):
                raise DataError(
                    f"Row {row}, column {column!r}: item {place} is itself a list, {_short(item)}. Give one flat list "
                    f"of {items} a row, such as one for each sentence."
                )
        found.append(values)
    return found


def read_words(dataset: Dataset, column: str) -> list[list[str]]:
    """A column of words.

    Raises:
        DataError: As :func:`read_lists`, or a word is no text, or is blank.
    """
    rows = read_lists(dataset, column, "words")
    for row, words in enumerate(rows, start=1):
        for place, word in enumerate(words, start=1):
            if not isinstance(word, str):
                raise DataError(
                    f"Row {row}, column {column!r}: word {place} is {word!r} ({type(word).__name__}), where text is "
                    "expected. Convert the words to text."
                )
            if not word.strip():
                raise DataError(
                    f"Row {row}, column {column!r}: word {place} is {word!r}, which is blank and gives no tokens. "
                    "Remove it, and its tag."
                )
    return rows


def tokenize_words(
    tokenizer: Any, rows: Sequence[Sequence[str]], max_length: int, column: str
) -> Iterator[TokenizedWords]:
    """Tokenizes rows of words as running text, each word by itself, and cuts their ends to ``max_length``.

    A word of which the tokenizer drops every character is read as its unknown token; a warning counts them.

    Args:
        tokenizer: a fast transformers tokenizer.
        rows: rows of words that are not blank.
        max_length: longest row in tokens, special tokens included.
        column: name of the column, for messages.

    Raises:
        DataError: The tokenizer is not a fast one, or has no unknown token where one is needed; or ``max_length``
            leaves no room for words.
    """
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} cannot say which token belongs to which word. Tagging needs a fast tokenizer: "
            "load it with AutoTokenizer, or use a model that has one."
        )
    special = tokenizer.num_special_tokens_to_add(pair=False)
    if max_length <= special:
        raise DataError(
            f"max_length {max_length} leaves no room for words: the tokenizer adds {special} special tokens. Use at "
            f"least {special + 1}."
        )
    blank = _blank(tokenizer)
    dropped: list[tuple[int, int]] = []
    for start in range(0, len(rows), CHUNK):
        part = [_spaced(words, blank) for words in rows[start : start + CHUNK]]
        encoded = _encode(tokenizer, part)
        for offset, words in enumerate(part):
            found, place = encoded, offset
            missing = sorted(set(range(len(words))) - set(encoded.word_ids(offset)))
            if missing:
                dropped += [(start + offset, word) for word in missing]
                found, place = _encode(tokenizer, [_with_unknown(tokenizer, words, missing, dropped, column)]), 0
            yield _cut(found, place, len(words), max_length)
    if dropped:
        row, word = dropped[0]
        logger.warning(
            "%d words in column %r give no tokens, the first of them word %d of row %d, %r. They are read as the "
            "unknown token %r.",
            len(dropped),
            column,
            word + 1,
            row + 1,
            rows[row][word],
            tokenizer.unk_token,
        )


def _encode(tokenizer: Any, rows: list[list[str]]) -> Any:
    return tokenizer(rows, is_split_into_words=True, verbose=False)


def _blank(tokenizer: Any) -> str:
    """What must stand before a word inside a row, so that its tokens are those that it has in running text.

    Byte-level tokenizers, such as GPT-2's, take the blank into the token of the word behind it, but are not given any
    blank where words come one by one.
    """
    text = tokenizer("a b", verbose=False)["input_ids"]
    for blank in ("", " "):
        if _encode(tokenizer, [["a", f"{blank}b"]])["input_ids"][0] == text:
            return blank
    return ""


def _spaced(words: Sequence[str], blank: str) -> list[str]:
    return [words[0], *(f"{blank}{word}" for word in words[1:])]


def _with_unknown(
    tokenizer: Any, words: list[str], missing: list[int], dropped: list[tuple[int, int]], column: str
) -> list[str]:
    """``words`` with the unknown token in place of those that are ``missing``, the last ones of ``dropped``."""
    if tokenizer.unk_token is None:
        row, word = dropped[-len(missing)]
        raise DataError(
            f"Row {row + 1}, column {column!r}: word {word + 1}, {words[word]!r}, gives no tokens: the tokenizer drops "
            "all its characters and has no unknown token. Remove the word, and its tag."
        )
    return [tokenizer.unk_token if place in missing else word for place, word in enumerate(words)]


def _cut(encoded: Any, row: int, words: int, max_length: int) -> TokenizedWords:
    """One row of ``encoded`` in at most ``max_length`` tokens; special tokens at either end stay."""
    owners = encoded.word_ids(row)
    places = [place for place, word in enumerate(owners) if word is not None]
    first, behind = places[0], places[-1] + 1
    over = max(0, len(owners) - max_length)
    keep = [*range(behind - over), *range(behind, len(owners))]
    starts = [CUT] * words
    for place in range(behind - over - 1, first - 1, -1):
        if owners[place] is not None:
            starts[owners[place]] = place
    columns = {
        name: [encoded[name][row][place] for place in keep]
        for name in ("input_ids", "token_type_ids")
        if name in encoded
    }
    return TokenizedWords(columns, starts, over > 0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
