"""LoRTA: the attention matrices of all layers as one tensor in canonical polyadic form.

Letters: d the hidden size, H the number of heads, L of layers, R the rank, s the scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.reparameterized.decompositions import CP, SharedSlice
from deltune.sites import Insertion, WeightSite, weight_sites

__all__ = ["LoRTA"]

_ROLES = ("attention.query", "attention.key", "attention.value", "attention.output")


@dataclass(frozen=True)
class _Shape:
    """What matrices must have in common to be slices of one tensor."""

    stack: str
    hidden_size: int
    heads: int
    head_dim: int


@register
@dataclass(frozen=True)
class LoRTA(Method):
    r"""Low-rank tensor adaptation: W + s V diag(m) U^T, where all matrices are slices of one tensor of five modes.

    The modes are the input (d), the heads (H), the features of a head (d / H), the layers (L), and which matrix it is:
    query, key, value or output (4). The tensor is a sum of R products of a vector for each mode. So V consists of the
    products of a head's and a feature's entry, and m of those of the layer's and the matrix's. The matrix that joins
    the heads has the transposed slice. The factor of a head's features is zero at the start, so that the model is
    unchanged. The change can be folded into the matrices afterwards.

    When to use:
        Where a delta is to be as small as can be: at rank 4 all attention matrices of BERT-base together take fewer
        parameters than one matrix with LoRA of rank 3. Since it is so small, ranks may be well above LoRA's.

    Cost:
        Parameters: R (d + H + d / H + L + 4). BERT-base: 860 R, at R = 16 13,760 (0.013 %). With fewer heads for keys
            and values there are two tensors, of queries and outputs and of keys and values, each with 2 for the 4.
        Memory: gradients and optimizer state of the factors alone. Activations: the input of every matrix.
        Time: two thin products for each matrix, as LoRA of rank R.
        Inference: the same products; none after merging.

    Terms:
        Site: the matrices of attention; by default all four.
        Form: a slice of one tensor in canonical polyadic form.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.LoRTA(rank=4))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 4 (32 + 2 heads + 16 + 2 layers + 4 matrices)
        224

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/lorta \
            --method lorta --rank 32

    Differs from the paper:
        The paper has one tensor for equal numbers of heads. Here matrices with other numbers of heads (grouped-query
        attention), of other stacks and of other inputs have tensors of their own, in which modes count the chosen
        layers and matrices only. U is uniform within 1/sqrt(d), the factors of heads, layers and matrices are standard
        normal, and the factor of a head's features is zero. Rank, scale and learning rate are this library's choice.

    Source:
        Hounie et al. 2024, arXiv 2410.04060.
    """

    rank: int = option(16, "rank R of the tensor", minimum=1)
    scale: float = option(1.0, "the scale s of the change", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout between the two thin products while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.*",)), "which matrices of attention to change")

    name: ClassVar[str] = "lorta"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Hounie et al.", "LoRTA: Low Rank Tensor Adaptation of Large Language Models", 2024, "2410.04060"
    )
    learning_rate: ClassVar[float] = 5e-3
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The factors of every tensor, and a form at each matrix.

        Raises:
            MethodError: if a target is no matrix of attention.
        """
        groups: dict[_Shape, list[WeightSite]] = {}
        for site in weight_sites(model, anatomy, self.targets):
            groups.setdefault(_shape(site, anatomy), []).append(site)
        for shape, sites in groups.items():
            layers = list(dict.fromkeys(site.part.layer for site in sites))
            roles = list(dict.fromkeys(site.part.role for site in sites))
            factors = CP(
                (shape.hidden_size, shape.heads, shape.head_dim, len(layers), len(roles)),
                self.rank,
                rows=2,
                dtype=sites[0].dtype,
                device=sites[0].device,
            )
            for name in ("V1", "P1", "P2"):
                nn.init.normal_(factors.get_parameter(name))
            key = f"{shape.stack}.factors.{shape.hidden_size}x{shape.heads}x{shape.head_dim}"
            yield Placement(None, factors, shared=key)
            for site in sites:
                index = layers.index(site.part.layer), roles.index(site.part.role)
                transposed = site.part.role == "attention.output"
                yield Placement(site, SharedSlice(factors, index, self.scale, self.dropout, transposed=transposed))


def _shape(site: WeightSite, anatomy: Anatomy) -> _Shape:
    part = site.part
    if part.role not in _ROLES:
        raise MethodError(
            f"lorta: {site.key} is no matrix of attention, and has no heads. Choose among {', '.join(_ROLES)}; fact "
            "changes any matrix."
        )
    shapes = (other.attention for other in anatomy.of("attention", part.stack) if other.layer == part.layer)
    attention = next(shapes, None)
    if attention is None:
        raise MethodError(f"lorta: the number of heads at {site.key} is not known. Use fact, which does not need it.")
    grouped = part.role in ("attention.key", "attention.value")
    heads = attention.key_value_heads if grouped else attention.heads
    width, height = site.in_features, site.out_features
    if part.role == "attention.output":
        width, height = height, width
    return _Shape(part.stack or "model", width, heads, height // heads)
