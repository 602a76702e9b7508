"""Fisher information of a frozen model's weights: the sum over examples of squared gradients.

    I(w) = sum over examples (x, y) of (d log p(y|x) / d w)^2

The gradient is that of one example at a time: the square of a batch's gradient is something else.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import MethodError

__all__ = ["fisher_information"]


def fisher_information(
    model: nn.Module,
    parameters: Mapping[str, nn.Parameter],
    batches: Iterable[Mapping[str, Any]],
    limit: int,
) -> dict[str, Tensor]:
    """The information of each parameter, in float32 at least; the model is in evaluation mode meanwhile.

    log p is minus the model's own loss, which is a mean over the tokens of an example where it has many.

    Args:
        model: a model that computes its loss.
        parameters: of which; by name. They may be frozen.
        batches: arguments of the model, with labels.
        limit: number of examples to use at most.

    Raises:
        MethodError: if there is no example, or no labels with them.
    """
    wide = {name: torch.promote_types(value.dtype, torch.float32) for name, value in parameters.items()}
    total = {name: torch.zeros_like(value, dtype=wide[name]) for name, value in parameters.items()}
    frozen = [value for value in parameters.values() if not value.requires_grad]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    count = 0
    try:
        for value in frozen:
            value.requires_grad_(True)
        for example in _examples(batches):
            if count == limit:
                break
            count += 1
            with torch.enable_grad():
                loss = model(**example)["loss"]
                gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            for name, gradient in zip(parameters, gradients, strict=True):
                if gradient is not None:
                    total[name] += gradient.to(wide[name]).square()
    finally:
        for value in frozen:
            value.requires_grad_(False)
        for module, training in modes:
            module.training = training
    if not count:
        raise MethodError("The Fisher information needs examples, but there was none in the batches given to prepare.")
    return total


def _examples(batches: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of the batches, as batches of one."""
    for batch in batches:
        if batch.get("labels") is None:
            raise MethodError(
                "The Fisher information needs batches with labels, from which the model computes its loss; these have "
                f"only {', '.join(batch)}."
            )
        for row in range(len(batch["labels"])):
            yield {
                name: value[row : row + 1] if isinstance(value, Tensor) and value.dim() else value
                for name, value in batch.items()
            }
