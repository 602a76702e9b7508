"""The final hidden states of a stack, replaced by what a form makes of the states of all its layers.

Letters: B batch, T positions, d hidden size, L number of layers.

The form is given detached tensors: no gradient reaches the stack, so the backward pass ends here and nothing of the
stack is kept for it. Where everything below is frozen, as it is by default, no graph is built there in the first place.

States are gathered by hooks of our own, not by ``output_hidden_states``, which puts hooks on the model that stay.
They are kept for the length of one call, for each thread apart.
"""

from __future__ import annotations

import inspect
import threading
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Stack
from deltune.errors import StateError, TargetError, suggestion
from deltune.sites.base import Control, Form, Insertion, Site, Tap, first_tensor, named_arguments, with_first_tensor

__all__ = ["StackStates", "StatesForm", "StatesSite", "states_sites"]


@dataclass(frozen=True)
class StackStates:
    """What one pass through a stack made; plain data, so that it may as well come from a store.

    Attributes:
        hidden: L + 1 tensors (B, T, d), detached: the input of the first layer (the embedding output), that of each
            further layer, and the output of the last.
        final: the stack's final hidden states, (B, T, d), detached: the last of ``hidden``, behind the final norm
            where the stack has one.
        calls: of each layer, by name, the arguments of its call besides the hidden states: attention masks,
            rotary positions, the cache.
        beside: what the form of the stack that this one reads has appended to that stack's final states, (B, S, w).
    """

    hidden: tuple[Tensor, ...]
    final: Tensor
    calls: tuple[Mapping[str, Any], ...] = ()
    beside: Tensor | None = None


class StatesForm(Form):
    """``forward`` maps the states of a stack to its new final hidden states, (B, T, d).

    Attributes:
        transparent: while true the stack keeps its own final states, with their graph: for set-up that needs the
            gradients of the frozen model.
    """

    #: Whether all states but the embedding output and the last are to go through the stack's final norm first.
    reads_normalized: bool = False
    #: Features of the result if it is not to replace the final states but to travel with them, as further features, to
    #: the form of the stack that reads them. They travel there so that they are repeated and reordered with them.
    appended: int = 0
    #: Features that the form of the stack which this one reads has appended.
    beside: int = 0
    transparent: bool = False

    def reads(self, layers: int) -> Collection[int]:
        """Which of the ``layers`` + 1 entries of ``hidden`` it reads; by default all."""
        return range(layers + 1)

    @abstractmethod
    def forward(self, states: StackStates) -> Tensor:
        """New final hidden states, (B, T, d)."""


@dataclass(frozen=True)
class StatesSite(Site):
    """The final hidden states of a stack of ``layers`` layers and width ``hidden_size``.

    ``layers`` counts every application of a layer, also where layers are shared. ``stack`` names the modules.
    """

    stack: Stack
    dtype: torch.dtype
    device: torch.device

    insertion: ClassVar[Insertion] = Insertion.REPLACE
    reads: ClassVar[str] = "h_1 .. h_L"

    @property
    def modified(self) -> str:
        """What the stack hands on."""
        return "last hidden state"

    def combination(self, factor: str) -> str:
        """The new state itself."""
        return "dh"

    @property
    def hidden_size(self) -> int:
        """Features d of each state."""
        return self.stack.hidden_size

    @property
    def layers(self) -> int:
        """Number L of layers, each counted as often as it is applied."""
        return len(self.stack) * self.stack.repeats

    def tap(self, control: Control) -> StatesTap:
        """A tap that gathers states and replaces the last."""
        return StatesTap(self, control)


@dataclass
class _Record:
    """The states of a pass that is not yet complete."""

    inputs: list[Tensor] = field(default_factory=list)
    calls: list[Mapping[str, Any]] = field(default_factory=list)
    last: Tensor | None = None
    beside: Tensor | None = None


