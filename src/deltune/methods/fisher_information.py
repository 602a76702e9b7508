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
    *,
    power: str = "square",
    labels: str = "given",
) -> dict[str, Tensor]:
    """The information of each parameter, in float32 at least; the model is in evaluation mode meanwhile.

    log p is minus the model's own loss, which is a mean over the tokens of an example where it has many.

    Args:
        model: a model that computes its loss.
        parameters: of which; by name. They may be frozen.
        batches: arguments of the model, with labels.
        limit: number of examples to use at most.
        power: what of the gradients is summed: ``square``, or ``absolute`` for their absolute values.
        labels: ``given``; or ``expected`` for a sum over all classes, each by its probability under the model, of a
            model that classifies whole texts.

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
            for share, gradients in _gradients(model, example, list(parameters.values()), labels):
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        own = gradient.to(wide[name])
                        total[name] += share * (own.square() if power == "square" else own.abs())
    finally:
        for value in frozen:
            value.requires_grad_(False)
        for module, training in modes:
            module.training = training
    if not count:
        raise MethodError("The Fisher information needs examples, but there was none in the batches given to prepare.")
    return total


def _gradients(
    model: nn.Module, example: Mapping[str, Any], parameters: list[nn.Parameter], labels: str
) -> Iterator[tuple[float, tuple[Tensor | None, ...]]]:
    """Gradients of one example, with the share that they count by.

    Raises:
        MethodError: if the model does not classify whole texts, and all classes are asked for.
    """
    with torch.enable_grad():
        if labels == "given":
            yield 1.0, torch.autograd.grad(model(**example)["loss"], parameters, allow_unused=True)
            return
        logits = model(**{name: value for name, value in example.items() if name != "labels"}).get("logits")
        if logits is None or logits.dim() != 2 or logits.shape[1] < 2:
            raise MethodError(
                "The expectation over all labels needs a model that classifies whole texts. Use labels=given."
            )
        log_probabilities = logits[0].float().log_softmax(-1)
        last = len(log_probabilities) - 1
        for label, value in enumerate(log_probabilities):
            gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=label < last)
            yield float(value.detach().exp()), gradients


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
