"""Low-rank decompositions of one matrix, or of many that are slices of one tensor and share their factors.

A slice is V M U^T: U (d_in, r_in) and V (d_out, r_out) are shared, and a small core M (r_out, r_in) tells slices apart.
A method makes one decomposition and a form for each site::

    factors = CP(shape=(d_in, d_out, count), rank=8)
    yield Placement(None, factors, shared="factors")
    for number, site in enumerate(sites):
        yield Placement(site, SharedSlice(factors, number))

Letters: d_in and d_out the width and height of a slice, R or r ranks, N the number of slices.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.sites import Form, WeightForm

__all__ = ["CP", "SVD", "UV", "Decomposition", "Index", "SharedSlice", "TensorTrain", "Tucker", "truncated_svd"]

#: Which slices: a number or a range for each mode of the tensor that counts slices.
Index = int | slice | tuple[int | slice, ...]


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The best approximation of ``matrix`` (m, n) of a rank k: left (m, k), singular values (k), right (k, n).

    left @ diag(values) @ right misses the matrix by the root of the sum of the other squared singular values, and no
    matrix of that rank comes nearer (Eckart and Young 1936). Computed in float32 at least.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    left, values, right = torch.linalg.svd(matrix.detach().to(wide), full_matrices=False)
    return left[:, :rank], values[:rank], right[:rank]


def _rows(factor: Tensor, index: int | slice) -> Tensor:
    """Rows of ``factor`` (N, ...), always with the first dimension."""
    if isinstance(index, slice):
        return factor[index]
    index = range(len(factor))[index]  # from the end, if negative
    return factor[index : index + 1]


class Decomposition(Form, ABC):
    """Factors that slices share, kept once; the slices' forms refer to it.

    Subclasses have the parameter ``U`` (d_in, r_in), the factor ``V`` (d_out, r_out), and say what the cores are.
    """

    U: nn.Parameter

    def output_factor(self) -> Tensor:
        """V (d_out, r_out)."""
        return self.get_parameter("V")

    @abstractmethod
    def cores(self, index: Index) -> Tensor:
        """The cores M (n, r_out, r_in) of the n slices that ``index`` names."""

    def spread(self, thin: Tensor, index: Index, transposed: bool = False) -> Tensor:
        """M_i t of every slice: from one t (..., r_in) to (..., n, r_out); with ``transposed`` by M_i^T."""
        cores = self.cores(index).to(thin)
        cores = cores.mT if transposed else cores
        return F.linear(thin, cores.flatten(0, 1)).view(*thin.shape[:-1], *cores.shape[:2])

    def gather(self, thin: Tensor, index: Index, transposed: bool = False) -> Tensor:
        """The sum of M_i t_i over the slices: from (..., n, r_in) to (..., r_out); ``transposed`` as above."""
        cores = self.cores(index).to(thin)
        cores = cores.mT if transposed else cores
        return F.linear(thin.flatten(-2), cores.transpose(0, 1).flatten(1))

    def dense(self, index: Index) -> Tensor:
        """The slices themselves, (n, d_out, d_in)."""
        return self.output_factor() @ self.cores(index) @ self.U.T

    def _factor(self, shape: tuple[int, ...], bound: float, like: dict[str, Any]) -> nn.Parameter:
        return nn.Parameter(nn.init.uniform_(torch.empty(shape, **like), -bound, bound))


class CP(Decomposition):
    r"""Canonical polyadic form: X = sum_r lambda_r a_r o b_r o c_r ..., in any number of modes.

    The first mode is the input; the next ``rows`` modes together are the output, the last of them counting fastest; any
    further ones count slices. So a slice is V diag(lambda * c_i) U^T. The parameters are ``U``; ``V``, or ``V1``,
    ``V2``, ... of several modes; ``P``, or ``P1``, ``P2``, ...; each (size of the mode, R); ``scales`` is lambda (R).

    At the start U is uniform within 1/sqrt(d_in), the last of the output's factors is zero, the others are
    Xavier-uniform, and lambda is one.

    Args:
        shape: sizes of the modes.
        rank: R.
        rows: how many modes make the output.
        scaled: whether there is a lambda.
        dtype, device: of the parameters.
    """

    formula: ClassVar[str] = "U diag(lambda o P_i) V"

    def __init__(
        self,
        shape: Sequence[int],
        rank: int,
        *,
        rows: int = 1,
        scaled: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        like = {"dtype": dtype, "device": device}
        outputs, counts = shape[1 : 1 + rows], shape[1 + rows :]
        self.U = self._factor((shape[0], rank), 1 / math.sqrt(shape[0]), like)
        self._outputs = ["V"] if rows == 1 else [f"V{number}" for number in range(1, rows + 1)]
        self._counts = ["P"] if len(counts) == 1 else [f"P{number}" for number in range(1, len(counts) + 1)]
        for name, size in (*zip(self._outputs, outputs, strict=True), *zip(self._counts, counts, strict=True)):
            self.register_parameter(name, self._factor((size, rank), math.sqrt(6 / (size + rank)), like))
        nn.init.zeros_(self.get_parameter(self._outputs[-1]))
        self.scales = nn.Parameter(torch.ones_like(self.U[0])) if scaled else None

    def output_factor(self) -> Tensor:
        """The column-wise Kronecker product of the output's factors, (d_out, R)."""
        product: Tensor = self.get_parameter(self._outputs[0])
        for name in self._outputs[1:]:
            product = (product[:, None] * self.get_parameter(name)).flatten(0, 1)
        return product

    def diagonals(self, index: Index) -> Tensor | None:
        """The diagonals lambda * c_i of the cores, (n, R); None where they are all ones."""
        product = None if self.scales is None else self.scales[None]
        numbers = index if isinstance(index, tuple) else (index,)
        if len(numbers) != len(self._counts) or sum(isinstance(number, slice) for number in numbers) > 1:
            raise ValueError(
                f"An index has a number for each of {len(self._counts)} modes, of which one may be a range."
            )
        for name, number in zip(self._counts, numbers, strict=True):
            chosen = _rows(self.get_parameter(name), number)
            product = chosen if product is None else product * chosen
        return product

    def cores(self, index: Index) -> Tensor:
        """The diagonal cores (n, R, R)."""
        diagonals = self.diagonals(index)
        return torch.diag_embed(torch.ones_like(self.U[:1]) if diagonals is None else diagonals)

    def spread(self, thin: Tensor, index: Index, transposed: bool = False) -> Tensor:
        """As for every decomposition; a diagonal core needs no matrix product."""
        diagonals = self.diagonals(index)
        return thin[..., None, :] if diagonals is None else thin[..., None, :] * diagonals.to(thin)

    def gather(self, thin: Tensor, index: Index, transposed: bool = False) -> Tensor:
        """As for every decomposition; a diagonal core needs no matrix product."""
        diagonals = self.diagonals(index)
        return (thin if diagonals is None else thin * diagonals.to(thin)).sum(-2)


