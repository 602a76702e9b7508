"""LoRA: the change of a weight matrix as a product of two thin ones.

Letters: d_in and d_out the matrix's width and height, r the rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.reparameterized.low_rank import DecomposedLowRank, LowRank, PrincipalLowRank, RankPattern
from deltune.sites import Form, Insertion, WeightSite, weight_sites

__all__ = ["LoRA"]


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
        ``weight_decomposed`` (DoRA) learns the length of each row apart from its direction: often better at small
        ranks, and slower. ``initialization=pissa`` starts from the matrix's own principal part and learns faster.
        Add ``+ bitfit`` to train the biases as well.

    Cost:
        Parameters: r (d_in + d_out) for each matrix. BERT-base, queries and values, r = 8: 294,912 (0.27 %).
        Memory: gradients and optimizer state of A and B alone. Activations: the gradient of A needs the input of its
            matrix, so with all matrices changed they are hardly fewer than in full fine-tuning.
        Time: two thin products more for each matrix; the gradients of the frozen matrices are not computed.
        Inference: 2 r (d_in + d_out) operations for each token and matrix; none after merging.

    Terms:
        Site: linear maps, tables of embeddings, convolutions; by default the maps that make queries and values.
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
        its own. A convolution has r channels in between; the authors' code factorises its kernel otherwise.
        ``rank_stabilized`` is from Kalajdzievski 2023, arXiv 2312.03732; ``weight_decomposed`` (DoRA) from Liu et al.
        2024, arXiv 2402.09353; ``initialization=pissa`` from Meng et al. 2024, arXiv 2404.02948, where the principal
        part is taken out of the frozen matrix: here the branch subtracts it, and the matrix stays as it is. Saved,
        it is an ordinary change of twice the rank.

    Source:
        Hu et al. 2021, arXiv 2106.09685, section 4.1; authors' code: microsoft/LoRA.
    """

    rank: int = option(8, "rank r of the change: more capacity, more parameters", minimum=1)
    alpha: float = option(16.0, "numerator of the scale alpha / rank", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    rank_stabilized: bool = option(False, "scale by alpha / sqrt(rank) (rsLoRA), for large ranks")
    initialization: str = option(
        "uniform",
        "where A starts: uniform, or gaussian of deviation 1 / rank, and B at zero; pissa: both from the matrix",
        choices=("uniform", "gaussian", "pissa"),
    )
    weight_decomposed: bool = option(False, "learn the length of each row apart from its direction (DoRA)")
    rank_pattern: str | None = option(
        None, "other ranks for some of the targets: 'ffn.up layers=-4: -> 16; ffn.down -> 4'"
    )
    targets: Targets = option(Targets(("attention.query", "attention.value")), "which matrices to change")

    name: ClassVar[str] = "lora"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Hu et al.", "LoRA: Low-Rank Adaptation of Large Language Models", 2021, "2106.09685"
    )
    learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        RankPattern(self.rank_pattern)
        if self.weight_decomposed and self.initialization == "pissa":
            raise MethodError("lora: weight_decomposed and initialization=pissa exclude each other. Choose one.")

    def scale(self, rank: int) -> float:
        """The scale s of a change of that rank."""
        return self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A low-rank form at every selected matrix.

        Raises:
            MethodError: if the rank exceeds what a matrix can have, or a form cannot act on a matrix of its kind.
        """
        sites = weight_sites(model, anatomy, self.targets, ("linear", "embedding", "convolution"))
        for site, rank in RankPattern(self.rank_pattern).ranks(sites, self.rank, model, anatomy):
            yield Placement(site, self._form(site, rank, model))

    def stored(self, forms: Mapping[str, Form]) -> LoRA:
        """Of twice the rank if it started from the principal part, which the file then holds."""
        if self.initialization != "pissa":
            return self
        return replace(
            self,
            rank=2 * self.rank,
            alpha=self.alpha * (math.sqrt(2) if self.rank_stabilized else 2),
            initialization="uniform",
            rank_pattern=RankPattern(self.rank_pattern).times(2) or None,
        )

    def _form(self, site: WeightSite, rank: int, model: nn.Module) -> LowRank:
        scale = self.scale(rank)
        if not self.weight_decomposed and self.initialization != "pissa":
            form = LowRank(site, rank, scale, self.dropout)
            if self.initialization == "gaussian" and site.kind != "embedding":
                nn.init.normal_(form.A, std=1 / rank)
            return form
        if site.kind != "linear":
            option_name = "weight_decomposed" if self.weight_decomposed else "initialization=pissa"
            raise MethodError(
                f"{option_name} acts on linear maps, and {site.key} is a {site.kind}. Leave it out of the targets, or "
                "use another initialization."
            )
        if not self.weight_decomposed and 2 * rank > min(site.in_features, site.out_features):
            raise MethodError(
                f"initialization=pissa with rank {rank} is more than half of what {site.key} can have, which is "
                f"{min(site.in_features, site.out_features)}: saved, it has twice the rank. Use a smaller rank."
            )
        kind = DecomposedLowRank if self.weight_decomposed else PrincipalLowRank
        return kind(site, site.matrix(model.get_submodule(site.module)), rank, scale, self.dropout)
