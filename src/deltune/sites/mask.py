"""Masks over frozen matrices: while one is live, the matrix with zeros where the mask drops a weight is in its place.

Shapes: x (..., in), y (..., out), a matrix and its mask (rows, in) whichever way the model stores it.

The masked matrix is written when the mask changes and stands in the module's parameter table, so that the model runs as
it does without a mask; the original object waits beside it. Where scores train, a hook behind the module gives them
their gradient: one product more in the backward pass, none in the forward pass.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError, StateError
from deltune.quantization import is_quantized
from deltune.sites.base import Control, Form, Insertion, Tap
from deltune.sites.weight import WeightSite, weight_sites
from deltune.sites.written import Refresh, Writer, versions_of

__all__ = ["MaskForm", "MaskSite", "mask_sites"]


class MaskForm(Form):
    """Says which weights of a matrix are kept."""

    @abstractmethod
    def kept(self) -> Tensor:
        """The mask: boolean, (rows, in)."""

    def straight_through(self) -> nn.Parameter | None:
        """What takes the mask's gradient, (rows, in), as if it were the mask; None if nothing trains."""
        return None

    def refuse_empty(self, key: str) -> None:
        """Refuse a mask that keeps nothing of the matrix ``key``.

        Raises:
            StateError: if so.
        """
        kept = self.kept()
        if not kept.is_meta and not bool(kept.any()):
            raise StateError(
                f"The mask of {key} drops every weight of the matrix, so that nothing is left of it. All scores have "
                "fallen to the threshold: train with a lower learning rate and without weight decay."
            )


@dataclass(frozen=True)
class MaskSite(WeightSite):
    """A linear map whose matrix, or some rows of it, a mask is laid over.

    ``calls`` are the modules that may be called by themselves, the model ("") among them.
    """

    calls: tuple[str, ...] = ("",)

    insertion: ClassVar[Insertion] = Insertion.SELECT
    reads: ClassVar[str] = "W"

    def combination(self, factor: str) -> str:
        """The masked matrix takes the matrix's place."""
        return "W o dh"

    def tap(self, control: Control) -> MaskTap:
        """A tap on the matrix."""
        return MaskTap(self, control)

    def selected(self, form: Form) -> tuple[str, ...]:
        """The weight, of which some entries are changed."""
        return (f"{self.module}.weight",)

    def own(self, weight: Tensor) -> Tensor:
        """The site's own rows (rows, in) of ``weight``, a whole matrix as the model stores it."""
        return self.part_of(self._whole(weight))

    def write(self, weight: Tensor, rows: Tensor) -> None:
        """Write ``rows`` (rows, in) where the site's own rows of ``weight`` are."""
        self._view(weight).copy_(self._shaped(rows))

    def write_masked(self, weight: Tensor, original: Tensor, kept: Tensor) -> None:
        """Write into the site's own rows of ``weight`` those of ``original``, zero where they are not ``kept``."""
        # not a product, which would make some of the zeros negative
        zero = torch.zeros((), dtype=weight.dtype, device=weight.device)
        torch.where(self._shaped(kept), self._view(original), zero, out=self._view(weight))

    def _view(self, weight: Tensor) -> Tensor:
        """The site's own rows, to be written to; interleaved ones have one dimension more."""
        whole = self._whole(weight.detach())
        return whole if self.rows is None else self.rows.view(whole, 0)

    def _shaped(self, rows: Tensor) -> Tensor:
        return rows if self.rows is None else self.rows.split(rows, 0)

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The weight with zeros where the mask drops one; all others keep their bits.

        Raises:
            StateError: if nothing would be left of the matrix.
        """
        assert isinstance(form, MaskForm)
        form.refuse_empty(self.key)
        original = modules[self.module].get_parameter("weight")
        merged = original.detach().clone()
        self.write_masked(merged, original, form.kept())
        return {f"{self.module}.weight": merged}


class MaskTap(Tap):
    """Has the masked matrix written, and gives the scores their gradient."""

    weighted: ClassVar[bool] = True
    site: MaskSite

    def __init__(self, site: MaskSite, control: Control) -> None:
        super().__init__(site, control)
        self._matrices: _MaskedMatrices | None = None
        self.versions: list[Any] = []

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Put the masked matrix in the place of the original, if a mask is live here."""
        if not any(self.masks()):
            return
        self._matrices = _MaskedMatrices.of(modules, self.site.calls)
        self._matrices.add(self)
        if any(form.straight_through() is not None for form, _ in self.masks()):
            self._handles.append(modules[self.site.module].register_forward_hook(self))

    @property
    def installed(self) -> bool:
        """Whether a masked matrix stands in the place of the original."""
        return self._matrices is not None

    def uninstall(self) -> None:
        """Put the original back."""
        if self._matrices is not None:
            self._matrices.remove(self)
            self._matrices = None
        super().uninstall()

    def masks(self) -> Iterator[tuple[MaskForm, float]]:
        """The live masks here and their weights."""
        for form, weight in self.live():
            assert isinstance(form, MaskForm)
            yield form, weight

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Give the scores their part in ``output``, which is that of the masked matrix already."""
        if not torch.is_grad_enabled():
            return output
        assert self._matrices is not None
        original = self._matrices.originals[self.site.module]
        for form, weight in self.masks():
            scores = form.straight_through()
            if scores is not None and scores.requires_grad:
                apply: Any = _StraightThrough.apply
                output = apply(output, args[0], scores, original, self.site, weight)
        return output

    def write(self, weight: Tensor, original: Tensor) -> None:
        """Write the site's own rows into ``weight`` as all live masks leave them: W + sum of factor * (M - 1) * W."""
        masks = list(self.masks())
        if len(masks) == 1 and masks[0][1] == 1.0:
            self.site.write_masked(weight, original, masks[0][0].kept())
            return
        share = torch.ones((), dtype=weight.dtype, device=weight.device)
        for form, factor in masks:
            share = share - factor * ~form.kept()
        self.site.write(weight, self.site.own(original) * share)

    def present(self, weight: Tensor) -> list[Any]:
        """What the masked matrix is made of, and where it is to be."""
        tensors = [tensor for form, _ in self.masks() for tensor in (*form.parameters(), *form.buffers())]
        return [weight.dtype, weight.device, *versions_of(tensors)]


