"""What every task is: columns, encoding, collation, head, metrics, and a description that rebuilds it."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, DeltuneError, suggestion
from deltune.tasks import _tokens
from deltune.tasks._arrays import first_output
from deltune.tasks._columns import require_columns, require_rows
from deltune.tasks._encoding import Encoded, EncodingReport
from deltune.tasks._optional import require
from deltune.tasks.collation import Collator

if TYPE_CHECKING:
    from datasets import Dataset
    from typing_extensions import Self

#: Reads a folder as a model of a class, with options of its configuration.
Reader = Callable[..., Any]

logger = logging.getLogger(__name__)

_DESCRIPTION_KEYS = ("task", "options", "loss", "metric", "greater_is_better", "encoding")


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """What is learned: which columns are read, how they become tensors, which head and which metrics.

    A task is immutable and knows nothing of methods or training. Its own values (the fields) rebuild it.

    Attributes:
        max_length: Longest row in tokens, special tokens included. ``None`` (the default) is the smaller of
            512 and the limit that the tokenizer names; ``resolve`` replaces it by the number.
    """

    name: ClassVar[str]
    """Name on the command line and in saved descriptions."""
    auto_class: ClassVar[str]
    """Name of the transformers class that builds the model."""
    metric: ClassVar[str]
    """The primary metric, one of the keys that ``metrics`` returns."""
    greater_is_better: ClassVar[bool]
    """Whether a greater primary metric is better."""
    token_labels: ClassVar[bool]
    """Whether there is a label a token, or one a row."""
    generates: ClassVar[bool] = False
    """Whether predictions are made with ``model.generate`` on unlabelled rows, or with a forward pass."""
    prediction_padding_side: ClassVar[str] = "right"
    """Side to pad on when predicting; decoders generate behind left padding."""

    metric_modules: ClassVar[tuple[str, ...]] = ()
    """Modules of optional packages that ``metrics`` imports."""

    max_length: int | None = None

    def __post_init__(self) -> None:
        check_positive("max_length", self.max_length)

    @classmethod
    def from_data(cls, dataset: Dataset, **options: Any) -> Self:
        """Builds the task for training data, inferring what the data tell, such as the labels.

        Args:
            dataset: The training data.
            **options: Values of the task's fields; they take precedence over what would be inferred.

        Raises:
            DataError: An option is unknown or makes no sense, or the data lack a column or hold values that
                the task cannot use.
        """
        cls._check_options(options)
        task = cls(**options)
        require_rows(dataset)
        require_columns(dataset, task.columns(), cls.name)
        return task

    @abstractmethod
    def columns(self, *, labelled: bool = True) -> tuple[str, ...]:
        """The data columns that the task reads, without those of the labels if ``labelled`` is false."""

    def required_texts(self, *, labelled: bool = True) -> tuple[str, ...]:
        """Those of ``columns`` that must hold text in every row; see ``drop_empty_rows``."""
        return self.columns(labelled=labelled)

    @property
    @abstractmethod
    def loss_convention(self) -> str:
        """What the training loss is and which tokens or rows it covers, in words."""

    @abstractmethod
    def _encode(self, dataset: Dataset, tokenizer: Any, labelled: bool) -> Encoded:
        """Encodes checked data; called on a resolved task."""

    def check_metrics(self) -> None:
        """Refuse, before a training that measures, where a package that :meth:`metrics` needs is missing.

        Raises:
            DeltuneError: saying how to install it.
        """
        for module in self.metric_modules:
            require(module)

    @abstractmethod
    def metrics(self, predictions: Any, labels: Any) -> dict[str, float]:
        """Scores predictions.

        Args:
            predictions: What ``reduce_logits`` returned, for all rows.
            labels: The labels of the same rows.

        Raises:
            TrainingError: The predictions are not finite numbers.
        """

    @abstractmethod
    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """Predictions for people, one dictionary a row."""

    def predict_rows(
        self, outputs: Any, rows: Sequence[Mapping[str, Any]], tokenizer: Any = None
    ) -> list[dict[str, Any]]:
        """Like ``predict``, for tasks whose predictions also depend on the rows, encoded with ``labelled=False``."""
        del rows
        return self.predict(outputs, tokenizer)

    # -- models and tokenizers ------------------------------------------------------------------------

    def model_options(self) -> dict[str, Any]:
        """Configuration values that the task's head needs, such as ``num_labels``; empty by default."""
        return {}

    def load_model(
        self,
        path: str,
        *,
        tokenizer: Any = None,
        dropout: float | None = None,
        read: Reader | None = None,
        **options: Any,
    ) -> Any:
        """Loads a pretrained model with the task's head.

        Args:
            path: Local folder, or a name on the model hub.
            tokenizer: Where given, the model's padding id is set to the tokenizer's. Needed to classify with
                decoders, which look for the last token that is not padding.
            dropout: Where given, every dropout of the model gets this probability. A frozen model needs none, and
                short trainings learn faster without.
            read: Reads the folder in place of ``from_pretrained``: called with the model's class, the path, and the
                options. :func:`deltune.quantization.reader` gives one that quantises.
            **options: Passed on to ``from_pretrained``; ``dtype`` is float32 by default.

        Raises:
            DataError: An option would contradict the task.
            DeltuneError: The model cannot be loaded, or has no such head.
        """
        import torch
        import transformers

        required = self.model_options()
        clashing = sorted(required.keys() & options.keys())
        if clashing:
            raise DataError(f"The task {self.name!r} sets {', '.join(clashing)} itself. Leave it out.")
        options = {"dtype": torch.float32, **options}
        try:
            if dropout is not None:
                options.update(_with_dropout(transformers.AutoConfig.from_pretrained(path), dropout))
            kind = getattr(transformers, self.auto_class)
            model: Any = (read or _read)(kind, path, **required, **options)
        except OSError as error:
            raise _unloadable("model", path, error) from error
        except RuntimeError as error:
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise DeltuneError(
                f"The model in {str(path)!r} has a head of another size than {self.name!r} needs here. Give "
                f"the "
                "pretrained model without that head, or pass ignore_mismatched_sizes=True to begin with a "
                "new one."
            ) from error
        except ValueError as error:
            if "Unrecognized model" in str(error) or "does not recognize this architecture" in str(error):
                raise _unloadable("model", path, error) from error
            if "Unrecognized configuration class" not in str(error):
                raise
            raise DeltuneError(
                f"The model in {str(path)!r} cannot do {self.name!r}: transformers has no {self.auto_class} "
                f"for "
                "its architecture. Choose another model or another task."
            ) from error
        if tokenizer is not None and model.config.pad_token_id != tokenizer.pad_token_id:
            model.config.pad_token_id = tokenizer.pad_token_id
        return model

    def load_tokenizer(self, path: str, **options: Any) -> Any:
        """Loads a tokenizer and gives it a padding token from its own vocabulary if it has none.

        Args:
            path: Local folder, or a name on the model hub.
            **options: Passed on to ``AutoTokenizer.from_pretrained``.

        Raises:
            DataError: The tokenizer has no special token that could pad.
            DeltuneError: The tokenizer cannot be loaded.
        """
        import transformers

        try:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
        except (OSError, ValueError) as error:
            raise _unloadable("tokenizer", path, error) from error
        _tokens.ensure_padding_token(tokenizer)
        return tokenizer

    def resolve(self, tokenizer: Any) -> Self:
        """A copy in which everything that depends on the tokenizer is fixed, such as ``max_length``.

        Encoding does this by itself. Describe the resolved task, so that nothing is left to chance.
        """
        return replace(self, max_length=_tokens.length_limit(self.max_length, tokenizer))

    # -- data -----------------------------------------------------------------------------------------

    def encode(self, dataset: Dataset, tokenizer: Any, *, labelled: bool = True) -> Dataset:
        """Turns text into token ids; logs a warning if rows were cut or dropped.

        Args:
            dataset: Rows with the task's columns; other columns are left out.
            tokenizer: A transformers tokenizer.
            labelled: False encodes what a prediction starts from, and needs no label column.

        Returns:
            A dataset with ``input_ids``, ``attention_mask``, ``length`` (tokens), ``token_type_ids`` where
            the tokenizer makes them, and ``labels`` where ``labelled``.

        Raises:
            DataError: There are no rows, a column is missing, or a value cannot be used; the message names
                the row.
        """
        encoded = self.encode_with_report(dataset, tokenizer, labelled=labelled)
        if encoded.report.truncated_rows or encoded.report.dropped_rows:
            logger.warning("%s: %s", self.name, encoded.report.sentence())
        return encoded.dataset

    def encode_with_report(self, dataset: Dataset, tokenizer: Any, *, labelled: bool = True) -> Encoded:
        """Like ``encode``, and returns the counts of rows cut and dropped besides."""
        require_rows(dataset)
        require_columns(dataset, self.columns(labelled=labelled), self.name)
        return self.resolve(tokenizer)._encode(dataset, tokenizer, labelled)

    def collator(
        self, tokenizer: Any, *, padding_side: str = "right", pad_to_multiple_of: int | None = None
    ) -> Collator:
        """A callable that pads encoded rows to a batch of tensors.

        Args:
            tokenizer: Gives the padding id; must have one (``load_tokenizer`` sees to it).
            padding_side: ``"right"`` by default; ``prediction_padding_side`` for predictions.
            pad_to_multiple_of: Rounds the padded length up; none by default.
        """
        if tokenizer.pad_token_id is None:
            raise DataError("The tokenizer has no padding token. Load it with task.load_tokenizer, or set one.")
        return Collator(
            pad_token_id=tokenizer.pad_token_id,
            pad_token_type_id=tokenizer.pad_token_type_id,
            token_labels=self.token_labels,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
        )

    def generation_options(self, tokenizer: Any) -> dict[str, int]:
        """What ``model.generate`` must be told; nothing for tasks that do not generate."""
        del tokenizer
        return {}

    def reduce_logits(self, logits: Any, labels: Any) -> Any:
        """Makes a batch's logits small before they are collected for ``metrics``.

        Give it to ``transformers.Trainer`` as ``preprocess_logits_for_metrics``.
        """
        del labels
        return first_output(logits)

    # -- description ----------------------------------------------------------------------------------

    def describe(self, encoding: Mapping[str, EncodingReport] | None = None) -> dict[str, Any]:
        """Everything needed to do the task again, as JSON values.

        Args:
            encoding: Reports of the encodings, by the name of the data (such as ``"train"``).
        """
        description: dict[str, Any] = {
            "task": self.name,
            "options": {field.name: _json_value(getattr(self, field.name)) for field in fields(self)},
            "loss": self.loss_convention,
            "metric": self.metric,
            "greater_is_better": self.greater_is_better,
        }
        if encoding is not None:
            description["encoding"] = {name: report.describe() for name, report in encoding.items()}
        return description

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Self:
        """The task that ``describe`` described.

        Raises:
            DataError: The description is of another task, lacks a part or has an unknown one.
        """
        for key in description:
            if key not in _DESCRIPTION_KEYS:
                raise DataError(
                    f"The task's description has an unknown part {key!r}. {suggestion(key, _DESCRIPTION_KEYS)}"
                )
        if description.get("task") != cls.name or "options" not in description:
            raise DataError(
                f"This is not a description of the task {cls.name!r}: it says "
                f"task={description.get('task')!r} "
                f"and has the parts {', '.join(description) or 'none'}."
            )
        options: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in description["options"].items()
        }
        cls._check_options(options)
        return cls(**options)

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        """Names of the task's fields, in order."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def _check_options(cls, options: Mapping[str, Any]) -> None:
        for option in options:
            if option not in cls.option_names():
                raise DataError(
                    f"The task {cls.name!r} has no option {option!r}. {suggestion(option, cls.option_names())}"
                )


def check_positive(option: str, value: Any) -> None:
    """Refuses an option that is neither ``None`` nor a whole number of at least 1."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise DataError(f"{option} must be a whole number of at least 1, not {value!r}.")


