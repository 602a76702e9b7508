"""How to train: every number that a run depends on, validated, and filled in where it was left open."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, get_type_hints

from deltune.errors import TrainingError, suggestion

__all__ = ["TrainingSettings", "setting_rows"]


def _setting(
    default: Any,
    help: str,
    *,
    minimum: float | None = None,
    maximum: float | None = None,
    exclusive: bool = False,
    choices: Iterable[str] = (),
) -> Any:
    """A setting: its default, one sentence of help, and its bounds; ``exclusive``: ``minimum`` itself is invalid."""
    metadata = {"help": help, "minimum": minimum, "maximum": maximum, "exclusive": exclusive}
    return field(default=default, metadata={**metadata, "choices": tuple(choices)})


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """How to train. ``None`` means: let the method, the data or the machine decide; :meth:`resolve` says what.

    A step is one update of the parameters; it reads ``batch_size * gradient_accumulation`` rows.

    Raises:
        TrainingError: when built with a value of the wrong type or out of bounds.
    """

    epochs: float = _setting(3.0, "passes over the training data", minimum=0, exclusive=True)
    steps: int | None = _setting(None, "number of steps; overrides epochs", minimum=1)
    batch_size: int = _setting(16, "rows of a batch", minimum=1)
    evaluation_batch_size: int | None = _setting(
        None, "rows of a batch in evaluation; twice batch_size if none", minimum=1
    )
    gradient_accumulation: int = _setting(1, "batches whose gradients are added up for one step", minimum=1)
    learning_rate: float | None = _setting(
        None, "peak learning rate; the method's own default if none", minimum=0, exclusive=True
    )
    head_learning_rate: float | None = _setting(
        None, "peak learning rate of the task head; that of the method if none", minimum=0, exclusive=True
    )
    weight_decay: float | None = _setting(
        None, "decay of weight matrices, never of biases and norms; the method's own default if none", minimum=0
    )
    warmup_ratio: float = _setting(0.06, "share of the steps in which the rate rises to its peak", minimum=0, maximum=1)
    schedule: str = _setting(
        "linear", "course of the learning rate after the warm-up", choices=("linear", "constant", "cosine")
    )
    optimizer: str = _setting(
        "adamw",
        "what makes the steps; the 8bit ones keep their state in 8 bits, the paged ones on CUDA only",
        choices=("adamw", "adamw-8bit", "paged-adamw", "paged-adamw-8bit"),
    )
    max_gradient_norm: float = _setting(
        1.0, "longer gradients are scaled down to this norm; 0 leaves them alone", minimum=0
    )
    seed: int = _setting(
        0, "seed of data order and dropout; on the command line of new parameters too", minimum=0, maximum=2**32 - 1
    )
    precision: str = _setting(
        "float32",
        "arithmetic of the forward pass; parameters keep their own type",
        choices=("float32", "bfloat16"),
    )
    gradient_checkpointing: bool = _setting(False, "recompute activations in the backward pass to save memory")
    length_buckets: bool = _setting(True, "make batches of rows of similar length, which saves padding")
    drop_layers: bool = _setting(
        False, "leave a random number of the lowest layers unchanged in each step, so that they can be dropped later"
    )
    frozen_states: str | None = _setting(
        None,
        "folder where the states of the frozen layers are kept, so that these run once for each text and not in every "
        "epoch; may serve several runs; not kept if none",
    )
    evaluate_every: int | None = _setting(None, "steps between evaluations; an epoch if none", minimum=1)
    save_every: int | None = _setting(None, "steps between training checkpoints; an epoch if none", minimum=1)
    patience: int | None = _setting(
        None, "stop after this many evaluations without a better metric; never if none", minimum=1
    )
    keep_best: bool = _setting(True, "end with the weights that were best in evaluation, not the last ones")
    device: str | None = _setting(None, "where to compute: cpu, cuda or mps; the best that is present if none")
    threads: int | None = _setting(None, "processor threads of PyTorch; as many as it uses now if none", minimum=1)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if isinstance(value, os.PathLike):
                value = os.fspath(value)
                object.__setattr__(self, item.name, value)
            if hints[item.name] in (float, float | None) and isinstance(value, int) and not isinstance(value, bool):
                value = float(value)
                object.__setattr__(self, item.name, value)
            _check(item, value, hints[item.name])
        if self.device is not None and self.device not in ("cpu", "cuda", "mps"):
            raise TrainingError(
                f"device cannot be {self.device!r}. Choose cpu, cuda or mps; which of several GPUs is said by "
                "the environment variable CUDA_VISIBLE_DEVICES."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> TrainingSettings:
        """Build from named values, which may be text as typed on a command line.

        Raises:
            TrainingError: if a name is unknown or a value makes no sense.
        """
        hints = get_type_hints(cls)
        names = [item.name for item in dataclasses.fields(cls)]
        values: dict[str, Any] = {}
        for name, value in options.items():
            if name not in names:
                raise TrainingError(f"There is no setting {name!r}. {suggestion(name, names)}")
            values[name] = _from_text(value, hints[name]) if isinstance(value, str) else value
        return cls(**values)

    def updated(self, **options: Any) -> TrainingSettings:
        """A copy with some values changed.

        Raises:
            TrainingError: as when built.
        """
        return type(self).from_options({**self.to_dict(), **options})

    def resolve(
        self, *, learning_rate: float, weight_decay: float, batches: int, device: str, threads: int
    ) -> TrainingSettings:
        """A copy in which nothing is left open.

        Args:
            learning_rate: the method's default.
            weight_decay: the method's default.
            batches: number of batches of an epoch.
            device: kind of the device that was found.
            threads: threads that PyTorch uses now.

        Raises:
            TrainingError: if the optimizer is not for that device.
        """
        self.check_optimizer(self.device or device)
        steps_per_epoch = self.steps_per_epoch(batches)
        steps = self.steps or max(1, math.ceil(self.epochs * steps_per_epoch))
        rate = learning_rate if self.learning_rate is None else self.learning_rate
        return dataclasses.replace(
            self,
            steps=steps,
            epochs=steps / steps_per_epoch,
            evaluation_batch_size=self.evaluation_batch_size or 2 * self.batch_size,
            learning_rate=rate,
            head_learning_rate=rate if self.head_learning_rate is None else self.head_learning_rate,
            weight_decay=weight_decay if self.weight_decay is None else self.weight_decay,
            evaluate_every=self.evaluate_every or min(steps, steps_per_epoch),
            save_every=self.save_every or min(steps, steps_per_epoch),
            device=self.device or device,
            threads=self.threads or threads,
        )

    def check_optimizer(self, device: str) -> None:
        """Refuse an optimizer that this machine cannot have.

        Args:
            device: kind of the device that will be used.

        Raises:
            TrainingError: if it needs CUDA, or a package that is not installed.
        """
        if self.optimizer == "adamw":
            return
        plain = self.optimizer.removeprefix("paged-")
        if plain != self.optimizer and device != "cuda":
            raise TrainingError(
                f"The optimizer {self.optimizer!r} moves its state between the memories of a CUDA device and of the "
                f"host, and this run is on {device}. Use optimizer={plain}, which makes the same steps."
            )
        if device == "mps":
            raise TrainingError(
                f"The optimizer {self.optimizer!r} is for cpu and cuda, and this run is on mps. Use optimizer=adamw."
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise TrainingError(
                f"The optimizer {self.optimizer!r} needs the package 'bitsandbytes', which is not installed. Install "
                "it with: pip install 'deltune[quant]'. Or use optimizer=adamw."
            )

    def steps_per_epoch(self, batches: int) -> int:
        """Steps that an epoch of that many batches has; the last may have fewer batches than the others."""
        return max(1, math.ceil(batches / self.gradient_accumulation))

    def to_dict(self) -> dict[str, Any]:
        """All settings as plain values."""
        return dataclasses.asdict(self)


def setting_rows() -> list[dict[str, Any]]:
    """Each setting: name, type, default, help and bounds, for pages and the command line."""
    hints = get_type_hints(TrainingSettings)
    return [
        {"name": item.name, "type": _expected(hints[item.name]), "default": item.default, **item.metadata}
        for item in dataclasses.fields(TrainingSettings)
    ]


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    bool: ("true or false", lambda value: isinstance(value, bool)),
    int: ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, float) and math.isfinite(value)),
    str: ("a word", lambda value: isinstance(value, str)),
}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of an optional one; the type alone otherwise."""
    return tuple(getattr(hint, "__args__", (hint,)))


