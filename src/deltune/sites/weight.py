"""Changes of a weight matrix: ``y <- y + dW x``, in whole matrices or in the rows of a fused one.

Shapes: x (..., in), y (..., out); a delta of weights is (rows, in) whichever way the model stores its matrix.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Rows, Targets
from deltune.backbone.matrices import matrix_shape
from deltune.errors import StateError, TargetError
from deltune.quantization import dense_weight, is_quantized
from deltune.sites.base import Control, Form, Insertion, Site, Tap, gated, rows_of, weighted, with_change
from deltune.sites.grouped import Group, GroupableForm, Together, blocks_for, in_blocks

__all__ = ["Kind", "WeightForm", "WeightSite", "weight_sites"]

Kind = Literal["linear", "embedding", "convolution"]
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d

_KINDS: dict[Kind, str] = {"linear": "linear map", "embedding": "table of embeddings", "convolution": "convolution"}


class WeightForm(GroupableForm):
    """A change of a matrix. ``forward`` maps the matrix's input (..., in) to dh (..., rows).

    Embeddings and convolutions are matrices too: the input of an embedding is the vocabulary, that of a convolution
    one window, (in channels / groups) times the size of the kernel. What a form does not say of these itself is
    computed from its :meth:`weight_delta`.
    """

    #: Whether the change depends on the frozen matrix; :meth:`change` and :meth:`weight_delta` are given it then.
    reads_matrix: ClassVar[bool] = False
    #: Where the change is linear in the parameters' distance from one value, at which there is none: that value.
    neutral: ClassVar[float | None] = None

    @abstractmethod
    def weight_delta(self) -> Tensor:
        """The change of the matrix, shape (rows, in), in the parameters' own type."""

    def weight_delta_of(self, matrix: Tensor) -> Tensor:
        """As :meth:`weight_delta`, given the frozen ``matrix`` (rows, in)."""
        return self.weight_delta()

    def bias_delta_of(self, bias: Tensor) -> Tensor | None:
        """The change of the frozen map's ``bias`` (rows) that folding it in makes; None, the default, for none."""
        return None

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``output`` (..., rows) plus ``weight`` times the change; forms may fuse the sum."""
        change: Tensor = self(x)
        return output + (change if weight == 1.0 else weight * change)

    def change(self, output: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The change dh (..., rows) where ``reads_matrix``.

        Args:
            output: what the frozen map gave, (..., rows), the bias included.
            x: its input, (..., in).
            matrix: its matrix (rows, in).
            bias: its bias (rows), if it has one.
        """
        change: Tensor = self(x)
        return change

    def look_up(self, ids: Tensor) -> Tensor:
        """The change (..., rows) of an embedding's output for ``ids`` (...)."""
        return F.embedding(ids, self.weight_delta().T)

    def convolve(self, x: Tensor, module: Convolution) -> Tensor:
        """The change of a convolution's output, for its padded input ``x`` (batch, channels, ...)."""
        kernel = self.weight_delta().to(x.dtype).view(module.weight.shape)
        return _convolution(x, kernel, module)


def _convolution(x: Tensor, kernel: Tensor, module: Convolution) -> Tensor:
    function = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    return function(x, kernel, None, module.stride, 0, module.dilation, module.groups)


