"""What attachments put on a model while they are live, and take off again without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deltune.attachment import BANK, Attachment, Bank
from deltune.backbone import Anatomy
from deltune.model_hooks import (
    BareStateHook,
    IgnoredKeys,
    InputGradientHook,
    LayerDropHook,
    PenaltyHook,
    lowest_trained_layers,
    total_penalty,
)
from deltune.routing import remove_routed_heads, routed_heads
from deltune.sites import Control, Tap

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["Installation"]


class Installation:
    """Forms as submodules, taps and hooks of one model: all of them, or none.

    What it costs to put them on and to take them off does not grow with the number of attachments: the forms of all
    stay together in one bank for each layer, which goes on and off as a whole, and taps are those of the live ones.

    Args:
        model: the model.
        anatomy: its parts.
        control: which attachments are live.
        attachments: all of them by name.
        taps: all of them by the identity of their sites.
        modules: the model's modules by dotted name.
    """

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        control: Control,
        attachments: Mapping[str, Attachment],
        taps: Mapping[str, Tap],
        modules: Mapping[str, nn.Module],
    ) -> None:
        self.model = model
        self.anatomy = anatomy
        self.control = control
        self.attachments = attachments
        self.taps = taps
        self.modules = modules
        self._installed = False
        self._handles: list[RemovableHandle] = []
        self._taps_on: list[Tap] = []
        self._ignored_on_save: set[str] | None = None
        #: The bank of each layer that has forms, and where and in which mode the layer was when it was last off.
        self._banks: dict[nn.Module, Bank] = {}
        self._states: dict[nn.Module, tuple[torch.device | None, bool]] = {}

    def add(self, attachment: Attachment) -> None:
        """Let the forms of a further attachment go on with those of the others; nothing is on at present."""
        for placed in attachment.placed.values():
            owner = self.modules[placed.owner]
            if owner not in self._banks:
                self._banks[owner] = Bank()
                self._states[owner] = _state(owner)
            bank = self._banks[owner]
            if attachment.name not in bank._modules:
                bank.add_module(attachment.name, Bank())
            bank.get_submodule(attachment.name).add_module(placed.key.replace(".", "_"), placed.form)

    def remove(self, attachment: Attachment) -> None:
        """Undo :meth:`add`; nothing is on at present."""
        for owner in {self.modules[placed.owner] for placed in attachment.placed.values()}:
            bank = self._banks[owner]
            del bank._modules[attachment.name]
            if not bank._modules:
                del self._banks[owner], self._states[owner]

    def put_on(self) -> None:
        """Put everything on the model."""
        self._installed = True
        live = [self.attachments[name] for name in self.control.live]
        # before the banks are on: nothing else that is attached has to be looked through
        lowest = list(lowest_trained_layers(self.model, self.anatomy, live))
        changed = any(_state(owner) != state for owner, state in self._states.items())
        for attachment in self.attachments.values() if changed else live:
            attachment.follow(self.modules)
        for owner, bank in self._banks.items():
            owner.add_module(BANK, bank)
        if self.control.route:
            self._handles.extend(routed_heads(self.model, self.anatomy, self.control, live))
        acting = {site.identity for attachment in live for _, site, _ in attachment.sites}
        taps = [tap for identity, tap in self.taps.items() if identity in acting or tap.watches]
        for tap in sorted(taps, key=lambda tap: tap.site.order):
            self._taps_on.append(tap)
            tap.install(self.modules)
        if total_penalty(self.control, self.attachments) is not None:
            self._handles.append(self.model.register_forward_hook(PenaltyHook(self.control, self.attachments)))
        layers = max((len(stack) for stack in self.anatomy.stacks.values()), default=0)
        if self.control.drop_seed is not None:
            hook = LayerDropHook(self.control, self.attachments, layers)
            self._handles.append(self.model.register_forward_pre_hook(hook))
        for layer in lowest:
            self._handles.append(layer.register_forward_pre_hook(InputGradientHook()))
        register: Any = self.model.register_load_state_dict_post_hook
        self._handles.append(register(BareStateHook(self.attachments)))
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None)
        if ignored is not None:
            self._ignored_on_save = ignored
            keys: Any = IgnoredKeys(ignored, self.model, self.attachments)
            self.model._keys_to_ignore_on_save = keys

    def take_off(self) -> None:
        """Take everything off again; nothing happens if nothing is on."""
        if not self._installed:
            return
        for tap in self._taps_on:
            tap.uninstall()
        self._taps_on.clear()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        remove_routed_heads(self.model, self.control.live)
        for owner in self._banks:
            owner._modules.pop(BANK, None)
            self._states[owner] = _state(owner)
        if self._ignored_on_save is not None:
            self.model._keys_to_ignore_on_save = self._ignored_on_save  # type: ignore[assignment]
            self._ignored_on_save = None
        self._installed = False


def _state(owner: nn.Module) -> tuple[torch.device | None, bool]:
    """Where a layer is, and whether it is in training mode."""
    return next((value.device for value in owner.parameters()), None), owner.training
