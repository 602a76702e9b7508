"""KronA: the change of a weight matrix as a Kronecker product of two small ones.

Letters: A (a1, a2) and B (b1, b2) the factors, s the scale, d_in = a2 b2 and d_out = a1 b1 the matrix's width and
height.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Form, Insertion, ParallelForm, WeightForm, WeightSite, parallel_sites, weight_sites

__all__ = ["KronA", "KronAB", "Kronecker", "KroneckerBlock", "KroneckerWeight", "kronecker_product"]


def kronecker_product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """(A kron B) x for x (..., a2 b2), of shape (..., a1 b1), without the matrix A kron B.

    With x cut row by row into X (a2, b2) it is A X B^T (a1, b1), again row by row. The product that makes fewer
    operations comes first.
    """
    (a1, a2), (b1, b2) = A.shape, B.shape
    blocks = x.reshape(*x.shape[:-1], a2, b2)
    if a2 * b1 * (b2 + a1) <= a1 * b2 * (a2 + b1):
        return F.linear(F.linear(blocks, B).mT, A).mT.flatten(-2)
    return F.linear(F.linear(blocks.mT, A).mT, B).flatten(-2)


class Kronecker(Form):
    r"""dh = s (A kron B) x, with A (a1, a2) and B (b1, b2).

    At the start a factor is zero or uniform within 1/sqrt(a2), or 1/sqrt(b2): Kaiming-uniform by its own width, not by
    that of the whole matrix.

    Args:
        shape: (a1, a2) of A.
        other: (b1, b2) of B.
        scale: s.
        zero: the factor that starts at zero: ``"A"``, ``"B"`` or ``"none"``.
        dtype: type of the parameters.
        device: where they are.
    """

    formula: ClassVar[str] = "{x} (A kron B)"

    def __init__(
        self,
        shape: tuple[int, int],
        other: tuple[int, int],
        scale: float = 1.0,
        zero: str = "B",
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.empty(other, dtype=dtype, device=device))
        self.scale = scale
        for name, factor in (("A", self.A), ("B", self.B)):
            if name == zero:
                nn.init.zeros_(factor)
            else:
                nn.init.kaiming_uniform_(factor, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., a1 b1) for x (..., a2 b2)."""
        # the scale goes to a factor, which is smaller than the result
        return kronecker_product(x, self.scale * self.A.to(x.dtype), self.B.to(x.dtype))


