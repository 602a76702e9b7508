"""Gated sums: several methods at once, each change multiplied by a gate that learns how much of it to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_type_hints

from torch import nn

from deltune.backbone import Anatomy
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement, Sum
from deltune.methods.hybrid.gates import CentralGate, InputGate, ScalarGate, Share
from deltune.methods.options import check, converted, option
from deltune.methods.registry import register
from deltune.sites import Form, GateForm, LayerSite, ParameterSite, Pooling, Site, WeightSite, causal_at, gate_site

__all__ = ["Gated", "gated"]

#: Matrices of attention that read the same.
_READ_ALIKE = ("attention.query", "attention.key", "attention.value")


@register
@dataclass(frozen=True)
class Gated(Sum):
    r"""A sum whose parts are gated: h <- h + sum_i G_i(x) dh_i, G_i between 0 and 1. Made by :func:`gated`.

    A gate of ``gate=input`` is G = mean_t sigmoid(w x_t + b): one value for each row of the batch, from what the
    change at its place reads: the input of a matrix, of attention, or of the sublayer beside an adapter; the result
    behind which an adapter stands. Of a prefix, keys and values are multiplied. ``gate=scalar`` is one trained number
    at each place, whatever is read. ``gate=central`` weighs the parts against each other, from what the attention of
    the layer reads, so that their values are 1 in sum.

    The mean is over real positions (``pooling=mean``), so that nothing depends on the padding; the authors' code
    counts padding too (``pooling=all``). Where positions do not read later ones (decoders), a mean would let them, and
    would differ between cached and uncached generation: there every position has a gate of its own
    (``pooling=token``). ``pooling=auto``, the default, takes the mean in encoders and the token's own elsewhere.

    Source:
        Mao et al. 2022, arXiv 2110.07577, section 3.2; authors' code: morningmoni/UniPELT.
    """

    gate: str = option("input", "what a gate is computed from", choices=("input", "scalar", "central"))
    pooling: str = option(
        "auto", "how the values of a row's positions become one", choices=("auto", "mean", "all", "token")
    )
    shared: bool = option(
        True, "one gate for what changes query, key and value matrices of one attention; false: one for each matrix"
    )

    name: ClassVar[str] = "gated"
    paper: ClassVar[Paper] = Paper(
        "Mao et al.", "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", 2022, "2110.07577"
    )
    learning_rate: ClassVar[float] = 5e-4

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for item in dataclasses.fields(self):
            if item.name != "methods":
                value = converted(getattr(self, item.name), hints[item.name])
                object.__setattr__(self, item.name, value)
                check(self.name, item, value, hints[item.name])
        if len(self.methods) == 1 and self.gate != "central":
            # a sum needs two; a gate does not
            only = self.methods[0]
            for attribute in ("learning_rate", "weight_decay", "unchanged_at_start"):
                object.__setattr__(self, attribute, getattr(only, attribute))
        else:
            super().__post_init__()
        # the change depends on the input
        object.__setattr__(self, "mergeable", False)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The placements of every part, and a gate beside each form, or the gate that it shares.

        Raises:
            MethodError: if a part's change cannot be gated, or a mean is asked for where positions may not know of
                later ones.
        """
        gates: dict[str, Placement] = {}
        for number, method in enumerate(self.methods):
            for placement in method.place(model, anatomy):
                site, form = placement.site, placement.form
                if isinstance(site, ParameterSite):
                    raise MethodError(
                        f"{method.name} trains {site.name} of the model itself, which no gate can scale for each row. "
                        f"Add it to the gated sum instead: gated(...) + {method.name}."
                    )
                trains = form is not None and any(True for _ in form.parameters())
                # what neither trains nor can be gated is no change, such as a shift of positions
                if site is not None and form is not None and (trains or site.gateable):
                    yield from self._gate(method, number, site, form, gates, model, anatomy)
                yield placement.within(number)

    def _gate(
        self,
        method: Method,
        number: int,
        site: Site,
        form: Form,
        gates: dict[str, Placement],
        model: nn.Module,
        anatomy: Anatomy,
    ) -> Iterator[Placement]:
        """Give ``form`` its gate; the gate's placement, where it is a new one."""
        if not site.gateable:
            raise MethodError(
                f"The change of {method.name} at {site.key} cannot be gated: only changes of linear maps, attention, "
                f"sublayers and layers can. Add {method.name} to the gated sum instead: gated(...) + {method.name}."
            )
        pooling = self._pooling(site, model, anatomy)
        name = self._name(site, anatomy)
        key = name if self.gate == "central" else f"{number}.{name}"
        if key not in gates:
            gate = self._new(site, pooling, anatomy)
            part = "" if self.gate == "central" else str(number)
            gates[key] = Placement(gate_site(site, name, anatomy), gate, part=part)
            yield gates[key]
        found = gates[key].form
        if isinstance(found, CentralGate):
            if isinstance(site, LayerSite):
                raise MethodError(
                    f"{method.name} changes the whole layer's result here, behind everything that a central gate reads "
                    "of the layer. Use gate=input, or a method that changes a sublayer."
                )
            if site.part.stack == "cross" and site.part.role in _READ_ALIKE[1:]:
                raise MethodError(
                    f"{site.key} reads the encoder, whose positions are not those of the layer that a central gate "
                    "reads. Leave it out of the targets, or use gate=input."
                )
            form.gated_by = (Share(found, number),)
        else:
            assert isinstance(found, GateForm)
            form.gated_by = (found,)

    def _name(self, site: Site, anatomy: Anatomy) -> str:
        """Key of the gate of the change at ``site``."""
        part = site.part
        if self.gate == "central":
            if part.layer is None:
                raise MethodError(
                    f"{site.key} is in no layer, whose attention a central gate reads with. Use gate=input."
                )
            return f"{anatomy.stack_of(part).name}.{part.layer}.gate"
        if self.shared and part.role in _READ_ALIKE:
            return f"{part.stack}.{part.layer}.attention.projections.gate"
        return f"{site.key}.gate"

    def _pooling(self, site: Site, model: nn.Module, anatomy: Anatomy) -> Pooling:
        causal = causal_at(site, anatomy, model)
        if self.pooling == "auto":
            return "token" if causal else "mean"
        if causal and self.pooling != "token":
            raise MethodError(
                f"pooling={self.pooling} takes a mean over all positions at {site.key}, where a position may not know "
                "of later ones. Use pooling=token, or auto."
            )
        return _POOLINGS[self.pooling]

    def _new(self, site: Site, pooling: Pooling, anatomy: Anatomy) -> GateForm:
        facts: Any = site
        made = {"dtype": facts.dtype, "device": facts.device}
        if self.gate == "scalar":
            return ScalarGate(**made)
        if self.gate == "central":
            return CentralGate(anatomy.stack_of(site.part).hidden_size, len(self.methods), pooling, **made)
        features = site.in_features if isinstance(site, WeightSite) else facts.hidden_size
        return InputGate(features, pooling, **made)

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The same gates over the parts as they are stored."""
        return replace(self, methods=tuple(method.stored(forms) for method, forms in self.with_forms(forms)))

    def to_dict(self) -> dict[str, Any]:
        """Name, the parts' own dictionaries, and the options."""
        options = {item.name: getattr(self, item.name) for item in dataclasses.fields(self) if item.name != "methods"}
        return {**super().to_dict(), **options}

    def __str__(self) -> str:
        changed = [
            f"{item.name}={str(value).lower() if isinstance(value, bool) else value}"
            for item in dataclasses.fields(self)
            if item.name != "methods" and (value := getattr(self, item.name)) != item.default
        ]
        return f"gated({', '.join([*map(str, self.methods), *changed])})"


_POOLINGS: dict[str, Pooling] = {"mean": "mean", "all": "all", "token": "token"}


def gated(
    *methods: Method,
    gate: Literal["input", "scalar", "central"] = "input",
    pooling: Literal["auto", "mean", "all", "token"] = "auto",
    shared: bool = True,
) -> Gated:
    """Several methods at once, each change multiplied by a gate: ``gated(LoRA(), PrefixTuning(), PfeifferAdapter())``.

    Args:
        *methods: the parts: methods that change linear maps, attention, sublayers or layers.
        gate: what a gate is computed from: the ``input`` of what is changed; nothing (``scalar``: one trained number);
            what attention reads, by which the parts are weighed against each other (``central``).
        pooling: how the values of a row's positions become one; see :class:`Gated`.
        shared: one gate for the changes of query, key and value matrices of one attention, not one for each.

    Raises:
        MethodError: if there is no part.
    """
    if not methods:
        raise MethodError("gated() needs methods: gated(LoRA(), PrefixTuning()).")
    return Gated(methods, gate=gate, pooling=pooling, shared=shared)
