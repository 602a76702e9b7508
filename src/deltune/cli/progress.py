"""Live progress of a training run in the terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from deltune.cli.reporting import plain_number

__all__ = ["LiveProgress"]

#: Lines that are written where there is no terminal to draw a bar in.
_LINES = 10


class LiveProgress(TrainerCallback):  # type: ignore[misc]
    """Shows step, loss, learning rate, metric and the time left, on the standard error stream.

    Args:
        title: what is trained.
        metric: the metric to show after an evaluation.
    """

    def __init__(self, title: str, metric: str) -> None:
        self.console = Console(stderr=True)
        self.metric = metric
        self.values: dict[str, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[values]}", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar = self.progress.add_task(title, total=None, values="")

    def __enter__(self) -> LiveProgress:
        self.progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.progress.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Know how long it will be; say so if the run goes on from a checkpoint."""
        if state.global_step:
            self.console.print(f"Going on from step {state.global_step} of {state.max_steps}.", highlight=False)
        self.progress.update(self.bar, total=state.max_steps, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One step more."""
        self.progress.update(self.bar, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
        """New values."""
        shown = {"loss": "loss", "learning_rate": "rate", f"eval_{self.metric}": self.metric}
        self.values.update({shown[name]: value for name, value in logs.items() if name in shown})
        text = "  ".join(f"{name} {plain_number(value)}" for name, value in self.values.items())
        self.progress.update(self.bar, values=text)
        every = max(1, state.max_steps // _LINES)
        if not self.console.is_terminal and "loss" in logs and state.global_step % every == 0:
            self.console.print(f"step {state.global_step} of {state.max_steps}  {text}", highlight=False)
