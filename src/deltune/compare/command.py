"""The exact command that makes a row, or the whole comparison, again."""

from __future__ import annotations

import shlex
from pathlib import Path

from deltune.compare.plan import Comparison

__all__ = ["command", "shown_path"]


def command(comparison: Comparison, row: str | None = None, *, output: str = "again", jobs: int = 1) -> str:
    """A command line for a shell.

    Args:
        comparison: the comparison.
        row: one row of it; by default all. The baselines always run besides.
        output: folder of the results.
        jobs: how many processes at a time; part of the command because it changes the measured times.
    """
    words = ["deltune", "compare", "--model", shown_path(comparison.model), "--data", shown_path(comparison.data)]
    words += ["--task", comparison.task]
    for name, value in comparison.task_options.items():
        words += ["--task-option", f"{name}={value}"]
    if comparison.evaluation_data is not None:
        words += ["--evaluation-data", shown_path(comparison.evaluation_data)]
    for method in comparison.methods if row is None else (row,):
        words += ["--method", method]
    words += ["--seeds", ",".join(str(seed) for seed in comparison.seeds)]
    for name in ("steps", "epochs", "batch_size", "train_size", "evaluation_size", "max_length"):
        value = getattr(comparison, name)
        if value is not None:
            words += [f"--{name.replace('_', '-')}", str(value)]
    if comparison.split_seed:
        words += ["--split-seed", str(comparison.split_seed)]
    for name, rate in comparison.learning_rates.items():
        if row is None or name == row:
            words += ["--learning-rate", f"{name}={rate!r}"]
    if comparison.model_dropout is not None:
        words += ["--model-dropout", repr(comparison.model_dropout)]
    if comparison.head_learning_rate is not None:
        words += ["--head-learning-rate", repr(comparison.head_learning_rate)]
    if jobs != 1:
        words += ["--jobs", str(jobs)]
    return shlex.join([*words, "--output", output]).replace("'~/", "~/'")


def shown_path(text: str) -> str:
    """A path as it may stand in a report: relative to the current folder, or to the home folder as ``~``.

    Neither tells who the user is. Names on a hub, and paths outside of both, stay as they are.
    """
    path = Path(text).expanduser()
    if not path.exists():
        return text
    whole = path.absolute()
    for folder, prefix in ((Path.cwd(), ""), (Path.home(), "~/")):
        if whole.is_relative_to(folder):
            return prefix + whole.relative_to(folder).as_posix()
    return text
