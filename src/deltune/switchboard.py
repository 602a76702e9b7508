"""What is attached to a model and what of it is live: attaching, switching, routing rows, dropping layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Self

from torch import nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy, anatomy_of, describe_base_model
from deltune.errors import MethodError, StateError, suggestion
from deltune.folding import Folded
from deltune.installation import Installation
from deltune.methods import Method, parse
from deltune.model_hooks import refuse_to_resize
from deltune.quantization.layers import keep_packing
from deltune.quantization.model import format_of, parameter_count
from deltune.routing import repeated_per_task
from deltune.sites import Control, Tap
from deltune.switching import (
    check_dropped,
    check_name,
    check_replaced,
    check_route,
    check_together,
    check_written,
    find,
)

__all__ = ["HANDLE", "Switchboard"]

#: Attribute of the model under which its handle is found.
HANDLE = "_deltune_handle"
#: A method of transformers models that is refused while anything is attached.
_RESIZE = "resize_token_embeddings"


#: Weights of what is live, the route, whether it is stacked, and what does not train.
State = tuple[dict[str, float], tuple[str | None, ...], bool, frozenset[str]]


class Switchboard:
    """The attachments of one model, and which of them are live for which rows and layers.

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
        self._merged: tuple[Folded, State] | None = None
        self._before_route: State = ({}, (), False, frozenset())
        self._installation = Installation(
            model, self.anatomy, self.control, self.attachments, self._taps, self._modules
        )

    # -- attaching -------------------------------------------------------------------------------------------

    def attach(
        self,
        method: Method | str,
        name: str = "default",
        *,
        reversible: bool = True,
        train_head: bool | None = None,
    ) -> Self:
        """Attach a further method and make it the live one; see :func:`attach` for the arguments.

        Raises:
            MethodError, TargetError, StateError: as :func:`attach`; also if the name is taken.
        """
        check_name(name, self.attachments)
        self._refuse_while_merged("attach")
        method = parse(method)
        present = self._present()
        with_head = bool(self.anatomy.head) if train_head is None else train_head
        if with_head and not self.anatomy.head:
            raise MethodError("train_head is set, but this model has no task head.")
        self._set_live({})
        try:
            attachment = Attachment.build(name, method, self.model, self.anatomy, reversible, with_head)
            check_replaced([attachment])
            check_written([attachment])
        except Exception:
            self._set_live(*present)
            raise
        # what a file holds may act without training
        if not any(True for _ in attachment.parameters()) and not any(
            form.saved_buffers for form in attachment.forms.values()
        ):
            self._set_live(*present)
            raise MethodError(f"{method} would train nothing in this model.")
        if self._frozen is None:
            self._frozen = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
            self.model.requires_grad_(False)
            self.model.__dict__[HANDLE] = self
            if hasattr(self.model, _RESIZE):
                self.model.__dict__[_RESIZE] = refuse_to_resize
        self.attachments[name] = attachment
        self._installation.add(attachment)
        for _, site, form in attachment.sites:
            if site.identity not in self._taps:
                self._taps[site.identity] = site.tap(self.control)
            self._taps[site.identity].forms.setdefault(name, []).append(form)
        try:
            self._set_live({name: 1.0})
        except Exception:
            self._forget(name)
            if self.attachments:
                self._set_live(*present)
            else:
                self._thaw()
            raise
        return self

    def activate(
        self,
        *names: str,
        weights: Iterable[float] | None = None,
        stacked: bool = False,
        frozen: Iterable[str] = (),
    ) -> None:
        """Make these attachments live, and only these. With no name: none, the bare model.

        Args:
            *names: attached names; the changes of several are added.
            weights: factor of each one's change, by default one. Weights that are 1 in sum make an average.
            stacked: let each adapter behind a sublayer or layer read what those before it have made of the result, not
                the result itself: ``activate("language", "task", stacked=True)`` puts the task's adapter on top of the
                language's. Other changes are added as they are without it: those of weights, of what stands beside a
                sublayer; keys and values, and input rows, are joined.
            frozen: those of ``names`` that act but do not train.

        Raises:
            StateError: if a name is not attached, several select the same parameter, or weights are given to
                a change that cannot be scaled.

        Source:
            Pfeiffer et al. 2020, arXiv 2005.00052 (stacked); Poth et al. 2023, arXiv 2311.11077.
        """
        self._refuse_while_merged("activate")
        factors = tuple(weights) if weights is not None else (1.0,) * len(names)
        if len(factors) != len(names):
            raise StateError(f"{len(names)} names but {len(factors)} weights were given.")
        for name in names:
            self._attachment(name)
        resting = frozenset((frozen,) if isinstance(frozen, str) else frozen)
        absent = next((name for name in resting if name not in names), None)
        if absent is not None:
            raise StateError(
                f"{absent!r} cannot be frozen: it is not among what is activated. {suggestion(absent, names)}"
            )
        check_together(self.attachments, self._taps, names, factors)
        self._set_live(dict(zip(names, factors, strict=True)), stacked=stacked, frozen=resting)

    @contextmanager
    def activated(
        self,
        *names: str,
        weights: Iterable[float] | None = None,
        stacked: bool = False,
        frozen: Iterable[str] = (),
    ) -> Iterator[None]:
        """:meth:`activate` inside the block; afterwards all is as before it, routing included."""
        present, before = self._present(), self._before_route
        self.activate(*names, weights=weights, stacked=stacked, frozen=frozen)
        try:
            yield
        finally:
            self._set_live(*present)
            self._before_route = before

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the live attachments."""
        return tuple(self.control.live)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the live attachments that train."""
        return self.control.trained

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Exactly the bare model inside the block: no hooks, no additional keys, the original parameters."""
        self._refuse_while_merged("disable")
        present = self._present()
        self._set_live({})
        try:
            yield
        finally:
            self._set_live(*present)

    def route(self, rows: Iterable[str | None] | None) -> None:
        """Let each row of a batch take an attachment of its own: ``route(["sst2", "cola", None])``.

        A routed row's result is that of the row alone with its attachment, its trained task head included; None is the
        bare model. A batch that is a multiple as long repeats each entry, as beam search repeats each row. Training
        goes on with :meth:`trainable_parameters` of all that the route names.

        Args:
            rows: a name, or None, for each row; None to end routing: what was active before is so again.

        Raises:
            StateError: if merged, a name is not attached, or one trains parameters that all rows go through. While a
                route is set, a batch that does not fit it raises in the model's call.
        """
        self._refuse_while_merged("route")
        if rows is None:
            if self.control.route:
                self._set_live(*self._before_route)
            return
        route = tuple(rows)
        if isinstance(rows, str) or not route:
            raise StateError(f"A route is a list with a name, or None, for each row of a batch, not {rows!r}.")
        names = dict.fromkeys((name for name in route if name is not None), 1.0)
        check_route(self.attachments, names)
        before = self._before_route if self.control.route else self._present()
        if self.control.route and names.keys() == self.control.live.keys():
            self.control.route = route
        else:
            self._set_live(names, route)
        self._before_route = before

    @contextmanager
    def routed(self, rows: Iterable[str | None]) -> Iterator[None]:
        """:meth:`route` inside the block; afterwards all is as before it.

        The backward pass of a routed loss belongs into the block too: what is not live has no gradient.
        """
        present, before = self._present(), self._before_route
        self.route(rows)
        try:
            yield
        finally:
            self._set_live(*present)
            self._before_route = before

    @contextmanager
    def one_pass(self, *names: str) -> Iterator[None]:
        """Several tasks on each row in one pass: a batch of B rows leaves the model as ``len(names)`` times B rows.

        Those of the first task come first: ``outputs.logits.view(len(names), B, ...)``. Layers below the lowest one in
        which an attachment acts, for example after :meth:`drop_layers`, are computed once for all tasks.

        Args:
            *names: the attachments, with their trained heads.

        Raises:
            StateError: as :meth:`route`; also for models with several stacks, and for changes before the layers.
        """
        with self.routed(names):
            tasks = [self._attachment(name) for name in names]
            with repeated_per_task(self.model, self.anatomy, tasks, self.control.dropped):
                yield

    def drop_layers(self, count: int) -> None:
        """Let nothing act in the ``count`` lowest layers of each stack; 0 ends it (AdapterDrop).

        The model's own layers stay. It holds for training and evaluation, of all attachments.

        Source: Rücklé et al. 2021, arXiv 2010.11918, section 4.

        Raises:
            StateError: if the model has not so many layers, or an attachment trains parameters of the model itself.
        """
        check_dropped(count, self.anatomy, self.attachments.values())
        self.control.dropped = count

    def drop_layers_at_random(self, seed: int | None = 0) -> None:
        """In training let nothing act in the n lowest layers, n drawn for each step, so that any n serves afterwards.

        n is uniform on 0 to L - 1 for L layers, and follows from the seed and the number of steps of the bound
        optimizer. Evaluation is not concerned: see :meth:`drop_layers`.

        Source: Rücklé et al. 2021, arXiv 2010.11918, section 4 (robust AdapterDrop).

        Args:
            seed: of the draws; None ends it.

        Raises:
            StateError: as :meth:`drop_layers`; the model's call raises it in training if no optimizer is bound.
        """
        if seed is not None:
            check_dropped(1, self.anatomy, self.attachments.values())
        self.control.drop_seed = seed
        self.control.dropped_in_training = 0
        self._set_live(*self._present())

    def detach(self, name: str | None = None) -> nn.Module:
        """Remove one attachment, or all; without any left the model is bit-identical to what it was.

        Returns:
            The model.
        """
        if self._merged is not None:
            self.unmerge()
        self.route(None)
        live, _, stacked, frozen = self._present()
        live = {other: weight for other, weight in live.items() if name is not None and other != name}
        names = list(self.attachments) if name is None else [self._attachment(name).name]
        self._set_live({})
        for item in names:
            self._forget(item)
        if self.attachments:
            self._set_live(live, (), stacked, frozen - {name})
        else:
            self._thaw()
        return self.model

    def unmerge(self) -> None:
        """Put the original weights back, bit for bit, and the attachments beside them.

        Raises:
            StateError: if nothing is merged.
        """
        if self._merged is None:
            raise StateError("Nothing is merged.")
        folded, present = self._merged
        folded.undo()
        self._merged = None
        self._set_live(*present)

    # -- inside ----------------------------------------------------------------------------------------------

    def _attachment(self, name: str) -> Attachment:
        return find(self.attachments, name)

    def _refuse_while_merged(self, action: str) -> None:
        if self._merged is not None:
            raise StateError(f"Cannot {action} while merged. Call unmerge() first.")

    def _present(self) -> State:
        """What is live now, as :meth:`_set_live` takes it."""
        return dict(self.control.live), self.control.route, self.control.stacked, self.control.frozen

    def _set_live(
        self,
        live: dict[str, float],
        route: tuple[str | None, ...] = (),
        stacked: bool = False,
        frozen: frozenset[str] = frozenset(),
    ) -> None:
        """Take everything off the model, then put the given attachments on, for the rows of ``route`` or for all."""
        for name in reversed(tuple(self.control.live)):
            attachment = self.attachments[name]
            attachment.trainable(False)
            attachment.selection.swap_out()
        self._installation.take_off()
        self.control.live.clear()
        self.control.live.update(live)
        self.control.route, self.control.stacked, self.control.frozen = route, stacked, frozen
        for name in live:
            attachment = self.attachments[name]
            if not route:  # else all that it has selected is a head, which acts on its own rows
                attachment.selection.swap_in()
            attachment.trainable(name not in frozen)
        if not live:
            return
        try:
            self._installation.put_on()
        except Exception:
            self._set_live({})  # all of it, or nothing
            raise

    def _forget(self, name: str) -> None:
        """Remove an attachment, while nothing is on the model."""
        attachment = self.attachments.pop(name)
        self._installation.remove(attachment)
        for identity in {site.identity for _, site, _ in attachment.sites}:
            tap = self._taps[identity]
            del tap.forms[name]
            if not tap.forms:
                del self._taps[identity]

    def _thaw(self) -> None:
        """Let train what trained before the first attachment; nothing is attached any more."""
        if self._frozen is not None:
            for parameter, required in self._frozen:
                parameter.requires_grad_(required)
            self._frozen = None
            self._release()

    def _release(self) -> None:
        """Make the model forget this handle."""
        self.model.__dict__.pop(HANDLE, None)
        self.model.__dict__.pop(_RESIZE, None)
