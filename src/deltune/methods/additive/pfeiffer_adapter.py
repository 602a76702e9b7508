"""Pfeiffer adapters: one small bottleneck in a layer, behind the residual sum of its feed-forward sublayer.

Letters: d hidden size, m width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.methods.additive.bottleneck import BottleneckMethod
from deltune.methods.base import Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, residual_sum_sites

__all__ = ["PfeifferAdapter"]


@register
@dataclass(frozen=True)
class PfeifferAdapter(BottleneckMethod):
    r"""One adapter in each layer: y = LN(s + W_up phi(W_down z + b) + b) with z = LN(s), s = a + ffn(a).

    It reads the layer's normalised sum z, and its change is added to the sum s before the layer's own frozen norm is
    applied again. Where a model normalises before each sublayer (GPT-2, LLaMA, T5) no norm follows the sum; the
    adapter reads and changes s itself: y = s + W_up phi(W_down s + b) + b. Near the identity at the start; exactly the
    identity with ``initialization=kaiming``.

    When to use:
        Where adapters are wanted at half the cost of ``sequential-adapter``, with which it is on par in its authors'
        experiments: many tasks on one frozen model, each with a small file of its own.

    Cost:
        Parameters: 2 d m + m + d for each layer. BERT-base, m = d/16 = 48: 894,528 (0.82 %).
        Memory: gradients and optimizer state of what trains. Activations are kept in every layer above the lowest
            adapter, but fewer than in full fine-tuning, because frozen matrices need no input.
        Time: one small module more in a layer, and where a norm follows the sum, that norm a second time.
        Inference: the same; the non-linearity cannot be merged.

    Terms:
        Site: the residual sums behind feed-forward sublayers.
        Form: a bottleneck: a linear map to m values, a non-linearity, a linear map back.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.PfeifferAdapter(width="d/4"))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 * 32 * 8 + 8 + 32 each
        1104

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/pfeiffer \
            --method pfeiffer-adapter --width d/8

    Differs from the paper:
        The paper places adapters in models that normalise after each sublayer; elsewhere this follows the authors'
        library. Weights start with a standard deviation of 0.02, as in that library. The default learning rate is
        above the paper's 1e-4, which goes with up to 30 epochs. Norms stay frozen, as in the paper.

    Source:
        Pfeiffer et al. 2021, arXiv 2005.00247; authors' code: adapter-hub/adapters, where it is called seq_bn.
    """

    targets: Targets = option(Targets(("ffn",)), "behind which feed-forward sublayers")

    name: ClassVar[str] = "pfeiffer-adapter"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    paper: ClassVar[Paper] = Paper(
        "Pfeiffer et al.",
        "AdapterFusion: Non-Destructive Task Composition for Transfer Learning",
        2021,
        "2005.00247",
    )
    learning_rate: ClassVar[float] = 3e-3
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A bottleneck behind every selected sublayer's residual sum.

        Raises:
            TargetError: if it is not known where the model's norms are.
        """
        for site in residual_sum_sites(model, anatomy, self.targets):
            yield Placement(site, self.bottleneck(site))