@dataclass(frozen=True)
class WeightSite(Site):
    """A linear map, an embedding or a convolution.

    ``module`` is its dotted name; ``kind`` says what it is. ``in_features`` and ``out_features`` are those of the
    part that the site owns; ``rows`` says which output rows those are, None for all. ``transposed`` says that the
    weight is stored (in, out), as in GPT-2 and in embeddings.
    """

    in_features: int
    out_features: int
    transposed: bool
    dtype: torch.dtype
    device: torch.device
    kind: Kind = "linear"

    insertion: ClassVar[Insertion] = Insertion.WEIGHT

    @property
    def gateable(self) -> bool:  # type: ignore[override]
        """Only linear maps: the others have no positions to read."""
        return self.kind == "linear"

    @property
    def module(self) -> str:
        """Dotted name of the module."""
        return self.part.module

    @property
    def rows(self) -> Rows | None:
        """The output rows that this site owns, None for all."""
        return self.part.rows

    def matrix(self, module: nn.Module) -> Tensor:
        """The site's own rows of the module's weight as a matrix (rows, in); a view where that is possible.

        A weight that is stored in 4 bits is dequantised.
        """
        return self.part_of(self._whole(dense_weight(module)))

    def bias(self, module: nn.Module) -> Tensor | None:
        """The site's own rows of the module's bias, if it has one."""
        bias = getattr(module, "bias", None)
        return None if bias is None else self.part_of(bias)

    def part_of(self, tensor: Tensor, dim: int = 0) -> Tensor:
        """The site's own rows of ``tensor`` along ``dim``, as one dimension."""
        if self.rows is None:
            return tensor
        dim = dim % tensor.dim()
        view = self.rows.view(tensor, dim)
        return view if view.dim() == tensor.dim() else view.flatten(dim, dim + 1)

    def _whole(self, stored: Tensor) -> Tensor:
        return stored.flatten(1) if self.kind == "convolution" else stored.T if self.transposed else stored

    def in_weight(self, change: Tensor, shape: Sequence[int]) -> Tensor:
        """A change of the site's own rows (rows, in) as one of the whole stored weight of ``shape``, else zero."""
        weight = torch.zeros(tuple(shape), dtype=change.dtype, device=change.device)
        matrix = self._whole(weight)
        if self.rows is None:
            matrix.copy_(change)
        else:
            self.rows.view(matrix, 0).copy_(self.rows.split(change, 0))
        return weight

    def in_bias(self, change: Tensor, shape: Sequence[int]) -> Tensor:
        """A change of the site's own rows (rows) as one of the whole stored bias of ``shape``, else zero."""
        bias = torch.zeros(tuple(shape), dtype=change.dtype, device=change.device)
        self._add(bias, change)
        return bias

    def tap(self, control: Control) -> Tap:
        """A tap that adds the change to the module's output."""
        kinds = {"linear": WeightTap, "embedding": EmbeddingTap, "convolution": ConvolutionTap}
        return kinds[self.kind](self, control)

    def merge(self, form: Form, modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
        """The weight, and the bias, with the change added: computed in float32 at least, stored in its own type.

        Raises:
            StateError: if the weight is quantised: rounding the sum anew would lose most of the change.
        """
        assert isinstance(form, WeightForm)
        stored = modules[self.module].get_parameter("weight")
        if not stored.dtype.is_floating_point:
            raise StateError(
                f"{self.module} is quantised, and rounding the sum anew would lose most of the change. Keep the delta "
                "beside the model; or save it, make the bare model floating-point with "
                "deltune.quantization.dequantize(model), load the delta again and merge."
            )
        merged = _wide(stored)
        matrix = self._whole(merged)
        self._add(matrix, form.weight_delta_of(self.part_of(matrix)))
        values = {f"{self.module}.weight": merged.to(stored.dtype)}
        bias = getattr(modules[self.module], "bias", None)
        if bias is not None:
            wide = _wide(bias)
            change = form.bias_delta_of(self.part_of(wide))
            if change is not None:
                self._add(wide, change)
                values[f"{self.module}.bias"] = wide.to(bias.dtype)
        return values

    def _add(self, tensor: Tensor, change: Tensor) -> None:
        """Add ``change`` to the site's own rows of ``tensor``, in place."""
        change = change.detach().to(tensor)
        if self.rows is None:
            tensor += change
        else:
            view = self.rows.view(tensor, 0)
            view += self.rows.split(change, 0)


class WeightTap(Tap):
    """A forward hook on the linear map."""

    weighted = True
    site: WeightSite

    def __init__(self, site: Site, control: Control) -> None:
        super().__init__(site, control)
        self._together: Together[WeightForm] = Together(self)

    def install(self, modules: Mapping[str, nn.Module]) -> None:
        """Hook the module."""
        self._handles.append(modules[self.site.module].register_forward_hook(self))

    def uninstall(self) -> None:
        """Take the hook off, and keep nothing of what was computed together."""
        super().uninstall()
        self._together.clear()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the live changes to ``output``."""
        site, part = self.site, self.site.rows
        plan = self._together.plan() if self.control.route else None
        if plan is None:
            live = list(self.changes(args[0]))
        else:
            live = [] if plan.whole else list(self.changes(args[0], plan.together))
        if part is not None and is_quantized(module):
            # bitsandbytes returns a view that must not be changed in place
            output = output.clone()
        frozen = self._frozen_output(live, output)
        for group in plan.groups if plan is not None else ():
            output = self._with_group(output, args[0], group)
        for form, weight, rows in live:
            assert isinstance(form, WeightForm)
            x = rows_of(args[0], rows)
            if part is None and rows is None and not form.reads_matrix and not form.gated_by:
                output = form.add_to(output, x, weight)
                continue
            factor = gated(form, weight, x, rows)
            if form.reads_matrix:
                assert frozen is not None
                change = form.change(rows_of(frozen, rows), x, site.matrix(module), site.bias(module))
            else:
                change = form(x)
            output = self._with_change(output, change, factor, rows)
        return output

    def _with_change(self, output: Tensor, change: Tensor, weight: float | Tensor, rows: Tensor | None) -> Tensor:
        """``output`` with ``weight`` times the change of the site's own part, in these rows of the batch."""
        part = self.site.rows
        if part is None:
            return with_change(output, change, weight, rows)
        # in place: no linear map keeps its own output for the backward pass
        view = part.view(output, -1)
        change = part.split(weighted(change, weight), -1)
        if rows is None:
            view += change
        else:
            view.index_add_(0, rows, change.to(view.dtype))
        return output

    def _with_group(self, output: Tensor, x: Tensor, group: Group[WeightForm]) -> Tensor:
        """``output`` with the changes of forms that are computed together, each in its own rows."""
        stacked = self._together.stack(group, x.dtype)
        blocks = blocks_for(self.control.routed, group.names, x, stacked.rank)
        if blocks.owners is not None:
            stacked = stacked.gathered(blocks.owners)
        own = in_blocks(rows_of(x, blocks.rows), blocks.count)
        if blocks.rows is None and self.site.rows is None:
            return stacked.add_to(in_blocks(output, blocks.count), own).view_as(output)
        change = stacked.change(own)
        change = rows_of(change.reshape(-1, *x.shape[1:-1], change.shape[-1]), blocks.kept)
        return self._with_change(output, change, 1.0, blocks.targets)

    def _frozen_output(self, live: list[tuple[Form, float, Tensor | None]], output: Tensor) -> Tensor | None:
        """What the frozen map gave in the site's rows, where a form reads it; safe from changes in place."""
        if not any(isinstance(form, WeightForm) and form.reads_matrix for form, _, _ in live):
            return None
        return output if self.site.rows is None else self.site.part_of(output, -1).clone()


class EmbeddingTap(WeightTap):
    """A forward hook on the embedding."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the live changes to ``output``, scaled where the embedding scales its output (Gemma)."""
        scale = getattr(module, "embed_scale", 1.0)
        for form, weight, rows in self.changes(args[0]):
            assert isinstance(form, WeightForm)
            change = scale * form.look_up(rows_of(args[0], rows)).to(output.dtype)
            output = with_change(output, change, weight, rows)
        return output


class ConvolutionTap(WeightTap):
    """A forward hook on the convolution."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the live changes to ``output``."""
        assert isinstance(module, Convolution)
        x = _padded(args[0], module)
        for form, weight, rows in self.changes(x):
            assert isinstance(form, WeightForm)
            output = with_change(output, form.convolve(rows_of(x, rows), module), weight, rows)
        return output


def _wide(stored: Tensor) -> Tensor:
    """A copy in float32 at least."""
    return stored.detach().to(torch.promote_types(stored.dtype, torch.float32), copy=True)


def _padded(x: Tensor, module: Convolution) -> Tensor:
    """The input as the convolution itself pads it."""
    sides = module._reversed_padding_repeated_twice
    if not any(sides):
        return x
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, sides, mode=mode)


