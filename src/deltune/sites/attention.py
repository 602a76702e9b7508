"""More keys and values for an attention function.

Letters: B batch, H heads, K key/value heads, Q queries, T keys, P additional keys, D width of a head.

The additional keys and values enter after rotation, normalisation and the update of the cache: they are
never cached, shift no position and survive beam search and static caches. They are put in front of the
real ones, visible to every query.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltune.backbone import Anatomy, AttentionShape, Targets
from deltune.errors import StateError, TargetError
from deltune.sites.attention_positions import CountPositions
from deltune.sites.base import Control, Form, Insertion, Site, Tap
from deltune.sites.relative_positions import widened_bias

__all__ = ["KeyValueForm", "KeyValueSite", "dispatching_to", "key_value_sites", "own_function", "with_additional_keys"]

#: Name of our function in transformers' attention interface.
IMPLEMENTATION = "deltune"
#: Attribute under which an attention module finds its tap; a plain attribute, not a submodule.
_TAP = "_deltune_key_value"


class KeyValueForm(Form):
    """``forward`` returns additional keys and values, each (K, P, D)."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, Tensor]:
        """Additional keys and values, each (K, P, D)."""


@dataclass(frozen=True)
class KeyValueSite(Site):
    """An attention function with heads of ``shape``, in a stack of width ``hidden_size``.

    ``positions_entry`` names the module whose positions must be counted over real tokens, for stacks with
    rotary positions: additional keys are not rotated, so what a query makes of them depends on its position.
    """

    shape: AttentionShape
    hidden_size: int
    dtype: torch.dtype
    device: torch.device
    positions_entry: str | None = None

    insertion: ClassVar[Insertion] = Insertion.KEY_VALUE

    def tap(self, control: Control) -> KeyValueTap:
        """A tap inside the attention function."""
        return KeyValueTap(self, control)


