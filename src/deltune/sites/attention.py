"""More keys and values for an attention function.

Letters: B batch, H heads, K key/value heads, Q queries, T keys, P additional keys, D width of a head.

The additional keys and values enter after rotation, normalisation and the update of the cache: they are
never cached, shift no position and survive beam search and static caches. They are put in front of the
real ones, visible to every query.
"""

from __future__ import annotations

import copy
import inspect
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
from deltune.sites.base import Control, Form, Insertion, Site, Tap, named_arguments

__all__ = ["KeyValueForm", "KeyValueSite", "key_value_sites", "with_additional_keys"]

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
        self.implementation = config._attn_implementation or "eager"
        if self.implementation not in ("eager", "sdpa"):
            raise StateError(
                f"Additional keys and values are not possible with the attention implementation "
                f"{self.implementation!r}. Load the model with attn_implementation='sdpa' or 'eager'."
            )
        private = copy.copy(config)
        # not through the property: its setter would write to the sub-configurations, which are shared
        private.__dict__["_attn_implementation_internal"] = IMPLEMENTATION
        self._original = (module, config)
        module.config = private
        module.__dict__[_TAP] = self
        self._handles.append(module.register_forward_hook(self))
        if self.site.positions_entry is not None:
            entry = modules[self.site.positions_entry]
            names = tuple(inspect.signature(entry.forward).parameters)
            if "position_ids" in names:
                self._handles.append(entry.register_forward_pre_hook(_CountPositions(self, names), with_kwargs=True))

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

    def keys_and_values(self, reference: Tensor) -> tuple[Tensor, Tensor] | None:
        """Keys and values of all live forms, joined, each (K, P, D) in the type of ``reference``."""
        pairs = [form() for form, _ in self.live()]
        if not pairs:
            return None
        keys, values = zip(*pairs, strict=True)
        return torch.cat(keys, dim=1).to(reference), torch.cat(values, dim=1).to(reference)


@dataclass
class _CountPositions:
    """Before a stack: number the real tokens from 0, where padding is given and positions are not."""

    tap: KeyValueTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        arguments = named_arguments(self.names, args, kwargs)
        mask = arguments.get("attention_mask")
        if arguments.get("position_ids") is not None or not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        given = arguments.get("input_ids")
        given = arguments.get("inputs_embeds") if given is None else given
        if given is None or not any(True for _ in self.tap.live()):
            return None
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)
        arguments["position_ids"] = positions[:, -given.shape[1] :]
        return (), arguments


def _eager_function(module: nn.Module) -> Callable[..., Any]:
    """The eager attention of the module's own file, with its soft caps and sinks."""
    function: Callable[..., Any] = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
    return function


def _causal(queries: int, keys: int, device: torch.device) -> Tensor:
    """What ``sdpa`` makes of no mask, (1, 1, queries, keys); True where attention is allowed.

    transformers leaves the causal mask out only where query i is at key i: where there are as many keys, or
    where the rest are empty places of a static cache.
    """
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril()[None, None]


def _widened(mask: Tensor, count: int, visible: bool | float) -> Tensor:
    """``mask`` (..., T) with ``count`` visible columns in front."""
    front = mask.new_full((*mask.shape[:-1], count), visible)
    return torch.cat([front, mask], dim=-1)


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
    function = _eager_function(module) if eager else ALL_ATTENTION_FUNCTIONS[tap.implementation]
    added = tap.keys_and_values(key)
    if added is None:
        return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    count, batch = added[0].shape[1], key.shape[0]
    if attention_mask is None:
        causal = kwargs.pop("is_causal", None)
        causal = vars(module).get("is_causal", True) if causal is None else causal
        if causal and not eager and query.shape[2] > 1:
            attention_mask = _widened(_causal(query.shape[2], key.shape[2], key.device), count, True)
        elif not eager:
            kwargs["is_causal"] = False
    elif not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise StateError(
            f"An attention mask of type {type(attention_mask).__name__} cannot be widened for additional keys. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    else:
        attention_mask = _widened(attention_mask, count, attention_mask.dtype == torch.bool)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = _widened(kwargs["position_bias"], count, 0.0)
    key = torch.cat([added[0].expand(batch, -1, -1, -1), key], dim=2)
    value = torch.cat([added[1].expand(batch, -1, -1, -1), value], dim=2)
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
        if any(site.positions_entry == entry for site in sites):
            entry = None  # one of the stack's sites is enough
        sites.append(KeyValueSite(part, part.attention, stack.hidden_size, parameter.dtype, parameter.device, entry))
    return tuple(sites)