def weight_sites(
    model: nn.Module, anatomy: Anatomy, targets: Targets, kinds: Sequence[Kind] = ("linear",)
) -> tuple[WeightSite, ...]:
    """The matrices that ``targets`` selects.

    Args:
        model: the model.
        anatomy: its parts.
        targets: which.
        kinds: what a method can change: ``linear`` maps, ``embedding`` tables, ``convolution`` kernels.

    Raises:
        TargetError: if a target selects nothing, or something that is not of these kinds.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    roles = (*PROJECTION_ROLES, "embeddings") if "embedding" in kinds else PROJECTION_ROLES
    sites = []
    for part in targets.select(anatomy, tuple(modules), roles):
        module = modules[part.module]
        kind = _kind(module)
        if kind is None or kind not in kinds:
            raise TargetError(
                f"The target {part.key!r} is a {type(module).__name__}, not a {_KINDS[kinds[0]]}"
                f"{''.join(f' or {_KINDS[other]}' for other in kinds[1:])}. "
                f"Such modules below it: {_names(modules, part.module, kinds)}."
            )
        weight = module.get_parameter("weight")
        transposed = kind == "embedding" or hasattr(module, "nf")
        if kind == "convolution":
            out_features, in_features = weight.flatten(1).shape
        else:
            # of the module, not of its weight: that of a quantised one is packed
            shape = matrix_shape(module)
            assert shape is not None
            out_features, in_features = reversed(shape) if kind == "embedding" else shape
        if part.rows is not None:
            out_features = part.rows.size
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        sites.append(WeightSite(part, in_features, out_features, transposed, dtype, weight.device, kind))
    return tuple(sites)


def _kind(module: nn.Module) -> Kind | None:
    """What a module is: nn.Linear (or a subclass) and transformers' Conv1D, which has ``nf`` outputs, are linear."""
    if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "convolution" if isinstance(module, Convolution) else None


def _names(modules: Mapping[str, nn.Module], prefix: str, kinds: Sequence[Kind]) -> str:
    found: Sequence[str] = [
        name for name, module in modules.items() if name.startswith(f"{prefix}.") and _kind(module) in kinds
    ]
    return ", ".join(found[:6]) + (", ..." if len(found) > 6 else "") if found else "none"
