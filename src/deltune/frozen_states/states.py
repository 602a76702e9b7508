"""Layers below everything that trains run once for each text; later passes take what they made from a folder.

Letters: B rows of a batch, T positions, d hidden size.
"""

from __future__ import annotations

import functools
import inspect
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.errors import CheckpointError, StateError
from deltune.frozen_states.keys import row_keys
from deltune.frozen_states.store import StateStore
from deltune.frozen_states.trunk import Trunk, digest, parameters_below, refuse_dropout
from deltune.sites import Control
from deltune.sites.base import first_tensor, named_arguments, with_first_tensor

__all__ = ["FrozenStates", "frozen_states"]

logger = logging.getLogger("deltune")

#: Arguments that ask for more than the last layer's states.
_ASKING = ("output_hidden_states", "output_attentions")
#: Arguments that hold the cache of keys and values.
_CACHES = ("past_key_values", "layer_past")
#: Kinds of rotary positions whose frequencies depend on how long the padded batch is.
_BY_LENGTH = ("longrope", "dynamic")
#: How far a kept state may be from the same state computed anew, as a part of its norm.
_ROUNDING = 1e-3
_WIDE_ROUNDING = 5e-2


@dataclass
class _Pass:
    """One call of the model.

    ``spans`` says which of the T positions of each row are kept; ``length`` is T, None without a padding mask.
    """

    keys: list[str]
    spans: list[tuple[int, int]] | None
    length: int | None
    known: dict[int, Tensor]
    skips: bool
    training: bool
    position: int = 0
    made: dict[int, Tensor] = field(default_factory=dict)
    filled: Tensor | None = None


class _Passes(threading.local):
    """The pass that one thread is in, if any."""

    current: _Pass | None = None


