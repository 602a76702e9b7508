"""What `deltune tune` is asked to do: from its options, a configuration file, and options of method and task."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from deltune.errors import DataError, MethodError, suggestion
from deltune.training.settings import TrainingSettings

if TYPE_CHECKING:
    from deltune.methods import Method
    from deltune.tasks import Task

__all__ = ["TuneRequest", "extra_options", "read_configuration"]

#: Names that are neither settings nor options of a method or a task.
_OWN = (
    "model",
    "method",
    "data",
    "evaluation",
    "split",
    "evaluation_split",
    "limit",
    "task",
    "text",
    "model_dropout",
    "output",
    "restart",
)
_REQUIRED = ("model", "data", "output")
_PAIR = 2


@dataclass(frozen=True)
class TuneRequest:
    """A run as it was asked for, every name known and every value checked that can be checked without data."""

    model: str
    method: Method
    data: str
    evaluation: str | float | None
    split: str | None
    evaluation_split: str | None
    limit: int | None
    task: type[Task]
    task_options: dict[str, Any]
    output: Path
    restart: bool
    settings: TrainingSettings
    model_dropout: float | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> TuneRequest:
        """Sort named values into settings, options of the method, options of the task, and the rest.

        Raises:
            MethodError: if a name is unknown, or the method is not.
            DataError: if a needed value is missing.
            TrainingError: if a setting makes no sense.
        """
        from deltune.tasks import get_task

        for name in _REQUIRED:
            if values.get(name) in (None, ""):
                raise DataError(f"Say --{name}: it is needed, on the command line or in the configuration file.")
        task = get_task(str(values.get("task") or "text-classification"))
        settings_names = {item.name for item in dataclasses.fields(TrainingSettings)}
        rest = {name: value for name, value in values.items() if name not in _OWN and name not in settings_names}
        task_options = {name: value for name, value in rest.items() if name in task.option_names()}
        method = _method(
            values.get("method") or "lora",
            {name: value for name, value in rest.items() if name not in task_options},
            (*_OWN, *settings_names, *task.option_names()),
        )
        settings = {name: value for name, value in values.items() if name in settings_names}
        return cls(
            model=str(values["model"]),
            method=method,
            data=str(values["data"]),
            evaluation=_share(values.get("evaluation")),
            split=values.get("split"),
            evaluation_split=values.get("evaluation_split"),
            limit=_whole("limit", values.get("limit")),
            task=task,
            task_options=_task_options(task, task_options, values.get("text")),
            output=Path(values["output"]),
            restart=_truth(values.get("restart", False)),
            settings=TrainingSettings.from_options(settings),
            model_dropout=_number("model_dropout", values.get("model_dropout")),
        )


def read_configuration(path: Path) -> dict[str, Any]:
    """The named values of a YAML file; dashes in names count as underscores.

    Raises:
        DataError: if there is no such file or it is no list of named values.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"The configuration file {path} cannot be read: {error.strerror}. Check its name.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise DataError(f"The configuration file {path} is not valid YAML: {error}") from error
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise DataError(f"The configuration file {path} must hold lines like 'batch_size: 32'.")
    return {name.replace("-", "_"): value for name, value in content.items()}


def extra_options(arguments: Sequence[str]) -> dict[str, Any]:
    """Options that the command does not know by itself: ``--rank 16``, ``--rank=16``, or a flag alone.

    Raises:
        MethodError: if something is neither an option nor the value of one, or is given twice.
    """
    found: dict[str, Any] = {}
    waiting: str | None = None
    for item in arguments:
        if item.startswith("--"):
            name, equals, value = item.removeprefix("--").partition("=")
            name = name.replace("-", "_")
            if name in found:
                raise MethodError(f"--{name.replace('_', '-')} is given twice. Leave one out.")
            found[name] = value if equals else True
            waiting = None if equals else name
        elif waiting is not None:
            found[waiting] = item
            waiting = None
        else:
            raise MethodError(
                f"{item!r} belongs to no option. Write options as --name value; put quotes around values with spaces."
            )
    return found


def _method(specification: Any, options: Mapping[str, Any], others: Sequence[str]) -> Method:
    """The method, with options of its own that stand beside it."""
    from deltune.methods import get, parse
    from deltune.methods.base import Sum

    method = parse(specification)
    if not options:
        return method
    if isinstance(method, Sum):
        raise MethodError(
            f"{', '.join(_flag(name) for name in options)}: with several methods, write options behind the one that "
            f"they belong to: {method.methods[0].name}({next(iter(options))}=...) + {method.methods[1].name}."
        )
    kind = get(method.name)
    known = [item.name for item in dataclasses.fields(kind)]
    defaults = kind()
    for name in options:
        if name not in known:
            raise MethodError(
                f"There is no option {_flag(name)}: {method.name} has no option {name!r}, nor have the task and the "
                f"training. {suggestion(name, [*known, *others])} `deltune methods {method.name}` and "
                "`deltune tune --help` show all of them."
            )
        if getattr(method, name) != getattr(defaults, name):
            raise MethodError(f"{name} is given twice: in {method} and as {_flag(name)}. Leave one out.")
    changed = {name: getattr(method, name) for name in known if name not in options}
    return kind.from_options({**changed, **options})


def _task_options(task: type[Task], options: Mapping[str, Any], text: Any) -> dict[str, Any]:
    """Options of the task with values of the right type; ``text`` may be two columns."""
    from deltune.methods.options import converted

    hints = get_type_hints(task)
    found = {name: converted(value, hints[name]) for name, value in options.items()}
    columns = [text] if isinstance(text, str) else list(text or [])
    if len(columns) > _PAIR:
        raise DataError(f"--text names {len(columns)} columns. A row has one text or two.")
    for name, column in zip(("text", "text_pair"), columns, strict=False):
        if name in found:
            raise DataError(f"{_flag(name)} is given twice. Leave one out.")
        found[name] = column
    return found


def _share(value: Any) -> str | float | None:
    """A share of the data, if that is what the value says."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None if value is None else str(value)
    if not 0 < number < 1:
        raise DataError(f"--evaluation must be a file or a share between 0 and 1, not {value}.")
    return number


def _number(name: str, value: Any) -> float | None:
    try:
        return None if value is None else float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{_flag(name)} must be a number, not {value!r}.") from error


def _whole(name: str, value: Any) -> int | None:
    try:
        return None if value is None else int(str(value))
    except ValueError as error:
        raise DataError(f"{_flag(name)} must be a whole number, not {value!r}.") from error


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise DataError(f"restart must be true or false, not {value!r}.")
    return value


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
