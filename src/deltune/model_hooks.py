"""Hooks on the model as a whole, and on optimizers: schedules, penalties, state dictionaries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from deltune.attachment import BANK, Attachment
from deltune.sites import Control

__all__ = ["PenaltyHook", "StepHook", "accept_bare_state", "is_delta_key", "total_penalty"]


def total_penalty(control: Control, attachments: Mapping[str, Attachment]) -> Tensor | None:
    """Sum of the live attachments' penalties, None if there is none."""
    penalties = [penalty for name in control.live if (penalty := attachments[name].penalty()) is not None]
    return sum(penalties[1:], penalties[0]) if penalties else None


class StepHook:
    """After each optimizer step: the live methods' schedules."""

    def __init__(self, control: Control, attachments: Mapping[str, Attachment]) -> None:
        self.control = control
        self.attachments = attachments

    def __call__(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Let every live method follow."""
        for name in self.control.live:
            attachment = self.attachments[name]
            attachment.steps += 1
            attachment.method.after_step(attachment.forms, attachment.steps)


class PenaltyHook:
    """Adds the penalty to the loss of a model's output while training."""

    def __init__(self, control: Control, attachments: Mapping[str, Attachment]) -> None:
        self.control = control
        self.attachments = attachments

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Add to ``output.loss``, if there is one."""
        loss = output.get("loss") if isinstance(output, Mapping) else None
        if loss is None or not module.training:
            return output
        penalty = total_penalty(self.control, self.attachments)
        if penalty is not None:
            output["loss"] = loss + penalty
        return output


def is_delta_key(key: str) -> bool:
    """Whether an entry of a ``state_dict`` belongs to an attachment."""
    return f".{BANK}." in f".{key}"


def accept_bare_state(module: nn.Module, incompatible: Any) -> None:
    """Let the bare model's ``state_dict`` load while methods are attached, which it says nothing about."""
    ours = {key for key in module.state_dict() if is_delta_key(key)}
    missing = [key for key in incompatible.missing_keys if key in ours]
    if len(missing) == len(ours):
        for key in missing:
            incompatible.missing_keys.remove(key)
