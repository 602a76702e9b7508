"""Layers below everything that trains run once for each text; later passes take what they made from a folder.

Letters: B rows of a batch, T positions, d hidden size.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from deltune.attachment import BANK, Attachment
from deltune.backbone import Anatomy, Stack
from deltune.errors import CheckpointError, StateError
from deltune.sites import Control, Insertion, StatesForm
from deltune.sites.base import first_tensor, named_arguments, with_first_tensor
from deltune.state_store import StateStore

__all__ = ["FrozenStates", "Trunk", "frozen_states", "refuse_dropout"]

logger = logging.getLogger("deltune")

#: Arguments of a model that change nothing in its layers.
_BESIDE = ("labels", "return_dict", "use_cache", "num_items_in_batch")
#: Arguments that ask for more than the last layer's states.
_ASKING = ("output_hidden_states", "output_attentions")
#: Arguments that have a row for each text, of which one is always given.
_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
#: Arguments with a value for each position of a text, (B, T, ...).
_BY_POSITION = ("input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "position_ids")
#: Arguments that hold the cache of keys and values.
_CACHES = ("past_key_values", "layer_past")
#: Kinds of rotary positions whose frequencies depend on how long the padded batch is.
_BY_LENGTH = ("longrope", "dynamic")
#: How far a kept state may be from the same state computed anew, as a part of its norm.
_ROUNDING = 1e-3
_WIDE_ROUNDING = 5e-2


@dataclass(frozen=True)
class Trunk:
    """The lowest layers of a stack, in which nothing acts and nothing trains.

    Attributes:
        stack: the stack.
        depth: number of its lowest applications of a layer that belong to the trunk.
        kept: those of them whose output something above reads, in order.
    """

    stack: Stack
    depth: int
    kept: tuple[int, ...]

    @classmethod
    def of(cls, anatomy: Anatomy, control: Control, attachments: Iterable[Attachment]) -> Trunk:
        """The trunk below what these attachments change.

        Raises:
            StateError: if there is none, or it is not known where their changes stand.
        """
        if len(anatomy.stacks) != 1:
            raise StateError(
                "States of frozen layers can be kept for models with one stack of layers; this one has "
                f"{', '.join(anatomy.stacks) or 'none that is known'}."
            )
        (stack,) = anatomy.stacks.values()
        layers = len(stack) * stack.repeats
        depth, lowest, unknown = layers, "", False
        read: set[int] = set()
        for attachment in attachments:
            for place, layer, form in _places(anatomy, stack, attachment):
                if isinstance(form, StatesForm):
                    read.update(index - 1 for index in form.reads(layers) if index)
                elif layer is not None and not control.acts(layer, training=False):
                    continue
                elif layer is None or layer < depth:
                    depth, lowest, unknown = layer or 0, place, layer is None
        if not depth:
            if unknown:
                raise StateError(
                    f"Something acts or trains at {lowest}, of which it is not known that it stands above all layers, "
                    "so there may be no layer below it. Choose a method that leaves it alone, or train without keeping "
                    "states of frozen layers."
                )
            raise StateError(
                f"Something acts at {lowest}, below which no layer is frozen, so there are no states to keep. Let the "
                "method act in higher layers only, for example with targets 'attention.* layers=4:', or with "
                "drop_layers."
            )
        return cls(stack, depth, tuple(sorted({index for index in read if index < depth} | {depth - 1})))


def _places(anatomy: Anatomy, stack: Stack, attachment: Attachment) -> Iterator[tuple[str, int | None, Any]]:
    """Where an attachment changes something: a name, the layer (None: before all layers) and the form, if any."""
    for key, site, form in attachment.sites:
        if site.insertion is Insertion.REPLACE:
            yield key, len(stack), form
        else:
            yield key, _layer_of(anatomy, stack, site.part.module), form
    for name in attachment.selected_names:
        yield name, _layer_of(anatomy, stack, name), None


def _layer_of(anatomy: Anatomy, stack: Stack, name: str) -> int | None:
    """The layer that holds a module or parameter; L above the layers, None before them or where that is not known."""
    for index, layer in enumerate(stack.layers):
        if f"{name}.".startswith(f"{layer}."):
            return index if stack.repeats == 1 else 0
    above = filter(None, (*anatomy.head, anatomy.language_model_head, stack.final_norm))
    return len(stack) * stack.repeats if any(f"{name}.".startswith(f"{module}.") for module in above) else None


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
        self._frozen = [value for _, value in _below(model, anatomy, trunk)]
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
        found = None if self._asks_for_more(arguments) else _keys(arguments, self._by_length)
        if found is not None:
            keys, spans, length = found
            known = {row: states for row, key in enumerate(keys) if (states := self.store.get(key)) is not None}
            skips = len(known) == len(keys) and module.training in self._compared and self._learned
            self._passes.current = _Pass(keys, spans, length, known, skips, module.training)
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


def refuse_dropout(model: nn.Module, trunk: Trunk) -> None:
    """Refuse frozen layers that make something else each time in training.

    Raises:
        StateError: naming the module that drops values.
    """
    above = {
        module for layer in _applied(trunk)[1] for module in model.get_submodule(layer).modules()
    }  # those of the upper layers
    prefix = getattr(model, "base_model_prefix", "")
    for name, module in model.named_modules():
        in_base = not prefix or not hasattr(model, prefix) or f"{name}.".startswith(f"{prefix}.")
        if module in above or f".{BANK}." in f".{name}." or not in_base:
            continue
        for attribute, value in vars(module).items():
            drops = "drop" in attribute or (isinstance(module, nn.Dropout) and attribute == "p")
            if drops and isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
                raise StateError(
                    f"{name} drops values at random in training ({attribute}={value:g}), so that the frozen layers "
                    "make something else each time. Load the model with every dropout at zero: "
                    "task.load_model(path, dropout=0.0), or --model-dropout 0; where that does not reach it, in the "
                    "model's configuration."
                )


def _applied(trunk: Trunk) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the layers of the trunk, and of those above it."""
    layers = trunk.stack.layers
    return (layers[: trunk.depth], layers[trunk.depth :]) if trunk.stack.repeats == 1 else (layers, ())