def check_column_names(task: Task, options: Sequence[str]) -> None:
    """Refuses fields that should name a column (or be ``None``) and do not."""
    for option in options:
        value = getattr(task, option)
        if value is not None and (not isinstance(value, str) or not value):
            raise DataError(f"{option} must be the name of a data column, not {value!r}.")


def _json_value(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(kind: Any, path: str, **options: Any) -> Any:
    return kind.from_pretrained(path, **options)


def _unloadable(what: str, path: str, error: Exception) -> DeltuneError:
    if str(path).startswith((".", "/", "~")) and not Path(path).is_dir():
        problem = "There is no such folder."
    else:
        lines = str(error).strip().splitlines()
        problem = lines[0] if lines else type(error).__name__
    return DeltuneError(
        f"No {what} can be loaded from {str(path)!r}: {problem} "
        "Give a folder that holds a saved model, or a name on the model hub."
    )


def dropouts(config: Any) -> dict[str, float | None]:
    """Every dropout of a model's configuration by name; none where there is none."""
    return {
        name: value
        for name, value in getattr(config, "to_dict", dict)().items()
        if ("dropout" in name or name.endswith("_pdrop")) and (value is None or isinstance(value, int | float))
    }


def _with_dropout(config: Any, probability: float) -> dict[str, float]:
    """Every dropout of a configuration, set to ``probability``.

    Raises:
        DataError: if it is no probability.
    """
    if not 0 <= probability < 1:
        raise DataError(f"A dropout must be at least 0 and less than 1, not {probability}.")
    return dict.fromkeys(dropouts(config), probability)
