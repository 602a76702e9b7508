"""One label or one number for a text or a pair of texts.

Dimensions: N rows, C classes.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, suggestion
from deltune.tasks._arrays import as_array
from deltune.tasks._columns import require_columns, require_rows, text_column, wrong_type
from deltune.tasks._encoding import Encoded, EncodedRows
from deltune.tasks._labels import class_names, no_label, one_class, read_labels
from deltune.tasks._optional import require
from deltune.tasks._tokens import tokenize_rows
from deltune.tasks.base import Task, check_column_names

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self


@dataclass(frozen=True, kw_only=True)
class _SingleLabelTask(Task):
    """Shared by tasks with one label a row.

    Attributes:
        text: Column of the text, or of the first of two.
        text_pair: Column of the second text; none by default.
        label: Column of the label.
    """

    auto_class: ClassVar[str] = "AutoModelForSequenceClassification"
    token_labels: ClassVar[bool] = False

    text: str = "text"
    text_pair: str | None = None
    label: str = "label"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_column_names(self, ("text", "text_pair", "label"))
        if self.text is None or self.label is None:
            raise DataError("text and label must name data columns; only text_pair may be none.")

    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The text columns and, where ``labelled``, the label column."""
        texts = (self.text,) if self.text_pair is None else (self.text, self.text_pair)
        return (*texts, self.label) if labelled else texts

    def required_texts(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The text columns."""
        del labelled
        return self.columns(labelled=False)

    @abstractmethod
    def _label_values(self, dataset: Dataset) -> Sequence[int] | Sequence[float]:
        """The labels of all rows as the model needs them."""

    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        assert self.max_length is not None
        columns = [(name, text_column(dataset, name)) for name in self.columns(labelled=False)]
        labels = self._label_values(dataset) if labelled else [None] * len(dataset)
        rows = EncodedRows(len(dataset))
        for row, label in zip(tokenize_rows(tokenizer, columns, self.max_length), labels, strict=True):
            rows.add(row.columns, label)
            if row.truncated:
                rows.truncated()
        return rows.finish()


@dataclass(frozen=True, kw_only=True)
class TextClassification(_SingleLabelTask):
    """Assigns one of several classes to a text or a pair of texts.

    Labels in the data are text, whole numbers or ``datasets.ClassLabel``. ``from_data`` finds the classes:
    the names of a ``ClassLabel``, else the sorted distinct values. A whole number stands for the class with
    that number as its name or, where the names are not numbers, for the position of a name.

    Attributes:
        text: Column of the text, or of the first of two; ``"text"`` by default.
        text_pair: Column of the second text; none by default.
        label: Column of the label; ``"label"`` by default.
        label_names: Names of the classes, in the order of the model's outputs; at least two.
        max_length: Longest row in tokens; see ``Task``.
    """

    name: ClassVar[str] = "text-classification"
    metric: ClassVar[str] = "accuracy"
    greater_is_better: ClassVar[bool] = True
    metric_modules: ClassVar[tuple[str, ...]] = ("sklearn.metrics",)

    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        names = self.label_names
        if not isinstance(names, tuple) or not all(isinstance(name, str) and name for name in names):
            raise DataError(f"label_names must be a tuple of names, not {names!r}.")
        if len(set(names)) != len(names):
            raise DataError(f"label_names repeat a name: {', '.join(names)}. Give each class a name of its own.")
        if not names:
            raise DataError(
                "The classes are not known. Use TextClassification.from_data(training_data), or give label_names."
            )
        if len(names) == 1:
            raise one_class(names[0], self.label)

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task with the classes that the training data have.

        Args:
            dataset: The training data.
            **options: Values of the fields; with ``label_names`` given, the labels must be among them.

        Raises:
            DataError: An option is unknown, a column is missing, a label is missing or of a wrong type, or
                all labels are the same.
        """
        cls._check_options(options)
        given = tuple(options.pop("label_names", None) or ())
        # Two placeholders stand in for the classes until the data have been read.
        draft = cls(**options, label_names=given or ("0", "1"))
        require_rows(dataset)
        require_columns(dataset, draft.columns(), cls.name)
        if given:
            present = {given[index] for index in draft._label_values(dataset)}
            names = given
        else:
            values = read_labels(dataset, draft.label)
            present = {str(value) for value in values}
            kinds = {isinstance(value, str) for value in values}
            if len(kinds) > 1:
                raise DataError(f"The column {draft.label!r} mixes numbers and text. Use one kind of label.")
            names = class_names(dataset, draft.label) or tuple(str(value) for value in sorted(set(values)))
        if len(present) == 1:
            raise one_class(next(iter(present)), draft.label)
        return cls(**options, label_names=names)

    @property
    def loss_convention(self) -> str:
        """Cross entropy, averaged over rows."""
        return "cross entropy between the classes, averaged over the rows of a batch"

    def model_options(self) -> dict[str, Any]:
        """The number and the names of the classes."""
        return {
            "num_labels": len(self.label_names),
            "id2label": dict(enumerate(self.label_names)),
            "label2id": {name: index for index, name in enumerate(self.label_names)},
            "problem_type": "single_label_classification",
        }

    def _label_values(self, dataset: Dataset) -> Sequence[int]:
        positions = {name: index for index, name in enumerate(self.label_names)}
        numbered = all(name.lstrip("-").isdigit() for name in self.label_names)
        found = []
        for row, value in enumerate(read_labels(dataset, self.label), start=1):
            if isinstance(value, int) and not numbered:
                if not 0 <= value < len(self.label_names):
                    raise DataError(
                        f"Row {row} has the label {value}, which is out of range: there are "
                        f"{len(self.label_names)} classes, 0 to {len(self.label_names) - 1} "
                        f"({', '.join(self.label_names[:12])}). Correct the label or remove the row."
                    )
                found.append(value)
            elif str(value) in positions:
                found.append(positions[str(value)])
            else:
                numeric = numbered and isinstance(value, int)
                problem = "is out of range" if numeric else "is not one of the classes"
                raise DataError(
                    f"Row {row} has the label {value!r}, which {problem}: the training data have no such "
                    "class. " + suggestion(str(value), self.label_names)
                )
        return found

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Accuracy, macro-averaged F1 and Matthews' correlation, by scikit-learn.

        Args:
            predictions: Logits [N, C].
            labels: Positions of the true classes [N].

        Returns:
            ``accuracy`` and ``macro_f1`` in 0 to 1, ``matthews`` in -1 to 1. F1 is averaged over the classes
            that occur among labels or predictions.
        """
        scores = require("sklearn.metrics")
        predicted = as_array(predictions).argmax(axis=-1)
        return {
            "accuracy": float(scores.accuracy_score(labels, predicted)),
            "macro_f1": float(scores.f1_score(labels, predicted, average="macro", zero_division=0.0)),
            "matthews": float(scores.matthews_corrcoef(labels, predicted)),
        }

    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """The likeliest class of each row.

        Args:
            outputs: Logits [N, C], or a model output that has them.
            tokenizer: Not needed.

        Returns:
            For each row ``label``, its ``probability``, and ``probabilities`` of all classes by name.
        """
        import numpy as np

        del tokenizer
        logits = as_array(outputs)
        weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
        shares = weights / weights.sum(axis=-1, keepdims=True)
        return [
            {
                "label": self.label_names[int(row.argmax())],
                "probability": float(row.max()),
                "probabilities": dict(zip(self.label_names, row.tolist(), strict=True)),
            }
            for row in shares
        ]


@dataclass(frozen=True, kw_only=True)
class TextRegression(_SingleLabelTask):
    """Predicts a number for a text or a pair of texts.

    Attributes:
        text: Column of the text, or of the first of two; ``"text"`` by default.
        text_pair: Column of the second text; none by default.
        label: Column of the number; ``"label"`` by default.
        max_length: Longest row in tokens; see ``Task``.
    """

    name: ClassVar[str] = "text-regression"
    metric: ClassVar[str] = "pearson"
    greater_is_better: ClassVar[bool] = True
    metric_modules: ClassVar[tuple[str, ...]] = ("sklearn.metrics", "scipy.stats")

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task and checks that the numbers differ.

        Raises:
            DataError: An option is unknown, a column is missing, a label is no number, or all are the same.
        """
        task = super().from_data(dataset, **options)
        values = task._label_values(dataset)
        if len(set(values)) == 1:
            raise DataError(
                f"All values in column {task.label!r} are {values[0]}, so there is nothing to learn. "
                "Check the column, or give data with different values."
            )
        return task

    @property
    def loss_convention(self) -> str:
        """Squared error, averaged over rows."""
        return "squared error, averaged over the rows of a batch"

    def model_options(self) -> dict[str, Any]:
        """One output, trained as a regression."""
        return {"num_labels": 1, "problem_type": "regression"}

    def _label_values(self, dataset: Dataset) -> Sequence[float]:
        found = []
        for row, value in enumerate(dataset[self.label], start=1):
            if value is None:
                raise no_label(row, self.label)
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise wrong_type(value, row, self.label, "a number is")
            if not math.isfinite(value):
                raise DataError(f"Row {row} has the label {value} in column {self.label!r}. Give a finite number.")
            found.append(float(value))
        return found

    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Correlations and squared error, by scikit-learn and the scipy it builds on.

        Args:
            predictions: Model outputs [N, 1] or [N].
            labels: True numbers [N].

        Returns:
            ``pearson``, ``spearman`` (both 0 where they are undefined because all predictions or all labels
            are equal) and ``mean_squared_error``.
        """
        statistics = require("scipy.stats")
        scores = require("sklearn.metrics")
        predicted = as_array(predictions).reshape(-1)
        true = as_array(labels).reshape(-1)
        defined = len(set(predicted.tolist())) > 1 and len(set(true.tolist())) > 1
        return {
            "pearson": float(statistics.pearsonr(true, predicted).statistic) if defined else 0.0,
            "spearman": float(statistics.spearmanr(true, predicted).statistic) if defined else 0.0,
            "mean_squared_error": float(scores.mean_squared_error(true, predicted)),
        }

    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """The number for each row, as ``{"value": number}``.

        Args:
            outputs: Model outputs [N, 1] or [N].
            tokenizer: Not needed.
        """
        del tokenizer
        return [{"value": float(value)} for value in as_array(outputs).reshape(-1)]