def _expected(hint: Any) -> str:
    return " or ".join("none" if member is type(None) else _KINDS[member][0] for member in _members(hint))


def _check(item: dataclasses.Field[Any], value: Any, hint: Any) -> None:
    """Refuse a value of the wrong type or out of bounds."""
    members = _members(hint)
    if value is None and type(None) in members:
        return
    if not any(_KINDS[member][1](value) for member in members if member is not type(None)):
        raise TrainingError(f"{item.name} must be {_expected(hint)}, not {value!r}.")
    bounds = item.metadata
    if bounds["choices"] and value not in bounds["choices"]:
        raise TrainingError(f"{item.name} cannot be {value!r}. {suggestion(value, bounds['choices'])}")
    minimum, maximum = bounds["minimum"], bounds["maximum"]
    if minimum is not None and (value < minimum or (bounds["exclusive"] and value == minimum)):
        relation = "greater than" if bounds["exclusive"] else "at least"
        raise TrainingError(f"{item.name} must be {relation} {minimum}, not {value}.")
    if maximum is not None and value > maximum:
        raise TrainingError(f"{item.name} must be at most {maximum}, not {value}.")


def _from_text(text: str, hint: Any) -> Any:
    """Text as a value of the wanted type; text that is none stays text, for :func:`_check` to refuse."""
    members = _members(hint)
    word = text.strip().lower()
    if type(None) in members and word in ("none", "null"):
        return None
    if bool in members and word in ("true", "yes", "false", "no"):
        return word in ("true", "yes")
    for kind in (int, float):
        if kind in members:
            try:
                return kind(word)
            except ValueError:
                continue
    return text
