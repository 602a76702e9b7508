"""Tokenizing: lengths, truncation, the padding token, and token arithmetic that every task shares."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from deltune.errors import DataError
from deltune.tasks._columns import no_tokens

logger = logging.getLogger(__name__)

IGNORED = -100
"""Label of a position that has no loss, as in PyTorch's cross entropy."""

DEFAULT_MAX_LENGTH = 512
"""Longest row, in tokens, where neither the user nor the tokenizer asks for less."""

CHUNK = 1000
"""Rows given to the tokenizer at a time."""

_NO_LIMIT = 10**6


class TokenizedRow(NamedTuple):
    """One row of token ids.

    Attributes:
        columns: ``input_ids`` and, where the tokenizer makes them, ``token_type_ids``; equally long.
        truncated: Whether tokens were cut off.
    """

    columns: dict[str, list[int]]
    truncated: bool


def length_limit(asked: int | None, tokenizer: Any) -> int:
    """The longest row in tokens: what was asked for, else the smaller of 512 and the tokenizer's limit."""
    limit = int(min(tokenizer.model_max_length, _NO_LIMIT))
    if asked is None:
        return min(DEFAULT_MAX_LENGTH, limit)
    if asked > limit:
        logger.warning(
            "max_length %d is beyond the %d tokens that the tokenizer names as the model's limit; "
            "models with learned positions cannot read such rows.",
            asked,
            limit,
        )
    return asked


def ensure_padding_token(tokenizer: Any) -> None:
    """Gives a tokenizer without a padding token one that the vocabulary has already.

    The end token is taken, else the unknown or the separator token. No token is added, so embeddings keep
    their size. That padding then shares an id with a real token does no harm: deltune masks padding by
    position, never by id.

    Raises:
        DataError: The tokenizer has no special token at all.
    """
    if tokenizer.pad_token_id is not None:
        return
    for candidate in (tokenizer.eos_token, tokenizer.unk_token, tokenizer.sep_token):
        if candidate is not None:
            tokenizer.pad_token = candidate
            return
    raise DataError(
        "The tokenizer has no padding, end, unknown or separator token, so batches cannot be padded. "
        "Set one, for example: tokenizer.pad_token = '<a token of the vocabulary>'."
    )


def end_token_id(tokenizer: Any) -> int:
    """The id of the token that ends a text.

    Raises:
        DataError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            "The tokenizer has no end token, so a model cannot learn where a text ends. "
            "Set one of the vocabulary, for example: tokenizer.eos_token = '</s>'."
        )
    return int(tokenizer.eos_token_id)


def plain_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of ``texts`` with nothing added and nothing cut."""
    if not texts:
        return []
    rows: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return rows


def common_prefix(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many leading items (tokens or characters) two sequences share."""
    shared = min(len(first), len(second))
    for index in range(shared):
        if first[index] != second[index]:
            return index
    return shared


def tokenize_rows(
    tokenizer: Any, columns: Sequence[tuple[str, Sequence[str]]], max_length: int
) -> Iterator[TokenizedRow]:
    """Tokenizes one text a row, or two, as the tokenizer does by default, cut to ``max_length``.

    Of two texts the longer one is cut first.

    Args:
        tokenizer: A transformers tokenizer.
        columns: One or two pairs of column name and texts.
        max_length: Longest row in tokens, special tokens included.

    Yields:
        A ``TokenizedRow`` for every row, in order.

    Raises:
        DataError: A text gives no tokens, or ``max_length`` leaves no room for text.
    """
    pair = len(columns) == 2
    special = tokenizer.num_special_tokens_to_add(pair=pair)
    if max_length < special + len(columns):
        raise DataError(
            f"max_length {max_length} leaves no room for text: the tokenizer adds {special} special tokens. "
            f"Use at least {special + len(columns)}."
        )
    for start in range(0, len(columns[0][1]), CHUNK):
        parts = [list(texts[start : start + CHUNK]) for _, texts in columns]
        encoded = tokenizer(*parts, verbose=False, return_special_tokens_mask=True)
        for offset in range(len(parts[0])):
            empty = _empty_part(tokenizer, encoded, offset, len(columns))
            if empty is not None:
                raise no_tokens(start + offset + 1, columns[empty][0])
        names = [name for name in ("input_ids", "token_type_ids") if name in encoded]
        long = [row for row, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
        shortened: dict[int, dict[str, list[int]]] = {}
        if long:
            selected = [[texts[row] for row in long] for texts in parts]
            cut = tokenizer(*selected, truncation=True, max_length=max_length, verbose=False)
            shortened = {row: {name: cut[name][place] for name in names} for place, row in enumerate(long)}
        for row in range(len(parts[0])):
            if row in shortened:
                yield TokenizedRow(shortened[row], True)
            else:
                yield TokenizedRow({name: encoded[name][row] for name in names}, False)


def _empty_part(tokenizer: Any, encoded: Any, row: int, parts: int) -> int | None:
    """Which of the texts of a row (0 or 1) has no token; none where all have some."""
    if tokenizer.is_fast:
        present = set(encoded.sequence_ids(row))
        return next((part for part in range(parts) if part not in present), None)
    return 0 if all(encoded["special_tokens_mask"][row]) else None
