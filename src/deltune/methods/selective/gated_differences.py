"""Differences from a model's parameters behind gates, of which in the end the greatest are kept.

Letters: N entries of G parameter tensors, k of them kept; theta_0 (N) what the model has, w (N) the differences, z (N)
their gates and z_g (G) those of whole tensors, alpha (N) and alpha_g (G) the parameters of these.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.methods.selective.greatest import greatest
from deltune.methods.selective.hard_concrete import HardConcrete
from deltune.sites import EntriesForm, EntriesSite, Piece

__all__ = ["GatedDifferences"]


class GatedDifferences(EntriesForm):
    r"""theta = theta_0 + z z_g w while the gates learn; after :meth:`keep`, theta_0 + ``values`` in k entries.

    In training mode z and z_g are drawn anew after each step of the optimizer, and stand for all batches of a step, for
    what is recomputed, and for all processes: they follow from the seed and the number of steps, which the buffer
    ``draws`` counts. In evaluation they are those of u = 1/2.

    With g the gradient of theta: dw = g z z_g, dalpha = g w z_g dz/dalpha, dalpha_g = sum g w z dz_g/dalpha_g.

    Args:
        site: whose entries.
        names: of the parameters that differ.
        gates: how alpha becomes a gate.
        kept: k, how many entries are kept at most; those that do not differ at all are not among them.
        alpha: where alpha and alpha_g start; w starts at 0.
        grouped: whether there are gates of whole tensors.
        strength: lambda of the penalty.
        product: whether the penalty of an entry is lambda times the probability that it and its tensor are open;
            otherwise those of entries and of tensors are added.
        seed: of the draws.
    """

    formula: ClassVar[str] = "z z_g w"

    w: nn.Parameter | None
    alpha: nn.Parameter | None
    group_alpha: nn.Parameter | None
    draws: Tensor

    def __init__(
        self,
        site: EntriesSite,
        names: Sequence[str],
        gates: HardConcrete,
        *,
        kept: int,
        alpha: float,
        grouped: bool,
        strength: float,
        product: bool,
        seed: int,
    ) -> None:
        empty = torch.zeros(0, dtype=site.dtype, device=site.device)
        super().__init__(site, empty.long(), empty, relative=True)
        self.register_parameter("values", None)
        self.gates, self.kept, self.strength, self.product, self.seed = gates, kept, strength, product, seed
        sizes = dict(zip(site.names, site.sizes, strict=True))
        self.sizes = [sizes[name] for name in names]
        starts = itertools.accumulate(self.sizes, initial=0)
        #: Of each parameter its number, and where it is in w.
        self.parts = {
            name: (number, slice(start, start + sizes[name]))
            for number, (name, start) in enumerate(zip(names, starts, strict=False))
        }
        self.w = nn.Parameter(empty.new_zeros(self.size))
        self.alpha = nn.Parameter(empty.new_full((self.size,), alpha))
        self.group_alpha = nn.Parameter(empty.new_full((len(names),), alpha)) if grouped else None
        self.register_buffer("draws", torch.zeros((), dtype=torch.long, device=site.device))
        #: Which draw stands in the model; None for the gates of evaluation.
        self._written: int | None = None
        #: After which step the gates are done; None before an optimizer is bound.
        self.last_gated: int | None = None

    @property
    def size(self) -> int:
        """N."""
        return sum(self.sizes)

    @property
    def gated(self) -> bool:
        """Whether the gates still learn."""
        return self.w is not None

    # -- what stands in the model ----------------------------------------------------------------------------

    def pieces(self, tensors: Mapping[str, Tensor] | None = None) -> Iterator[Piece]:
        """All entries while the gates learn, afterwards those that are kept."""
        if self.gated if not tensors else "w" in tensors:
            yield from (Piece(name, part, None) for name, (_, part) in self.parts.items())
        else:
            yield from super().pieces(tensors)

    def state(self) -> tuple[tuple[int, int], ...]:
        """Differs with what is trained; in training also with the draw."""
        trained = [*self.parameters(), *([self.draws] if self.training and self.gated else [self.indices])]
        return tuple((id(value), value._version) for value in trained)

    def written(self, piece: Piece, originals: Tensor) -> Tensor:
        """What stands in the entries of ``piece``, where the model has ``originals``; both (entries,)."""
        if not self.gated:
            return super().written(piece, originals)
        self._written = int(self.draws) if self.training else None
        change = self.difference(piece.name, self._written)
        return change + originals

    def difference(self, name: str, draw: int | None = None) -> Tensor:
        """The differences z z_g w of one parameter, flat; with the gates of evaluation unless a draw is given."""
        w, s, group = self._gates(name, draw)
        change = self.gates.gate(s).mul_(w)
        return change if group is None else change.mul_(self.gates.gate(group))

    def collect(self, piece: Piece, gradient: Tensor) -> None:
        """Add the gradients of w, alpha and alpha_g that follow from that of theta; see above."""
        if not self.gated:
            super().collect(piece, gradient)
            return
        assert self.w is not None
        assert self.alpha is not None
        w, s, group = self._gates(piece.name, self._written)
        gradient = gradient.to(w)
        z = self.gates.gate(s)
        by_gate = gradient * w
        if group is not None:
            assert self.group_alpha is not None
            number, _ = self.parts[piece.name]
            self.add_gradient(self.group_alpha, number, self.gates.gate_backward(torch.dot(by_gate, z), group))
            gate = self.gates.gate(group)
            z *= gate
            by_gate *= gate
        self.add_gradient(self.w, piece.part, z.mul_(gradient))
        self.add_gradient(self.alpha, piece.part, self.gates.gate_backward(by_gate, s))

    def stepped(self) -> None:
        """Draw other gates from now on."""
        if self.gated:
            self.draws += 1

    def _gates(self, name: str, draw: int | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of one parameter w and the concrete variable s of its entries, flat, and that of the whole, a scalar."""
        assert self.w is not None
        assert self.alpha is not None
        number, part = self.parts[name]
        w = self.w.detach()[part]
        w = w.to(torch.promote_types(w.dtype, torch.float32))
        noise = None if draw is None else self._noise(number, draw, len(w), w.device)
        s = self.gates.concrete(self.alpha.detach()[part].to(w), None if noise is None else noise[:-1])
        if self.group_alpha is None:
            return w, s, None
        alpha = self.group_alpha.detach()[number].to(w)
        return w, s, self.gates.concrete(alpha, None if noise is None else noise[-1])

    def _noise(self, number: int, draw: int, size: int, device: torch.device) -> Tensor:
        """The noise u of one parameter's entries, and last that of the whole; not kept, but made again as needed."""
        digest = hashlib.sha256(f"{self.seed} {draw} {number}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))
        return torch.rand(size + 1, generator=generator, device=device)

    # -- the penalty -----------------------------------------------------------------------------------------

    def penalty(self) -> Tensor | None:
        """Lambda times the expected number of open gates; None if lambda is zero, or the gates are done."""
        if self.alpha is None or not self.strength:
            return None
        entries = self.gates.open(self.alpha, self.sizes)
        if self.group_alpha is None:
            return self.strength * entries.sum()
        groups = self.gates.probability(self.group_alpha.to(entries.dtype))
        return self.strength * ((entries * groups).sum() if self.product else entries.sum() + groups.sum())

    # -- what is kept ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def greatest(self) -> tuple[Tensor, Tensor]:
        """The entries that differ most, by the gates of evaluation.

        Returns:
            Their indices in the site's parameters, ascending, and z z_g w there: (k,) each.
        """
        changes = {name: self.difference(name) for name in self.parts}
        scores = {name: change.abs() for name, change in changes.items()}
        indices = greatest(scores, min(self.kept, self.size), self.site.starts)
        found = self._at(indices, changes)
        differ = found != 0
        return indices[differ], found[differ]

    @torch.no_grad()
    def keep(self, restart: bool) -> None:
        """End the gates: the entries that differ most are trained from now on, the others are those of the model.

        Args:
            restart: whether they start again from 0; otherwise from w, without the gates.
        """
        assert self.w is not None
        indices, _ = self.greatest()
        w = self.w.detach()
        values = self._at(indices, {name: w[part] for name, (_, part) in self.parts.items()})
        self._end_gates(indices, torch.zeros_like(values) if restart else values)

    def stored(self) -> EntriesForm:
        """The kept entries; while the gates learn, those that would be kept now, with z z_g w as their values."""
        if not self.gated:
            return self
        assert self.w is not None
        indices, values = self.greatest()
        return EntriesForm(self.site, indices, values.to(self.w.dtype), relative=True)

    def _at(self, indices: Tensor, flat: Mapping[str, Tensor]) -> Tensor:
        found = [flat[name][places] for name, _, places in self.site.split(indices)]
        return torch.cat(found) if found else next(iter(flat.values()))[:0]

    def _end_gates(self, indices: Tensor, values: Tensor) -> None:
        old = next(self.parameters())
        # what is given may be another model's
        values = values.detach().to(old.device, old.dtype, copy=True)
        self.values = nn.Parameter(values, requires_grad=old.requires_grad)
        self.indices = indices.to(old.device, copy=True)
        self.w = self.alpha = self.group_alpha = None

    # -- going on from a checkpoint --------------------------------------------------------------------------

    def resize(self, tensors: Mapping[str, Tensor]) -> None:
        """Have gates, or as many kept entries, as ``tensors`` have."""
        values = tensors.get("values")
        if values is not None:
            if self.gated or values.shape != self.values.shape:
                self._end_gates(tensors.get("indices", torch.zeros_like(values, dtype=torch.long)), values)
        elif "w" in tensors and not self.gated:
            old = next(self.parameters())
            for name in ("w", "alpha", "group_alpha"):
                if name in tensors:
                    value = torch.zeros_like(tensors[name], dtype=old.dtype, device=old.device)
                    setattr(self, name, nn.Parameter(value, requires_grad=old.requires_grad))
            self.register_parameter("values", None)
            self.indices = self.indices[:0].clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """As for every module, after taking the shapes of what is to be loaded."""
        self.resize({key.removeprefix(prefix): state_dict[key] for key in state_dict if key.startswith(prefix)})
        super()._load_from_state_dict(state_dict, prefix, *args)
