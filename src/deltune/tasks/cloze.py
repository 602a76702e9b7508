"""Classification as a cloze: a language model fills in the word that stands for the class.

Dimensions: B rows of a batch, T token positions, V vocabulary entries, N rows in all, C classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, TrainingError, suggestion
from deltune.tasks._arrays import as_array, first_output
from deltune.tasks._columns import require_columns, text_column
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._template_rows import TemplateFiller
from deltune.tasks._tokens import IGNORED
from deltune.tasks._verbalizer import check_words, read_words, word_ids, written
from deltune.tasks.base import Reader, Task, check_column_names
from deltune.tasks.classification import TextClassification
from deltune.tasks.template import Template

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor
    from typing_extensions import Self

__all__ = ["Cloze"]

_KINDS = {"auto": "", "masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


@dataclass(frozen=True, kw_only=True)
class Cloze(Task):
    """Assigns one of several classes to a row by the word that a language model puts into a template.

    No new head is trained: the model's own map to its vocabulary answers, and each class has a word of the vocabulary
    (or several) that stands for it. The template is described in :mod:`deltune.tasks.template`; one with pseudo tokens
    needs a method that makes their embeddings, such as ``p-tuning(placement=template)``.

    The loss is that of the equation -log p(word of the class | row), over the whole vocabulary, so that the model's own
    loss computes it in any training loop. Predictions and metrics compare the words of the classes alone.

    Attributes:
        template: The template; ``"{text} It was [MASK]."`` by default. For a decoder it ends where the answer follows:
            ``"{text} It was"``.
        label: Column of the label; ``"label"`` by default.
        label_names: Names of the classes; those of ``words``, else found in the data as by ``TextClassification``.
        words: For each class its word: ``("negative=bad", "positive=good")`` or a mapping of names to words. Several
            words, ``"positive=good|great"``, count together in predictions; training teaches the first. By default
            the names of the classes are their words. Each is one token where it stands in the template.
        language_model: ``"masked"``, ``"causal"`` (a decoder), or ``"auto"`` (default): masked if the tokenizer has a
            mask token. ``resolve`` replaces it.
        word_ids: Ids of all words, one class after the other, filled in by ``resolve``.
        max_length: Longest row in tokens; see ``Task``. The texts of columns are cut at their ends, the longest first.
    """

    name: ClassVar[str] = "cloze"
    metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    token_labels: ClassVar[bool] = True

    template: str = "{text} It was [MASK]."
    label: str = "label"
    label_names: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    language_model: str = "auto"
    word_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("label",))
        if self.label is None:
            raise DataError("label must name a data column.")
        if self.language_model not in _KINDS:
            raise DataError(
                f"language_model must be one of {', '.join(_KINDS)}, not {self.language_model!r}. "
                f"{suggestion(str(self.language_model), _KINDS)}"
            )
        Template.parse(self.template)
        object.__setattr__(self, "words", written(self.words))
        given = read_words(self.words)
        if given and not self.label_names:
            object.__setattr__(self, "label_names", tuple(given))
        check_words(given, self._classes.label_names)

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task with the classes that the training data have.

        Args:
            dataset: The training data.
            **options: Values of the fields; with ``words`` or ``label_names`` given, the labels must be among them.

        Raises:
            DataError: An option is unknown or makes no sense, a column is missing, a label is missing or unknown, or
                all labels are the same.
        """
        cls._check_options(options)
        template = Template.parse(options.get("template", cls.template))
        label = options.get("label", cls.label)
        require_columns(dataset, (*template.columns, label), cls.name)
        given = options.get("label_names") or tuple(read_words(written(options.get("words", ()))))
        classes = TextClassification.from_data(dataset, text=template.columns[0], label=label, label_names=given)
        return cls(**{**options, "label_names": classes.label_names})

    @property
    def auto_class(self) -> str:  # type: ignore[override]
        """Name of the transformers class: of masked or of causal language models."""
        return _KINDS[self.language_model] or _KINDS["masked"]

    @property
    def verbalizer(self) -> dict[str, tuple[str, ...]]:
        """The words of each class, in the order of ``label_names``."""
        given = read_words(self.words)
        return {name: given.get(name, (name,)) for name in self.label_names}

    @property
    def pseudo_tokens(self) -> int:
        """P, the number of pseudo tokens of the template."""
        return Template.parse(self.template).pseudo_tokens

    @property
    def _classes(self) -> TextClassification:
        """Reads and measures labels."""
        columns = Template.parse(self.template).columns
        return TextClassification(text=columns[0], label=self.label, label_names=self.label_names)

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The columns of the template and, where ``labelled``, that of the label."""
        names = Template.parse(self.template).columns
        return (*names, self.label) if labelled else names

    def required_texts(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The columns of the template."""
        del labelled
        return self.columns(labelled=False)

    @property
    def loss_convention(self) -> str:
        """Cross entropy of the word at its place, over the vocabulary."""
        return (
            "cross entropy of the word that stands for the class, over the whole vocabulary, at its place in the "
            "template alone, averaged over rows"
        )

    # -- models and tokenizers ------------------------------------------------------------------------

    def load_model(
        self,
        path: str,
        *,
        tokenizer: Any = None,
        dropout: float | None = None,
        read: Reader | None = None,
        **options: Any,
    ) -> Any:
        """Loads a masked language model or a decoder; see ``Task.load_model``.

        Raises:
            DataError: The model is an encoder-decoder, which has no place for the answer.
        """
        if self.language_model == "auto":
            return self._of_kind(tokenizer or self.load_tokenizer(path)).load_model(
                path, tokenizer=tokenizer, dropout=dropout, read=read, **options
            )
        model = super().load_model(path, tokenizer=tokenizer, dropout=dropout, read=read, **options)
        if model.config.is_encoder_decoder:
            raise DataError(
                f"The model in {str(path)!r} is an encoder-decoder. A cloze is answered by a masked language model at "
                "its mask token, or by a decoder at the next token. Use another model, or the task "
                "'sequence-to-sequence'."
            )
        return model

    def resolve(self, tokenizer: Any) -> Self:
        """A copy with ``max_length`` as a number, the kind of language model, and the ids of the words.

        Raises:
            DataError: The template does not suit such a model; a word is not one token, or two have the same; or
                ``word_ids`` are given and are not those of this tokenizer.
        """
        resolved = super().resolve(tokenizer)._of_kind(tokenizer)
        ids = word_ids(resolved.verbalizer, resolved._filler(tokenizer))
        if self.word_ids not in ((), ids):
            raise DataError(
                f"The words of this task have the ids {', '.join(map(str, self.word_ids))}, but this tokenizer gives "
                f"{', '.join(map(str, ids))}. Use the tokenizer of the model that the task was resolved for."
            )
        return replace(resolved, word_ids=ids)

    def _of_kind(self, tokenizer: Any) -> Self:
        if self.language_model != "auto":
            return self
        return replace(self, language_model="causal" if tokenizer.mask_token_id is None else "masked")

    def _filler(self, tokenizer: Any) -> TemplateFiller:
        assert self.max_length is not None
        masked = self.language_model == "masked"
        # a decoder's row has the answer behind it
        length = self.max_length if masked else self.max_length - 1
        return TemplateFiller(Template.parse(self.template), tokenizer, masked=masked, max_length=length)

    # -- data -----------------------------------------------------------------------------------------

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        masked = self.language_model == "masked"
        columns = {name: text_column(dataset, name) for name in self.columns(labelled=False)}
        texts = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        first = self._first_ids()
        labels = self._classes._label_values(dataset) if labelled else [None] * len(dataset)
        typed = "token_type_ids" in tokenizer("a", verbose=False)
        rows = EncodedRows(len(dataset))
        for row, label in zip(self._filler(tokenizer).fill(texts), labels, strict=True):
            ids, targets = row.input_ids, None
            if label is not None:
                ids = ids if masked else [*ids, first[label]]
                targets = [IGNORED] * len(ids)
                targets[row.answer] = first[label]
            rows.add({"input_ids": ids, **({"token_type_ids": [0] * len(ids)} if typed else {})}, targets)
            if row.truncated:
                rows.truncated()
        return rows.finish()

    def _groups(self) -> list[tuple[int, ...]]:
        """The ids of the words of each class."""
        if not self.word_ids:
            raise DataError("The ids of the words are not known yet. Call task.resolve(tokenizer) first.")
        rest = iter(self.word_ids)
        return [tuple(itertools.islice(rest, len(words))) for words in self.verbalizer.values()]

    def _first_ids(self) -> list[int]:
        """The id that training teaches for each class."""
        return [ids[0] for ids in self._groups()]

    # -- measuring ------------------------------------------------------------------------------------

    def class_scores(self, logits: Tensor) -> Tensor:
        """Scores of the classes, whose softmax are their shares of what the words of all classes get together.

        Args:
            logits: [..., V] at the place of the answer.

        Returns:
            float32 [..., C]: log of the sum of the exponentials of the logits of each class's words.
        """
        import torch

        return torch.stack([logits[..., list(ids)].float().logsumexp(-1) for ids in self._groups()], dim=-1)

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Keeps of each row the scores of the classes, the true class and the loss.

        Args:
            logits: [B, T', V] with T' >= T, or a tuple that starts with them. Where a method puts positions of its own
                in front (T' > T), the last T belong to the template.
            labels: [B, T], the word's id at its place, -100 elsewhere.

        Returns:
            float32 [B, C + 2]: scores; position of the true class; cross entropy of the word, in nats.

        Raises:
            TrainingError: A row has not exactly one place, or a label is no word of a class.
        """
        import torch
        from torch.nn.functional import cross_entropy

        found = labels != IGNORED
        if not bool((found.sum(1) == 1).all()):
            raise TrainingError("Each row of a cloze has one label, that of its word. Encode the data with the task.")
        places = found.long().argmax(1)
        words = labels.gather(1, places[:, None])[:, 0]
        matches = words[:, None] == torch.tensor(self._first_ids(), device=labels.device)
        if not bool(matches.any(1).all()):
            raise TrainingError("A label is none of the words of this task's classes. Encode the data with this task.")
        answers = _at(first_output(logits), labels.shape[1], places - int(self.language_model == "causal"))
        losses = cross_entropy(answers.float(), words, reduction="none")
        return torch.cat([self.class_scores(answers), matches.float().argmax(1, keepdim=True), losses[:, None]], dim=1)

    def metrics(self, predictions: Any, labels: Any = None) -> dict[str, float]:
        """Loss, and the metrics of text classification between the classes.

        Args:
            predictions: What ``reduce_logits`` returned [N, C + 2].
            labels: Not needed.

        Returns:
            ``loss`` (nats per row, over the whole vocabulary), and ``accuracy``, ``macro_f1`` and ``matthews``; see
            ``TextClassification.metrics``.
        """
        del labels
        rows = as_array(predictions)
        if rows.ndim != 2 or rows.shape[1] != len(self.label_names) + 2:
            raise DataError(
                f"Predictions have the shape {list(rows.shape)}, where [rows, {len(self.label_names) + 2}] is "
                "expected. Pass task.reduce_logits as preprocess_logits_for_metrics."
            )
        return {"loss": float(rows[:, -1].mean()), **self._classes.metrics(rows[:, :-2], rows[:, -2].astype(int))}

    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """The likeliest class of each row.

        Args:
            outputs: Scores of the classes [N, C], as ``class_scores`` gives them.
            tokenizer: Not needed.

        Returns:
            For each row ``label``, its ``probability``, and ``probabilities`` of all classes by name, which sum to one.
        """
        scores = as_array(outputs)
        if scores.ndim != 2 or scores.shape[1] != len(self.label_names):
            raise DataError(
                f"Scores have the shape {list(scores.shape)}, where [rows, {len(self.label_names)}] is expected. "
                "Use predict_rows for the logits of a model."
            )
        return self._classes.predict(scores, tokenizer)

    def predict_rows(
        self, outputs: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any = None
    ) -> list[dict[str, Any]]:
        """The likeliest class of each row, from the logits at the place of its answer alone.

        Args:
            outputs: Logits [B, T', V] of a batch that was padded on ``prediction_padding_side``.
            rows: The rows of the batch, as ``encode`` makes them with ``labelled=False``.
            tokenizer: Tells the mask token.
        """
        import torch

        logits = first_output(outputs)
        lengths = [len(row["input_ids"]) for row in rows]
        width = max(lengths)
        if self.language_model == "causal":
            places = [length - 1 for length in lengths]
        elif tokenizer is None:
            raise DataError("Finding the mask token needs the tokenizer. Pass it as third argument.")
        else:
            places = [list(row["input_ids"]).index(tokenizer.mask_token_id) for row in rows]
        if self.prediction_padding_side == "left":
            places = [width - length + place for place, length in zip(places, lengths, strict=True)]
        answers = _at(logits, width, torch.tensor(places, device=logits.device))
        return self.predict(self.class_scores(answers), tokenizer)


def _at(logits: Tensor, length: int, places: Tensor) -> Tensor:
    """The logits [B, V] at one place of each row; of [B, T', V] the last ``length`` positions are the template's."""
    import torch

    extra = logits.shape[1] - length
    if extra < 0 or logits.shape[0] != len(places):
        raise TrainingError(
            f"Logits of shape {list(logits.shape)} do not belong to {len(places)} rows of {length} positions: there "
            "must be as many rows, and at least as many positions."
        )
    return logits[torch.arange(len(places), device=logits.device), places + extra]
