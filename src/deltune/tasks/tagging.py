"""A tag for every word, such as the names of people and places in a sentence.

Dimensions: B rows of a batch, T token positions, W words of a row, C tags, N rows in all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, TrainingError, suggestion
from deltune.tasks._arrays import as_array, first_output
from deltune.tasks._columns import require_columns, require_rows
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._optional import require
from deltune.tasks._spans import BIO, OUTSIDE, SCHEMES, label_set, spans_of
from deltune.tasks._tags import check_label_names, positions_of, read_tags, scheme_of
from deltune.tasks._tokens import DEFAULT_MAX_LENGTH, IGNORED
from deltune.tasks._words import CUT, WORD_STARTS, WORDS, WordCollator, WordReport, read_words, tokenize_words
from deltune.tasks.base import Task, check_column_names

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from typing_extensions import Self

    from deltune.tasks.collation import Collator

#: Columns that ``from_data`` looks for where none is named.
_WORD_COLUMNS = ("words", "tokens")
_TAG_COLUMNS = ("tags", "ner_tags")


@dataclass(frozen=True, kw_only=True)
class TokenTagging(Task):
    """Finds spans of words, such as names, by a tag for every word.

    Words and tags are lists, or text with blanks between the items. The tags are ``O``, ``B-type`` and ``I-type``, in
    the scheme BIO (also called IOB2) or IOB1; they are learned and predicted as BIO. The model reads all tokens of a
    word; the tag stands at the first one, the others have no loss. Rows that are too long lose words at their ends.

    ``from_data`` finds the types, names of a ``ClassLabel`` column included, and the scheme.

    Attributes:
        words: Column of the words; ``"words"`` by default. ``from_data`` takes ``"tokens"`` if there is no ``"words"``.
        tags: Column of the tags; ``"tags"`` by default. ``from_data`` takes ``"ner_tags"`` if there is no ``"tags"``.
        label_names: The tags, in the order of the model's outputs. A whole number in the data stands for the tag at
            that position. By default ``O``, then ``B-`` and ``I-`` of each type, types in alphabetical order.
        scheme: ``"BIO"`` (default): every span begins with ``B-``, and an ``I-`` that continues no span is an error;
            ``"IOB1"``: an ``I-`` that continues no span begins one.
        max_length: Longest row in tokens; see ``Task``.
    """

    name: ClassVar[str] = "token-tagging"
    auto_class: ClassVar[str] = "AutoModelForTokenClassification"
    metric: ClassVar[str] = "f1"
    greater_is_better: ClassVar[bool] = True
    token_labels: ClassVar[bool] = True
    metric_modules: ClassVar[tuple[str, ...]] = ("seqeval.metrics.sequence_labeling",)

    words: str = "words"
    tags: str = "tags"
    label_names: tuple[str, ...] = ()
    scheme: str = BIO

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("words", "tags"))
        if self.words is None or self.tags is None:
            raise DataError("words and tags must name data columns.")
        if self.scheme not in SCHEMES:
            raise DataError(
                f"scheme must be {' or '.join(map(repr, SCHEMES))}, not {self.scheme!r}. "
                f"{suggestion(str(self.scheme), SCHEMES)}"
            )
        check_label_names(self.label_names)

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task with the columns, the tags and the scheme of the training data.

        Args:
            dataset: The training data.
            **options: Values of the fields; they take precedence over what is found. With ``label_names`` given, the
                tags must be among them.

        Raises:
            DataError: An option is unknown, a column is missing, a row has not as many tags as words, a tag is none of
                BIO, the tags follow neither scheme, or no word is in a span.
        """
        cls._check_options(options)
        require_rows(dataset)
        present = dataset.column_names
        for option, choices in (("words", _WORD_COLUMNS), ("tags", _TAG_COLUMNS)):
            found = next((name for name in choices if name in present), None)
            if option not in options and found is not None:
                options[option] = found
        given = tuple(options.pop("label_names", None) or ())
        scheme = options.pop("scheme", None)
        # placeholders stand in for tags and scheme until the data have been read
        draft = cls(**options, label_names=given or (OUTSIDE, "B"), scheme=scheme or BIO)
        require_columns(dataset, draft.columns(), cls.name)
        words = read_words(dataset, draft.words)
        rows = read_tags(dataset, draft.tags, words, given)
        if all(tag == OUTSIDE for tags in rows for tag in tags):
            raise DataError(
                f"All tags in column {draft.tags!r} are {OUTSIDE!r}, so there is nothing to learn. Give data with "
                "spans, or name another column of tags."
            )
        task = replace(
            draft,
            label_names=given or label_set(tag for tags in rows for tag in tags),
            scheme=scheme or scheme_of(rows, draft.tags),
        )
        task._positions(dataset, words)
        return task

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The column of words and, where ``labelled``, that of tags."""
        return (self.words, self.tags) if labelled else (self.words,)

    def required_texts(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The column of words."""
        del labelled
        return (self.words,)

    @property
    def loss_convention(self) -> str:
        """Cross entropy of the words' tags, averaged over words."""
        return "cross entropy between the tags at the first token of each word, averaged over the words of a batch"

    def model_options(self) -> dict[str, Any]:
        """The number and the names of the tags."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
        }

    # -- data -----------------------------------------------------------------------------------------

    def collator(
        self, tokenizer: Any, *, padding_side: str = "right", pad_to_multiple_of: int | None = None
    ) -> Collator:
        """Like ``Task.collator``; words that were encoded for a prediction are not for the model."""
        made = super().collator(tokenizer, padding_side=padding_side, pad_to_multiple_of=pad_to_multiple_of)
        return WordCollator(**{item.name: getattr(made, item.name) for item in fields(made)})

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        assert self.max_length is not None
        words = read_words(dataset, self.words)
        positions = self._positions(dataset, words) if labelled else None
        rows = EncodedRows(len(dataset))
        starts: list[list[int]] = []
        for row, tokens in enumerate(tokenize_words(tokenizer, words, self.max_length, self.words)):
            labels = None
            if positions is not None:
                labels = [IGNORED] * len(tokens.columns["input_ids"])
                for place, position in zip(tokens.starts, positions[row], strict=True):
                    if place != CUT:
                        labels[place] = position
            rows.add(tokens.columns, labels)
            if tokens.truncated:
                rows.truncated()
            starts.append(tokens.starts)
        encoded, report = rows.finish()
        if not labelled:
            encoded = encoded.add_column(WORDS, words).add_column(WORD_STARTS, starts)
        counted = WordReport(
            **{item.name: getattr(report, item.name) for item in fields(report)},
            words=sum(map(len, words)),
            cut_words=sum(row.count(CUT) for row in starts),
        )
        return Encoded(encoded, counted)

    def _positions(self, dataset: Dataset, words: list[list[str]]) -> list[list[int]]:
        """The tags of all rows by their positions among ``label_names``."""
        rows = read_tags(dataset, self.tags, words, self.label_names)
        return positions_of(rows, self.scheme, self.label_names, self.tags)

    # -- measuring ------------------------------------------------------------------------------------

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Keeps of each word its tag, the likeliest tag and the loss, so that logits need not be collected.

        Args:
            logits: [B, T, C], or a tuple that starts with them.
            labels: [B, T], -100 at all but the first token of each word.

        Returns:
            float32 [B, ``max_length``, 3]: position of the true tag, position of the likeliest tag, cross entropy in
            nats; one word after the other, filled up with -100. Every batch has the same shape but for B.

        Raises:
            TrainingError: The logits do not belong to the labels.
        """
        import torch
        from torch.nn.functional import cross_entropy

        logits = first_output(logits)
        if logits.shape[:2] != labels.shape:
            raise TrainingError(
                f"Logits of shape {list(logits.shape)} do not belong to labels of shape {list(labels.shape)}: there "
                "must be one row of logits for each token."
            )
        scores = logits.float()
        losses = cross_entropy(scores.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED)
        words = torch.stack([labels.float(), scores.argmax(-1).float(), losses.view_as(labels)], dim=-1)
        width = self.max_length or DEFAULT_MAX_LENGTH
        if labels.shape[1] > width and int((labels != IGNORED).sum(-1).max()) > width:
            raise TrainingError(
                f"A row has more than the {width} words that max_length leaves room for. Encode and measure with the "
                "same task."
            )
        kept = words.new_full((len(labels), width, 3), IGNORED)
        for row, begun in enumerate(labels != IGNORED):
            kept[row, : int(begun.sum())] = words[row, begun]
        return kept

    def metrics(self, predictions: Any, labels: Any = None) -> dict[str, float]:
        """Spans by seqeval, as its default and ``conlleval`` count them; and accuracy and loss of the words' tags.

        A predicted span is right if there is a true one of the same words and the same type. Words that were cut off
        are not counted.

        Args:
            predictions: What ``reduce_logits`` returned [N, W, 3].
            labels: Not needed.

        Returns:
            ``loss`` (nats per word), ``f1``, ``precision`` and ``recall`` of spans, over all types together, and
            ``accuracy``, the share of words with the right tag; the latter four in 0 to 1.

        Raises:
            DeltuneError: seqeval is not installed.
            TrainingError: A loss is not a finite number.
        """
        del labels
        scores = require(*self.metric_modules)
        words = as_array(predictions)
        if words.ndim != 3 or words.shape[2] != 3:
            raise DataError(
                f"Predictions have the shape {list(words.shape)}, where [rows, words, 3] is expected. Pass "
                "task.reduce_logits as preprocess_logits_for_metrics."
            )
        real = words[..., 0] != IGNORED
        if not real.any():
            raise DataError("No word has a tag, so there is nothing to measure. Check the labels.")
        true, predicted = (
            [
                [self.label_names[int(tag)] for tag in row[begun]]
                for row, begun in zip(words[..., part], real, strict=True)
            ]
            for part in (0, 1)
        )
        precision, recall, f1, _ = scores.precision_recall_fscore_support(
            true, predicted, average="micro", zero_division=0
        )
        return {
            "loss": float(words[..., 2][real].mean()),
            "f1": float(f1),
            "precision": float(precision),
            "recall": float(recall),
            "accuracy": float((words[..., 0] == words[..., 1])[real].mean()),
        }

    # -- predicting -----------------------------------------------------------------------------------

    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """The likeliest tag of every token, padding included, as ``{"tags": tags}``; see ``predict_rows`` for words.

        Args:
            outputs: Logits [B, T, C], or a model output that has them.
            tokenizer: Not needed.
        """
        del tokenizer
        return [{"tags": [self.label_names[tag] for tag in row]} for row in as_array(outputs).argmax(-1).tolist()]

    def predict_rows(
        self, outputs: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any = None
    ) -> list[dict[str, Any]]:
        """Tags and spans of the words of each row.

        Args:
            outputs: Logits [B, T, C] of a batch that was padded on ``prediction_padding_side``.
            rows: The rows of the batch, as ``encode`` makes them with ``labelled=False``.
            tokenizer: Not needed.

        Returns:
            For each row its ``words``; ``tags``, as many; ``spans``: ``type``, ``text``, and the positions ``start``
            and ``end`` (not included) of words, counting from 0; and ``cut_words``, how many words were cut off, whose
            tag is ``O`` because the model has not seen them.

        Raises:
            DataError: The rows were not encoded for a prediction.
        """
        if any(WORD_STARTS not in row for row in rows):
            raise DataError(
                "These rows were encoded for training and no longer say where words begin. Give the words themselves, "
                "or encode them with task.encode(data, tokenizer, labelled=False)."
            )
        found = []
        for row, predicted in zip(rows, self.predict(outputs, tokenizer), strict=True):
            every, words = predicted["tags"], row[WORDS]
            shift = len(every) - row["length"] if self.prediction_padding_side == "left" else 0
            tags = [OUTSIDE if start == CUT else every[shift + start] for start in row[WORD_STARTS]]
            found.append(
                {
                    "words": words,
                    "tags": tags,
                    "spans": [
                        {**span._asdict(), "text": " ".join(words[span.start : span.end])} for span in spans_of(tags)
                    ],
                    "cut_words": row[WORD_STARTS].count(CUT),
                }
            )
        return found