class _StraightThrough(torch.autograd.Function):
    """``output`` as it is, with a gradient for the scores: dL/dS := dL/dM = (dL/dy x^T) * W.

    Of the matrix product in it only x is kept: W is the frozen weight itself.
    """

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, scores: Tensor, original: Tensor, site: MaskSite, weight: float
    ) -> Tensor:
        # under autocast the product is one of narrower numbers
        ctx.save_for_backward(x.to(output.dtype), original)
        ctx.site, ctx.weight, ctx.dtype = site, weight, scores.dtype
        # a plain view would forbid models to change their projections in place
        return torch.ops.aten._unsafe_view(output, output.shape)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        x, original = ctx.saved_tensors
        site: MaskSite = ctx.site
        own = site.part_of(gradient, -1)
        product = own.reshape(-1, own.shape[-1]).T @ x.reshape(-1, x.shape[-1])
        product = product.to(ctx.dtype).mul_(site.own(original))
        return gradient, None, product if ctx.weight == 1.0 else ctx.weight * product, None, None, None


class _MaskedMatrices(Writer):
    """All masked matrices of one model: they stand in the modules' places, and the originals wait here."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.originals: dict[str, nn.Parameter] = {}
        self._modules = modules
        self._taps: list[MaskTap] = []
        self._handles: list[Any] = []
        #: Names of the masked modules whose weights are being loaded.
        self._loaded: frozenset[str] = frozenset()

    @classmethod
    def of(cls, modules: Mapping[str, nn.Module], calls: Iterable[str]) -> Self:
        """Those of this model; new ones if none is masked yet."""
        for hook in modules[""]._forward_pre_hooks.values():
            if isinstance(hook, Refresh) and isinstance(hook.writer, cls):
                return hook.writer
        found = cls(modules)
        found._handles.extend(found.watch(modules, calls))
        return found

    def add(self, tap: MaskTap) -> None:
        """Mask one more matrix, or further rows of it."""
        name = tap.site.module
        if name not in self.originals:
            original = self._weight(name)
            self.originals[name] = original
            with torch.inference_mode(False), torch.no_grad():  # it may serve in training later
                # where the mask is laid over all of it, all is written at once
                stand_in = torch.empty_like(original) if tap.site.rows is None else original.clone()
                self._modules[name]._parameters["weight"] = nn.Parameter(stand_in, requires_grad=False)
        self._taps.append(tap)
        self._write(tap)

    def remove(self, tap: MaskTap) -> None:
        """Mask no longer, and put the original back if no other rows of it are masked."""
        self._taps.remove(tap)
        name = tap.site.module
        if not any(other.site.module == name for other in self._taps):
            self._follow(name)
            self._modules[name]._parameters["weight"] = self.originals.pop(name)
        if not self._taps:
            self.stop_following()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

    def refresh(self, stepped: bool = False) -> None:
        """Write the matrices whose masks have changed, and all that train after a step."""
        if any(True for _ in self.trained()):
            self.follow_steps()
        for tap in self._taps:
            trains = stepped and any(form.straight_through() is not None for form, _ in tap.masks())
            if trains or tap.versions != tap.present(self._weight(tap.site.module)):
                self._write(tap)

    def trained(self) -> Iterator[Tensor]:
        """The live scores."""
        for tap in self._taps:
            for form, _ in tap.masks():
                scores = form.straight_through()
                if scores is not None:
                    yield scores

    def before_loading(self, model: nn.Module, state: Mapping[str, Any]) -> None:
        """See to it that afterwards only what was loaded differs."""
        self.refresh()
        self._loaded = frozenset(name for name in self.originals if f"{name}.weight" in state)

    @torch.no_grad()
    def after_loading(self) -> None:
        """Take loaded weights for the originals: all of them, or where masks came along, those that are kept."""
        before = {}
        for name in self._loaded:
            original = self.originals[name]
            self._follow(name)
            before[name] = original.detach().clone()
            original.data.copy_(self._weight(name))
        if all(tap.versions == tap.present(self._weight(tap.site.module)) for tap in self._taps):
            return  # it was the bare model's state
        for tap in self._taps:
            if tap.site.module not in before:
                continue
            loaded, earlier = (tap.site.own(values[tap.site.module]) for values in (self.originals, before))
            masks = list(tap.masks())
            # several masks leave it open what each has dropped
            rows = torch.where(masks[0][0].kept(), loaded, earlier) if len(masks) == 1 else earlier
            tap.site.write(self.originals[tap.site.module].data, rows)

    def _weight(self, name: str) -> nn.Parameter:
        weight = self._modules[name]._parameters["weight"]
        assert weight is not None
        return weight

    def _follow(self, name: str) -> None:
        """Have the original follow where the model was moved, and the type that it was given."""
        original, weight = self.originals[name], self._weight(name)
        if (original.device, original.dtype) != (weight.device, weight.dtype):
            original.data = original.data.to(weight.device, weight.dtype)

    @torch.no_grad()
    def _write(self, tap: MaskTap) -> None:
        name = tap.site.module
        weight = self._weight(name)
        if not weight.is_meta:  # a model without values
            self._follow(name)
            # not through the parameter itself: a graph that holds it may still have its backward pass to come
            tap.write(weight.data, self.originals[name].data)
        tap.versions = tap.present(weight)


def mask_sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[MaskSite, ...]:
    """The linear maps that ``targets`` selects, to lay masks over their matrices.

    Raises:
        MethodError: if a matrix is quantised, or tied to another module's parameter.
        TargetError: if a target selects nothing, or something that is no linear map.
    """
    calls = ("", *dict.fromkeys(stack.entry for stack in anatomy.stacks.values() if stack.entry))
    modules = dict(model.named_modules())
    owners: dict[int, list[str]] = {}
    for name, module in modules.items():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    sites = []
    for site in weight_sites(model, anatomy, targets):
        module = model.get_submodule(site.module)
        weight = module.get_parameter("weight")
        if is_quantized(module) or not weight.dtype.is_floating_point:
            raise MethodError(
                f"{site.module} is quantised, and a masked matrix of floating-point numbers cannot stand in its place. "
                "Load the model unquantised, call deltune.quantization.dequantize(model) first, or leave it out of the "
                "targets."
            )
        others = [name for name in owners[id(weight)] if modules[name] is not module]
        if others:
            raise MethodError(
                f"{site.module} is tied to {', '.join(others)}, which would be masked with it. Leave it out of the "
                "targets."
            )
        sites.append(MaskSite(**vars(site), calls=calls))
    return tuple(sites)
