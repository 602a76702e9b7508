"""One row of a comparison in a process of its own: ``python -m deltune.compare.worker JOB.json``.

Only then does peak memory belong to one method. The process runs the row's seeds one after the other and writes
one JSON object a line to its standard output: ``start``, ``step``, ``done`` or ``failed``, each with its seed.
Whatever else is printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from deltune.checkpoints import TENSOR_FILE
from deltune.compare.content import ComparisonData, prepare_data
from deltune.compare.plan import MAJORITY, Comparison
from deltune.compare.worker_job import Job
from deltune.errors import DeltuneError
from deltune.measure import PeakMemory, optimizer_state_bytes, provenance, release_memory, resident_bytes
from deltune.quantization import reader
from deltune.training import FitResult, TrainingSettings, fit
from deltune.tuned import Tuned, attach

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["main", "run_job"]

Emit = Callable[[Mapping[str, Any]], None]

#: Seconds between two reports of progress.
_REPORT_INTERVAL = 0.2


class _Progress(transformers.TrainerCallback):  # type: ignore[misc]
    """Reports steps and the latest loss."""

    def __init__(self, emit: Emit, seed: int) -> None:
        self._emit = emit
        self._seed = seed
        self._loss: float | None = None
        self._reported = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        """Remember the loss."""
        loss = (logs or {}).get("loss")
        self._loss = self._loss if loss is None else float(loss)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report, but not too often."""
        now = time.monotonic()
        last = state.global_step >= state.max_steps
        if last or now - self._reported >= _REPORT_INTERVAL:
            self._reported = now
            self._emit(
                {
                    "event": "step",
                    "seed": self._seed,
                    "step": state.global_step,
                    "total": state.max_steps,
                    "loss": self._loss,
                }
            )


