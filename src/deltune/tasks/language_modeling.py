"""Plain language modeling: a decoder learns to continue documents, and where they end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError
from deltune.tasks._columns import no_tokens, text_column
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._tokens import CHUNK, IGNORED, end_token_id
from deltune.tasks.base import check_column_names, check_positive
from deltune.tasks.generative import GenerativeTask

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class CausalLanguageModeling(GenerativeTask):
    """Learns every token of every document, its end token included.

    Nothing is cut off. A document longer than ``max_length`` becomes several rows, each of which starts with
    the last token of the row before, so that every token is predicted exactly once. With ``block_size`` all
    documents form one stream, divided by their end tokens, which is cut into rows of that many tokens in the
    same way; a row may then hold several documents, and later ones see earlier ones.

    Attributes:
        text: Column of the documents; ``"text"`` by default.
        block_size: Tokens of a row when documents are joined; none by default: no row holds two documents.
        max_length: Longest row in tokens; see ``Task``.
    """

    name: ClassVar[str] = "causal-language-modeling"
    auto_class: ClassVar[str] = "AutoModelForCausalLM"

    text: str = "text"
    block_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("text",))
        check_positive("block_size", self.block_size)
        for option in ("block_size", "max_length"):
            if getattr(self, option) == 1:
                raise DataError(f"{option} must be at least 2, because a row of one token predicts nothing.")
        if self.block_size is not None and self.max_length is not None and self.block_size > self.max_length:
            raise DataError(
                f"block_size {self.block_size} is greater than max_length {self.max_length}. "
                "Lower block_size, or raise max_length if the model reads longer rows."
            )

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The text column."""
        del labelled
        return (self.text,)

    @property
    def loss_convention(self) -> str:
        """Cross entropy of every token, averaged over tokens."""
        return "cross entropy of every token and of the end token of each document, averaged over tokens"

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        assert self.max_length is not None
        rows = EncodedRows(len(dataset))
        documents = self._documents(dataset, tokenizer)
        if not labelled:
            for document in documents:
                rows.add({"input_ids": document[-self.max_length :]})
                if len(document) > self.max_length:
                    rows.truncated()
            return rows.finish()
        end = end_token_id(tokenizer)
        ended = (document if document[-1] == end else [*document, end] for document in documents)
        length = self.block_size or self.max_length
        for ids in _stream(ended, length) if self.block_size else _pieces(ended, length):
            rows.add({"input_ids": ids}, [IGNORED, *ids[1:]])
        return rows.finish()

    def _documents(self, dataset: Dataset, tokenizer: Any) -> Iterator[list[int]]:
        """Token ids of each document, with what the tokenizer adds by default (such as a start token)."""
        texts = text_column(dataset, self.text)
        for start in range(0, len(texts), CHUNK):
            encoded = tokenizer(texts[start : start + CHUNK], verbose=False, return_special_tokens_mask=True)
            for row, special in enumerate(encoded["special_tokens_mask"], start=start + 1):
                if all(special):
                    raise no_tokens(row, self.text)
            yield from encoded["input_ids"]


def _pieces(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """Rows of at most ``length`` tokens; a document's rows overlap by one token."""
    for document in documents:
        for start in range(0, max(len(document) - 1, 1), length - 1):
            yield document[start : start + length]


def _stream(documents: Iterable[list[int]], length: int) -> Iterator[list[int]]:
    """All documents joined, in rows of ``length`` tokens (the last perhaps shorter) that overlap by one."""
    pending: list[int] = []
    for document in documents:
        pending.extend(document)
        start = 0
        while len(pending) - start > length:
            yield pending[start : start + length]
            start += length - 1
        del pending[:start]
    if len(pending) > 1:
        yield pending
