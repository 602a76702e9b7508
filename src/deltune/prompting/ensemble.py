"""Several prompts for one task, trained in one batch, that vote at the cost of one model.

Letters: N number of prompts, B rows of a batch, C classes.

Source: Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning, arXiv 2104.08691, section 6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deltune.errors import MethodError, StateError
from deltune.methods import Method, parse
from deltune.sites import Insertion
from deltune.tuned import HANDLE, Tuned

__all__ = ["EnsembleReport", "PromptEnsemble", "compare_votes", "majority_vote", "repeated"]

#: From a model's output to a score for each class, (rows, C): logits of a head, or of the labels' tokens.
Scores = Callable[[Any], Tensor]


def majority_vote(probabilities: Tensor) -> Tensor:
    """The class that most prompts find most probable, for each row, (B,).

    Of classes with equally many votes the one wins whose probabilities have the greater sum over all prompts, those
    that voted otherwise included; of classes whose sums are equal too, the first. A prompt whose greatest probability
    is shared by several classes votes for the first of them.

    Args:
        probabilities: of each class, by each prompt, (N, B, C).
    """
    if probabilities.dim() != 3 or not probabilities.numel():
        raise MethodError(
            f"Prompts vote with probabilities (prompts, rows, classes), not {tuple(probabilities.shape)}."
        )
    classes = probabilities.shape[-1]
    votes = torch.nn.functional.one_hot(probabilities.argmax(-1), classes).sum(0)
    sums = probabilities.double().sum(0)
    leading = votes == votes.amax(1, keepdim=True)
    return sums.masked_fill(~leading, -torch.inf).argmax(1)


@dataclass(frozen=True)
class EnsembleReport:
    """How well the prompts do alone, and their vote.

    Attributes:
        single: accuracy of each prompt, by name.
        vote: accuracy of the majority.
        rows: number of rows that this was measured on.
    """

    single: dict[str, float]
    vote: float
    rows: int

    @property
    def mean(self) -> float:
        """Mean accuracy of a prompt alone."""
        return sum(self.single.values()) / len(self.single)

    @property
    def best(self) -> str:
        """The prompt with the greatest accuracy; of equal ones the first."""
        return max(self.single, key=lambda name: self.single[name])

    def __str__(self) -> str:
        return (
            f"vote {self.vote:.4f}, best prompt {self.best} {self.single[self.best]:.4f}, mean of "
            f"{len(self.single)} prompts {self.mean:.4f}, on {self.rows} rows"
        )


def compare_votes(names: Sequence[str], probabilities: Tensor, labels: Tensor) -> EnsembleReport:
    """Compare the vote with each prompt alone.

    Args:
        names: of the prompts.
        probabilities: (N, B, C).
        labels: the right class of each row, (B,).

    Raises:
        MethodError: if the numbers do not fit.
    """
    if probabilities.shape[:2] != (len(names), len(labels)) or not len(labels):
        raise MethodError(
            f"{len(names)} names and {len(labels)} labels do not fit probabilities of the shape "
            f"{tuple(probabilities.shape)}: (prompts, rows, classes) is wanted, and one row at least."
        )
    right = (probabilities.argmax(-1) == labels).double().mean(1).tolist()
    vote = float((majority_vote(probabilities) == labels).double().mean())
    return EnsembleReport(dict(zip(names, right, strict=True)), vote, len(labels))


def repeated(batch: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A batch ``count`` times over, the whole batch for the first prompt first: tensors (B, ...) to (count B, ...)."""
    return {
        name: value.repeat(count, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) and value.dim() else value
        for name, value in batch.items()
    }


