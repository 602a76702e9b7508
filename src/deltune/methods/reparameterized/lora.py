"""LoRA: the change of a weight matrix as a product of two thin ones.

Letters: d_in and d_out the matrix's width and height, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, WeightForm, WeightSite, weight_sites

__all__ = ["LoRA", "LowRank"]


class LowRank(WeightForm):
    r"""dh = s B A dropout(x), with A (r, d_in) and B (d_out, r).

    Args:
        in_features: d_in.
        out_features: d_out.
        rank: r.
        scale: s.
        dropout: probability of zeroing an entry of x while training; the frozen product is not touched.
        dtype: type of the parameters.
        device: where they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        scale: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(rank, in_features, dtype=dtype, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, dtype=dtype, device=device))
        self.scale = scale
        self.dropout = dropout
        # uniform within 1/sqrt(d_in), as in the authors' code (the paper says Gaussian)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def _thin(self, x: Tensor) -> Tensor:
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return F.linear(x, self.A.to(x.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """The change dh (..., d_out) for x (..., d_in)."""
        thin = self._thin(x)
        return self.scale * F.linear(thin, self.B.to(thin.dtype))

    def add_to(self, output: Tensor, x: Tensor, weight: float = 1.0) -> Tensor:
        """``output`` plus the change, the sum fused into the second product."""
        thin = self._thin(x)
        factor = self.B.to(thin.dtype).T
        if output.dtype != thin.dtype:
            return output + (weight * self.scale) * (thin @ factor)
        flat = torch.addmm(
            output.reshape(-1, output.shape[-1]),
            thin.reshape(-1, thin.shape[-1]),
            factor,
            alpha=weight * self.scale,
        )
        return flat.view_as(output)

    def weight_delta(self) -> Tensor:
        """S B A, (d_out, d_in)."""
        return self.scale * (self.B @ self.A)


@register
@dataclass(frozen=True)
class LoRA(Method):
    r"""Low-rank adaptation: h = W0 x + s B A x with s = alpha / r.

    W0 is frozen; A (r, d_in) is uniform within 1/sqrt(d_in) at the start and B (d_out, r) is zero, so that the
    model is unchanged at the start. The change can be folded into W0 afterwards.

    When to use:
        A good first choice: few options, few parameters, and nothing left to pay once merged. Where the default
        learns too little, change more matrices (``targets="attention.* ffn.*"``) before raising the rank.
        alpha / r sets the size of a step, so raise alpha with the rank, or set ``rank_stabilized`` for large ranks.

    Cost:
        Parameters: r (d_in + d_out) for each matrix. BERT-base, queries and values, r = 8: 294,912 (0.27 %).
        Memory: gradients and optimizer state of A and B alone. Activations: the gradient of A needs the input of its
            matrix, so with all matrices changed they are hardly fewer than in full fine-tuning.
        Time: two thin products more for each matrix; the gradients of the frozen matrices are not computed.
        Inference: 2 r (d_in + d_out) operations for each token and matrix; none after merging.

    Terms:
        Site: linear maps; by default those that make queries and values.
        Form: s B A, the product of two thin matrices.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> tuned = deltune.attach(model, deltune.LoRA(rank=4, alpha=8))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 matrices, 4 (32 + 32) each
        1024

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/lora \
            --method lora --rank 16 --alpha 32 --targets "attention.* ffn.*"

    Differs from the paper:
        A is drawn as in the authors' code; the paper says Gaussian. The default learning rate is above the 2e-4
        to 5e-4 of the authors' scripts. In a fused matrix (GPT-2) each of query, key and value has an A and B of
        its own. ``rank_stabilized`` is from Kalajdzievski 2023, arXiv 2312.03732.

    Source:
        Hu et al. 2021, arXiv 2106.09685, section 4.1; authors' code: microsoft/LoRA.
    """

    rank: int = option(8, "rank r of the change: more capacity, more parameters", minimum=1)
    alpha: float = option(16.0, "numerator of the scale alpha / rank", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    rank_stabilized: bool = option(False, "scale by alpha / sqrt(rank) (rsLoRA), for large ranks")
    targets: Targets = option(Targets(("attention.query", "attention.value")), "which matrices to change")

    name: ClassVar[str] = "lora"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    )
    learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True

    @property
    def scale(self) -> float:
        """The scale s of the change."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A low-rank form at every selected matrix.

        Raises:
            MethodError: if the rank exceeds what a matrix can have.
        """
        for site in weight_sites(model, anatomy, self.targets):
            yield Placement(site, self._form(site))

    def _form(self, site: WeightSite) -> LowRank:
        largest = min(site.in_features, site.out_features)
        if self.rank > largest:
            raise MethodError(
                f"Rank {self.rank} exceeds what {site.key} can have: the matrix is {site.out_features} x "
                f"{site.in_features}, so its rank is at most {largest}."
            )
        return LowRank(
            site.in_features, site.out_features, self.rank, self.scale, self.dropout, site.dtype, site.device
        )
