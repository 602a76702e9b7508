"""Train a tuned model on a task."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import deltune
from deltune.attachment import Attachment
from deltune.errors import DeltuneError, StateError, TrainingError
from deltune.frozen_states import Trunk, refuse_dropout
from deltune.measure import provenance as measured_on
from deltune.tasks import LengthBucketSampler, Task, fingerprint, padding_share
from deltune.tasks.base import dropouts
from deltune.training.batches import planned_batches
from deltune.training.devices import usable_device
from deltune.training.evaluation import encoded
from deltune.training.fit_trainer import FitTrainer, history_of
from deltune.training.pseudo_tokens import check_pseudo_tokens
from deltune.training.randomness import kept_apart
from deltune.training.result import FitResult
from deltune.training.run_folder import RunFolder
from deltune.training.settings import TrainingSettings
from deltune.training.snapshot import newest_snapshot
from deltune.training.weights import put_back, refuse_not_finite
from deltune.tuned import Tuned

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["fit"]

#: Settings that change no more than rounding.
_MACHINE = ("device", "threads", "frozen_states")


def fit(
    tuned: Tuned,
    task: Task,
    train: Dataset,
    evaluation: Dataset | None = None,
    *,
    tokenizer: Any = None,
    settings: TrainingSettings | None = None,
    output: str | Path | None = None,
    resume: bool = True,
    callbacks: Sequence[Any] = (),
    provenance: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train the live attachment of ``tuned``.

    With ``output``, training checkpoints, the delta and ``result.json`` are written there. A run that was stopped
    at any moment goes on when ``fit`` is called again with the same arguments, and ends in the same bits. A run
    that has ended returns its result at once, with its weights put into ``tuned``. (On a GPU this holds as far as
    the model's kernels are deterministic.)

    The caller's random numbers, threads and model configuration are left alone.

    Args:
        tuned: the handle; exactly one attachment must be live.
        task: what is learned.
        train: rows with the task's columns, or rows that ``task.encode`` made.
        evaluation: such rows to measure with, after each epoch by default; they decide which weights are kept.
        tokenizer: the model's tokenizer; by default that of the folder that the model was loaded from.
        settings: how to train; all defaults if none.
        output: folder of the run; nothing is written without one.
        resume: whether to go on with a run in ``output``. If False it is deleted.
        callbacks: transformers callbacks, such as one that shows progress.
        provenance: further plain values to write into the result's provenance, such as the command line.

    Returns:
        Metrics, history and what it takes to do the run again.

    Raises:
        DataError: if the data do not fit the task.
        DeltuneError: if a package that measuring needs is not installed.
        StateError: if no or several attachments are live, nothing trains, or ``output`` holds another run.
        TrainingError: if the loss or the weights are no longer finite numbers, where older checkpoints are kept;
            or if the wanted device is not there.
        CheckpointError: if the disk is full, or a checkpoint is damaged.
    """
    settings = settings or TrainingSettings()
    attachment = _live_attachment(tuned)
    tokenizer = tokenizer or _tokenizer_of(tuned, task)
    task = task.resolve(tokenizer)
    check_pseudo_tokens(tuned, task)
    rows, evaluation_rows = encoded(task, train, tokenizer), None
    if evaluation is not None:
        task.check_metrics()
        evaluation_rows = encoded(task, evaluation, tokenizer)
    lengths = [int(length) for length in rows["length"]]
    sampler = LengthBucketSampler(
        lengths, settings.batch_size, settings.seed, pool_batches=50 if settings.length_buckets else 1
    )
    resolved = settings.resolve(
        learning_rate=attachment.method.learning_rate,
        weight_decay=attachment.method.weight_decay,
        batches=len(sampler),
        device=usable_device(settings.device),
        threads=torch.get_num_threads(),
    )
    if resolved.frozen_states is not None:
        _check_frozen(tuned, resolved.frozen_states, output)
    attachment.task = task.describe()
    identity = _identity(tuned, attachment, resolved, rows, evaluation_rows)
    folder = RunFolder(output, identity, _versions(), resume=resume) if output is not None else None
    ended = folder.finished(attachment.name) if folder is not None else None
    if folder is not None and ended is not None:
        put_back(tuned, ended[1], folder.path)
        return ended[0]

    with _surroundings(tuned, resolved), tempfile.TemporaryDirectory() as scratch:
        checkpoints = folder.checkpoints if folder is not None else Path(scratch)
        trainer = FitTrainer(
            tuned,
            task,
            rows,
            evaluation_rows,
            tokenizer=tokenizer,
            settings=resolved,
            sampler=sampler,
            folder=checkpoints,
            saves=folder is not None,
            callbacks=list(callbacks),
        )
        try:
            _train(trainer, checkpoints)
        except TrainingError as error:
            raise _with_advice(error, folder) from error
        result = _result(trainer, lengths, {**identity, **dict(provenance or {})})
        if folder is not None:
            folder.finish(tuned, result)
    return result


def _check_frozen(tuned: Tuned, folder: str, output: str | Path | None) -> None:
    """Refuse, before anything is written, what could not be trained on kept states.

    Raises:
        StateError: if no layer is frozen below what acts, or frozen layers drop values.
        TrainingError: if both folders are the same.
    """
    if output is not None and Path(folder).expanduser().resolve() == Path(output).expanduser().resolve():
        raise TrainingError(
            f"frozen_states and output are the same folder, {output}. States serve several runs: give them their own."
        )
    trunk = Trunk.of(tuned.anatomy, tuned.control, [tuned.attachments[name] for name in tuned.active])
    refuse_dropout(tuned.model, trunk)


