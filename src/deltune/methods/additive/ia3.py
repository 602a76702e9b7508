"""(IA)^3: keys, values and feed-forward activations times learned vectors.

Letters: d_in and d_out the width and height of a matrix W, b its bias, l the vector.
"""

from __future__ import annotations

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

__all__ = ["IA3", "InputScale", "OutputScale"]


class OutputScale(WeightForm):
    """y = l * (W x + b), with l (d_out); dh = (l - 1) * (W x + b).

    l is one at the start.
    """

    formula: ClassVar[str] = "(l - 1) * W {x}"
    reads_matrix: ClassVar[bool] = True
    neutral: ClassVar[float] = 1.0

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.out_features, dtype=site.dtype, device=site.device))

    def factor(self) -> str:
        """None beside the formula's l."""
        return ""

    def forward(self, output: Tensor) -> Tensor:
        """The change dh (..., d_out) of the frozen map's output (..., d_out)."""
        return (self.scale.to(output.dtype) - 1) * output

    def change(self, output: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The change dh (..., d_out)."""
        change: Tensor = self(output)
        return change

    def weight_delta(self) -> Tensor:
        """Not known without the frozen matrix."""
        raise NotImplementedError

    def weight_delta_of(self, matrix: Tensor) -> Tensor:
        """The change of ``matrix`` (d_out, d_in)."""
        return (self.scale.to(matrix) - 1)[:, None] * matrix

    def bias_delta_of(self, bias: Tensor) -> Tensor:
        """The change of ``bias`` (d_out)."""
        return (self.scale.to(bias) - 1) * bias


class InputScale(WeightForm):
    """y = W (l * x) + b, with l (d_in); dh = W ((l - 1) * x).

    l is one at the start.
    """

    formula: ClassVar[str] = "W ((l - 1) * {x})"
    reads_matrix: ClassVar[bool] = True
    neutral: ClassVar[float] = 1.0

    def __init__(self, site: WeightSite) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(site.in_features, dtype=site.dtype, device=site.device))

    def factor(self) -> str:
        """None beside the formula's l."""
        return ""

    def forward(self, x: Tensor, matrix: Tensor) -> Tensor:
        """The change dh (..., d_out) for x (..., d_in)."""
        return F.linear((self.scale.to(x.dtype) - 1) * x, matrix.to(x.dtype))

    def change(self, output: Tensor, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        """The change dh (..., d_out)."""
        change: Tensor = self(x, matrix)
        return change

    def weight_delta(self) -> Tensor:
        """Not known without the frozen matrix."""
        raise NotImplementedError

    def weight_delta_of(self, matrix: Tensor) -> Tensor:
        """The change of ``matrix`` (d_out, d_in)."""
        return (self.scale.to(matrix) - 1) * matrix


@register
@dataclass(frozen=True)
class IA3(Method):
    r"""Infused adapter, (IA)^3: k = l_k * (W_k x), v = l_v * (W_v x), and W_2 (l_ff * g(W_1 x)) where layers widen.

    Each l is a vector of as many numbers as there are features, one at the start, so that the model is unchanged then.
    It can be folded into the matrix afterwards.

    When to use:
        Few labelled examples and a very small delta that still reaches every layer: a fifth of the parameters of LoRA
        with rank 8. The result depends much on the learning rate, so try several.

    Cost:
        Parameters: the width of keys, of values and of the inner feed-forward activations, for each layer. BERT-base:
            55,296 (0.05 %).
        Memory: gradients and optimizer state of the vectors alone; activations of the maps that they scale.
        Time: one multiplication for each scaled output. A scaled input costs a second product with its matrix while
            the delta stands beside the model, since the frozen product is not touched.
        Inference: the same; none after merging.

    Terms:
        Site: linear maps; by default those that make keys and values, and the one that narrows the feed-forward part.
        Form: a vector l, times the map's output or its input.
        Combination: a sum with (l - 1) times what the frozen map gives, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.IA3())
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, keys and values of 32, 64 inside
        256

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/ia3 --method ia3

    Differs from the paper:
        The paper's models have no biases in these maps; where there is one, its result is scaled along, as in Hugging
        Face peft. The authors train with Adafactor, a pretrained start of the vectors and two additional losses.

    Source:
        Liu et al. 2022, arXiv 2205.05638, section 3.3; authors' code: r-three/t-few.
    """

    targets: Targets | None = option(
        Targets(("attention.key", "attention.value")), "the maps whose output is scaled; none if none"
    )
    inputs: Targets | None = option(Targets(("ffn.down",)), "the maps whose input is scaled; none if none")

    name: ClassVar[str] = "ia3"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Liu et al.",
        "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning",
        2022,
        "2205.05638",
    )
    learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets is None and self.inputs is None:
            raise MethodError(f"{self.name}: neither targets nor inputs are given, so that nothing is scaled.")

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A vector at every selected map.

        Raises:
            TargetError: if a target selects nothing, or no linear map.
        """
        for targets, form in ((self.targets, OutputScale), (self.inputs, InputScale)):
            if targets is not None:
                for site in weight_sites(model, anatomy, targets):
                    yield Placement(site, form(site))
