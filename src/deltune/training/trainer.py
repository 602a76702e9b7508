"""A transformers Trainer for tuned models: it writes deltas only, and resumes exactly."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from deltune.errors import TrainingError
from deltune.training.randomness import RandomStream
from deltune.training.snapshot import Snapshot, prune_snapshots, write_snapshot
from deltune.training.weights import capture, put_back, refuse_not_finite
from deltune.tuned import Tuned

if TYPE_CHECKING:
    from deltune.model_hooks import StepHooks

__all__ = ["DeltaTrainer"]

_IGNORED = -100


class DeltaTrainer(Trainer):  # type: ignore[misc]
    """``transformers.Trainer`` for the live attachments of a tuned model.

    All arguments of the Trainer work, and so do subclassing and callbacks. What differs:

    - Checkpoints and ``save_model`` hold what was trained, never the base model.
    - A run that goes on from a checkpoint ends in the same bits as one that never stopped: each step draws its
      random numbers from a stream of its own, which the checkpoint holds.
    - The optimizer is made for the trained parameters alone, without decay of biases and norms, and the schedules
      of the methods follow it. Bind an optimizer of your own with ``tuned.bind(optimizer)``.
    - With gradient accumulation every batch counts by its number of labels, for every loss and penalty.
    - A loss that is not a finite number stops training with an error.

    Args:
        tuned: the handle of the model to train.
        args: as for the Trainer.
        head_learning_rate: peak rate of the task head; ``args.learning_rate`` if None.
        **options: further arguments of the Trainer, all but ``model`` and ``model_init``.
    """

    # set by the Trainer
    optimizer: Any
    lr_scheduler: Any
    control: Any

    def __init__(
        self,
        tuned: Tuned,
        args: TrainingArguments | None = None,
        *,
        head_learning_rate: float | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model=tuned.model, args=args, **options)
        if self.args.fp16 or self.args.world_size > 1:
            raise TrainingError(
                "DeltaTrainer trains in one process, and in float32 or bfloat16: its checkpoints could not resume "
                "exactly otherwise. Use bf16=True instead of fp16=True; for several processes use a plain "
                "transformers.Trainer with model=tuned.model."
            )
        self.tuned = tuned
        self.head_learning_rate = head_learning_rate
        self.stream = RandomStream(self.args.seed)
        self.add_callback(_StreamCallback(self.stream))
        if self.compute_loss_func is None:
            # the batches of a step are weighted here, see get_batch_samples
            self.model_accepts_loss_kwargs = False
        self._weights: deque[float] = deque()
        self._weight: float | None = None
        self._bound: StepHooks | None = None
        self._made: Any = None
        self._loaded: dict[str, Any] | None = None

    # -- optimizer -------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        """The optimizer that ``args`` names, for the trained parameters; weight decay for matrices alone."""
        if self.optimizer is None:
            head = {
                id(parameter)
                for active in self.tuned.trained
                for name, parameter in self.tuned.attachments[active].parameters()
                if name in self.tuned.attachments[active].head_names
            }
            groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
            for name, parameter in self.tuned.named_trainable_parameters():
                groups.setdefault((id(parameter) in head, _spared(name, parameter)), []).append(parameter)
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, model or self.model)
            rates = (self.args.learning_rate, self.head_learning_rate or self.args.learning_rate)
            self.optimizer = kind(
                [
                    {"params": values, "weight_decay": 0.0 if spared else self.args.weight_decay, "lr": rates[in_head]}
                    for (in_head, spared), values in groups.items()
                ],
                **options,
            )
            self._made = self.optimizer
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, *args: Any, **options: Any) -> Any:
        """As in the Trainer; from now on the methods' schedules follow the optimizer that was made here."""
        scheduler = super().create_scheduler(num_training_steps, *args, **options)
        if self._made is not None:
            self._bound = self.tuned.bind(self._made, num_training_steps)
            self._made = None
        return scheduler

    def train(self, *args: Any, **options: Any) -> Any:
        """As ``Trainer.train``; afterwards the methods' schedules no longer follow the optimizer."""
        try:
            return super().train(*args, **options)
        finally:
            if self._bound is not None:
                self._bound.remove()
                self._bound = None
                self.optimizer = None

    # -- loss ------------------------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """The batches of a step; each weighs as much as it has labels, so that they equal one large batch."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._weights.clear()
        if len(batches) > 1 and self.compute_loss_func is None:
            counts = [self._labels_of(batch) for batch in batches]
            if all(count is not None for count in counts):
                total = sum(count or 0 for count in counts)
                self._weights.extend((count or 0) / max(1, total) for count in counts)
            else:
                self._weights.extend(1 / len(batches) for _ in batches)
        return batches, items

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """As in the Trainer.

        Raises:
            TrainingError: if the loss is not a finite number; the parameters have not been changed then.
        """
        if self._weights:
            self._weight = self._weights.popleft()
            self.current_gradient_accumulation_steps = 1
        try:
            loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        finally:
            self._weight = None
        if not bool(torch.isfinite(loss)):
            raise TrainingError(self._not_finite(float(loss)))
        return loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in the Trainer, weighted by the batch's share of the step."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self._weight is None:
            return found
        return (found[0] * self._weight, found[1]) if return_outputs else found * self._weight

    def _labels_of(self, batch: Any) -> int | None:
        """How many labels a batch has that count."""
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor):
            return None
        if labels.dim() > 1 and getattr(self, "_loss_shifts_labels", False):
            labels = labels[..., 1:]
        return len(labels) if labels.dtype.is_floating_point else int((labels != _IGNORED).sum())

    def _not_finite(self, loss: float) -> str:
        step = self.state.global_step + 1
        rate = self.lr_scheduler.get_last_lr()[0] if self.lr_scheduler is not None else self.args.learning_rate
        return (
            f"The loss is {loss} at step {step} of {self.state.max_steps}, so training cannot go on. The learning rate "
            f"is {rate:.3g} here, {self.args.learning_rate:.3g} at its peak: try a third of it, a longer warm-up, a "
            "smaller max_gradient_norm, or float32 if this is bfloat16."
        )

    # -- checkpoints -----------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """What a subclass wants to keep in checkpoints: plain values and tensors; nothing by default."""
        return {}

    def load_extra_state(self, state: dict[str, Any]) -> None:
        """Take over what :meth:`extra_state` gave."""

    def best_weights(self) -> dict[str, Tensor] | None:
        """Weights to keep in checkpoints beside the present ones; none by default."""
        return None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the delta, in the form in which it is loaded for use; the base model is not written."""
        folder = Path(output_dir or self.args.output_dir)
        names = self.tuned.trained
        for name in names:
            self.tuned.save(folder if len(names) == 1 else folder / name, name)

    def save_snapshot(self, folder: Path) -> None:
        """Write a training checkpoint.

        Raises:
            TrainingError: if trained values are not finite numbers.
            CheckpointError: if it cannot be written.
        """
        refuse_not_finite(self.tuned, self.state.global_step)
        state = {
            "optimizer": self.optimizer.state_dict() if self.optimizer is not None else None,
            "scheduler": self.lr_scheduler.state_dict() if self.lr_scheduler is not None else None,
            "random": self.stream.state_dict(),
            "method_steps": {name: self.tuned.attachments[name].steps for name in self.tuned.trained},
            "extra": self.extra_state(),
        }
        write_snapshot(folder, Snapshot(capture(self.tuned), self.best_weights(), state), self.state.save_to_json)

    def use_snapshot(self, snapshot: Snapshot, source: Path) -> None:
        """Take over the weights and everything but optimizer and schedule, which follow once they exist."""
        put_back(self.tuned, snapshot.weights, source)
        for name, steps in snapshot.state["method_steps"].items():
            self.tuned.attachments[name].steps = steps
        self.stream.load_state_dict(snapshot.state["random"])
        self.load_extra_state(snapshot.state["extra"])
        self._loaded = snapshot.state

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        parent = Path(self._get_output_dir(trial))
        best = parent / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step == self.state.global_step or best.is_dir():
            self.state.best_model_checkpoint = str(best)
        self.save_snapshot(parent / f"checkpoint-{self.state.global_step}")
        if self.args.save_total_limit:
            prune_snapshots(parent, self.args.save_total_limit, self.state.best_model_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.use_snapshot(Snapshot.read(folder), folder)

    def _load_best_model(self) -> None:
        folder = Path(str(self.state.best_model_checkpoint))
        put_back(self.tuned, Snapshot.read(folder).weights, folder)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._loaded is None:
            return
        if self._loaded["optimizer"] is not None:
            self.optimizer.load_state_dict(self._loaded["optimizer"])
            self.lr_scheduler.load_state_dict(self._loaded["scheduler"])
        self._loaded = None

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing to do: bfloat16 needs no scaler, and float16 is not used to train deltas."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Nothing to do: the stream of random numbers was loaded with the weights."""


class _StreamCallback(TrainerCallback):  # type: ignore[misc]
    """Lets each step draw its random numbers from the stream."""

    def __init__(self, stream: RandomStream) -> None:
        self.stream = stream

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go to where the step before ended."""
        self.stream.enter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remember where this step ends."""
        self.stream.leave()


def _spared(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is a bias, a norm's weight or the like, which is not decayed."""
    return parameter.dim() < 2 or any("bias" in piece for piece in name.split(".")[-2:])
