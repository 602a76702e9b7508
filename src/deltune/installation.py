"""What attachments put on a model while they are live, and take off again without a trace."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from deltune.attachment import Attachment
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
        self._ignored_on_save: set[str] | None = None

    def put_on(self) -> None:
        """Put everything on the model."""
        live = [self.attachments[name] for name in self.control.live]
        if self.control.route:
            self._handles.extend(routed_heads(self.model, self.anatomy, self.control, live))
        for attachment in self.attachments.values():
            attachment.register(self.modules)
        for tap in sorted(self.taps.values(), key=lambda tap: tap.site.order):
            tap.install(self.modules)
        if total_penalty(self.control, self.attachments) is not None:
            self._handles.append(self.model.register_forward_hook(PenaltyHook(self.control, self.attachments)))
        layers = max((len(stack) for stack in self.anatomy.stacks.values()), default=0)
        if self.control.drop_seed is not None:
            hook = LayerDropHook(self.control, self.attachments, layers)
            self._handles.append(self.model.register_forward_pre_hook(hook))
        for layer in lowest_trained_layers(self.model, self.anatomy, live):
            self._handles.append(layer.register_forward_pre_hook(InputGradientHook()))
        register: Any = self.model.register_load_state_dict_post_hook
        self._handles.append(register(BareStateHook(self.attachments)))
        ignored = getattr(self.model, "_keys_to_ignore_on_save", None)
        if ignored is not None:
            self._ignored_on_save = ignored
            keys: Any = IgnoredKeys(ignored, self.model, self.attachments)
            self.model._keys_to_ignore_on_save = keys
        self._installed = True

    def take_off(self) -> None:
        """Take everything off again; nothing happens if nothing is on."""
        if not self._installed:
            return
        for tap in self.taps.values():
            tap.uninstall()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        for attachment in self.attachments.values():
            attachment.unregister(self.modules)
        remove_routed_heads(self.model)
        if self._ignored_on_save is not None:
            self.model._keys_to_ignore_on_save = self._ignored_on_save  # type: ignore[assignment]
            self._ignored_on_save = None
        self._installed = False
