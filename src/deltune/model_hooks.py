"""Hooks on the model as a whole, and on optimizers: schedules, penalties, state dictionaries."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, nn

from deltune.attachment import BANK, Attachment
from deltune.backbone import Anatomy
from deltune.errors import StateError
from deltune.sites import Control

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = [
    "BareStateHook",
    "IgnoredKeys",
    "InputGradientHook",
    "LayerDropHook",
    "PenaltyHook",
    "StepHooks",
    "added_keys",
    "dropped_at",
    "lowest_trained_layers",
    "refuse_to_resize",
    "total_penalty",
]


def total_penalty(control: Control, attachments: Mapping[str, Attachment]) -> Tensor | None:
    """Sum of the live attachments' penalties, None if there is none."""
    penalties = [penalty for name in control.trained if (penalty := attachments[name].penalty()) is not None]
    return sum(penalties[1:], penalties[0]) if penalties else None


class StepHooks:
    """Around each optimizer step: the live methods' schedules."""

    def __init__(self, control: Control, attachments: Mapping[str, Attachment]) -> None:
        self.control = control
        self.attachments = attachments
        self._handles: list[RemovableHandle] = []

    def bind(self, optimizer: torch.optim.Optimizer, steps: int | None) -> StepHooks:
        """Follow ``optimizer`` from now on, for so many steps; of a wrapper (accelerate, Lightning) what it wraps."""
        while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = inner
        for attachment in self._trained():
            attachment.method.begin(attachment.forms, steps)
        self.control.bound += 1
        self._handles.append(optimizer.register_step_pre_hook(self.before))
        self._handles.append(optimizer.register_step_post_hook(self.after))
        return self

    def remove(self) -> None:
        """Follow no longer."""
        if self._handles:
            self.control.bound -= 1
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """What every live method does before a step.

        Methods look at the gradients there. A closure, as Lightning gives one to the step, makes them only when it is
        called, so they then do it right after its first call.
        """
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._before(optimizer)
            return None
        called = False

        def with_gradients() -> Any:
            nonlocal called
            loss = closure()
            if not called:
                called = True
                self._before(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], with_gradients, *args[2:]), kwargs
        return args, {**kwargs, "closure": with_gradients}

    def _before(self, optimizer: torch.optim.Optimizer) -> None:
        for attachment in self._trained():
            attachment.method.before_step(attachment.forms, attachment.steps + 1, optimizer)

    def after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """What every live method does after a step."""
        for attachment in self._trained():
            attachment.steps += 1
            attachment.method.after_step(attachment.forms, attachment.steps, optimizer)

    def _trained(self) -> list[Attachment]:
        return [self.attachments[name] for name in self.control.trained]


class LayerDropHook:
    """Before the model in training: in how many of the lowest layers nothing acts in this step (Rücklé et al. 2021).

    The number follows from the seed and the step, so that it is the same in every part of a batch, in every process
    and in a run that goes on from a checkpoint.

    Args:
        control: takes the number.
        attachments: know how many steps were taken.
        layers: L; the number is uniform on 0 to L - 1.
    """

    def __init__(self, control: Control, attachments: Mapping[str, Attachment], layers: int) -> None:
        self.control = control
        self.attachments = attachments
        self.layers = layers

    def __call__(self, module: nn.Module, args: Any) -> None:
        """Draw.

        Raises:
            StateError: if nobody counts steps.
        """
        seed = self.control.drop_seed
        if seed is None or not module.training:
            return
        if not self.control.bound:
            raise StateError(
                "Dropping layers at random follows the steps of an optimizer: call tuned.bind(optimizer) before "
                "training."
            )
        step = max((self.attachments[name].steps for name in self.control.trained), default=0)
        self.control.dropped_in_training = dropped_at(step, seed, self.layers)


def dropped_at(step: int, seed: int, layers: int) -> int:
    """Number of dropped layers in the step after ``step`` steps, uniform on 0 to ``layers`` - 1."""
    digest = hashlib.sha256(f"{seed} {step}".encode()).digest()
    return int.from_bytes(digest[:8], "big") * layers >> 64


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


def added_keys(model: nn.Module, attachments: Mapping[str, Attachment]) -> set[str]:
    """The entries of the model's ``state_dict`` that the bare model does not have: forms, and added biases."""
    added = {id(value) for attachment in attachments.values() for value in attachment.selection.added}
    return {
        key for key, value in model.state_dict(keep_vars=True).items() if f".{BANK}." in f".{key}" or id(value) in added
    }


class IgnoredKeys(Set[str]):
    """What ``save_pretrained`` leaves out: names given, and what attachments add at that moment, as forms may grow."""

    def __init__(self, names: Iterable[str], model: nn.Module, attachments: Mapping[str, Attachment]) -> None:
        self.names = frozenset(names)
        self.model = model
        self.attachments = attachments

    def _all(self) -> set[str]:
        return {*self.names, *added_keys(self.model, self.attachments)}

    def __contains__(self, key: object) -> bool:
        return key in self._all()

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class BareStateHook:
    """Lets the bare model's ``state_dict`` load while methods are attached, which it says nothing about."""

    def __init__(self, attachments: Mapping[str, Attachment]) -> None:
        self.attachments = attachments

    def __call__(self, module: nn.Module, incompatible: Any) -> None:
        """Accept that all of our own entries are missing; a part of them missing stays an error."""
        ours = added_keys(module, self.attachments)
        if ours <= set(incompatible.missing_keys):
            incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in ours]


def lowest_trained_layers(model: nn.Module, anatomy: Anatomy, live: Iterable[Attachment] = ()) -> Iterator[nn.Module]:
    """Of each stack the first layer in which anything trains, if there is one.

    A form of a live attachment counts even where all that it trains is shared, and so lies in no layer.
    """
    owners = {placed.owner for attachment in live for placed in attachment.placed.values()}
    for stack in anatomy.stacks.values():
        for name in stack.layers:
            layer = model.get_submodule(name)
            if name in owners or any(value.requires_grad for value in layer.parameters()):
                yield layer
                break


class InputGradientHook:
    """Before a layer that is recomputed: let its input require a gradient, where all below it is frozen.

    Re-entrant gradient checkpointing differentiates only what an input with a gradient reaches, so a frozen
    model below would leave the layer's own parameters without one. transformers sees to this for models that
    read token ids, but not for those of images and sound.
    """

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Replace the hidden states, if they need it."""
        if not (getattr(module, "gradient_checkpointing", False) and module.training and torch.is_grad_enabled()):
            return None
        options = getattr(module._gradient_checkpointing_func, "keywords", {})
        needs = options.get("use_reentrant", True) and args and isinstance(args[0], Tensor)
        if not needs or args[0].requires_grad:
            return None
        return args[0].detach().requires_grad_(), *args[1:]


def refuse_to_resize(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands in for ``model.resize_token_embeddings``, which replaces modules that attachments refer to.

    Raises:
        StateError: always.
    """
    raise StateError(
        "The token embeddings cannot be resized while methods are attached. Resize them before attaching, or detach "
        "first."
    )