class _Passes(threading.local):
    """The pass that one thread is in, if any; copies and pickles hold none."""

    def __init__(self) -> None:
        # a list that is changed in place: torch.compile does not follow a new value of an attribute
        self.records: list[_Record] = []

    def __reduce__(self) -> tuple[type[_Passes], tuple[()]]:
        return _Passes, ()


class StatesTap(Tap):
    """Hooks before the stack, behind each layer, and behind the module whose output are the final states."""

    site: StatesSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._passes = _Passes()
        self._norm: nn.Module | None = None

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook stack, layers and exit."""
        stack = self.site.stack
        self._norm = None if stack.final_norm is None else modules[stack.final_norm]
        entry = modules[stack.entry]
        self._handles.append(entry.register_forward_pre_hook(_EntryHook(self, _names(entry)), with_kwargs=True))
        for name in stack.layers:
            layer_hook = _LayerHook(self, _names(modules[name]))
            self._handles.append(modules[name].register_forward_hook(layer_hook, with_kwargs=True))
        self._handles.append(modules[self.site.part.module].register_forward_hook(self))

    def acting(self) -> list[StatesForm]:
        """The live forms that are not transparent, in order."""
        forms = [form for form, _ in self.live() if isinstance(form, StatesForm)]
        return [form for form in forms if not form.transparent]

    def enter(self) -> _Record:
        """A pass begins; what an earlier one left behind that ended with an error goes."""
        self._passes.records.clear()
        self._passes.records.append(_Record())
        return self._passes.records[-1]

    def seen(self, arguments: dict[str, Any], names: Sequence[str], output: Any) -> None:
        """Note what a layer was given and what it made, unless a layer is only run again for its gradient."""
        if not self._passes.records:
            return
        record = self._passes.records[-1]
        record.inputs.append(arguments.pop(names[0]).detach())
        record.calls.append(arguments)
        record.last = first_tensor(output).detach()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Replace the final states, or append to them.

        Raises:
            StateError: if two attachments would replace them for the same rows, or a layer did not run.
        """
        if not self._passes.records:
            return None
        record = self._passes.records.pop()
        forms = self.acting()
        if not forms:
            return None
        final = first_tensor(output)
        states = self._states(record, final.detach())
        results = list(zip(forms, self._results(forms, states), strict=True))
        replaced = states.final
        for form, _, rows in self.changes(replaced):
            made = [result.to(final.dtype) for other, result in results if other is form and not other.appended]
            if not made:
                continue
            if rows is None and len(forms) > 1:
                raise StateError(
                    f"Two methods replace the final hidden states of the {self.site.part.stack}, so they cannot be "
                    "active together. Activate one of them, or route each row to one."
                )
            # of all rows first, because masks and caches are of all rows
            replaced = made[0] if rows is None else replaced.index_copy(0, rows, made[0].index_select(0, rows))
        appended = [result.to(replaced.dtype) for form, result in results if form.appended]
        output = _with_listed(output, final, replaced)
        return with_first_tensor(output, torch.cat([replaced, *appended], dim=-1) if appended else replaced)

    def _states(self, record: _Record, final: Tensor) -> StackStates:
        if len(record.inputs) != self.site.layers or record.last is None:
            raise StateError(
                f"{len(record.inputs)} of the {self.site.layers} layers of the {self.site.part.stack} ran, but a "
                "method that reads the states of its layers needs all. If the model drops layers at random in "
                "training, set its layerdrop to 0."
            )
        return StackStates((*record.inputs, record.last), final, tuple(record.calls), record.beside)

    def _results(self, forms: Sequence[StatesForm], states: StackStates) -> Iterator[Tensor]:
        """What each form makes of the states; each is given its own part of what was appended."""
        start = 0
        for form in forms:
            given = self._normalized(states) if form.reads_normalized else states
            if form.beside and states.beside is not None:
                given = replace(given, beside=states.beside[..., start : start + form.beside])
                start += form.beside
            result: Tensor = form(given)
            yield result

    def _normalized(self, states: StackStates) -> StackStates:
        """``states`` with each layer's output behind the final norm, as the last one is."""
        if self._norm is None:
            return states
        with torch.no_grad():
            inner = tuple(self._norm(state) for state in states.hidden[1:-1])
        return replace(states, hidden=(states.hidden[0], *inner, states.final))


