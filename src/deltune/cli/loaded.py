"""A model with a saved delta and the task that the delta was trained for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.errors import CheckpointError

if TYPE_CHECKING:
    from deltune.tasks import Task
    from deltune.tuned import Tuned

__all__ = ["Loaded", "load_delta"]


@dataclass(frozen=True)
class Loaded:
    """A model with its delta attached, its task and its tokenizer."""

    tuned: Tuned
    task: Task
    tokenizer: Any


def load_delta(
    model: str,
    delta: Path,
    device: str | None = None,
    *,
    quantized: bool = True,
    name: str | None = None,
    head: bool = True,
) -> Loaded:
    """Load the model for the task of a delta, and attach the delta.

    A model that was quantised when the delta was trained is quantised in the same way.

    Args:
        model: folder of the pretrained model.
        delta: folder that ``deltune tune`` or ``Tuned.save`` wrote.
        device: cpu, cuda or mps; the best that is present if none.
        quantized: if False the model is loaded as it is in its folder in any case.
        name: under which to attach the delta; by default that under which it was saved.
        head: whether the task head that was trained comes with it.

    Raises:
        CheckpointError: if the delta is missing, damaged, of another model, or says no task.
        TrainingError: if there is no such device.
    """
    from deltune.cli.reporting import quiet_libraries

    quiet_libraries()
    import deltune
    from deltune.checkpoints import TENSOR_FILE, other_formats, read_description
    from deltune.quantization import NF4, reader
    from deltune.tasks import task_from_description
    from deltune.training.devices import usable_device

    place = usable_device(device)
    foreign = [] if (delta / TENSOR_FILE).is_file() else other_formats(delta, "deltune")
    if foreign:
        raise CheckpointError(
            f"{delta} holds a delta in the format {foreign[0]}, which says no task, so the model's head and the data's "
            "columns are not known. Load it in Python with deltune.load(model, folder); deltune.export and "
            "deltune.merge_deltas take it from there."
        )
    description = read_description(delta)
    if not description.get("task"):
        raise CheckpointError(
            f"{delta} does not say for which task it was trained, so the model's head and the data's columns are not "
            "known. Deltas that `deltune tune` or deltune.fit trained say it; load this one in Python."
        )
    task = task_from_description(description["task"])
    tokenizer = task.load_tokenizer(model)
    stored = description["base_model"].get("quantization") if quantized else None
    base = task.load_model(model, tokenizer=tokenizer, read=reader(None if stored is None else NF4.from_dict(stored)))
    tuned = deltune.load(base, delta, name, head=head)
    tuned.model.to(place)
    tuned.model.eval()
    return Loaded(tuned, task, tokenizer)
