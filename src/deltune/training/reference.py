"""The model without its delta, beside the model with it, and without a second copy of its weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from deltune.errors import StateError
from deltune.training.evaluation import device_of, measuring
from deltune.tuned import Tuned

__all__ = ["ReferenceModel"]


class ReferenceModel(nn.Module):
    """Stands for the model that training began with, where a trainer compares the trained model with it.

    Preference training (DPO, KTO) holds the trained model's log-probabilities against those of a frozen reference.
    With a delta that is the same model without it, so that no second copy has to be loaded: every call runs
    ``tuned.model`` without the delta, in evaluation mode and without gradients, and puts everything back. Results are
    those of a copy, bit for bit.

        DPOTrainer(model=tuned.model, ref_model=ReferenceModel(tuned), ...)

    Where training goes on from a delta, the reference has that delta: attach it twice, once to train and once to be
    compared with, and name the second one.

        tuned = deltune.load(model, "deltas/sft", name="sft")
        deltune.load(tuned, "deltas/sft", name="dpo")
        reference = ReferenceModel(tuned, "sft")

    It has no parameters of its own, so a reference that follows the trained model (``sync_ref_model`` in TRL) needs a
    real copy.

    Args:
        tuned: the handle of the model.
        *active: attachments that the reference has; none by default, the bare model.

    Raises:
        StateError: if an attachment is not there, merged, or cannot be switched off (``reversible=False``); in a
            call, if rows are routed and the reference has attachments.
    """

    def __init__(self, tuned: Tuned, *active: str) -> None:
        super().__init__()
        self.tuned = tuned
        self.active = active
        with self._as_reference():  # what does not work is said here, and not after the first batch
            pass

    @contextmanager
    def _as_reference(self) -> Iterator[None]:
        """The model as the reference has it, in evaluation mode and without gradients."""
        if not self.active:
            with self.tuned.disabled(), measuring(self.tuned.model):
                yield
            return
        if self.tuned.control.route:
            raise StateError("A reference with attachments cannot be compared with routed rows: end routing first.")
        with self.tuned.activated(*self.active), measuring(self.tuned.model):
            yield

    def _without_gradients(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with self._as_reference():
                return function(*args, **options)

        return call

    def forward(self, *args: Any, **options: Any) -> Any:
        """As the model's own, without the delta."""
        return self._without_gradients(self.tuned.model)(*args, **options)

    @property
    def base_model(self) -> Callable[..., Any]:
        """The model below its head, for trainers that compute the head's output themselves."""
        model: Any = self.tuned.model
        return self._without_gradients(model.base_model)

    def get_output_embeddings(self) -> nn.Module:
        """The head for tokens, with the reference's weights also after the call that it is used for."""
        model: Any = self.tuned.model
        with self._as_reference():
            # parameters and hooks stand in dictionaries, which attaching changes
            head: nn.Module = copy.copy(model.get_output_embeddings())
            for name, value in vars(head).items():
                if isinstance(value, dict):
                    vars(head)[name] = value.copy()
        return head

    @property
    def config(self) -> Any:
        """The model's own."""
        return self.tuned.model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return device_of(self.tuned.model)

    def state_dict(self, *args: Any, **options: Any) -> dict[str, Any]:  # type: ignore[override]
        """Of the model without the delta; trainers tell references apart by it."""
        with self._as_reference():
            return self.tuned.model.state_dict(*args, **options)