class KeyValueTap(Tap):
    """Gives an attention module a private configuration that dispatches to our attention function."""

    site: KeyValueSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self.implementation = "eager"
        self.reached = False
        self._original: tuple[nn.Module, Any] | None = None

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Let the module's attention calls come to us.

        Raises:
            StateError: if the model's attention implementation cannot take additional keys.
        """
        module = modules[self.site.part.module]
        config: Any = module.config
        self.implementation, private = dispatching_to(IMPLEMENTATION, config)
        self._original = (module, config)
        module.config = private
        module.__dict__[_TAP] = self
        self._handles.append(module.register_forward_hook(self))
        if self.site.positions_entry is not None:
            self._handles.extend(CountPositions.install(self, modules[self.site.positions_entry]))

    def uninstall(self) -> None:
        """Give the module its own configuration back."""
        super().uninstall()
        if self._original is not None:
            module, config = self._original
            module.config = config
            del module.__dict__[_TAP]
            self._original = None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """After the first call of the module: did it really come to us?"""
        if not self.reached:
            raise StateError(
                f"{type(module).__name__} ({self.site.part.module}) ignores transformers' attention interface, so "
                "additional keys and values would have no effect in it. Choose a method that does not need them."
            )

    def keys_and_values(self, reference: Tensor) -> _Added | None:
        """Keys and values of all live forms, for a batch shaped and typed ``reference`` (B, K, T, D); None for none."""
        found = [(*form(), rows) for form, _, rows in self.changes(reference)]
        if not found:
            return None
        owners = self._owners(reference)
        lengths = [(name, key.shape[1]) for name, (key, _, _) in zip(owners, found, strict=True)]
        shape = (reference.shape[0], -1, -1, -1)
        keys = torch.cat([key.expand(shape) for key, _, _ in found], dim=2).to(reference)
        values = torch.cat([value.expand(shape) for _, value, _ in found], dim=2).to(reference)
        if all(rows is None for _, _, rows in found):
            return _Added(keys, values, None, lengths)
        # each form has columns of its own, which other rows do not see
        visible = torch.zeros(reference.shape[0], 1, 1, keys.shape[2], dtype=torch.bool, device=reference.device)
        start = 0
        for key, _, rows in found:
            visible[rows, :, :, start : start + key.shape[1]] = True
            start += key.shape[1]
        return _Added(keys, values, visible, lengths)

    def _owners(self, reference: Tensor) -> list[str]:
        """Which attachment each form of :meth:`changes` belongs to."""
        routed = set(self.control.routes(reference.shape[0])) if self.control.route else None
        return [name for name, _, _ in self._acting() if routed is None or name in routed]


@dataclass
class _Added:
    """Keys and values (B, K, P, D), and which of them each row sees, (B, 1, 1, P) boolean; all of them for None.

    ``lengths`` says how many of them belong to which attachment, in order.
    """

    keys: Tensor
    values: Tensor
    visible: Tensor | None
    lengths: list[tuple[str, int]]


def dispatching_to(name: str, config: Any) -> tuple[str, Any]:
    """The name of the attention function that ``config`` says, and a private copy of it that says ``name``.

    Raises:
        StateError: if the model's attention implementation cannot be replaced by ours.
    """
    implementation: str = config._attn_implementation or "eager"
    if implementation not in ("eager", "sdpa"):
        raise StateError(
            f"Additional keys and values are not possible with the attention implementation {implementation!r}. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    private = copy.copy(config)
    # not through the property: its setter would write to the sub-configurations, which are shared
    private.__dict__["_attn_implementation_internal"] = name
    return implementation, private


def own_function(module: nn.Module, implementation: str) -> Callable[..., Any]:
    """The attention function of that name; the eager one is that of the module's own file, with caps and sinks."""
    if implementation != "eager":
        registered: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS[implementation]
        return registered
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return function


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """What ``sdpa`` makes of no mask, (1, 1, queries, keys); True where attention is allowed.

    transformers leaves the causal mask out only where query i is at key i: where there are as many keys, or
    where the rest are empty places of a static cache.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _widened(mask: Tensor, added: _Added) -> Tensor:
    """``mask`` (B or 1, H or 1, Q or 1, T), boolean or additive, with the additional columns in front."""
    boolean = mask.dtype == torch.bool
    count = added.keys.shape[2]
    if added.visible is None:
        front = mask.new_full((*mask.shape[:-1], count), True if boolean else 0.0)
        return torch.cat([front, mask], dim=-1)
    front = added.visible
    if not boolean:
        front = mask.new_zeros(front.shape).masked_fill(~front, torch.finfo(mask.dtype).min)
    front = front.expand(-1, mask.shape[1], mask.shape[2], -1)
    return torch.cat([front, mask.expand(front.shape[0], -1, -1, -1)], dim=-1)


def with_additional_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: the model's own one, with more keys and values.

    Args:
        module: the attention module; its tap says which keys and values to add.
        query: (B, H, Q, D).
        key: (B, K, T, D).
        value: (B, K, T, D).
        attention_mask: (B or 1, H or 1, Q or 1, T), boolean (True is visible) or additive; None for no mask,
            which the ``sdpa`` implementation reads as causal where the module is causal.
        **kwargs: whatever else the module gives its attention function.

    Raises:
        StateError: if the mask has a form that cannot be widened.
    """
    tap: KeyValueTap = vars(module)[_TAP]
    tap.reached = True
    eager = tap.implementation == "eager"
    function = own_function(module, tap.implementation)
    added = tap.keys_and_values(key)
    bias = kwargs.get("position_bias")
    if bias is not None:
        lengths = [] if added is None else added.lengths
        kwargs["position_bias"] = widened_bias(module, bias, key.shape[2], lengths)
    if added is None:
        return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if attention_mask is None:
        causal = kwargs.pop("is_causal", None)
        causal = vars(module).get("is_causal", True) if causal is None else causal
        if causal and not eager and query.shape[2] > 1:
            attention_mask = _widened(_causal(query.shape[2], key.shape[2], key.device), added)
        else:
            if not eager:
                kwargs["is_causal"] = False
            if added.visible is not None:
                shape = (1, 1, 1, key.shape[2])
                all_visible = (
                    query.new_zeros(shape) if eager else torch.ones(shape, dtype=torch.bool, device=key.device)
                )
                attention_mask = _widened(all_visible, added)
    elif not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise StateError(
            f"An attention mask of type {type(attention_mask).__name__} cannot be widened for additional keys. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    else:
        attention_mask = _widened(attention_mask, added)
    key = torch.cat([added.keys, key], dim=2)
    value = torch.cat([added.values, value], dim=2)
    return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(IMPLEMENTATION, with_additional_keys)


def key_value_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[KeyValueSite, ...]:
    """The attention functions that ``targets`` selects.

    Raises:
        TargetError: if a target selects nothing, or an attention that cannot take additional keys.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    sites: list[KeyValueSite] = []
    for part in targets.select(anatomy, (), ("attention",)):
        if part.attention is None or not part.dispatches:
            raise TargetError(
                f"The attention of {anatomy.family} ({part.module}) does not go through transformers' attention "
                "interface, so it cannot take additional keys and values. Choose a method with another insertion, "
                "such as lora or sequential-adapter."
            )
        stack = anatomy.stack_of(part)
        parameter = next(modules[part.module].parameters())
        entry = stack.tokens.entry if stack.tokens is not None and stack.tokens.positions is None else None
        sites.append(KeyValueSite(part, part.attention, stack.hidden_size, parameter.dtype, parameter.device, entry))
    return tuple(sites)