class _OptimizerState(transformers.TrainerCallback):  # type: ignore[misc]
    """The greatest size of what the optimizer keeps, which phases of methods change; None if not all was seen."""

    def __init__(self) -> None:
        self.most: int | None = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A run that goes on has not been seen from its beginning."""
        if state.global_step:
            self.most = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """Look at it before the step, at the end of which a phase may end."""
        self._look(optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        """And after it."""
        self._look(optimizer)

    def _look(self, optimizer: Any) -> None:
        if self.most is not None:
            self.most = max(self.most, optimizer_state_bytes(optimizer))


def run_job(job: Job, emit: Emit) -> None:
    """Run every seed of a row; a failure ends its seed only.

    Args:
        job: the row.
        emit: receives the events.
    """
    torch.set_num_threads(job.threads)
    comparison = Comparison.from_dict(job.comparison)
    data = prepare_data(comparison)
    baseline = resident_bytes()
    for seed, folder in job.folders.items():
        emit({"event": "start", "seed": seed})
        try:
            if job.row == MAJORITY:
                result = majority(comparison, data)
            else:
                result = _train(comparison, data, job, seed, Path(folder), emit)
        except Exception as error:  # whatever a method, a model or a library raises becomes a row of the report
            traceback.print_exc()
            text = str(error) if isinstance(error, DeltuneError) else f"{type(error).__name__}: {error}"
            emit({"event": "failed", "seed": seed, "error": text})
        else:
            result["memory"]["resident_baseline"] = baseline
            emit({"event": "done", "seed": seed, "result": result})
            if not job.keep:
                shutil.rmtree(folder, ignore_errors=True)
        release_memory()


def majority(comparison: Comparison, data: ComparisonData) -> dict[str, Any]:
    """Answer always with the most frequent label of the training examples: a class, or a tag for every word.

    The scores that stand for it are the logarithms of the labels' shares, so that a loss is that of knowing nothing
    but these.
    """
    tokenizer = data.task.load_tokenizer(comparison.model)
    with PeakMemory() as memory:
        train, labels = (_labels(data.task.encode(rows, tokenizer)) for rows in (data.train, data.evaluation))
        # one more of each label than there are, so that no logarithm is infinite
        counts = torch.bincount(train[train >= 0], minlength=len(data.task.label_names)) + 1
        scores = (counts / counts.sum()).log()
        parts = [
            data.task.reduce_logits(scores.expand(*part.shape, -1), part)
            for part in torch.split(labels, comparison.batch_size)
        ]
        metrics = data.task.metrics(torch.cat(parts), labels)
    return {
        "parameters": {"trainable": 0, "head": 0, "share": 0.0, "model": None},
        "metrics": metrics,
        "seconds": 0.0,
        "steps": 0,
        "examples": 0,
        "memory": memory.use.to_dict(),
        "checkpoint_bytes": 0,
        "history": [],
        "settings": {},
        "provenance": provenance(),
    }


def _labels(rows: Dataset) -> torch.Tensor:
    """The labels of encoded rows: [N], or [N, T] with -100 where there is none."""
    values = [torch.as_tensor(value) for value in rows["labels"]]
    if values[0].dim() == 0:
        return torch.stack(values)
    return torch.nn.utils.rnn.pad_sequence(values, batch_first=True, padding_value=-100)


def _train(
    comparison: Comparison, data: ComparisonData, job: Job, seed: int, folder: Path, emit: Emit
) -> dict[str, Any]:
    method = comparison.method(job.row)
    assert method is not None
    settings = training_settings(comparison, job.row, seed, len(data.train), job.threads)
    device = _device()
    if (folder / TENSOR_FILE).exists():
        # it had ended, but its result never arrived: only training again measures its memory
        shutil.rmtree(folder)
    tokenizer = data.task.load_tokenizer(comparison.model)
    with PeakMemory(device) as memory:
        # the head is drawn first, so all methods start from the same one
        transformers.set_seed(seed)
        model = data.task.load_model(
            comparison.model, tokenizer=tokenizer, dropout=comparison.model_dropout, read=reader(method.base_format)
        )
        tuned = attach(model, method, reversible=False)
        at_start = tuned.summary().parameters
        optimizer_state = _OptimizerState()
        outcome = fit(
            tuned,
            data.task,
            data.train,
            data.evaluation,
            tokenizer=tokenizer,
            settings=settings,
            output=folder,
            callbacks=[_Progress(emit, seed), optimizer_state],
        )
    checkpoint_bytes = (folder / TENSOR_FILE).stat().st_size
    result = _result(tuned, outcome, memory, checkpoint_bytes, provenance(device, seed=seed, threads=job.threads))
    result["parameters"]["trainable_at_start"] = at_start
    result["memory"]["optimizer_state"] = optimizer_state.most
    return result


def _result(
    tuned: Tuned, outcome: FitResult, memory: PeakMemory, checkpoint_bytes: int, origin: dict[str, Any]
) -> dict[str, Any]:
    summary = tuned.summary()
    return {
        "parameters": {
            "trainable": summary.parameters,
            "head": summary.head_parameters,
            "share": summary.share,
            "model": summary.model_parameters,
        },
        "metrics": outcome.metrics,
        "seconds": outcome.seconds,
        "steps": outcome.steps,
        "examples": outcome.examples,
        "memory": memory.use.to_dict(),
        "checkpoint_bytes": checkpoint_bytes,
        "history": outcome.history,
        "settings": outcome.settings,
        "provenance": origin,
    }


def training_settings(
    comparison: Comparison, row: str, seed: int, train_examples: int, threads: int
) -> TrainingSettings:
    """Settings of one run. The last weights count, not the best: choosing by the evaluation data would flatter."""
    batches = -(-train_examples // comparison.batch_size)
    steps = comparison.steps or max(1, round((comparison.epochs or 1.0) * batches))
    return TrainingSettings(
        steps=steps,
        batch_size=comparison.batch_size,
        learning_rate=comparison.learning_rate(row),
        head_learning_rate=comparison.head_learning_rate,
        seed=seed,
        keep_best=False,
        save_every=max(50, steps // 10),
        threads=threads,
    )


def _device() -> str:
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _emit_to(descriptor: int) -> Emit:
    def emit(event: Mapping[str, Any]) -> None:
        try:
            os.write(descriptor, (json.dumps(event) + "\n").encode())
        except BrokenPipeError:
            os._exit(1)  # the comparison is gone, so nobody wants the result

    return emit


def main(arguments: list[str]) -> None:
    """Entry point of the process."""
    (path,) = arguments
    # libraries print: keep the pipe for events alone
    events = os.dup(1)
    os.dup2(2, 1)
    run_job(Job.from_json(Path(path).read_text(encoding="utf-8")), _emit_to(events))


if __name__ == "__main__":
    main(sys.argv[1:])
