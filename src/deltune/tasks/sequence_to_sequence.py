"""Text to text with an encoder and a decoder, such as T5 or BART."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError
from deltune.tasks._columns import no_tokens, text_column
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._tokens import CHUNK, end_token_id, tokenize_rows
from deltune.tasks.base import check_column_names, check_positive
from deltune.tasks.generative import GenerativeTask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from datasets import Dataset

    from deltune.tasks.collation import Collator


@dataclass(frozen=True, kw_only=True)
class SequenceToSequence(GenerativeTask):
    """Learns to write a target text for a source text.

    The decoder's inputs are left to the model, which makes them from the labels. A target that is too long is
    cut before its end token, so that the end is still learned.

    Attributes:
        source: Column of the text to read; ``"source"`` by default.
        target: Column of the text to write; ``"target"`` by default.
        prefix: Text put before every source, such as ``"summarize: "``; none by default.
        max_target_length: Longest target in tokens, its end token included; 128 by default.
        max_length: Longest source in tokens; see ``Task``.
    """

    name: ClassVar[str] = "sequence-to-sequence"
    auto_class: ClassVar[str] = "AutoModelForSeq2SeqLM"
    prediction_padding_side: ClassVar[str] = "right"
    predicts_next: ClassVar[bool] = False

    source: str = "source"
    target: str = "target"
    prefix: str = ""
    max_target_length: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("source", "target"))
        check_positive("max_target_length", self.max_target_length)
        if self.max_target_length is None or self.max_target_length < 2:
            raise DataError("max_target_length must be at least 2: a token and the end token.")
        if not isinstance(self.prefix, str):
            raise DataError(f"prefix must be text, not {self.prefix!r}.")

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The source column and, where ``labelled``, the target column."""
        return (self.source, self.target) if labelled else (self.source,)

    @property
    def loss_convention(self) -> str:
        """Cross entropy of the target's tokens, averaged over tokens."""
        return "cross entropy of the target's tokens and of its end token, averaged over tokens"

    def collator(
        self, tokenizer: Any, *, padding_side: str = "right", pad_to_multiple_of: int | None = None
    ) -> Collator:
        """Like ``Task.collator``; labels are padded on their own length, always on the right."""
        collator = super().collator(tokenizer, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of)
        return replace(collator, labels_follow_inputs=False)

    def answers(self, dataset: Dataset) -> list[str]:
        """The target of each row."""
        return text_column(dataset, self.target)

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        assert self.max_length is not None
        sources = [self.prefix + text for text in text_column(dataset, self.source)]
        rows = EncodedRows(len(dataset))
        encoded = tokenize_rows(tokenizer, [(self.source, sources)], self.max_length)
        if not labelled:
            for row in encoded:
                rows.add(row.columns)
                if row.truncated:
                    rows.truncated()
            return rows.finish()
        for row, (labels, target_cut) in zip(encoded, self._targets(dataset, tokenizer), strict=True):
            rows.add(row.columns, labels)
            if row.truncated or target_cut:
                rows.truncated()
        return rows.finish()

    def _targets(self, dataset: Dataset, tokenizer: Any) -> Iterator[tuple[list[int], bool]]:
        """Labels of each row, ended by the end token, and whether they were cut."""
        end = end_token_id(tokenizer)
        texts = text_column(dataset, self.target)
        for start in range(0, len(texts), CHUNK):
            encoded = tokenizer(
                text_target=texts[start : start + CHUNK], verbose=False, return_special_tokens_mask=True
            )
            for place, (ids, special) in enumerate(
                zip(encoded["input_ids"], encoded["special_tokens_mask"], strict=True), start=start + 1
            ):
                if all(special):
                    raise no_tokens(place, self.target)
                body = ids[:-1] if ids[-1] == end else ids
                yield [*body[: self.max_target_length - 1], end], len(body) >= self.max_target_length
