"""The tensors that training changes, as they are: not the form in which they are saved for use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from deltune.errors import CheckpointError, TrainingError
from deltune.tuned import Tuned

__all__ = ["capture", "put_back", "refuse_not_finite"]


def _tensors(tuned: Tuned) -> Iterator[tuple[str, Tensor]]:
    """Every trained tensor of the live attachments, and the buffers of their forms."""
    for name in tuned.trained:
        attachment = tuned.attachments[name]
        for key, parameter in attachment.parameters():
            yield f"{name}.{key}", parameter
        for key, form in attachment.forms.items():
            for buffer_name, buffer in form.named_buffers():
                yield f"{name}.{key}.{buffer_name}", buffer


def capture(tuned: Tuned) -> dict[str, Tensor]:
    """Copies of all trained tensors, on the CPU."""
    return {key: value.detach().to("cpu", copy=True).contiguous() for key, value in _tensors(tuned)}


def put_back(tuned: Tuned, tensors: Mapping[str, Tensor], source: object) -> None:
    """Copy tensors that :func:`capture` gave into the attachments.

    Raises:
        CheckpointError: if they are not those of these attachments; nothing is copied then.
    """
    for name in tuned.trained:
        for key, form in tuned.attachments[name].forms.items():
            prefix = f"{name}.{key}."
            form.resize(
                {item.removeprefix(prefix): value for item, value in tensors.items() if item.startswith(prefix)}
            )
    present = dict(_tensors(tuned))
    differing = sorted(present.keys() ^ tensors.keys()) + [
        key for key in present.keys() & tensors.keys() if present[key].shape != tensors[key].shape
    ]
    if differing:
        raise CheckpointError(
            f"The weights in {source} are not those of this model and method; they differ in "
            f"{', '.join(differing[:5])}{' and more' if len(differing) > 5 else ''}. Choose another output folder, or "
            "start anew with --restart (in Python: resume=False)."
        )
    with torch.no_grad():
        for key, value in present.items():
            value.copy_(tensors[key])


def refuse_not_finite(tuned: Tuned, step: int) -> None:
    """Refuse to keep weights that are no longer numbers.

    Raises:
        TrainingError: naming the first such tensor.
    """
    for key, value in _tensors(tuned):
        if value.dtype.is_floating_point and not bool(torch.isfinite(value).all()):
            raise TrainingError(
                f"After step {step} the trained tensor {key} holds values that are not finite numbers: training has "
                "diverged. Lower the learning rate, lengthen the warm-up, or train in float32."
            )
