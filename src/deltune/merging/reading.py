"""What attached deltas have trained, in terms that can be calculated with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.checkpoints import stored_tensors
from deltune.errors import StateError
from deltune.folding import refuse_tied
from deltune.merging.terms import term_of, terms
from deltune.methods import Method
from deltune.methods.reparameterized.decompositions import SharedSlice
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.sites import Form, SelectionForm, WeightForm, WeightSite

__all__ = ["Delta", "MatrixChange", "Own", "comparable", "read_delta"]


@dataclass(frozen=True)
class MatrixChange:
    """The change of a matrix, (rows, in).

    Attributes:
        site: the matrix.
        form: as it is stored.
        module: that holds the matrix.
    """

    site: WeightSite
    form: WeightForm
    module: nn.Module

    @property
    def dtype(self) -> torch.dtype:
        """Type of the form's parameters; of the matrix, where the form has none of its own."""
        return next((value.dtype for value in self.form.parameters()), self.site.dtype)

    def dense(self) -> Tensor:
        """The change, in float32 at least."""
        form = self.form
        wide = torch.promote_types(self.dtype, torch.float32)
        with torch.no_grad():
            low_rank = self.factors()
            if low_rank is not None:
                factor_A, factor_B = low_rank
                return factor_B @ factor_A
            if form.reads_matrix:  # in its own type, which rounds row norms as training did
                return form.weight_delta_of(self.site.matrix(self.module).detach().to(wide)).to(wide)
            if self.dtype != wide:
                form = copy.deepcopy(form).to(wide)
                if isinstance(form, SharedSlice):
                    form.decomposition.to(wide)
            return form.weight_delta().to(wide)

    @property
    def parameter(self) -> str:
        """Full name of the parameter that holds the matrix."""
        return f"{self.site.module}.weight"

    def in_parameter(self, change: Tensor | None = None) -> Tensor:
        """The change, or another one of the matrix, as one of the whole parameter.

        Raises:
            StateError: if the parameter is quantised.
        """
        stored = self.module.get_parameter("weight")
        if not stored.dtype.is_floating_point:
            raise StateError(
                f"{self.parameter} is quantised, so that its entries cannot be changed one by one. Give rank=, for a "
                "low-rank change beside it."
            )
        return self.site.in_weight(self.dense() if change is None else change, stored.shape)

    def bias_change(self) -> Tensor | None:
        """The change of the bias (rows) that comes with it, in float32 at least; None if there is none."""
        bias = self.site.bias(self.module)
        if bias is None:
            return None
        wide = torch.promote_types(self.dtype, torch.float32)
        change = self.form.bias_delta_of(bias.detach().to(wide))
        return None if change is None else change.detach()

    def in_bias(self) -> Tensor:
        """:meth:`bias_change`, where there is one, as one of the whole bias."""
        change = self.bias_change()
        assert change is not None
        return self.site.in_bias(change, self.module.get_parameter("bias").shape)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and s B (rows, r) with the change s B A, in float32 at least; None if it is no such product."""
        form = self.form
        if not isinstance(form, LowRank) or form.reads_matrix:
            return None
        factor_A, factor_B = (factor.detach() for factor in form.factors())
        wide = torch.promote_types(factor_A.dtype, torch.float32)
        return factor_A.to(wide), form.scale * factor_B.to(wide)


@dataclass(frozen=True)
class Own:
    """One of the model's own parameters, as it was and as it is.

    Attributes:
        tuned: its values.
        original: None for a bias that the model does not have.
        further: what makes the changes of matrices, or of biases, that stand in it besides.
    """

    tuned: Tensor
    original: Tensor | None
    further: tuple[Callable[[], Tensor], ...] = ()

    @property
    def start(self) -> Tensor:
        """The original values; zeros for an added bias."""
        return torch.zeros_like(self.tuned) if self.original is None else self.original.detach()

    def change(self) -> Tensor:
        """The difference, in float32 at least."""
        wide = torch.promote_types(self.tuned.dtype, torch.float32)
        change = (self.tuned.double() - self.start.to(self.tuned.device).double()).to(wide)
        for make in self.further:
            change = change + make().to(change)
        return change


@dataclass
class Delta:
    """One delta, as it is stored.

    Attributes:
        name: its own.
        method: under which it is stored.
        matrices: changes of matrices by key of the site.
        vectors: those that are linear in vectors of their own, so that the vectors can be merged in their place. They
            are among ``values``, until :meth:`lift` or :meth:`unscaled`.
        own: of the model's own parameters, by full name; without the task head's.
        values: all other trained values, by key.
        starts: what those of them have started from of which it is known, by key.
        buffers: what the file holds besides, by key.
        head: values of the task head, by full name.
        task: that it was trained for.
        tensors: all that is stored, by key.
        by_entries: whether its method chooses entries of parameters, which another delta need not have.
        lifted: whether changes of matrices have become changes of the parameters that hold them.
    """

    name: str
    method: Method
    matrices: dict[str, MatrixChange] = field(default_factory=dict)
    vectors: dict[str, MatrixChange] = field(default_factory=dict)
    own: dict[str, Own] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    head: dict[str, Tensor] = field(default_factory=dict)
    task: dict[str, Any] | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    by_entries: bool = False
    lifted: bool = False

    def kinds(self) -> list[str]:
        """What each term of its method is merged as: changes of matrices, of entries, or by the method's name."""
        if self.by_entries:
            return ["entries"]
        kinds = []
        for term in terms(self.method):
            matrices = any(key.startswith(term.path) for key in self.matrices)
            # vectors at other matrices are other tensors, but comparable changes
            vectors = sorted(key for key in self.vectors if key.startswith(term.path))
            kinds.append(f"{term.path}matrices" if matrices else " ".join([f"{term.path}{term.method.name}", *vectors]))
        return kinds

    def lift(self) -> Delta:
        """The same, with all of its changes as those of the model's own parameters."""
        own = self._own_biases(self.vectors.values())
        for change in (*self.matrices.values(), *self.vectors.values()):
            stored = change.module.get_parameter("weight").detach()
            before = own.get(change.parameter, Own(stored, stored))
            own[change.parameter] = replace(before, further=(*before.further, change.in_parameter))
        return replace(self._without_vectors(), matrices={}, own=own, lifted=True)

    def unscaled(self) -> Delta:
        """The same, with what its vectors change as changes of matrices and biases."""
        if not self.vectors:
            return self
        own, matrices = self._own_biases(self.vectors.values()), {**self.matrices, **self.vectors}
        return replace(self._without_vectors(), matrices=matrices, own=own, by_entries=True)

    def add_biases(self) -> None:
        """Take note of the biases that change with matrices."""
        found = self._own_biases(self.matrices.values())
        # no form that changes a matrix alone can hold them
        self.by_entries |= any(own.further for own in found.values())
        self.own = found

    def _own_biases(self, changes: Iterable[MatrixChange]) -> dict[str, Own]:
        """``own`` with the biases that come with these changes."""
        own = dict(self.own)
        for change in changes:
            if change.bias_change() is not None:
                name, stored = f"{change.site.module}.bias", change.module.get_parameter("bias").detach()
                before = own.get(name, Own(stored, stored))
                own[name] = replace(before, further=(*before.further, change.in_bias))
        return own

    def _without_vectors(self) -> Delta:
        # all whose start is known are vectors
        kept = {key: value for key, value in self.values.items() if key not in self.starts}
        return replace(self, vectors={}, values=kept, starts={})


