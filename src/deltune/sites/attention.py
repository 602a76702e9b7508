"""More keys and values for an attention function.

Letters: B batch, b rows of it that a form serves, H heads, K key/value heads, Q queries, T keys, P additional keys,
D width of a head, n forms whose gates differ from query to query.

The additional keys and values enter after rotation, normalisation and the update of the cache: they are
never cached, shift no position and survive beam search and static caches. They are put in front of the
real ones, visible to every query.
"""

from __future__ import annotations

import copy
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from deltune.backbone import Anatomy, AttentionShape, Targets
from deltune.errors import StateError, TargetError
from deltune.sites.added_keys import AddedKeys, Keys
from deltune.sites.attention_positions import CountPositions
from deltune.sites.base import Control, Form, Insertion, Seen, Site, Tap, gated, rows_of, with_change

__all__ = [
    "HeadForm",
    "HeadSite",
    "KeyValueForm",
    "KeyValueSite",
    "dispatching_to",
    "head_sites",
    "key_value_sites",
    "own_function",
    "with_additional_keys",
]

#: Name of our function in transformers' attention interface.
IMPLEMENTATION = "deltune"
#: Attribute under which an attention module finds its tap; a plain attribute, not a submodule.
_TAP = "_deltune_key_value"


class KeyValueForm(Form):
    """``forward`` returns additional keys and values, each (K, P, D)."""

    @abstractmethod
    def forward(self) -> tuple[Tensor, Tensor]:
        """Additional keys and values, each (K, P, D)."""


class HeadForm(Form):
    """``forward`` maps the queries of all heads to a change of what each head makes."""

    @abstractmethod
    def forward(self, query: Tensor, scaling: float) -> Tensor:
        """The change (B, H, Q, D) for the query (B, H, Q, D), whose products with keys the model scales by that."""


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
    gateable: ClassVar[bool] = True

    @property
    def modified(self) -> str:
        """What each head makes, before the matrix that joins them."""
        return f"{super().modified} heads"

    def combination(self, factor: str) -> str:
        """The share lam is what that the additional keys have of the softmax."""
        gated = f", keys and values times {factor}" if factor else ""
        return f"(1 - lam) h + lam dh{gated}"

    def tap(self, control: Control) -> KeyValueTap:
        """A tap inside the attention function."""
        return KeyValueTap(self, control)


@dataclass(frozen=True)
class HeadSite(KeyValueSite):
    """What the heads of an attention function make, before the matrix that joins them, beside the function itself."""

    insertion: ClassVar[Insertion] = Insertion.PARALLEL

    @property
    def identity(self) -> str:
        """Additional keys in the same attention function share the tap."""
        return f"{Insertion.KEY_VALUE.value}:{self.key}"

    def combination(self, factor: str) -> str:
        """A sum: no softmax is shared, so that there is no gate."""
        return Site.combination(self, factor)


class KeyValueTap(Tap):
    """Gives an attention module a private configuration that dispatches to our attention function."""

    site: KeyValueSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self.implementation = "eager"
        self.reached = False
        self._seen = Seen()
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
        if any(form.gated_by for forms in self.forms.values() for form in forms):
            self._handles.append(module.register_forward_pre_hook(self.read, with_kwargs=True))
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

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what the module reads for the gates, until its attention function runs."""
        self._seen.inputs[:] = [args[0] if args else next(iter(kwargs.values()))]

    def reading(self) -> Tensor | None:
        """What the module read, (B, Q, d), if a gate has to know it."""
        return self._seen.inputs.pop() if self._seen.inputs else None

    def keys_and_values(self, reference: Tensor, read: Tensor | None) -> AddedKeys | None:
        """Keys and values of all live forms, for a batch shaped and typed ``reference`` (B, K, T, D); None for none."""
        found = []
        for form, _, rows in self.changes(reference):
            if isinstance(form, KeyValueForm):
                keys, values = form()
                found.append(Keys(keys, values, self._weight(form, 1.0, read, rows), rows))
        return AddedKeys.of(found, reference) if found else None

    def scales(self, form: Form) -> bool:
        """Keys and values are not a change that can be scaled; changes of heads are."""
        return isinstance(form, HeadForm)

    def with_changes(self, heads: Tensor, query: Tensor, scaling: float | None, read: Tensor | None) -> Tensor:
        """What the heads make, (B, Q, H, D), with the live changes that read the ``query`` (B, H, Q, D)."""
        for form, weight, rows in self.changes(query):
            if isinstance(form, HeadForm):
                change = form(rows_of(query, rows), query.shape[-1] ** -0.5 if scaling is None else scaling)
                factor = self._weight(form, weight, read, rows)
                factor = factor[..., None] if isinstance(factor, Tensor) else factor
                heads = with_change(heads, change.transpose(1, 2), factor, rows)
        return heads

    def _weight(self, form: Form, weight: float, read: Tensor | None, rows: Tensor | None) -> float | Tensor:
        """The weight times the form's gate, which reads what the attention module read, (B, Q, d)."""
        return weight if read is None else gated(form, weight, rows_of(read, rows), rows)


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


