"""The trainer behind :func:`deltune.fit`: batches by length, the task's evaluation, the best weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import PrinterCallback, TrainerState, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from deltune.tasks import LengthBucketSampler, Task
from deltune.training.batches import EpochLoader
from deltune.training.evaluation import arithmetic, device_of, evaluate
from deltune.training.flow import Flow
from deltune.training.settings import TrainingSettings
from deltune.training.snapshot import TRAINER_STATE_FILE, Snapshot, prune_snapshots
from deltune.training.trainer import DeltaTrainer
from deltune.tuned import Tuned

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["FitTrainer", "history_of"]

_KEPT_CHECKPOINTS = 2
_SCHEDULES = {"linear": "linear", "constant": "constant_with_warmup", "cosine": "cosine"}
#: Names of transformers; it chooses the implementation of adamw itself.
_OPTIMIZERS = {"adamw-8bit": "adamw_8bit", "paged-adamw": "paged_adamw_32bit", "paged-adamw-8bit": "paged_adamw_8bit"}
_EVALUATION = "eval_"


class FitTrainer(DeltaTrainer):
    """A :class:`DeltaTrainer` that follows :class:`TrainingSettings` and measures by a task.

    Args:
        tuned: what to train.
        task: measures and collates.
        train: encoded rows.
        evaluation: encoded rows, or none.
        tokenizer: the model's tokenizer.
        settings: resolved settings.
        sampler: makes batches of the training rows.
        folder: where training checkpoints go.
        saves: whether to write any.
        callbacks: those of the caller.
    """

    def __init__(
        self,
        tuned: Tuned,
        task: Task,
        train: Dataset,
        evaluation: Dataset | None,
        *,
        tokenizer: Any,
        settings: TrainingSettings,
        sampler: LengthBucketSampler,
        folder: Path,
        saves: bool,
        callbacks: list[Any],
    ) -> None:
        super().__init__(
            tuned,
            _arguments(settings, folder),
            data_collator=task.collator(tokenizer),
            train_dataset=train,
            eval_dataset=evaluation,
            head_learning_rate=settings.head_learning_rate,
        )
        self.task = task
        self.tokenizer = tokenizer
        self.settings = settings
        self.sampler = sampler
        self.saves = saves
        metric = task.metric if evaluation is not None else None
        self.flow = Flow(tuned, settings, metric, task.greater_is_better, saves)
        self.remove_callback(DefaultFlowCallback)
        self.remove_callback(PrinterCallback)
        for callback in (self.flow, *callbacks):
            self.add_callback(callback)

    # -- data and arithmetic ---------------------------------------------------------------------------------

    def get_train_dataloader(self) -> EpochLoader:
        """The training batches."""
        return EpochLoader(self.train_dataset, self.sampler, self.data_collator)

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        """Autocast where the precision asks for it; the model itself is not wrapped."""
        return arithmetic(self.args.device, self.settings.precision)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Measure by the task."""
        assert self.settings.evaluation_batch_size is not None
        with self.flow.clock.paused():
            metrics = evaluate(
                self.tuned,
                self.task,
                self.eval_dataset if eval_dataset is None else eval_dataset,
                self.tokenizer,
                batch_size=self.settings.evaluation_batch_size,
                precision=self.settings.precision,
            )
            self.log({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prepare_methods(self) -> None:
        """Let the method set itself up from the first epoch's batches, where it needs data."""
        device = device_of(self.model)
        self.stream.enter()
        self.tuned.prepare(
            {name: value.to(device) for name, value in batch.items()} for batch in self.get_train_dataloader()
        )
        self.stream.leave()

    def train(self, *args: Any, **options: Any) -> Any:
        """As ``Trainer.train``; gradient checkpointing is on only while it lasts."""
        checkpointing = self.settings.gradient_checkpointing
        if checkpointing:
            _gradient_checkpointing(self.model, True)
        try:
            return super().train(*args, **options)
        finally:
            if checkpointing:
                _gradient_checkpointing(self.model, False)

    # -- checkpoints -----------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Where the course of the run is."""
        return {"flow": self.flow.state_dict()}

    def best_weights(self) -> dict[str, Tensor] | None:
        """The weights that were best so far."""
        return self.flow.best_weights

    def use_snapshot(self, snapshot: Snapshot, source: Path) -> None:
        """Take over weights, random numbers and the course of the run."""
        super().use_snapshot(snapshot, source)
        self.flow.load_state_dict(snapshot.state["extra"]["flow"], snapshot.best)

    def save_first_snapshot(self) -> None:
        """Keep the weights that the run begins with: should it be killed, it begins with them again."""
        if self.saves:
            self.save_snapshot(self._folder(0))

    def is_first(self, folder: Path) -> bool:
        """Whether a checkpoint is that of the beginning, when there was no optimizer yet."""
        return folder == self._folder(0)

    def load_trainer_state(self, folder: Path) -> None:
        """Take over the history of a run that has done all its steps."""
        self.state = TrainerState.load_from_json(str(folder / TRAINER_STATE_FILE))

    def _folder(self, step: int) -> Path:
        return Path(self.args.output_dir) / f"checkpoint-{step}"

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        with self.flow.clock.paused():
            self.save_snapshot(self._folder(self.state.global_step))
            prune_snapshots(Path(self.args.output_dir), _KEPT_CHECKPOINTS)


def history_of(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trainer's log as one dictionary a step; values that are no finite numbers become None."""
    history: dict[int, dict[str, Any]] = {}
    for entry in entries:
        row = history.setdefault(entry["step"], {"step": entry["step"], "epoch": entry["epoch"]})
        measured = {key.removeprefix(_EVALUATION): value for key, value in entry.items() if key.startswith(_EVALUATION)}
        if measured:
            row["evaluation"] = _plain(measured)
        elif "loss" in entry:
            gradient_norm = entry.get("grad_norm")
            row.update(_plain({"loss": entry["loss"], "learning_rate": entry["learning_rate"]}))
            row.update(_plain({"gradient_norm": gradient_norm}))
    return [row for row in history.values() if len(row) > 2]


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()
    }


def _arguments(settings: TrainingSettings, folder: Path) -> TrainingArguments:
    """The Trainer's arguments; what it would log, measure and save by itself is left to :class:`Flow`."""
    assert settings.steps is not None
    optimizer = {"optim": _OPTIMIZERS[settings.optimizer]} if settings.optimizer in _OPTIMIZERS else {}
    arguments = TrainingArguments(
        **optimizer,
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=int(settings.warmup_ratio * settings.steps),
        lr_scheduler_type=_SCHEDULES[settings.schedule],
        max_grad_norm=settings.max_gradient_norm,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        logging_strategy="no",
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to="none",
    )
    # one device is used, also where there are several
    arguments._setup_devices  # noqa: B018
    arguments._n_gpu = min(arguments._n_gpu, 1)
    return arguments


def _gradient_checkpointing(model: Any, enable: bool) -> None:
    """Switch it on or off under the name that this version of transformers has."""
    options = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        if enable:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        else:
            model.activation_checkpointing_disable()
    elif enable:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)
    else:
        model.gradient_checkpointing_disable()