class FrozenStates:
    """What :meth:`deltune.Tuned.frozen_states` gives.

    Attributes:
        trunk: the layers that run once.
        store: the kept states.
        computed: number of rows for which they ran.
        reused: number of rows for which they did not.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy, trunk: Trunk, store: StateStore, live: Any) -> None:
        self.model = model
        self.trunk = trunk
        self.store = store
        self.computed = 0
        self.reused = 0
        self._live = live
        self._as_entered = live()
        self._passes = _Passes()
        self._names = tuple(inspect.signature(model.forward).parameters)
        self._frozen = [value for _, value in parameters_below(model, anatomy, trunk)]
        config = repr(getattr(getattr(model, "config", None), "rope_parameters", None))
        self._by_length = any(kind in config for kind in _BY_LENGTH)
        #: What a layer gives back beside the hidden states: nothing (None), or so many times None in a tuple. Not known
        #: before the first pass.
        self._extra: int | None = None
        self._learned = False
        #: In which modes (training, evaluation) known rows were computed once more and compared.
        self._compared: set[bool] = set()
        self._stopped = False
        self._checked_dropout = False

    # -- the model's call ------------------------------------------------------------------------------------

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Look for the rows of a batch.

        Raises:
            StateError: if other attachments are live than when the block was entered, or frozen layers drop values.
        """
        self._passes.current = None
        if self._live() != self._as_entered:
            raise StateError(
                "Attachments were switched while states of frozen layers are kept. Leave the block of frozen_states "
                "first, and enter it again."
            )
        if any(value.requires_grad for value in self._frozen):
            return None  # they train after all, or their gradients are wanted
        if module.training and not self._checked_dropout:
            refuse_dropout(self.model, self.trunk)
            self._checked_dropout = True
        arguments = named_arguments(self._names, args, kwargs)
        found = None if self._asks_for_more(arguments) else row_keys(arguments, self._by_length)
        if found is not None:
            known = {row: states for row, key in enumerate(found.keys) if (states := self.store.get(key)) is not None}
            skips = len(known) == len(found.keys) and module.training in self._compared and self._learned
            self._passes.current = _Pass(*found, known, skips, module.training)
        trains = module.training or arguments.get("labels") is not None
        if trains and "use_cache" in self._names and arguments.get("use_cache") is None:
            return args, {**kwargs, "use_cache": False}  # a cache would need the keys and values of all layers
        return None

    def _asks_for_more(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call reads more of the frozen layers than what is kept."""
        config = getattr(self.model, "config", None)
        if any(arguments.get(name, getattr(config, name, None)) for name in _ASKING):
            return True
        return any(arguments.get(name) is not None for name in _CACHES)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep what was made, if the call came to its end."""
        current, self._passes.current = self._passes.current, None
        if current is None or output is None or current.position < self.trunk.depth:
            return
        self.reused += len(current.known) if current.skips else 0
        self.computed += 0 if current.skips else len(current.keys)
        if current.skips or self._stopped or len(current.made) < len(self.trunk.kept):
            return
        if current.known:
            self._compared.add(current.training)
        states = torch.stack([current.made[index] for index in self.trunk.kept])
        rows = {
            key: states[:, row, slice(*current.spans[row])] if current.spans else states[:, row]
            for row, key in enumerate(current.keys)
            if row not in current.known
        }
        try:
            self.store.put(rows)
        except CheckpointError as error:
            logger.warning("%s This run goes on without keeping more.", error)
            self._stopped = True

    # -- a layer's call --------------------------------------------------------------------------------------

    def layer(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What a frozen layer makes, or made before."""
        current = self._passes.current
        if current is None or current.position >= self.trunk.depth:
            return forward(*args, **kwargs)
        arguments = named_arguments(tuple(inspect.signature(forward).parameters), args, kwargs)
        if any(arguments.get(name) is not None for name in _CACHES):
            self._passes.current = None  # a cache needs the keys and values of all layers
            return forward(*args, **kwargs)
        position = current.position
        current.position += 1
        hidden = args[0] if args else kwargs["hidden_states"]
        if current.skips:
            if position in self.trunk.kept:
                hidden = self._filled(current, hidden)[self.trunk.kept.index(position)]
            return hidden if self._extra is None else (hidden, *(None,) * self._extra)
        output = forward(*args, **kwargs)
        self._learn(output)
        if position not in self.trunk.kept:
            return output
        made = first_tensor(output)
        if made.shape[0] != len(current.keys) or current.length not in (None, made.shape[1]):
            raise StateError(
                f"The layers work on {made.shape[0]} rows of {made.shape[1]} positions, the model was given "
                f"{len(current.keys)} of {current.length}. Keep no states of frozen layers in one_pass, nor with "
                "additional positions."
            )
        if current.known:
            made = self._with_known(current, position, made)
        current.made[position] = made.detach()
        return with_first_tensor(output, made)

    def _learn(self, output: Any) -> None:
        """What else a layer gives back."""
        extra = output[1:] if isinstance(output, tuple) else None
        if any(value is not None for value in extra or ()):
            raise StateError(
                f"The layers of {type(self.model).__name__} hand on more than their hidden states, which is not kept. "
                "Train without keeping states of frozen layers."
            )
        self._extra = None if extra is None else len(extra)
        self._learned = True

    def _with_known(self, current: _Pass, position: int, made: Tensor) -> Tensor:
        """``made`` with the rows that are known, so that a row has the same states in every batch.

        Raises:
            CheckpointError: if they are others than those computed now.
        """
        filled = self._filled(current, made)[self.trunk.kept.index(position)]
        made = made.clone()
        narrow = min(self.store.dtype.itemsize, made.dtype.itemsize) < 4
        tolerance = _WIDE_ROUNDING if narrow or torch.is_autocast_enabled(made.device.type) else _ROUNDING
        for row in current.known:
            span = slice(*current.spans[row]) if current.spans else slice(None)
            kept, anew = filled[row, span], made[row, span]
            # of the median position: a few may have very large values
            far = ((kept - anew).norm(dim=-1) / anew.norm(dim=-1).clamp_min(1e-6)).float().median()
            if not far <= tolerance:
                raise CheckpointError(
                    f"The states kept in {self.store.folder} are not those that the frozen layers make now: they "
                    f"differ by {float(far):.1%}. They are of another model, or the layers make something else each "
                    "time. Give another folder, or train without keeping states of frozen layers."
                )
            made[row, span] = kept
        return made

    def _filled(self, current: _Pass, like: Tensor) -> Tensor:
        """The known rows of a batch with zeros for padding, (S, B, T, d)."""
        if current.filled is None:
            first = next(iter(current.known.values()))
            length = first.shape[1] if current.length is None else current.length
            filled = first.new_zeros(first.shape[0], len(current.keys), length, first.shape[2])
            for row, states in current.known.items():
                filled[:, row, slice(*current.spans[row]) if current.spans else slice(None)] = states
            current.filled = filled.to(like.device, like.dtype)
        return current.filled

    def __reduce__(self) -> NoReturn:
        raise StateError("A model cannot be copied while states of its frozen layers are kept. Leave the block first.")


@contextmanager
def _standing_in(layers: Sequence[nn.Module], states: FrozenStates) -> Iterator[None]:
    """Let ``states`` answer for these layers; their hooks go on seeing what they are given and what they make."""
    before = [(layer, vars(layer).get("forward")) for layer in layers]
    try:
        for layer in layers:
            object.__setattr__(layer, "forward", _StandIn(layer.forward, states))
        yield
    finally:
        for layer, own in before:
            vars(layer).pop("forward", None)
            if own is not None:
                object.__setattr__(layer, "forward", own)


class _StandIn:
    """In the place of a layer's ``forward``; an object, so that a copy or pickle of the layer is refused."""

    def __init__(self, forward: Callable[..., Any], states: FrozenStates) -> None:
        functools.update_wrapper(self, forward)
        self.forward = forward
        self.states = states

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.states.layer(self.forward, args, kwargs)

    def __reduce__(self) -> NoReturn:
        raise StateError("A model cannot be copied while states of its frozen layers are kept. Leave the block first.")


@contextmanager
def frozen_states(
    model: nn.Module,
    anatomy: Anatomy,
    control: Control,
    attachments: Mapping[str, Attachment],
    folder: str | Path,
    dtype: torch.dtype | None = None,
) -> Iterator[FrozenStates]:
    """See :meth:`deltune.Tuned.frozen_states`."""

    def live() -> Any:
        return dict(control.live), control.route, control.dropped

    trunk = Trunk.of(anatomy, control, [attachments[name] for name in control.live])
    trained = next((name for name, value in parameters_below(model, anatomy, trunk) if value.requires_grad), None)
    if trained is not None:
        raise StateError(
            f"{trained} trains, although nothing attached acts there, so what the layers make changes. Freeze it, or "
            "train without keeping states of frozen layers."
        )
    layers = [model.get_submodule(name) for name in trunk.stack.layers]
    floating = (value.dtype for value in layers[0].parameters() if value.dtype.is_floating_point)
    origin = {
        "model_type": getattr(getattr(model, "config", None), "model_type", type(model).__name__),
        "layers": list(trunk.kept),
        "weights": digest(model, anatomy, trunk),
    }
    with ExitStack() as opened:
        store = StateStore(folder, origin, dtype or next(floating), len(trunk.kept), trunk.stack.hidden_size)
        opened.callback(store.close)
        states = FrozenStates(model, anatomy, trunk, store, live)
        opened.enter_context(_standing_in(layers, states))
        for handle in (
            model.register_forward_pre_hook(states.before, with_kwargs=True, prepend=True),
            model.register_forward_hook(states.after, always_call=True),
        ):
            opened.callback(handle.remove)
        yield states