def comparable(deltas: Sequence[Delta]) -> list[Delta]:
    """The deltas in terms that all share: where methods differ that change weights, as changes of the parameters."""
    kinds = [delta.kinds() for delta in deltas]
    if all(found == kinds[0] for found in kinds) or not all(delta.method.mergeable for delta in deltas):
        return list(deltas)
    return [delta.lift() for delta in deltas]


def read_delta(attachment: Attachment, modules: Mapping[str, nn.Module]) -> Delta:
    """What an attachment has trained.

    Args:
        attachment: which must not be live.
        modules: the bare model's modules by name.

    Raises:
        StateError: if it changes a matrix that is tied to another one.
    """
    method = attachment.method.stored(attachment.forms)
    delta = Delta(attachment.name, method, task=attachment.task, tensors=stored_tensors(attachment))
    for key, placed in attachment.placed.items():
        form = placed.form.stored()
        if form is None:
            continue
        term = term_of(method, key)
        if term.gated:  # no change of weights: how much of it acts depends on the input
            _read_values(delta, key, form)
        elif isinstance(placed.site, WeightSite) and isinstance(form, WeightForm):
            refuse_tied(attachment, f"{placed.site.module}.weight", modules)
            change = MatrixChange(placed.site, form, modules[placed.site.module])
            if form.neutral is None:
                delta.matrices[key] = change
                continue
            delta.vectors[key] = change
            _read_values(delta, key, form)
            for name, vector in form.named_parameters():
                delta.starts[f"{key}.{name}"] = torch.full_like(vector, form.neutral, requires_grad=False)
        elif isinstance(placed.form, SelectionForm):
            delta.by_entries = True
        elif placed.site is not None and term.method.mergeable:
            delta.by_entries = True
            for name, value in placed.site.merge(form, modules).items():
                original = _original(modules, name)
                before = delta.own.get(name)
                # rows of a fused matrix have masks of their own
                tuned = value if before is None or original is None else before.tuned + (value - original.detach())
                delta.own[name] = Own(tuned, original)
        elif not term.method.mergeable:  # else factors that the changes of matrices share
            _read_values(delta, key, form)
    for name, parameter in attachment.selection:
        if name in attachment.head_names:
            delta.head[name] = parameter.detach()
        else:
            delta.own[name] = Own(parameter.detach(), _original(modules, name))
    delta.add_biases()
    return delta


def _read_values(delta: Delta, key: str, form: Form) -> None:
    delta.values.update({f"{key}.{name}": value.detach() for name, value in form.named_parameters()})
    delta.buffers.update({f"{key}.{name}": form.get_buffer(name) for name in form.saved_buffers})


def _original(modules: Mapping[str, nn.Module], name: str) -> Tensor | None:
    owner, _, attribute = name.rpartition(".")
    return modules[owner]._parameters[attribute]