def _names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)


@dataclass
class _EntryHook:
    """Before a stack: begin a pass, and take from the states of another stack what was appended to them."""

    tap: StatesTap
    names: tuple[str, ...]

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        record = self.tap.enter()
        beside = sum(form.beside for form in self.tap.acting())
        if not beside:
            return None
        arguments = named_arguments(self.names, args, kwargs)
        read = arguments.get("encoder_hidden_states")
        width = self.tap.site.hidden_size
        if read is None or read.shape[-1] != width + beside:
            raise StateError(
                f"The {self.tap.site.part.stack} reads states that were made without the side network beside the "
                "stack that made them. Run both with the same methods active."
            )
        arguments["encoder_hidden_states"] = read[..., :width].detach()
        record.beside = read[..., width:]
        return (), arguments


@dataclass
class _LayerHook:
    """Behind a layer: hand on what it was given, by name, and what it made."""

    tap: StatesTap
    names: tuple[str, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.tap.seen(named_arguments(self.names, args, kwargs), self.names, output)


def _with_listed(output: Any, final: Tensor, replaced: Tensor) -> Any:
    """``output`` with other final states as the last of the hidden states that it lists; DeBERTa reads them there."""
    if isinstance(output, tuple):
        return tuple(_with_last(value, final, replaced) for value in output)
    if isinstance(output, Mapping) and output.get("hidden_states") is not None:
        output["hidden_states"] = _with_last(output["hidden_states"], final, replaced)  # type: ignore[index]
    return output


def _with_last(states: Any, final: Tensor, replaced: Tensor) -> Any:
    """``states`` with another last one, if it is a tuple that ends with ``final``."""
    return (*states[:-1], replaced) if isinstance(states, tuple) and states and states[-1] is final else states


def states_sites(model: nn.Module, anatomy: Anatomy, stacks: Sequence[str] = ()) -> tuple[StatesSite, ...]:
    """The final hidden states of stacks.

    Args:
        model: the model.
        anatomy: its parts.
        stacks: names of stacks. By default those that no other stack reads: the decoder of an encoder-decoder model,
            every stack where there is no cross-attention.

    Raises:
        TargetError: if the model has no such stack, or it is not known where its final states leave it.
    """
    if not anatomy.stacks:
        raise TargetError(
            f"Nothing is known of the layers of {anatomy.family}, so their states cannot be read. Choose a method "
            "that changes modules by name, such as lora."
        )
    for name in stacks:
        if name not in anatomy.stacks:
            raise TargetError(f"{anatomy.family} has no stack {name!r}. {suggestion(name, anatomy.stacks)}")
    modules = dict(model.named_modules(remove_duplicate=False))
    return tuple(_site(anatomy.stacks[name], anatomy, modules) for name in stacks or _last_stacks(anatomy))


def _last_stacks(anatomy: Anatomy) -> tuple[str, ...]:
    """The stacks that read others, or all if none does."""
    crossed = [part for part in anatomy.of("attention") if part.stack not in anatomy.stacks]
    return tuple(dict.fromkeys(anatomy.stack_of(part).name for part in crossed)) or tuple(anatomy.stacks)


def _site(stack: Stack, anatomy: Anatomy, modules: Mapping[str, nn.Module]) -> StatesSite:
    if stack.exit is None:
        raise TargetError(
            f"It is not known where the final hidden states of the {stack.name} of {anatomy.family} leave it, so they "
            "cannot be replaced. Choose a method that changes the layers themselves, such as lora."
        )
    floating = (value for value in modules[stack.layers[0]].parameters() if value.dtype.is_floating_point)
    parameter = next(floating)
    return StatesSite(Part("states", stack.name, None, stack.exit), stack, parameter.dtype, parameter.device)