def with_additional_keys(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The attention function that transformers calls: the model's own one, with more keys and values.

    What forms of a :class:`HeadSite` make of the query is added to what the heads make.

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
    read = tap.reading()
    added = tap.keys_and_values(key, read)
    heads, weights = _attended(tap, added, module, query, key, value, attention_mask, **kwargs)
    return tap.with_changes(heads, query, kwargs.get("scaling"), read), weights


def _attended(
    tap: KeyValueTap,
    added: AddedKeys | None,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own function with the additional keys and values."""
    eager = tap.implementation == "eager"
    function = own_function(module, tap.implementation)
    if added is None:
        return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    if attention_mask is None:
        causal = kwargs.pop("is_causal", None)
        causal = vars(module).get("is_causal", True) if causal is None else causal
        if causal and not eager and query.shape[2] > 1:
            attention_mask = added.widened(_causal(query.shape[2], key.shape[2], key.device))
        else:
            if not eager:
                kwargs["is_causal"] = False
            if added.visible is not None:
                shape = (1, 1, 1, key.shape[2])
                all_visible = (
                    query.new_zeros(shape) if eager else torch.ones(shape, dtype=torch.bool, device=key.device)
                )
                attention_mask = added.widened(all_visible)
    elif not isinstance(attention_mask, Tensor) or attention_mask.dim() != 4:
        raise StateError(
            f"An attention mask of type {type(attention_mask).__name__} cannot be widened for additional keys. "
            "Load the model with attn_implementation='sdpa' or 'eager'."
        )
    else:
        attention_mask = added.widened(attention_mask)
    if kwargs.get("position_bias") is not None:
        kwargs["position_bias"] = replace(added, visible=None).widened(kwargs["position_bias"])
    if added.gates:
        # the width that the functions would take it from is that of several heads now
        kwargs["scaling"] = query.shape[-1] ** -0.5 if kwargs.get("scaling") is None else kwargs["scaling"]
    query, key, value = added.joined(query, key, value)
    output, weights = function(module, query, key, value, attention_mask, **kwargs)
    return added.parted(output), weights


AttentionInterface.register(IMPLEMENTATION, with_additional_keys)


def head_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[HeadSite, ...]:
    """The heads of the attention functions that ``targets`` selects.

    Raises:
        TargetError: if a target selects nothing, or an attention function that cannot be reached.
    """
    sites = key_value_sites(model, anatomy, targets)
    return tuple(HeadSite(**{item.name: getattr(site, item.name) for item in fields(site)}) for site in sites)


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
                "interface, so it can take no additional keys and values, and its heads cannot be changed. Choose a "
                "method with another insertion, such as lora or sequential-adapter."
            )
        stack = anatomy.stack_of(part)
        parameter = next(modules[part.module].parameters())
        entry = stack.tokens.entry if stack.tokens is not None and stack.tokens.positions is None else None
        sites.append(KeyValueSite(part, part.attention, stack.hidden_size, parameter.dtype, parameter.device, entry))
    return tuple(sites)
