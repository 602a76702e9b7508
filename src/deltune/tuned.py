"""The handle that a user holds: a model with methods attached."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy, anatomy_of, describe_base_model
from deltune.checkpoints import write
from deltune.errors import MethodError, StateError, suggestion
from deltune.folding import Folded, fold
from deltune.installation import Installation
from deltune.methods import Method, parse
from deltune.model_hooks import StepHooks, refuse_to_resize, total_penalty
from deltune.quantization.layers import keep_packing
from deltune.quantization.model import dequantize_layers, format_of, parameter_count
from deltune.sites import Control, Tap
from deltune.summary import Summary

__all__ = ["HANDLE", "Tuned", "attach"]

#: Attribute of the model under which its handle is found.
HANDLE = "_deltune_handle"
#: A method of transformers models that is refused while anything is attached.
_RESIZE = "resize_token_embeddings"


def attach(
    model: nn.Module,
    method: Method | str,
    name: str = "default",
    *,
    reversible: bool = True,
    train_head: bool | None = None,
) -> Tuned:
    """Attach ``method`` to ``model`` and freeze everything else.

    The model stays the same object, with its class, its module names and its ``state_dict`` keys; call it and
    train it as before.

    Args:
        model: a transformers model, or any module (then targets are patterns of module names).
        method: a method, or its text: ``"lora(rank=16)"``.
        name: name of the attachment, for switching, saving and routing.
        reversible: keep the original values of parameters that a selective method trains, so that it can be
            disabled, switched and detached. False saves that memory.
        train_head: whether to train the task head too; by default, if the model has one.

    Returns:
        The handle; ``handle.model`` is ``model``.

    Raises:
        MethodError: if the method or one of its options does not fit.
        TargetError: if a target selects nothing.
        StateError: if the model has a handle already (use its ``attach``).
    """
    if HANDLE in vars(model):
        raise StateError(
            "This model has methods attached already. Use the handle's attach(method, name=...), or detach first."
        )
    tuned = Tuned(model)
    tuned.attach(method, name, reversible=reversible, train_head=train_head)
    return tuned


class Tuned:
    """A model with methods attached. Made by :func:`attach` or :func:`deltune.load`.

    Attributes:
        model: the model itself.
        anatomy: its parts.
        base_model: kind, size, a sample of the pretrained weights and how they are quantised, to know the model again.
        attachments: every attached method by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.anatomy: Anatomy = anatomy_of(model)
        keep_packing(model)
        stored = format_of(model)
        self.base_model = {
            **describe_base_model(model),
            "parameters": parameter_count(getattr(model, "base_model", model)),
            "quantization": None if stored is None else stored.to_dict(),
        }
        self._size = parameter_count(model)
        self.attachments: dict[str, Attachment] = {}
        self.control = Control()
        self._taps: dict[str, Tap] = {}
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._frozen: list[tuple[nn.Parameter, bool]] | None = None
        self._merged: tuple[Folded, dict[str, float]] | None = None
        self._installation = Installation(
            model, self.anatomy, self.control, self.attachments, self._taps, self._modules
        )

    # -- attaching and switching -----------------------------------------------------------------------------

    def attach(
        self,
        method: Method | str,
        name: str = "default",
        *,
        reversible: bool = True,
        train_head: bool | None = None,
    ) -> Tuned:
        """Attach a further method and make it the live one; see :func:`attach` for the arguments.

        Raises:
            MethodError, TargetError, StateError: as :func:`attach`; also if the name is taken.
        """
        self._check_name(name)
        self._refuse_while_merged("attach")
        method = parse(method)
        live = dict(self.control.live)
        with_head = bool(self.anatomy.head) if train_head is None else train_head
        if with_head and not self.anatomy.head:
            raise MethodError("train_head is set, but this model has no task head.")
        self._set_live({})
        try:
            attachment = Attachment.build(name, method, self.model, self.anatomy, reversible, with_head)
        except Exception:
            self._set_live(live)
            raise
        if not any(True for _ in attachment.parameters()):
            self._set_live(live)
            raise MethodError(f"{method} would train nothing in this model.")
        if self._frozen is None:
            self._frozen = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            self.model.requires_grad_(False)
            self.model.__dict__[HANDLE] = self
            if hasattr(self.model, _RESIZE):
                self.model.__dict__[_RESIZE] = refuse_to_resize
        self.attachments[name] = attachment
        for _, site, form in attachment.sites:
            tap = self._taps.setdefault(site.identity, site.tap(self.control))
            tap.forms.setdefault(name, []).append(form)
        self._set_live({name: 1.0})
        return self

    def activate(self, *names: str, weights: Iterable[float] | None = None) -> None:
        """Make these attachments live, and only these. With no name: none, the bare model.

        Args:
            *names: attached names; the changes of several are added.
            weights: factor of each one's change, by default one.

        Raises:
            StateError: if a name is not attached, several select the same parameter, or weights are given to
                a change that cannot be scaled.
        """
        self._refuse_while_merged("activate")
        factors = tuple(weights) if weights is not None else (1.0,) * len(names)
        if len(factors) != len(names):
            raise StateError(f"{len(names)} names but {len(factors)} weights were given.")
        for name in names:
            self._attachment(name)
        self._check_together(names, factors)
        self._set_live(dict(zip(names, factors, strict=True)))

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the live attachments."""
        return tuple(self.control.live)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Exactly the bare model inside the block: no hooks, no additional keys, the original parameters."""
        self._refuse_while_merged("disable")
        live = dict(self.control.live)
        self._set_live({})
        try:
            yield
        finally:
            self._set_live(live)

    def set_rank(self, rank: int, name: str | None = None) -> None:
        """Cut an attachment to a rank, where the method trained all smaller ranks too (:class:`deltune.DyLoRA`).

        Evaluation, merging and saving use that rank from then on; nothing is lost, so that another one, also a larger
        one, can be chosen later. Training and its checkpoints do not depend on it.

        Args:
            rank: from 1 to the rank that was trained.
            name: which attachment; by default the live one.

        Raises:
            StateError: if merged, or if several are live and none is named.
            MethodError: if the method does not train smaller ranks, or the rank is out of range.
        """
        self._refuse_while_merged("set the rank")
        if name is None and len(self.active) != 1:
            raise StateError(f"Say which attachment to cut: name= one of {', '.join(self.attachments)}.")
        attachment = self._attachment(name or self.active[0])
        forms: list[Any] = [form for form in attachment.forms.values() if hasattr(form, "set_rank")]
        if not forms:
            raise MethodError(
                f"{attachment.method.name} cannot be cut to a rank: it does not train smaller ranks along with its "
                "own. Use dylora, or attach with the rank that you want."
            )
        largest = min(form.rank for form in forms)
        if not isinstance(rank, int) or not 1 <= rank <= largest:
            raise MethodError(
                f"{attachment.name!r} can be cut to the ranks 1 to {largest}, not to {rank!r}. A larger rank must be "
                "trained."
            )
        for form in forms:
            form.set_rank(rank)

    def detach(self, name: str | None = None) -> nn.Module:
        """Remove one attachment, or all; without any left the model is bit-identical to what it was.

        Returns:
            The model.
        """
        if self._merged is not None:
            self.unmerge()
        live = {other: weight for other, weight in self.control.live.items() if name is not None and other != name}
        names = list(self.attachments) if name is None else [self._attachment(name).name]
        self._set_live({})
        for item in names:
            attachment = self.attachments.pop(item)
            for _, site, _ in attachment.sites:
                tap = self._taps[site.identity]
                tap.forms.pop(item, None)
                if not tap.forms:
                    del self._taps[site.identity]
        if self.attachments:
            self._set_live(live)
        elif self._frozen is not None:
            for parameter, required in self._frozen:
                parameter.requires_grad_(required)
            self._frozen = None
            self._release()
        return self.model

    # -- training --------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the live attachments, for an optimizer."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As :meth:`trainable_parameters`, with names; several live attachments are told apart by theirs."""
        several = len(self.control.live) > 1
        for name in self.control.live:
            for key, parameter in self.attachments[name].parameters():
                yield (f"{name}.{key}" if several else key), parameter

    def prepare(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the live methods set themselves up from data, where they need it."""
        for name in self.control.live:
            attachment = self.attachments[name]
            attachment.method.prepare(self.model, attachment.forms, batches)

    def penalty(self) -> Tensor | None:
        """Additional loss of the live methods, a scalar; None if there is none.

        It is part of ``output.loss`` already while the model is training.
        """
        return total_penalty(self.control, self.attachments)

    def bind(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> StepHooks:
        """Let the schedules of the attached methods follow ``optimizer.step()`` by themselves.

        Args:
            optimizer: of any training loop.
            steps: number of steps that training will have, which some schedules need to know.

        Returns:
            A handle whose ``remove()`` ends it.

        Raises:
            MethodError: if a schedule does not fit into so many steps.
        """
        return StepHooks(self.control, self.attachments).bind(optimizer, steps)

    # -- merging ---------------------------------------------------------------------------------------------

    @property
    def merged(self) -> bool:
        """Whether the live attachments are folded into the model's weights at present."""
        return self._merged is not None

    def merge(self, *, reversible: bool = True, dequantize: bool = False) -> nn.Module:
        """Fold the live attachments into the model's weights, which then cost nothing extra to run.

        Args:
            reversible: keep the original weights for :meth:`unmerge`, which then restores their exact bits. If
                False the attachments are removed and the model is an ordinary, fully tuned one.
            dequantize: make the matrices of a quantised model floating-point numbers first, those that its products
                used, as :func:`deltune.quantization.dequantize` does. Not reversible.

        Returns:
            The model.

        Raises:
            StateError: if merged already, if a live method cannot be merged, a matrix is tied to another, or is
                quantised and ``dequantize`` is not set.
        """
        self._refuse_while_merged("merge")
        if dequantize and reversible:
            raise StateError("Merging with dequantize=True cannot be undone: pass reversible=False too.")
        if not self.control.live:
            raise StateError("Nothing is active, so there is nothing to merge.")
        live = dict(self.control.live)
        if any(weight != 1.0 for weight in live.values()):
            raise StateError("Attachments with weights other than one cannot be merged.")
        self._set_live({})
        try:
            for name in live:
                self.attachments[name].refuse_unmergeable()
            if dequantize and format_of(self.model) is not None:
                dequantize_layers(self.model)
                self._modules.update(self.model.named_modules(remove_duplicate=False))
            folded = fold([self.attachments[name] for name in live], self._modules)
        except Exception:
            self._set_live(live)
            raise
        if reversible:
            self._merged = (folded, live)
            return self.model
        self.attachments.clear()
        self._taps.clear()
        self._frozen = None
        self._release()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)  # packed weights cannot
        return self.model

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and the attachments beside them.

        Raises:
            StateError: if nothing is merged.
        """
        if self._merged is None:
            raise StateError("Nothing is merged.")
        folded, live = self._merged
        folded.undo()
        self._merged = None
        self._set_live(live)

    # -- looking and saving ----------------------------------------------------------------------------------

    def summary(self, name: str | None = None) -> Summary:
        """What an attachment trains, per site, and its share of the model; by default of the live ones."""
        names = self.active if name is None else (name,)
        return Summary.of(self.model, [self._attachment(item) for item in names], self._size)

    def save(self, path: str | Path, name: str | None = None) -> Path:
        """Write an attachment to a folder: one safetensors file with the trained part, one JSON for people.

        Args:
            path: the folder; made if it does not exist, replaced file by file if it does.
            name: which attachment; by default the live one.

        Returns:
            The folder.

        Raises:
            StateError: if merged, or if several are live and none is named.
        """
        self._refuse_while_merged("save")
        if name is None and len(self.active) != 1:
            raise StateError(f"Say which attachment to save: name= one of {', '.join(self.attachments)}.")
        return write(self._attachment(name or self.active[0]), self.base_model, path)

    def __repr__(self) -> str:
        items = ", ".join(f"{name}: {attachment.method}" for name, attachment in self.attachments.items())
        return f"Tuned({type(self.model).__name__}, {{{items}}}, active={list(self.active)})"

    # -- inside ----------------------------------------------------------------------------------------------

    def _attachment(self, name: str) -> Attachment:
        if name not in self.attachments:
            raise StateError(f"Nothing is attached under the name {name!r}. {suggestion(name, self.attachments)}")
        return self.attachments[name]

    def _check_name(self, name: str) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][\w-]*", name) or hasattr(nn.Module, name):
            raise StateError(f"{name!r} cannot be the name of an attachment: use letters, digits, '-' and '_'.")
        if name in self.attachments:
            raise StateError(f"The name {name!r} is taken. Detach it first, or choose another name.")

    def _refuse_while_merged(self, action: str) -> None:
        if self._merged is not None:
            raise StateError(f"Cannot {action} while merged. Call unmerge() first.")

    def _check_together(self, names: tuple[str, ...], weights: tuple[float, ...]) -> None:
        selected: dict[str, str] = {}
        for name, weight in zip(names, weights, strict=True):
            attachment = self.attachments[name]
            for parameter, _ in attachment.selection:
                if parameter in selected:
                    raise StateError(
                        f"{selected[parameter]!r} and {name!r} both have their own value of {parameter}, so they "
                        "cannot be active together."
                    )
                selected[parameter] = name
            unscalable = next((key for key, site, _ in attachment.sites if not self._taps[site.identity].weighted), "")
            own = [key for key, _ in attachment.selection if key not in attachment.head_names]
            if weight != 1.0 and (unscalable or own):
                raise StateError(
                    f"The change of {name!r} at {unscalable or own[0]} cannot be scaled; its weight must be 1."
                )

    def _set_live(self, live: dict[str, float]) -> None:
        """Take everything off the model, then put the given attachments on."""
        for name in reversed(tuple(self.control.live)):
            attachment = self.attachments[name]
            attachment.trainable(False)
            attachment.selection.swap_out()
        self._installation.take_off()
        self.control.live.clear()
        self.control.live.update(live)
        for name in live:
            attachment = self.attachments[name]
            attachment.selection.swap_in()
            attachment.trainable(True)
        if live:
            self._installation.put_on()

    def _release(self) -> None:
        """Make the model forget this handle."""
        self.model.__dict__.pop(HANDLE, None)
        self.model.__dict__.pop(_RESIZE, None)