class UV(CP):
    """Plain factors of one matrix, V U^T: U (d_in, r), V (d_out, r), V zero at the start."""

    formula: ClassVar[str] = "U V"

    def __init__(self, shape: tuple[int, int], rank: int, **place: Any) -> None:
        super().__init__(shape, rank, **place)


class SVD(CP):
    """The form of a singular value decomposition, V diag(lambda) U^T.

    At the start U and V have orthonormal columns, where the rank allows it, and lambda (``scales``) is zero.
    """

    formula: ClassVar[str] = "U diag(lambda) V"

    def __init__(self, shape: tuple[int, int], rank: int, **place: Any) -> None:
        super().__init__(shape, rank, scaled=True, **place)
        for name in ("U", "V"):
            factor = self.get_parameter(name)
            if not factor.is_meta:
                with torch.no_grad():
                    factor.copy_(nn.init.orthogonal_(torch.empty(factor.shape)))
        assert self.scales is not None
        nn.init.zeros_(self.scales)


class Tucker(Decomposition):
    r"""Tucker form of a tensor (d_in, d_out, N): the core of slice n is M_n[j, i] = sum_k C[i, j, k] P[n, k].

    ``U`` (d_in, R1), ``V`` (d_out, R2), ``P`` (N, R3), ``C`` (R1, R2, R3). At the start U is uniform within
    1/sqrt(d_in), V zero, P and C Xavier-uniform. CP is the special case of a super-diagonal C.

    Args:
        shape: (d_in, d_out, N).
        ranks: R1, R2 and R3, or one number for all.
        dtype, device: of the parameters.
    """

    formula: ClassVar[str] = "U (C P_i) V"

    def __init__(
        self,
        shape: tuple[int, int, int],
        ranks: int | tuple[int, int, int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        like = {"dtype": dtype, "device": device}
        first, second, third = (ranks,) * 3 if isinstance(ranks, int) else ranks
        self.U = self._factor((shape[0], first), 1 / math.sqrt(shape[0]), like)
        self.V = self._factor((shape[1], second), 0, like)
        self.P = self._factor((shape[2], third), math.sqrt(6 / (shape[2] + third)), like)
        # torch takes the first two dimensions of a cube for the fans, each times the third
        self.C = self._factor((first, second, third), math.sqrt(6 / ((first + second) * third)), like)

    def cores(self, index: Index) -> Tensor:
        """The cores (n, R2, R1)."""
        (number,) = index if isinstance(index, tuple) else (index,)
        return torch.einsum("ijk,nk->nji", self.C, _rows(self.P, number))


class TensorTrain(Decomposition):
    r"""Tensor train over (output, number of the slice, input): slice n is V S_n U^T.

    ``U`` (d_in, r), ``V`` (d_out, r), ``S`` (N, r, r). At the start U is uniform within 1/sqrt(d_in), V zero, S uniform
    within 1/sqrt(r).

    Args:
        shape: (d_in, d_out, N).
        rank: r.
        dtype, device: of the parameters.
    """

    formula: ClassVar[str] = "U S_i V"

    def __init__(
        self,
        shape: tuple[int, int, int],
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        like = {"dtype": dtype, "device": device}
        self.U = self._factor((shape[0], rank), 1 / math.sqrt(shape[0]), like)
        self.V = self._factor((shape[1], rank), 0, like)
        self.S = self._factor((shape[2], rank, rank), 1 / math.sqrt(rank), like)

    def cores(self, index: Index) -> Tensor:
        """The cores S_n (n, r, r)."""
        (number,) = index if isinstance(index, tuple) else (index,)
        return _rows(self.S, number)


class SharedSlice(WeightForm):
    r"""dh = s V dropout(M U^T x): one slice of a shared decomposition, or several side by side.

    It has no parameters of its own, and refers to a decomposition that the attachment keeps once.

    Args:
        decomposition: the shared factors.
        index: which of its slices; of several, a range.
        scale: s.
        dropout: probability of zeroing an entry of the thin vector between M and V while training.
        along_input: whether several slices divide the matrix's input and not its output.
        transposed: whether the matrix is made of transposed slices.
    """

    def __init__(
        self,
        decomposition: Decomposition,
        index: Index,
        scale: float = 1.0,
        dropout: float = 0.0,
        *,
        along_input: bool = False,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        # in a tuple, so that the shared factors are not registered again with every site
        self._shared = (decomposition,)
        self.index = index
        self.scale, self.dropout = scale, dropout
        self.along_input, self.transposed = along_input, transposed

    def as_text(self, x: str) -> str:
        """A slice i of the shared factors."""
        return f"{x} {self._shared[0].as_text(x)}"

    @property
    def decomposition(self) -> Decomposition:
        """The shared factors."""
        return self._shared[0]

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., d_out) for x (..., d_in)."""
        shared = self._shared[0]
        factors: tuple[Tensor, Tensor] = (shared.U, shared.output_factor())
        reads, writes = reversed(factors) if self.transposed else factors
        if self.along_input:
            thin = x.reshape(*x.shape[:-1], -1, reads.shape[0]) @ reads.to(x)
            thin = shared.gather(thin, self.index, self.transposed)
        else:
            thin = shared.spread(x @ reads.to(x), self.index, self.transposed)
        if self.dropout and self.training:
            thin = F.dropout(thin, self.dropout)
        change = self.scale * (thin @ writes.to(thin).T)
        return change if self.along_input else change.flatten(-2)

    def weight_delta(self) -> Tensor:
        """The slices side by side, times s, (d_out, d_in)."""
        dense = self.scale * self._shared[0].dense(self.index)
        dense = dense.mT if self.transposed else dense
        return dense.transpose(0, 1).flatten(1) if self.along_input else dense.flatten(0, 1)
