"""FacT: all matrices of a model as slices of one tensor, whose decomposition is trained.

Letters: D the width of the model, h the height of a block, N the number of blocks, r the rank, s the scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.reparameterized.decompositions import Decomposition, SharedSlice, TensorTrain, Tucker
from deltune.sites import Insertion, WeightSite, weight_sites

__all__ = ["Blocks", "FacT"]


@dataclass(frozen=True)
class Blocks:
    """How matrices that have one side in common are cut into blocks of one size, (height, width).

    ``width`` is the common side, which for a transformer is its hidden size. ``height`` is the greatest common divisor
    of the sides that are cut, and of ``width`` too where that divisor is above it: 768 in BERT-base, 192 for 576 x 576,
    192 x 576 and 1536 x 576. A matrix that reads ``width`` features is cut along its output. Any other one writes
    ``width`` features and is cut along its input; unless the blocks are square, it consists of transposed blocks.
    """

    width: int
    height: int
    sites: tuple[WeightSite, ...]

    @classmethod
    def of(cls, sites: tuple[WeightSite, ...], anatomy: Anatomy) -> list[Blocks]:
        """The matrices in groups by width: in most models there is one."""
        groups: dict[int, list[WeightSite]] = {}
        for site in sites:
            groups.setdefault(_width(site, anatomy), []).append(site)
        return [cls(width, _height(width, group), tuple(group)) for width, group in groups.items()]

    def count(self, site: WeightSite) -> int:
        """The number of blocks of a matrix."""
        return (site.in_features if self.along_input(site) else site.out_features) // self.height

    def along_input(self, site: WeightSite) -> bool:
        """Whether the matrix is cut along its input."""
        return site.in_features != self.width

    def transposed(self, site: WeightSite) -> bool:
        """Whether its blocks are transposed."""
        return self.along_input(site) and self.height != self.width


def _sides(site: WeightSite) -> tuple[int, int]:
    return site.out_features, site.in_features


def _height(width: int, sites: list[WeightSite]) -> int:
    cut = math.gcd(*(site.out_features if site.in_features == width else site.in_features for site in sites))
    return cut if cut <= width else math.gcd(cut, width)


def _width(site: WeightSite, anatomy: Anatomy) -> int:
    """The hidden size, if the matrix has that side; else its own width."""
    try:
        hidden = anatomy.stack_of(site.part).hidden_size
    except KeyError:
        return site.in_features
    return hidden if hidden in _sides(site) else site.in_features


@register
@dataclass(frozen=True)
class FacT(Method):
    r"""Factor-tuning: W_k + s V S_k U^T for every block k of every matrix, with one U and one V for all of them.

    All matrices are cut into N blocks of one size, which are the slices of one tensor. U (D, r) and V (h, r) are
    shared; a small S_k (r, r) tells the blocks apart. In ``tensor-train`` form (FacT-TT) each S_k is trained itself; in
    ``tucker`` form (FacT-TK) S_k = sum_c P[k, c] C[:, :, c], with P (N, r) and one shared C (r, r, r). V is zero at the
    start, so that the model is unchanged. The change can be folded into the matrices afterwards.

    When to use:
        For deltas far smaller than LoRA's that still change every matrix. ``scale`` matters more than elsewhere: the
        authors choose it among 0.01, 0.1, 1, 10 and 100 for each task. ``tucker`` takes fewer parameters as long as the
        rank is well below the number of blocks.

    Cost:
        Parameters: r (D + h) + N r^2, or r (D + h) + N r + r^3 with ``tucker``. BERT-base has 144 blocks of 768 x 768:
            21,504 at rank 8 (0.02 %), 61,440 at rank 16; ``tucker`` at rank 16: 30,976.
        Memory: gradients and optimizer state of the factors alone. Activations: the input of every matrix.
        Time: two thin products and a tiny one for each matrix; r^3 operations for each block with ``tucker``.
        Inference: the same products; none after merging.

    Terms:
        Site: linear maps; by default those of attention and feed-forward layers.
        Form: s V S_k U^T for each block, with U and V shared by all matrices.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.FacT(rank=4))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # U and V 4 * 32 each; 16 blocks, S_k 4 * 4 each
        512

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/fact \
            --method fact --decomposition tucker --rank 16 --scale 10

    Differs from the paper:
        The paper cuts a vision transformer, where every side is a multiple of the hidden size. Here the height h of a
        block is the greatest common divisor of all sides that are cut, which gives the same blocks there. With
        grouped-query attention and gated layers it is less than D; a matrix that writes D features and does not read as
        many is then cut along its input and made of transposed blocks. Matrices whose hidden sizes differ (CLIP) have
        factors of their own. In Tucker form the authors' code transposes the cores of the matrix that narrows; here all
        blocks are alike. The rank is the smallest that the authors use and the scale the middle one; weight decay and
        dropout are theirs. The learning rate is three times their 1e-3, which goes with a hundred epochs. Dropout comes
        after S_k, as in the authors' code.

    Source:
        Jie and Deng 2023, arXiv 2212.03145, section 3; authors' code: JieShibo/PETL-ViT.
    """

    decomposition: str = option(
        "tensor-train", "an S of its own for each block, or a Tucker form of them", choices=("tensor-train", "tucker")
    )
    rank: int = option(8, "rank r of all factors, at most the height of a block", minimum=1)
    scale: float = option(1.0, "the scale s of the change", minimum=0, exclusive=True)
    dropout: float = option(0.1, "dropout between S and V while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.*", "ffn.*")), "which matrices to change")

    name: ClassVar[str] = "fact"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Jie and Deng", "FacT: Factor-Tuning for Lightweight Adaptation on Vision Transformer", 2023, "2212.03145"
    )
    learning_rate: ClassVar[float] = 3e-3
    weight_decay: ClassVar[float] = 1e-4
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The shared factors of every group of matrices, and a form at each matrix.

        Raises:
            MethodError: if the rank exceeds the height of a block.
        """
        for blocks in Blocks.of(weight_sites(model, anatomy, self.targets), anatomy):
            factors = self._factors(blocks)
            yield Placement(None, factors, shared=f"factors.{blocks.width}")
            first = 0
            for site in blocks.sites:
                index = slice(first, first + blocks.count(site))
                form = SharedSlice(
                    factors,
                    index,
                    self.scale,
                    self.dropout,
                    along_input=blocks.along_input(site),
                    transposed=blocks.transposed(site),
                )
                yield Placement(site, form)
                first = index.stop

    def _factors(self, blocks: Blocks) -> Decomposition:
        if self.rank > blocks.height:
            raise MethodError(
                f"fact: rank {self.rank} exceeds the height {blocks.height} of the blocks, which is the greatest "
                f"common divisor of the cut sides of all matrices of width {blocks.width}. Use a smaller rank, or "
                "fewer targets."
            )
        shape = (blocks.width, blocks.height, sum(blocks.count(site) for site in blocks.sites))
        kind = TensorTrain if self.decomposition == "tensor-train" else Tucker
        return kind(shape, self.rank, blocks.sites[0].dtype, blocks.sites[0].device)