def _identity(
    tuned: Tuned, attachment: Attachment, settings: TrainingSettings, rows: Dataset, evaluation_rows: Dataset | None
) -> dict[str, Any]:
    """What makes two runs the same; what concerns the machine may change, at the price of the last bits."""
    described = {key: value for key, value in settings.to_dict().items() if key not in _MACHINE}
    if described["optimizer"] == "adamw":
        del described["optimizer"]  # runs from before there was a choice go on
    return {
        "name": attachment.name,
        "method": attachment.method.to_dict(),
        "head": list(attachment.head_names),
        "settings": described,
        "task": attachment.task,
        "data": {
            "train": fingerprint(rows),
            "evaluation": fingerprint(evaluation_rows) if evaluation_rows is not None else None,
        },
        "base_model": tuned.base_model,
        "dropouts": dropouts(getattr(tuned.model, "config", None)),
    }


def _result(trainer: FitTrainer, lengths: list[int], provenance: dict[str, Any]) -> FitResult:
    """What a trainer that has ended came to."""
    flow, settings, steps = trainer.flow, trainer.settings, trainer.state.global_step
    batches = planned_batches(trainer.sampler, settings, steps)
    machine = measured_on(str(trainer.args.device), seed=settings.seed, threads=settings.threads)
    return FitResult(
        metrics=flow.metrics,
        history=history_of(trainer.state.log_history),
        seconds=flow.clock.seconds,
        steps=steps,
        examples=sum(len(batch) for batch in batches),
        best_step=flow.best_step if settings.keep_best else None,
        stopped_early=flow.stopped_early,
        padding_share=padding_share(lengths, batches),
        settings=settings.to_dict(),
        provenance={**machine, **provenance},
    )


def _train(trainer: FitTrainer, checkpoints: Path) -> None:
    """Train to the end, from the newest checkpoint if there is one, and put the best weights back."""
    found = newest_snapshot(checkpoints)
    if found is None:
        trainer.prepare_methods()
        trainer.save_first_snapshot()
        start = None
    else:
        folder, snapshot = found
        trainer.use_snapshot(snapshot, folder)
        start = None if trainer.is_first(folder) else str(folder)
    if found is not None and trainer.flow.finished:
        trainer.load_trainer_state(found[0])
    else:
        kept = trainer.settings.frozen_states
        with trainer.tuned.frozen_states(kept) if kept else nullcontext():
            trainer.train(resume_from_checkpoint=start)
    if trainer.flow.best_weights is not None:
        put_back(trainer.tuned, trainer.flow.best_weights, checkpoints)
    refuse_not_finite(trainer.tuned, trainer.state.global_step)


def _with_advice(error: TrainingError, folder: RunFolder | None) -> TrainingError:
    """The error, and what is left of the run."""
    if folder is None:
        return error
    return TrainingError(
        f"{error} The last good training checkpoint is kept in {folder.checkpoints}. Other settings make another run: "
        "give another output folder, or --restart (in Python: resume=False)."
    )


@contextmanager
def _surroundings(tuned: Tuned, settings: TrainingSettings) -> Iterator[None]:
    """Threads, random numbers and the model's mode and configuration, as they were after the block."""
    threads = torch.get_num_threads()
    model = tuned.model
    config = getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    training = model.training
    drop_seed = tuned.control.drop_seed
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    if settings.drop_layers:
        tuned.drop_layers_at_random(settings.seed)
    try:
        with kept_apart():
            yield
    finally:
        torch.set_num_threads(threads)
        if settings.drop_layers:
            tuned.drop_layers_at_random(drop_seed)
        model.train(training)
        model.zero_grad(set_to_none=True)
        if config is not None and use_cache is not None:
            config.use_cache = use_cache


def _live_attachment(tuned: Tuned) -> Attachment:
    if len(tuned.trained) != 1:
        live = ", ".join(tuned.trained) or "none"
        raise StateError(
            f"fit trains one attachment, but those that are live are: {live}. Make one live with tuned.activate(name), "
            "or keep the others as they are with tuned.activate(..., frozen=[...]); "
            f"attached are: {', '.join(tuned.attachments) or 'none'}."
        )
    attachment = tuned.attachments[tuned.trained[0]]
    if not any(True for _ in attachment.parameters()):
        raise StateError(
            f"{attachment.name!r} ({attachment.method}) has nothing to train: what it holds is fixed, and no task head "
            "trains. Attach a method that trains, or load a model with a task head."
        )
    return attachment


def _tokenizer_of(tuned: Tuned, task: Task) -> Any:
    path = str(getattr(getattr(tuned.model, "config", None), "_name_or_path", "") or "")
    if not path:
        raise StateError("The model was not loaded from a folder, so its tokenizer is not known. Pass tokenizer=.")
    try:
        return task.load_tokenizer(path)
    except DeltuneError as error:
        raise StateError(f"{error} Or pass tokenizer=.") from error


def _versions() -> dict[str, str]:
    return {
        "deltune": deltune.__version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