class KroneckerBlock(Kronecker, ParallelForm):
    """dh = s (A kron B) x, plus s_res x where there is a ``residual`` s_res (a scalar)."""

    def __init__(self, shape: tuple[int, int], other: tuple[int, int], residual: bool = False, **options: Any) -> None:
        super().__init__(shape, other, **options)
        self.residual = nn.Parameter(torch.ones_like(self.A[0, 0])) if residual else None

    def as_text(self, x: str) -> str:
        """With what ``residual`` adds."""
        return super().as_text(x) if self.residual is None else f"s {super().as_text(x)} + s_res {x}"

    def factor(self) -> str:
        """The scale, which is none of the ``residual``."""
        return super().factor() if self.residual is None else ""

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., d) for x (..., d)."""
        change = super().forward(x)
        return change if self.residual is None else change + (self.residual.to(x.dtype) * x).to(change.dtype)


class KroneckerWeight(Kronecker, WeightForm):
    """The change s (A kron B) of a matrix; the product is built for merging alone."""

    def look_up(self, ids: Tensor) -> Tensor:
        """The change of an embedding's output: the column of A kron B for each of ``ids``, from one of A and of B."""
        width = self.B.shape[1]
        left = F.embedding(ids // width, self.scale * self.A.T)
        right = F.embedding(ids % width, self.B.T)
        return (left[..., :, None] * right[..., None, :]).flatten(-2)

    def weight_delta(self) -> Tensor:
        """The product s (A kron B), (d_out, d_in)."""
        return torch.kron(self.scale * self.A, self.B)


def _near_square(features: int) -> int:
    """The largest divisor of ``features`` that is not above its square root."""
    return next(number for number in range(math.isqrt(features), 0, -1) if features % number == 0)


def _divided(chosen: int | None, features: int, name: str, owner: str, key: str) -> tuple[int, int]:
    """``features`` as a product of two: of ``chosen``, or by default near the square.

    Raises:
        MethodError: if ``chosen`` is no divisor.
    """
    first = _near_square(features) if chosen is None else chosen
    if features % first:
        divisors = ", ".join(str(number) for number in range(1, features + 1) if features % number == 0)
        side = "height" if name == "rows" else "width"
        raise MethodError(
            f"{owner}: {name}={first} does not divide the {side} {features} of {key}. It can be one of {divisors}. For "
            f"several sizes leave it out, or join two methods: '{owner}({name}=..., targets=...) + {owner}(...)'."
        )
    return first, features // first


@register
@dataclass(frozen=True)
class KronA(Method):
    r"""Kronecker adapter, h = W0 x + s (A kron B) x.

    W0 is frozen; A (a1, a2) and B (b1, b2) are small, with a1 b1 = d_out and a2 b2 = d_in. A kron B consists of a1 x a2
    blocks, each B times an entry of A. Its rank is the product of theirs, so that few parameters can make a change of
    full rank. One factor is zero at the start, so that the model is unchanged; the change can be folded into W0
    afterwards.

    When to use:
        For a very small delta: about the size of LoRA with rank 1, but without its low rank. Raise ``scale`` where it
        learns too slowly. ``rows`` and ``columns`` choose the shape of A, and with it size and rank: A and B both
        square allow full rank; a matrix 768 x 768 with A (24, 32) and B (32, 24) has exactly the size of LoRA with
        rank 1 and a rank of 576 at most.

    Cost:
        Parameters: a1 a2 + b1 b2 for each matrix. BERT-base, queries and values, A (24, 24) and B (32, 32): 38,400
            (0.04 %).
        Memory: gradients and optimizer state of A and B alone. Activations: the matrix's input, and about as many
            values again in between.
        Time: two small products: a2 b1 (b2 + a1) operations for each token and matrix, or a1 b2 (a2 + b1) where that is
            less. For 768 x 768 that is 43,008 beside the 589,824 of the matrix itself. A kron B is not built.
        Inference: the same products; none after merging.

    Terms:
        Site: linear maps and tables of embeddings; by default the maps that make queries and values.
        Form: s (A kron B), a Kronecker product of two small matrices.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.KronA(scale=2.0))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 matrices, A (4, 4) and B (8, 8)
        320

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/krona \
            --method krona --scale 4 --targets "attention.*"

    Differs from the paper:
        There is no code of the authors. The paper chooses the shapes for each model; the default here takes for a1
        and a2 the largest divisors of d_out and d_in that are not above their square roots, as LoKr in LyCORIS does,
        so that the two factors of a square matrix are square. The factor at zero is B by default. In a fused matrix
        (GPT-2) each of query, key and value has factors of its own.

    Source:
        Edalati et al. 2022, arXiv 2212.10650, section 3.
    """

    scale: float = option(1.0, "the scale s of the change", minimum=0, exclusive=True)
    rows: int | None = option(None, "rows a1 of A, a divisor of the matrix's height; near its root if none", minimum=1)
    columns: int | None = option(None, "columns a2 of A, a divisor of the width; near its root if none", minimum=1)
    zero: str = option("B", "the factor that is zero at the start", choices=("A", "B"))
    targets: Targets = option(Targets(("attention.query", "attention.value")), "which matrices to change")

    name: ClassVar[str] = "krona"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Edalati et al.", "KronA: Parameter Efficient Tuning with Kronecker Adapter", 2022, "2212.10650"
    )
    learning_rate: ClassVar[float] = 1e-2
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A Kronecker form at every selected matrix.

        Raises:
            MethodError: if ``rows`` or ``columns`` does not divide a side of a matrix.
        """
        for site in weight_sites(model, anatomy, self.targets, ("linear", "embedding")):
            yield Placement(site, self._form(site))

    def _form(self, site: WeightSite) -> KroneckerWeight:
        a1, b1 = _divided(self.rows, site.out_features, "rows", self.name, site.key)
        a2, b2 = _divided(self.columns, site.in_features, "columns", self.name, site.key)
        return KroneckerWeight((a1, a2), (b1, b2), self.scale, self.zero, site.dtype, site.device)


@register
@dataclass(frozen=True)
class KronAB(Method):
    r"""Kronecker adapter beside a block, FFN(x) + s (A kron B) x (KronA_B), with ``residual`` + s_res x (KronA_B_res).

    The branch reads the input of a whole feed-forward sublayer and is added to its result; it has no non-linearity.
    A and B both start at random, so that the model changes at once; s_res is one trained number that starts at one.

    When to use:
        Where the change may stay beside the model: the paper finds it a little better than ``krona`` at the same
        size, with ``residual`` better still. It cannot be merged, because it passes by a non-linear block.

    Cost:
        Parameters: a1 a2 + b1 b2 for each sublayer, one more with ``residual``; BERT-base, A (24, 24) and B (32, 32):
            19,200 (0.02 %).
        Memory: gradients and optimizer state of A and B alone; activations of one more hidden state for each sublayer.
        Time: two small products for each sublayer, as for ``krona``.
        Inference: the same products; they cannot be merged. The paper measures 127 % of the time of the bare model,
            with ``residual`` 136 %.

    Terms:
        Site: feed-forward sublayers, from what their first matrix reads to their result; attention, if chosen.
        Form: s (A kron B), a Kronecker product of two small matrices; with ``residual`` a multiple of the input too.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.KronAB(residual=True))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, A (4, 4), B (8, 8) and s_res
        162

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/krona-b \
            --method krona-b --residual

    Differs from the paper:
        There is no code of the authors. In models that normalise before each sublayer the branch reads the normalised
        input, as the sublayer itself does. The scale is tuned for each task in the paper; it is 1 here. ``zero`` lets
        one factor start at zero, as in ``krona``; without ``residual`` the model is unchanged then.

    Source:
        Edalati et al. 2022, arXiv 2212.10650, section 3.
    """

    scale: float = option(1.0, "the scale s of the change", minimum=0, exclusive=True)
    residual: bool = option(False, "add a trained multiple of the input too (KronA_B_res)")
    rows: int | None = option(None, "rows a1 of A, a divisor of the hidden size; near its root if none", minimum=1)
    columns: int | None = option(None, "columns a2 of A, a divisor too; near the root if none", minimum=1)
    zero: str = option("none", "the factor that is zero at the start", choices=("none", "A", "B"))
    targets: Targets = option(Targets(("ffn",)), "beside which sublayers")

    name: ClassVar[str] = "krona-b"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.PARALLEL
    paper: ClassVar[Paper] = KronA.paper
    learning_rate: ClassVar[float] = 1e-2
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A Kronecker form beside every selected sublayer.

        Raises:
            MethodError: if ``rows`` or ``columns`` does not divide the hidden size.
        """
        for site in parallel_sites(model, anatomy, self.targets):
            a1, b1 = _divided(self.rows, site.hidden_size, "rows", self.name, site.key)
            a2, b2 = _divided(self.columns, site.hidden_size, "columns", self.name, site.key)
            options = {"scale": self.scale, "zero": self.zero, "dtype": site.dtype, "device": site.device}
            yield Placement(site, KroneckerBlock((a1, a2), (b1, b2), self.residual, **options))
