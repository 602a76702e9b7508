"""How far what was written is from the live model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deltune.errors import StateError
from deltune.training.evaluation import measuring

__all__ = ["LARGEST_DIFFERENCE", "LARGEST_DRIFT", "Drift", "probe_logits", "refuse_drift"]

_PROBE_ROWS, _PROBE_TOKENS = 4, 16
#: Merging in float32 drifts by about a millionth; by this much the folder holds something else.
LARGEST_DRIFT = 0.05
#: What is read as it was written, up to the order of sums.
LARGEST_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class Drift:
    """How far the logits of what was written are from those of the model with its delta.

    Attributes:
        largest: greatest absolute difference.
        relative: the same as a share of the greatest absolute logit.
        agreement: share of positions where both have the same greatest logit.
    """

    largest: float
    relative: float
    agreement: float

    @classmethod
    def between(cls, before: Tensor, after: Tensor) -> Drift:
        """Compare logits."""
        before, after = before.float(), after.float()
        largest = float((before - after).abs().max())
        agreement = float((before.argmax(-1) == after.argmax(-1)).float().mean())
        return cls(largest, largest / max(float(before.abs().max()), 1e-12), agreement)


def refuse_drift(drift: Drift, model: Any, output: Path) -> None:
    """Refuse what was written for ``output`` if its drift is more than rounding explains.

    Narrow types explain more than float32, because scales are folded into factors.

    Raises:
        StateError: if so.
    """
    narrow = any(value.dtype in (torch.bfloat16, torch.float16) for value in model.parameters())
    if not drift.relative <= (LARGEST_DRIFT if narrow else LARGEST_DIFFERENCE):
        raise StateError(
            f"What was written for {output} does not do the same: read again, its logits on a probe batch differ by "
            f"{drift.largest:.3g}, {drift.relative:.1%} of the greatest. It is gone. Export with --format merged, or "
            "keep the delta in deltune's own format."
        )


def _probe(model: Any) -> dict[str, Tensor]:
    embeddings: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if not hasattr(embeddings, "num_embeddings"):
        raise StateError(
            f"{type(model).__name__} reads no tokens, so what is written could not be compared with it. Export models "
            "of text; for others use tuned.save, or tuned.merge and save_pretrained."
        )
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(int(embeddings.num_embeddings), (_PROBE_ROWS, _PROBE_TOKENS), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    return {name: value.to(embeddings.weight.device) for name, value in batch.items()}


def probe_logits(model: Any) -> Tensor:
    """Logits of ``model`` for random tokens, the same each time, in evaluation mode.

    Raises:
        StateError: if the model reads no tokens.
    """
    with measuring(model):
        logits: Tensor = model(**_probe(model)).logits
    return logits
