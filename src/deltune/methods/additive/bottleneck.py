"""Bottlenecks: the small modules of all adapters, and the options that the methods placing them share.

Letters: d hidden size, m width of the bottleneck, e features of the change (d, but where attention's heads are
changed).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from deltune.errors import MethodError, suggestion
from deltune.methods.base import Method
from deltune.methods.options import option
from deltune.sites import LayerForm, ParallelForm, SublayerForm

__all__ = ["Bottleneck", "BottleneckMethod", "with_default"]

#: Standard deviation of normal initial weights, by the name of the initialisation.
_DEVIATIONS = {"truncated": 1e-2, "normal": 2e-2}
#: Scales that are trained.
_TRAINED_SCALES = ("learned", "channel")
#: A width as a part of the hidden size.
_PART = re.compile(r"d\s*/\s*([1-9]\d*)")


class Bottleneck(SublayerForm, ParallelForm, LayerForm):
    r"""dh = s (W_up phi(W_down LN(h) + b_down) + b_up), with LN only if ``layer_norm``.

    W_down (m, d) and W_up (e, m); biases are zero at the start. Dropout acts on the m values behind phi while
    training. s is a number, a trained scalar or a trained value for each of the e features.

    Args:
        features: d.
        width: m.
        activation: name of phi, as transformers knows it.
        initialization: ``kaiming``: W_down as Kaiming et al. (uniform within 1 / sqrt(d)), W_up zero, so that dh is
            zero; ``normal``; ``truncated``: normal and cut at two deviations.
        standard_deviation: of normal and truncated weights.
        scale: s; ``learned`` for a scalar and ``channel`` for one value a feature, both starting at ``first_scale``.
        first_scale: where a trained scale starts.
        dropout: probability.
        layer_norm: whether a trained LayerNorm comes first.
        out_features: e, by default d.
        dtype: type of the parameters.
        device: where they are.
    """

    formula: ClassVar[str] = "phi({x} W_down) W_up"

    scale: float | nn.Parameter

    def __init__(
        self,
        features: int,
        width: int,
        activation: str = "relu",
        initialization: str = "kaiming",
        standard_deviation: float = 1e-2,
        scale: float | str = 1.0,
        first_scale: float = 1.0,
        dropout: float = 0.0,
        layer_norm: bool = False,
        out_features: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        made: dict[str, Any] = {"dtype": dtype, "device": device}
        changed = features if out_features is None else out_features
        self.norm = nn.LayerNorm(features, **made) if layer_norm else None
        self.down = nn.Linear(features, width, **made)
        self.up = nn.Linear(width, changed, **made)
        self.activation, self.activation_name = ACT2FN[activation].to(**made), activation
        self.dropout = dropout
        if isinstance(scale, str):
            shape = (changed,) if scale == "channel" else ()
            self.scale = nn.Parameter(torch.full(shape, first_scale, **made))
        else:
            self.scale = scale
        self._initialize(initialization, standard_deviation)

    @torch.no_grad()
    def _initialize(self, initialization: str, standard_deviation: float) -> None:
        for linear in (self.down, self.up):
            nn.init.zeros_(linear.bias)
            if initialization == "truncated":
                nn.init.trunc_normal_(linear.weight, std=1.0, a=-2.0, b=2.0).mul_(standard_deviation)
            elif initialization == "normal":
                nn.init.normal_(linear.weight, std=standard_deviation)
        if initialization == "kaiming":
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def as_text(self, x: str) -> str:
        """With the name of phi, and LN where there is one."""
        return super().as_text(f"LN({x})" if self.norm is not None else x).replace("phi", self.activation_name, 1)

    def forward(self, h: Tensor) -> Tensor:
        """The change (..., e) for h (..., d)."""
        if self.norm is not None:
            weight, bias = self.norm.weight.to(h.dtype), self.norm.bias.to(h.dtype)
            h = F.layer_norm(h, self.norm.normalized_shape, weight, bias, self.norm.eps)
        narrow = self.activation(F.linear(h, self.down.weight.to(h.dtype), self.down.bias.to(h.dtype)))
        narrow = F.dropout(narrow, self.dropout, self.training)
        change = F.linear(narrow, self.up.weight.to(narrow.dtype), self.up.bias.to(narrow.dtype))
        if isinstance(self.scale, Tensor):
            return self.scale.to(change.dtype) * change
        return change if self.scale == 1.0 else self.scale * change


class Place(Protocol):
    """What of a site decides how its bottleneck is built."""

    @property
    def key(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def device(self) -> torch.device: ...


@dataclass(frozen=True)
class BottleneckMethod(Method):
    """What the methods that place bottlenecks share: their options, and how a bottleneck is built from them."""

    width: int | str = option("d/16", "width m of the bottleneck: a number, or a part of the hidden size d", minimum=1)
    activation: str = option("relu", "the bottleneck's non-linearity, as transformers names it")
    initialization: str = option(
        "normal",
        "where weights start: kaiming (uniform, and zero upwards, which leaves the model unchanged), normal, truncated",
        choices=("kaiming", "normal", "truncated"),
    )
    standard_deviation: float | None = option(
        None, "of normal (0.02 if not given) or truncated (0.01) initial weights", minimum=0, exclusive=True
    )
    scale: float | str = option(
        1.0,
        "factor s of the change: a number, or trained from 1: learned (a scalar), channel (one a feature)",
        minimum=0,
        exclusive=True,
    )
    dropout: float = option(0.0, "dropout inside the bottleneck while training", minimum=0, maximum=0.99)
    layer_norm: bool = option(False, "normalise the bottleneck's input by a trained LayerNorm of its own")

    def __post_init__(self) -> None:
        super().__post_init__()
        self._refuse_unknown("activation", self.activation, ACT2FN)
        if isinstance(self.width, str) and not _PART.fullmatch(self.width):
            raise MethodError(
                f"{self.name}: width must be a whole number, or a part of the hidden size d such as d/16, not "
                f"{self.width!r}."
            )
        if isinstance(self.scale, str):
            self._refuse_unknown("scale", self.scale, _TRAINED_SCALES)
        if self.standard_deviation is not None and self.initialization not in _DEVIATIONS:
            raise MethodError(
                f"{self.name}: with initialization={self.initialization} there is no standard_deviation to choose. "
                "Leave it out, or choose initialization=normal or truncated."
            )
        # the class says it for its defaults
        object.__setattr__(self, "unchanged_at_start", self.initialization == "kaiming")

    def bottleneck(self, site: Place, out_features: int | None = None) -> Bottleneck:
        """A new bottleneck for ``site``.

        Raises:
            MethodError: if the width is too small a part of the hidden size.
        """
        return Bottleneck(
            site.hidden_size,
            self._width_at(site),
            self.activation,
            self.initialization,
            self._deviation,
            self.scale,
            dropout=self.dropout,
            layer_norm=self.layer_norm,
            out_features=out_features,
            dtype=site.dtype,
            device=site.device,
        )

    @property
    def _deviation(self) -> float:
        given = self.standard_deviation
        return _DEVIATIONS.get(self.initialization, 0.0) if given is None else given

    def _width_at(self, site: Place) -> int:
        if isinstance(self.width, int):
            return self.width
        part = _PART.fullmatch(self.width)
        assert part is not None
        width = site.hidden_size // int(part[1])
        if width == 0:
            raise MethodError(
                f"{self.name}: width={self.width} leaves nothing at {site.key}, which has {site.hidden_size} features. "
                "Divide by less, or give the width as a number."
            )
        return width

    def _refuse_unknown(self, name: str, given: str, known: Iterable[str]) -> None:
        if given not in known:
            raise MethodError(f"{self.name}: there is no {name} {given!r}. {suggestion(given, known)}")


def with_default(name: str, default: Any) -> Any:
    """The shared option ``name`` with another default, for the fields of a method."""
    return field(default=default, metadata=BottleneckMethod.__dataclass_fields__[name].metadata)
