"""Additional losses of methods, for trainers that make their own loss of what the model gives."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from deltune.errors import StateError
from deltune.training.trainer import DeltaTrainer
from deltune.tuned import HANDLE, Tuned

__all__ = ["AddsPenalty"]


class AddsPenalty:
    """Adds the penalty of the live methods to the loss of a trainer that does not use ``output.loss``.

    Such are the trainers of TRL. To be put in front of the trainer's class:

        class PenalizedSFT(AddsPenalty, SFTTrainer):
            pass

    The penalty counts once for each step, however many batches the step has. A trainer that uses ``output.loss``, as
    transformers' own does, has the penalty in it already and is refused.

    Raises:
        StateError: when a class is made whose loss has the penalty already; when it trains a model without a delta.
    """

    # of transformers.Trainer
    model: Any
    loss_is_scaled_for_ga: bool | None = None
    model_accepts_loss_kwargs: bool
    compute_loss_func: Any
    current_gradient_accumulation_steps: int

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        below = cls.__mro__[cls.__mro__.index(AddsPenalty) + 1 :]
        maker = next((item for item in below if "compute_loss" in vars(item)), None)
        if maker in (None, Trainer, DeltaTrainer):
            raise StateError(
                f"{cls.__name__} would add the penalty twice, as a Trainer's own loss has it already, or stands in "
                "front of no trainer. Leave AddsPenalty out, or put it in front of a trainer that makes a loss of its "
                "own: class PenalizedSFT(AddsPenalty, SFTTrainer)."
            )

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss, in training with the penalty added."""
        below: Any = super()
        found = below.compute_loss(model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch)
        tuned: Tuned | None = vars(self.model).get(HANDLE)
        if tuned is None:
            raise StateError("There is no delta on the model, so there is no penalty either. Attach a method first.")
        penalty = tuned.penalty() if self.model.training else None
        if penalty is None:
            return found
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            scaled = bool(self.model_accepts_loss_kwargs and num_items_in_batch is not None) or bool(
                self.compute_loss_func
            )
        if scaled:  # else the trainer divides the whole loss itself
            penalty = penalty / self.current_gradient_accumulation_steps
        if return_outputs:
            return found[0] + penalty.to(found[0].device), found[1]
        return found + penalty.to(found.device)