def _below(model: nn.Module, anatomy: Anatomy, trunk: Trunk) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters in the trunk and before it; those of forms there do not act."""
    for name, value in model.named_parameters(remove_duplicate=False):
        layer = _layer_of(anatomy, trunk.stack, name)
        if f".{BANK}." not in f".{name}" and (layer is None or layer < trunk.depth):
            yield name, value


def _digest(model: nn.Module, anatomy: Anatomy, trunk: Trunk) -> str:
    """Of all values of the trunk and what stands before it."""
    digest = hashlib.blake2b(digest_size=16)
    for name, value in sorted(_below(model, anatomy, trunk), key=lambda item: item[0]):
        digest.update(name.encode())
        digest.update(_bytes(value.detach().cpu()))
    return digest.hexdigest()


def _bytes(value: Tensor) -> Any:
    return value.contiguous().view(-1).view(torch.uint8).numpy()


def _keys(
    arguments: Mapping[str, Any], by_length: bool
) -> tuple[list[str], list[tuple[int, int]] | None, int | None] | None:
    """A key for each row of a batch, from all that its states depend on; which positions are no padding; T.

    None if it is not known what they depend on, or a gradient of the input is wanted.
    """
    source = next((arguments[name] for name in _INPUTS if isinstance(arguments.get(name), Tensor)), None)
    given = dict(_flat((name, value) for name, value in sorted(arguments.items()) if name not in _BESIDE))
    tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    plain = {name: value for name, value in given.items() if isinstance(value, bool | int | float | str)}
    if (
        source is None
        or len(plain) + len(tensors) < len(given)
        or any(value.requires_grad for value in tensors.values())
    ):
        return None
    tensors = {name: value.detach().cpu() for name, value in tensors.items()}
    batch = len(source)
    mask = tensors.get("attention_mask")
    spans, length = None, None
    if mask is not None and mask.dim() == 2:
        length = mask.shape[1]
        spans = [_span(row) for row in mask.bool()]
    kind = source.device.type
    arithmetic = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    shared = f"{plain} {arithmetic} {next(iter(tensors.values())).shape[1:2] if by_length else ''}".encode()
    keys = []
    for row in range(batch):
        digest = hashlib.blake2b(shared, digest_size=16)
        if spans:
            digest.update(f"{spans[row][0]}".encode())
        for name, value in tensors.items():
            own = value[row] if value.dim() and len(value) == batch else value
            if spans and name in _BY_POSITION and value.shape[:2] == (batch, length):
                own = own[slice(*spans[row])]
            digest.update(f"{name} {own.dtype} {tuple(own.shape)}".encode())
            digest.update(_bytes(own))
        keys.append(digest.hexdigest())
    return keys, spans, length


def _flat(items: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Named values with what mappings, tuples and lists hold under names of their own; None is left out."""
    for name, value in items:
        if isinstance(value, Mapping):
            yield from _flat((f"{name}.{key}", value[key]) for key in sorted(value, key=str))
        elif isinstance(value, tuple | list):
            yield from _flat((f"{name}.{index}", item) for index, item in enumerate(value))
        elif value is not None:
            yield name, value


def _span(mask: Tensor) -> tuple[int, int]:
    """First real position and the one behind the last; all where none is real."""
    real = mask.nonzero()
    return (int(real[0]), int(real[-1]) + 1) if len(real) else (0, len(mask))


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
    trained = next((name for name, value in _below(model, anatomy, trunk) if value.requires_grad), None)
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
        "weights": _digest(model, anatomy, trunk),
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
