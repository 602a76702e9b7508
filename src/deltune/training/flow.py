"""The course of a run: when to log, evaluate, save and stop; which weights were best."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import TrainerCallback

from deltune.training.settings import TrainingSettings
from deltune.training.weights import capture
from deltune.tuned import Tuned

__all__ = ["Flow", "Stopwatch"]

#: About how many entries the history of a run has.
_ENTRIES = 200


class Stopwatch:
    """Counts seconds, except inside of ``paused`` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since: float | None = None

    def start(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Count no further."""
        if self._since is not None:
            self.seconds += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count inside the block."""
        running = self._since is not None
        self.stop()
        try:
            yield
        finally:
            if running:
                self.start()


class Flow(TrainerCallback):  # type: ignore[misc]
    """Decides after each step what is to be done, and keeps the best weights.

    Args:
        tuned: whose weights.
        settings: resolved settings.
        metric: name of the metric that decides, None if there is nothing to evaluate with.
        greater_is_better: whether a greater metric is better.
        saves: whether to write training checkpoints.
    """

    def __init__(
        self, tuned: Tuned, settings: TrainingSettings, metric: str | None, greater_is_better: bool, saves: bool
    ) -> None:
        assert settings.steps is not None
        self.tuned = tuned
        self.settings = settings
        self.metric = metric
        self.sign = 1.0 if greater_is_better else -1.0
        self.saves = saves
        self.log_every = max(1, settings.steps // _ENTRIES)
        self.clock = Stopwatch()
        self.best: float | None = None
        self.best_step: int | None = None
        self.best_weights: dict[str, Tensor] | None = None
        self.metrics: dict[str, float] = {}
        self.without_improvement = 0
        self.stopped_early = False
        self.finished = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.clock.start()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the clock."""
        self.clock.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Say what is to be done after this step."""
        step = state.global_step
        self.finished = step >= state.max_steps
        if self.finished:
            control.should_training_stop = True
        control.should_evaluate = self.metric is not None and self._due(step, self.settings.evaluate_every)
        control.should_save = self.saves and self._due(step, self.settings.save_every)
        # a checkpoint begins a new mean of the loss, so that the history does not depend on where a run was killed
        control.should_log = step % self.log_every == 0 or control.should_evaluate or control.should_save

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any) -> None:
        """Keep the weights if they are the best; stop if there has been no progress for long.

        Weights that would be saved as something else than was measured are not compared with others.
        """
        assert self.metric is not None
        if not all(self.tuned.attachments[name].settled for name in self.tuned.trained):
            self.metrics = dict(metrics)
            return
        value = metrics[self.metric]
        if self.best is None or self.sign * value > self.sign * self.best:
            self.best, self.best_step, self.without_improvement = value, state.global_step, 0
            if self.settings.keep_best:
                self.best_weights = capture(self.tuned)
        else:
            self.without_improvement += 1
        if not self.settings.keep_best or self.best_step == state.global_step:
            self.metrics = dict(metrics)
        if self.settings.patience is not None and self.without_improvement >= self.settings.patience:
            self.stopped_early = not self.finished
            self.finished = True
            control.should_training_stop = True
            control.should_save = self.saves

    def _due(self, step: int, every: int | None) -> bool:
        assert every is not None
        return self.finished or step % every == 0

    def state_dict(self) -> dict[str, Any]:
        """All but the best weights, as plain values."""
        names = ("best", "best_step", "metrics", "without_improvement", "stopped_early", "finished")
        return {"seconds": self.clock.seconds, **{name: getattr(self, name) for name in names}}

    def load_state_dict(self, state: dict[str, Any], best_weights: dict[str, Tensor] | None) -> None:
        """Take over what :meth:`state_dict` gave."""
        self.best_weights = best_weights
        self.clock.seconds = state["seconds"]
        for name, value in state.items():
            if name != "seconds":
                setattr(self, name, value)
