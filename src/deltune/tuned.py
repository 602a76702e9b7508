"""The handle that a user holds: a model with methods attached."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deltune.checkpoints import format_named, other_formats
from deltune.errors import CheckpointError, StateError
from deltune.folding import fold, refuse_tied
from deltune.frozen_states import FrozenStates, frozen_states
from deltune.methods import Method
from deltune.model_hooks import StepHooks, total_penalty
from deltune.quantization.model import dequantize_layers, format_of
from deltune.sparse_delta import Entries, SparseDelta
from deltune.summary import Summary
from deltune.switchboard import HANDLE, Switchboard

__all__ = ["HANDLE", "Tuned", "attach"]


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


class Tuned(Switchboard):
    """A model with methods attached. Made by :func:`attach` or :func:`deltune.load`.

    Attributes:
        model: the model itself.
        anatomy: its parts.
        base_model: kind, size, a sample of the pretrained weights and how they are quantised, to know the model again.
        attachments: every attached method by name.
    """

    # -- training --------------------------------------------------------------------------------------------

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters of the live attachments that train, for an optimizer."""
        return [parameter for _, parameter in self.named_trainable_parameters()]

    def named_trainable_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As :meth:`trainable_parameters`, with names; several live attachments are told apart by theirs."""
        several = len(self.trained) > 1
        for name in self.trained:
            for key, parameter in self.attachments[name].parameters():
                yield (f"{name}.{key}" if several else key), parameter

    def prepare(self, batches: Iterable[Mapping[str, Any]]) -> None:
        """Let the live methods that train set themselves up from data, where they need it."""
        for name in self.trained:
            attachment = self.attachments[name]
            attachment.method.prepare(self.model, attachment.forms, batches)
        if self.control.live:  # what trains may be something else now
            self._installation.take_off()
            self._installation.put_on()

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
        self._attachment(name or self.active[0]).set_rank(rank)

    @contextmanager
    def frozen_states(self, folder: str | Path, dtype: torch.dtype | None = None) -> Iterator[FrozenStates]:
        """Inside the block layers below everything that trains run once for each text, in training and evaluation.

        What they make of a text is kept in ``folder`` and taken from there when the same text comes again, in
        whatever batch, in this run or a later one. It serves methods that leave the lowest layers alone: side
        networks, fusion of layers, heads, the last layers, adapters whose lowest are dropped. A batch of which a row
        is not known runs as a whole.

        It takes d numbers for each position and kept layer: for a method that trains the upper layers that is one
        layer, for ladder side-tuning all layers that have a side layer.

        Args:
            folder: made if it does not exist.
            dtype: type of the kept numbers; that of the layers by default. float16 takes half of float32's space.

        Raises:
            StateError: if no layer is frozen below what acts, the model has several stacks, another process uses the
                folder; in training, if frozen layers drop values at random.
            CheckpointError: if the folder keeps states of another model, or of other layers.
        """
        self._refuse_while_merged("keep states of frozen layers")
        if not self.control.live:
            raise StateError("Nothing is active, so it is not known which layers are frozen. Activate a method first.")
        with frozen_states(self.model, self.anatomy, self.control, self.attachments, folder, dtype) as states:
            yield states

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
        if self.control.route or self.control.dropped:
            raise StateError("Weights are the same for all rows and layers: end routing and dropping before merging.")
        present = self._present()
        live = present[0]
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
            self._set_live(*present)
            raise
        if reversible:
            self._merged = (folded, present)
            return self.model
        for name in list(self.attachments):
            self._forget(name)
        self._frozen = None
        self._release()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.dtype.is_floating_point)  # packed weights cannot
        return self.model

    # -- looking and saving ----------------------------------------------------------------------------------

    def summary(self, name: str | None = None) -> Summary:
        """What an attachment trains, per site, and its share of the model; by default of the live ones that train."""
        names = self.trained if name is None else (name,)
        return Summary.of(self.model, [self._attachment(item) for item in names], self._size)

    def changes(self, name: str | None = None, *, head: bool = False) -> SparseDelta:
        """What an attachment changes in the model's own parameters, entry by entry.

        Args:
            name: which attachment; by default the live one.
            head: whether those of the task head are among them.

        Raises:
            StateError: if merged, if several are live and none is named, if the method cannot be merged or changes a
                matrix that is tied to another one, or if the original values are lost (``reversible=False``).
        """
        self._refuse_while_merged("compare with the original")
        attachment = self._attachment(self._one(name, "compare"))
        with self.disabled():
            found = {}
            for key, value in attachment.merged(self._modules).items():
                refuse_tied(attachment, key, self._modules)
                if head or key not in attachment.head_names:
                    owner, _, attribute = key.rpartition(".")
                    original = self._modules[owner]._parameters[attribute]
                    found[key] = Entries.between(torch.zeros_like(value) if original is None else original, value)
        return SparseDelta(found)

    def save(self, path: str | Path, name: str | None = None, *, format: str = "deltune") -> Path:
        """Write an attachment to a folder: one safetensors file with the trained part, one JSON for people.

        Args:
            path: the folder; made if it does not exist. What was saved there before in the same format is replaced.
            name: which attachment; by default the live one.
            format: the folder's format, one of ``deltune.checkpoints.FORMATS``; deltune's own holds every method,
                those of other libraries what they know.

        Returns:
            The folder.

        Raises:
            StateError: if merged, or if several are live and none is named.
            CheckpointError: if there is no such format, or it cannot hold this method; or it cannot be written, or the
                folder holds a delta in another format.
        """
        self._refuse_while_merged("save")
        attachment = self._attachment(self._one(name, "save"))
        writer = format_named(format)
        others = other_formats(path, format)
        if others:
            raise CheckpointError(
                f"{path} holds a delta in the format {others[0]}, and beside one in the format {format} it could not "
                "be told which is meant. Save to another folder, or remove what is there."
            )
        return writer.write(attachment, self.model, self.anatomy, self.base_model, Path(path))

    def _one(self, name: str | None, verb: str) -> str:
        """``name``, or that of the only live attachment, or of the only one that trains."""
        own = self.active if len(self.active) == 1 else self.trained
        if name is None and len(own) != 1:
            raise StateError(f"Say which attachment to {verb}: name= one of {', '.join(self.attachments)}.")
        return name or own[0]

    def __repr__(self) -> str:
        items = ", ".join(f"{name}: {attachment.method}" for name, attachment in self.attachments.items())
        return f"Tuned({type(self.model).__name__}, {{{items}}}, active={list(self.active)})"
