"""Rows of data in a template, as token ids: what is cut, and where pseudo tokens and the answer stand."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltune.errors import DataError
from deltune.tasks._columns import no_tokens
from deltune.tasks._tokens import CHUNK, plain_ids
from deltune.tasks.template import FIRST_PSEUDO_TOKEN, Column, Mask, PseudoTokens, Template, Text

__all__ = ["FilledTemplate", "TemplateFiller", "continuation_ids"]

#: A text that is sure to be one word, to tokenize others behind it.
_WORD = "a"


@dataclass(frozen=True)
class FilledTemplate:
    """One row in a template.

    Attributes:
        input_ids: token ids; those of pseudo tokens are ``FIRST_PSEUDO_TOKEN`` and the following, in order.
        pseudo_positions: where the pseudo tokens stand.
        answer: where the mask token stands; for a decoder, where the answer would follow: behind the last token.
        truncated: whether columns were cut.
    """

    input_ids: list[int]
    pseudo_positions: tuple[int, ...]
    answer: int
    truncated: bool


@dataclass
class _Run:
    """Text without a marker in it: pieces of the template that are tokenized as one text.

    ``inside`` says that something stands before it, so that its white space tells whether it begins a word.
    """

    pieces: list[Text | Column] = field(default_factory=list)
    inside: bool = False

    def text(self, values: Mapping[str, str]) -> str:
        """The run for one row."""
        return "".join(piece.text if isinstance(piece, Text) else values[piece.name] for piece in self.pieces)


class TemplateFiller:
    """Puts rows into a template for one tokenizer.

    Text between markers is tokenized as a whole, so that its tokens are those of running text. The tokenizer's own
    special tokens stand around it all; those that it puts at the end are left out for a decoder, which would answer
    behind them.

    Args:
        template: the template.
        tokenizer: a transformers tokenizer.
        masked: whether a masked language model reads the rows, or a decoder.
        max_length: longest row in tokens, special tokens, pseudo tokens and mask included.

    Raises:
        DataError: The template does not suit such a model, the tokenizer has no mask token, or ``max_length`` leaves no
            room for the columns.
    """

    def __init__(self, template: Template, tokenizer: Any, *, masked: bool, max_length: int) -> None:
        self.source = template
        self.template = template.for_masked() if masked else template.for_causal()
        if masked and tokenizer.mask_token_id is None:
            raise DataError(
                "The tokenizer has no mask token, so its model is not a masked language model. Give one that is, or "
                "use language_model='causal' and a template that ends where the answer follows."
            )
        self.tokenizer = tokenizer
        self.masked = masked
        self.max_length = max_length
        self.before, self.behind = _special_tokens(tokenizer)
        self.behind = self.behind if masked else []
        self.items = _items(self.template)
        least = self._tokens(dict.fromkeys(self.template.columns, _WORD))
        if least > max_length:
            raise DataError(
                f"max_length {max_length} leaves no room for the columns: the template with its special, pseudo and "
                f"mask tokens and one token for each column has {least}. Use {least} at least."
            )

    def word_ids(self, words: Sequence[str]) -> list[list[int]]:
        """Token ids of words at the place of the answer, where they may begin a word, or go on with one."""
        pieces = self.source.pieces
        before = pieces[: pieces.index(Mask())] if self.source.has_mask else (*pieces, Text(" "))
        if not any(not isinstance(piece, Text) or piece.text.strip() for piece in before):
            return plain_ids(self.tokenizer, words)
        last = before[-1]
        space = " " if isinstance(last, Text) and last.text[-1].isspace() else ""
        return continuation_ids(self.tokenizer, [space + word for word in words])

    def fill(self, rows: Sequence[Mapping[str, str]]) -> Iterator[FilledTemplate]:
        """Every row in the template.

        Args:
            rows: texts by column, none of them blank.

        Raises:
            DataError: A text gives no tokens, or holds the mask token itself.
        """
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            for name in self.template.columns:
                for place, ids in enumerate(plain_ids(self.tokenizer, [row[name] for row in chunk])):
                    if not ids:
                        raise no_tokens(start + place + 1, name)
                    if self.masked and self.tokenizer.mask_token_id in ids:
                        raise DataError(
                            f"The text in row {start + place + 1}, column {name!r}, holds the mask token "
                            f"{self.tokenizer.mask_token!r}, so the place of the answer is not clear. Remove it there."
                        )
            runs = [self._runs(row) for row in chunk]
            for row, several in zip(chunk, self._ids(runs), strict=True):
                length = self._length(several)
                if length > self.max_length:
                    several = self._cut(row, length)
                yield self._joined(several, truncated=length > self.max_length)

    # -- tokens -----------------------------------------------------------------------------------------

    def _runs(self, values: Mapping[str, str]) -> list[str]:
        """The texts between the markers of one row, without white space at the ends and before markers."""
        texts = [(item, item.text(values).rstrip()) for item in self.items if isinstance(item, _Run)]
        return [text if run.inside else text.lstrip() for run, text in texts]

    def _ids(self, rows: Sequence[Sequence[str]]) -> list[list[list[int]]]:
        """Token ids of the runs of every row."""
        inside = [item.inside for item in self.items if isinstance(item, _Run)]
        columns = [
            (continuation_ids if behind else plain_ids)(self.tokenizer, [row[number] for row in rows])
            for number, behind in enumerate(inside)
        ]
        return [list(ids) for ids in zip(*columns, strict=True)]

    def _length(self, runs: Sequence[Sequence[int]]) -> int:
        return len(self._joined(runs, truncated=False).input_ids)

    def _tokens(self, values: Mapping[str, str]) -> int:
        return self._length(self._ids([self._runs(values)])[0])

    def _joined(self, runs: Sequence[Sequence[int]], *, truncated: bool) -> FilledTemplate:
        ids, answer = list(self.before), -1
        positions: list[int] = []
        rest = iter(runs)
        for item in self.items:
            if isinstance(item, _Run):
                ids.extend(next(rest))
            elif isinstance(item, Mask):
                answer = len(ids)
                ids.append(int(self.tokenizer.mask_token_id))
            else:
                for _ in range(item.count):
                    ids.append(FIRST_PSEUDO_TOKEN + len(positions))
                    positions.append(len(ids) - 1)
        answer = answer if self.masked else len(ids)
        return FilledTemplate([*ids, *self.behind], tuple(positions), answer, truncated)

    # -- cutting ----------------------------------------------------------------------------------------

    def _cut(self, values: Mapping[str, str], length: int) -> list[list[int]]:
        """Ids of the runs of a row that had ``length`` tokens, with columns cut at their ends, the longest first."""
        values = dict(values)
        names = self.template.columns
        lengths = map(len, plain_ids(self.tokenizer, [values[name] for name in names]))
        kept = dict(zip(names, lengths, strict=True))
        occurs = {name: sum(piece == Column(name) for piece in self.template.pieces) for name in names}
        while True:
            excess = length - self.max_length
            while excess > 0:
                longest = max(names, key=lambda name: kept[name])
                if kept[longest] == 1:
                    raise DataError(
                        f"A row is longer than max_length {self.max_length} even with one token for each column. "
                        "Raise max_length, or shorten the template."
                    )
                kept[longest] -= 1
                excess -= occurs[longest]
            values = {name: self._beginning(values[name], kept[name]) for name in names}
            ids = self._ids([self._runs(values)])[0]
            # tokens where texts meet may differ from those of the texts alone
            length = self._length(ids)
            if length <= self.max_length:
                return ids

    def _beginning(self, text: str, tokens: int) -> str:
        """The longest beginning of ``text`` of no more than so many tokens; one character at least."""
        if self.tokenizer.is_fast:
            spans = self.tokenizer(text, add_special_tokens=False, verbose=False, return_offsets_mapping=True)
            ends = [end for _, end in spans["offset_mapping"]]
            return text if len(ends) <= tokens else text[: max(1, ends[tokens - 1])]
        place = bisect_right(
            range(1, len(text) + 1), tokens, key=lambda end: len(plain_ids(self.tokenizer, [text[:end]])[0])
        )
        return text[: max(1, place)]


def continuation_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts as they are behind something else.

    Many tokenizers treat the beginning of a text as that of a word, whether white space precedes it or not. So each
    text is tokenized behind a word, whose tokens are then left out; and by itself where the two would become one.
    """
    (word,) = plain_ids(tokenizer, [_WORD])
    if tokenizer.unk_token_id in word:
        return plain_ids(tokenizer, texts)
    found = plain_ids(tokenizer, [_WORD + text for text in texts])
    alone = [place for place, ids in enumerate(found) if ids[: len(word)] != word]
    for place, ids in zip(alone, plain_ids(tokenizer, [texts[place] for place in alone]), strict=True):
        found[place] = [*word, *ids]
    return [ids[len(word) :] for ids in found]


def _items(template: Template) -> list[_Run | PseudoTokens | Mask]:
    """The template as runs of text and markers; runs of white space alone are left out."""
    items: list[_Run | PseudoTokens | Mask] = []
    for piece in template.pieces:
        if isinstance(piece, PseudoTokens | Mask):
            items.append(piece)
        elif items and isinstance(items[-1], _Run):
            items[-1].pieces.append(piece)
        else:
            items.append(_Run([piece], inside=bool(items)))
    return [
        item
        for item in items
        if not isinstance(item, _Run) or any(isinstance(p, Column) or p.text.strip() for p in item.pieces)
    ]


def _special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and behind a text."""
    whole = list(tokenizer(_WORD, verbose=False)["input_ids"])
    (word,) = plain_ids(tokenizer, [_WORD])
    for start in range(len(whole) - len(word) + 1):
        if whole[start : start + len(word)] == word:
            return whole[:start], whole[start + len(word) :]
    raise DataError(
        f"The tokenizer turns {_WORD!r} into the tokens {whole} with its special tokens and {word} without, so where "
        "special tokens belong is not clear. Use another tokenizer."
    )
