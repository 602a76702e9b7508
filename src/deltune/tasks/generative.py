"""What tasks that produce text share: a loss a token, perplexity, and text for people.

Dimensions: B rows of a batch, T token positions, V vocabulary entries, N rows in all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from deltune.errors import DataError, TrainingError
from deltune.tasks._arrays import as_array, first_output
from deltune.tasks._tokens import IGNORED, end_token_id
from deltune.tasks.base import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import Tensor

_POSITIONS_AT_A_TIME = 256


@dataclass(frozen=True, kw_only=True)
class GenerativeTask(Task):
    """Base of the tasks whose model outputs a distribution over the vocabulary at every position."""

    metric: ClassVar[str] = "loss"
    greater_is_better: ClassVar[bool] = False
    token_labels: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    prediction_padding_side: ClassVar[str] = "left"
    predicts_next: ClassVar[bool] = True
    """Whether the logits at a position predict the label at the next one (decoders), or at the same one."""

    def answers(self, dataset: Dataset) -> list[str] | None:
        """The true text of each row, to compare generated text with; none where there is no single one."""
        del dataset
        return None

    def generation_options(self, tokenizer: Any) -> dict[str, int]:
        """What ``model.generate`` must be told to stop where training put the end: end and padding id."""
        return {"eos_token_id": end_token_id(tokenizer), "pad_token_id": int(tokenizer.pad_token_id)}

    def reduce_logits(self, logits: Any, labels: Tensor) -> Tensor:
        """Sums the loss of each row, so that logits never have to be collected.

        Args:
            logits: [B, T', V] with T' >= T, or a tuple that starts with them. Where a method puts positions
                of its own in front (T' > T), the last T belong to the text.
            labels: [B, T], -100 where there is no loss.

        Returns:
            float32 [B, 2]: the summed loss in nats and the number of tokens it is summed over.
        """
        return token_losses(first_output(logits), labels, predicts_next=self.predicts_next)

    def metrics(self, predictions: Any, labels: Any = None) -> dict[str, float]:
        """Loss per token and perplexity over all rows together.

        Args:
            predictions: What ``reduce_logits`` returned [N, 2].
            labels: Not needed.

        Returns:
            ``loss`` (nats per token), ``perplexity`` and ``tokens`` (how many have a loss).

        Raises:
            TrainingError: The loss is not a finite number.
        """
        del labels
        sums = as_array(predictions)
        if sums.ndim != 2 or sums.shape[1] != 2:
            raise DataError(
                f"Predictions have the shape {list(sums.shape)}, where [rows, 2] is expected. "
                "Pass task.reduce_logits as preprocess_logits_for_metrics."
            )
        total, tokens = sums.sum(axis=0).tolist()
        if tokens == 0:
            raise DataError("No token has a loss, so there is nothing to measure. Check the labels.")
        loss = total / tokens
        perplexity = math.exp(loss) if loss < 700 else math.inf
        return {"loss": loss, "perplexity": perplexity, "tokens": tokens}

    def generation_metrics(self, predicted: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
        """Compares generated text with the true text.

        Args:
            predicted: Generated texts.
            answers: True texts, as ``answers`` gives them.

        Returns:
            ``exact_match``: the share of rows whose text is the same but for white space at either end.
        """
        if len(predicted) != len(answers) or not answers:
            raise DataError(
                f"There are {len(predicted)} generated texts and {len(answers)} true ones. "
                "Give one of each for every row, and at least one row."
            )
        same = sum(first.strip() == second.strip() for first, second in zip(predicted, answers, strict=True))
        return {"exact_match": same / len(answers)}

    def predict(self, outputs: Any, tokenizer: Any = None) -> list[dict[str, Any]]:
        """Text of generated tokens, as ``{"text": text}``.

        Args:
            outputs: Token ids [B, T] as a tensor, array or lists. What ``generate`` returns for a decoder
                starts with the prompt: cut it off first, with ``ids[:, prompt_length:]``.
            tokenizer: Turns ids to text; special tokens are left out.
        """
        if tokenizer is None:
            raise DataError("Turning token ids into text needs the tokenizer. Pass it as second argument.")
        rows = [
            [tokenizer.pad_token_id if token == IGNORED else int(token) for token in row]
            for row in (outputs if isinstance(outputs, list) else outputs.tolist())
        ]
        return [{"text": text} for text in tokenizer.batch_decode(rows, skip_special_tokens=True)]


def token_losses(logits: Tensor, labels: Tensor, *, predicts_next: bool) -> Tensor:
    """Sums the cross entropy of each row, holding float32 copies of few positions at a time.

    Args:
        logits: [B, T', V], T' >= T; the last T positions belong to ``labels``.
        labels: [B, T], -100 where there is no loss.
        predicts_next: Whether the logits at a position predict the label at the next one.

    Returns:
        float32 [B, 2]: summed loss in nats, number of tokens.
    """
    import torch
    from torch.nn.functional import cross_entropy

    extra = logits.shape[1] - labels.shape[1]
    if extra < 0 or logits.shape[0] != labels.shape[0]:
        raise TrainingError(
            f"Logits of shape {list(logits.shape)} do not belong to labels of shape {list(labels.shape)}: "
            "there must be as many rows, and at least as many positions."
        )
    logits = logits[:, extra:]
    if predicts_next:
        logits, labels = logits[:, :-1], labels[:, 1:]
    sums = torch.zeros(labels.shape[0], 2, dtype=torch.float32, device=logits.device)
    for row in range(labels.shape[0]):
        (positions,) = torch.nonzero(labels[row] != IGNORED, as_tuple=True)
        for part in torch.split(positions, _POSITIONS_AT_A_TIME):
            losses = cross_entropy(logits[row, part].float(), labels[row, part], reduction="sum")
            sums[row, 0] += losses
            sums[row, 1] += len(part)
    return sums
