"""What is compared: one model, one task, one split of the data, one budget; several methods and seeds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from deltune.errors import DeltuneError, MethodError, suggestion
from deltune.methods import Method, parse

__all__ = ["LINEAR_HEAD", "MAJORITY", "Comparison", "Run", "specification_hash"]

#: Row of the majority class: nothing is trained.
MAJORITY = "majority"
#: Row of the frozen model of which only the head is trained.
LINEAR_HEAD = "linear-head"

_TASKS = ("text-classification", "token-tagging")
_LINEAR_HEAD_METHOD = "freeze(layers=0)"
#: A fresh linear layer on frozen features wants a greater rate than the layers below it.
_LINEAR_HEAD_RATE = 1e-2


@dataclass(frozen=True)
class Run:
    """One method with one seed.

    Attributes:
        row: name in the table, which is the method's text or the baseline's name.
        seed: of the head, the method's initial values and the order of the data.
    """

    row: str
    seed: int


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison: everything that all its runs share, the methods and the seeds.

    The rows are the baselines ``majority`` and ``linear-head``, then the methods. Every run gets the same
    examples, budget and batch size; the learning rate is each method's own.

    Attributes:
        model: folder of a pretrained model, or its name on the hub.
        data: what :func:`deltune.tasks.read_dataset` reads.
        methods: as text, such as ``lora(rank=8)``. The baselines may be named, and run anyway.
        task: name of the task.
        task_options: fields of the task, such as ``{"text": "sentence"}``.
        evaluation_data: separate data to evaluate on; by default they are split off from ``data``.
        seeds: one run of each method for each.
        steps: optimizer steps of each run; or
        epochs: passes over the training data. Exactly one of the two.
        batch_size: examples in a step.
        train_size: number of training examples; all by default.
        evaluation_size: number of evaluation examples; a tenth of the data by default.
        split_seed: chooses which examples are which.
        max_length: longest text in tokens; the task's default if None.
        learning_rates: rates by row that replace the methods' defaults.
        head_learning_rate: rate of the task head in every row; by default that of the row.
        model_dropout: probability of every dropout of the model, in every row; the model's own by default.

    Raises:
        DeltuneError: when built with values that make no sense.
        MethodError: if a method or option does not exist.
    """

    model: str
    data: str
    methods: tuple[str, ...]
    task: str = "text-classification"
    task_options: Mapping[str, Any] = field(default_factory=dict)
    evaluation_data: str | None = None
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int | None = None
    epochs: float | None = None
    batch_size: int = 16
    train_size: int | None = None
    evaluation_size: int | None = None
    split_seed: int = 0
    max_length: int | None = None
    learning_rates: Mapping[str, float] = field(default_factory=dict)
    head_learning_rate: float | None = None
    model_dropout: float | None = None

    def __post_init__(self) -> None:
        rows = [str(parse(text)) for text in self.methods if text not in (MAJORITY, LINEAR_HEAD)]
        _refuse_repeated("method", rows)
        object.__setattr__(self, "methods", tuple(rows))
        if self.task not in _TASKS:
            raise DeltuneError(f"The task {self.task!r} cannot be compared yet. {suggestion(self.task, _TASKS)}")
        if not self.seeds:
            raise DeltuneError("There is no seed. Give at least one, such as 0.")
        _refuse_repeated("seed", self.seeds)
        if (self.steps is None) == (self.epochs is None):
            raise DeltuneError("Give the budget of each run either in steps or in epochs.")
        for name in (
            "steps",
            "epochs",
            "batch_size",
            "train_size",
            "evaluation_size",
            "max_length",
            "head_learning_rate",
        ):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise DeltuneError(f"{name} must be greater than 0, not {value}.")
        if self.model_dropout is not None and not 0 <= self.model_dropout < 1:
            raise DeltuneError(f"model_dropout must be at least 0 and less than 1, not {self.model_dropout}.")
        rates = {self._row_of(name): float(rate) for name, rate in self.learning_rates.items()}
        for row, rate in rates.items():
            if not rate > 0:
                raise DeltuneError(f"The learning rate of {row} must be greater than 0, not {rate}.")
        object.__setattr__(self, "learning_rates", rates)

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of all rows: the baselines, then the methods."""
        return (MAJORITY, LINEAR_HEAD, *self.methods)

    @property
    def runs(self) -> list[Run]:
        """Every run, row by row. The majority class knows no chance, so it has the first seed only."""
        return [Run(row, seed) for row in self.rows for seed in (self.seeds if row != MAJORITY else self.seeds[:1])]

    def method(self, row: str) -> Method | None:
        """The method of a row; None for the majority class."""
        if row == MAJORITY:
            return None
        return parse(_LINEAR_HEAD_METHOD if row == LINEAR_HEAD else row)

    def learning_rate(self, row: str) -> float | None:
        """Peak learning rate of a row; None for the majority class."""
        method = self.method(row)
        if method is None:
            return None
        default = _LINEAR_HEAD_RATE if row == LINEAR_HEAD else method.learning_rate
        return self.learning_rates.get(row, default)

    def specification(self, run: Run, content: Mapping[str, Any]) -> dict[str, Any]:
        """Everything that a run's quality depends on, as JSON values.

        Args:
            run: the run.
            content: fingerprints of the model and the data and the task's description; paths do not count.
        """
        method = self.method(run.row)
        return {
            **content,
            "row": run.row,
            "method": None if method is None else method.to_dict(),
            "seed": run.seed,
            "steps": self.steps,
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "learning_rate": self.learning_rate(run.row),
            "head_learning_rate": self.head_learning_rate,
            "model_dropout": self.model_dropout,
            "weight_decay": None if method is None else method.weight_decay,
        }

    def to_dict(self) -> dict[str, Any]:
        """All values, for files."""
        return json.loads(json.dumps(asdict(self)))  # type: ignore[no-any-return]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Comparison:
        """What :meth:`to_dict` wrote."""
        arguments: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**arguments)

    def _row_of(self, name: str) -> str:
        if name in self.rows:
            return name
        try:
            row = str(parse(name))
        except MethodError:
            row = name
        if row not in self.rows:
            raise DeltuneError(
                f"A learning rate is given for {name!r}, which is not compared. {suggestion(name, self.rows)}"
            )
        return row


def specification_hash(specification: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits that differ wherever the specification does."""
    text = json.dumps(specification, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _refuse_repeated(what: str, values: Iterable[Any]) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise DeltuneError(f"The {what} {value} is given twice. Give each once.")
        seen.add(value)