class PromptEnsemble:
    """N attachments of one method, from different seeds, each of which reads every text in one pass of the model.

    A batch of B rows becomes one of N B rows, those of the first prompt first, and each part is routed to its prompt.
    The frozen model is kept once, whatever N. An ordinary loop trains them together::

        ensemble = PromptEnsemble(model, PromptTuning(length=20), count=5)
        optimizer = torch.optim.AdamW(ensemble.parameters(), lr=0.05)
        for batch in batches:
            optimizer.zero_grad()
            ensemble.loss(batch).backward()
            optimizer.step()
        ensemble.predict(batch)
        print(ensemble.evaluate(evaluation_batches))

    The loss is the mean over the prompts, so that each one's gradient is that of training it alone divided by N; for
    AdamW this makes no difference but in its epsilon.

    Args:
        model: the model, bare or with methods attached, or its handle.
        method: prompt tuning with its options, or another method that adds to the input and can be routed.
        count: N.
        prefix: the attachments are named by it and a number, from 0.
        seeds: of the initial values, one for each; 0 to N - 1 by default.
        train_head: whether each prompt trains its own task head too; by default, if the model has one.
        scores: from a model's output to a score of each class; by default its ``logits``, which must be (rows, C). For
            labels that are tokens: ``lambda output: output.logits[:, 0, label_ids]``.

    Raises:
        MethodError: if fewer than two prompts are wanted, seeds do not fit, or the method adds nothing to the input.
        StateError, TargetError: as :func:`deltune.attach`.
    """

    def __init__(
        self,
        model: nn.Module | Tuned,
        method: Method | str = "prompt-tuning",
        count: int = 5,
        *,
        prefix: str = "prompt-",
        seeds: Sequence[int] | None = None,
        train_head: bool | None = None,
        scores: Scores | None = None,
    ) -> None:
        method = parse(method)
        seeds = tuple(range(count)) if seeds is None else tuple(seeds)
        if count < 2 or len(set(seeds)) != count:
            raise MethodError(
                f"An ensemble has two prompts or more, each from its own seed; {count} prompts and the seeds "
                f"{', '.join(map(str, seeds)) or 'none'} were given."
            )
        if method.insertion is not Insertion.TOKENS:
            raise MethodError(f"{method.name} adds nothing to the input. An ensemble is of prompt-tuning or the like.")
        self.tuned = model if isinstance(model, Tuned) else vars(model).get(HANDLE) or Tuned(model)
        self.scores = scores or _logits
        self.names = tuple(f"{prefix}{number}" for number in range(count))
        attached: list[str] = []
        try:
            for name, seed in zip(self.names, seeds, strict=True):
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(seed)
                    self.tuned.attach(method, name, train_head=train_head)
                attached.append(name)
        except Exception:
            for name in attached:
                self.tuned.detach(name)
            raise

    @contextmanager
    def routed(self) -> Iterator[nn.Module]:
        """Inside the block the model reads repeated batches (:func:`repeated`), each part with its prompt."""
        with self.tuned.routed(self.names):
            yield self.tuned.model

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of all prompts, and of their heads, for an optimizer."""
        return [value for name in self.names for _, value in self.tuned.attachments[name].parameters()]

    def activate(self) -> None:
        """Make all prompts live and able to train, each for its part of a repeated batch.

        They stay so until something else is activated, or ``tuned.route(None)`` ends it.
        """
        if self.tuned.control.route != self.names:
            self.tuned.route(self.names)

    def loss(self, batch: Mapping[str, Any]) -> Tensor:
        """The mean of the prompts' losses on a batch with labels; a scalar. Activates the prompts (:meth:`activate`).

        Raises:
            StateError: if the model gives no loss, as without labels.
        """
        self.activate()
        loss: Tensor | None = self.tuned.model(**repeated(batch, len(self.names))).loss
        if loss is None:
            raise StateError("The model gives no loss. Put labels into the batch.")
        return loss

    @torch.no_grad()
    def probabilities(self, batch: Mapping[str, Any]) -> Tensor:
        """The probability of each class, by each prompt, for each row, (N, B, C), in evaluation mode.

        Args:
            batch: arguments of the model; labels are not read.

        Raises:
            StateError: if the scores are not one row of classes for each row of the batch.
        """
        given = {name: value for name, value in batch.items() if name != "labels"}
        rows = next(len(value) for value in given.values() if isinstance(value, Tensor) and value.dim())
        training = self.tuned.model.training
        self.tuned.model.eval()
        try:
            with self.routed() as model:
                scores = self.scores(model(**repeated(given, len(self.names))))
        finally:
            self.tuned.model.train(training)
        if scores.dim() != 2 or len(scores) != rows * len(self.names):
            raise StateError(
                f"The scores have the shape {tuple(scores.shape)}, but (rows, classes) with "
                f"{rows * len(self.names)} rows is wanted. Pass scores= to choose them from the model's output."
            )
        return scores.float().softmax(-1).view(len(self.names), rows, -1)

    def predict(self, batch: Mapping[str, Any]) -> Tensor:
        """The class that the majority of the prompts chooses for each row, (B,); see :func:`majority_vote`."""
        return majority_vote(self.probabilities(batch))

    def evaluate(self, batches: Iterable[Mapping[str, Any]]) -> EnsembleReport:
        """Accuracy of the vote beside that of each prompt.

        Args:
            batches: with ``labels``, the class of each row, (B,).
        """
        probabilities, labels = [], []
        for batch in batches:
            probabilities.append(self.probabilities(batch).cpu())
            labels.append(batch["labels"].cpu())
        if not labels:
            raise MethodError("There is nothing to evaluate: no batch was given.")
        return compare_votes(self.names, torch.cat(probabilities, 1), torch.cat(labels))


def _logits(output: Any) -> Tensor:
    logits: Tensor = output.logits
    return logits
