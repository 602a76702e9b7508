"""Parallel adapters: a small bottleneck beside a sublayer, scaled and added to the sublayer's result.

Letters: d hidden size, m width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.methods.additive.bottleneck import BottleneckMethod, with_default
from deltune.methods.base import Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, parallel_sites

__all__ = ["ParallelAdapter"]


@register
@dataclass(frozen=True)
class ParallelAdapter(BottleneckMethod):
    r"""Adapters beside sublayers: h <- FFN(x) + s (W_up phi(W_down x + b) + b).

    They read what the sublayer starts from, not its result, and have no residual connection of their own. W_up is
    zero at the start, so that the model is unchanged. By default they stand beside feed-forward sublayers; with
    ``targets=attention`` beside attention, where the change is added to the joined heads before their matrix W_o:
    h <- (heads + s A(x)) W_o.

    When to use:
        Where adapters shall learn much, as in summaries and translation: at the same size the authors find it better
        than sequential adapters and better beside feed-forward sublayers than beside attention. Beside attention they
        take ``layer_norm=true, scale=1, initialization=normal``. If training is unsteady, lower the scale or set
        ``layer_norm``.

    Cost:
        Parameters: 2 d m + m + d for each sublayer, one more with ``scale=learned``, d more with ``scale=channel``,
            2 d more with ``layer_norm``. BERT-base, m = 512: 9,452,544 (8.63 %).
        Memory: gradients and optimizer state of what trains. Activations are kept in every layer above the lowest
            adapter, but fewer than in full fine-tuning, because frozen matrices need no input.
        Time: one small module more beside each sublayer.
        Inference: the same; the non-linearity cannot be merged.

    Terms:
        Site: feed-forward sublayers, from their input to their result; attention, if chosen.
        Form: a bottleneck: a linear map to m values, a non-linearity, a linear map back, times a scale.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> tuned = deltune.attach(model, deltune.ParallelAdapter(width=8, scale="learned"))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 * 32 * 8 + 8 + 32 + 1 each
        1106

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/parallel \
            --method parallel-adapter --width 32 --scale 2

    Differs from the paper:
        The paper's formula does not say what is read where norms come before the sublayers. The authors' code reads
        the residual stream there, in mBART. That stream grows with depth: in the decoder SmolLM2 it made a short
        training worse than none (a loss of 2.41, against 1.67 untuned and 1.44 behind the norm), so that the default
        is what the sublayer itself reads; ``reads=stream`` is the authors'. Where norms come after the sublayers, both
        are the same. Nor does the formula say that attention is changed before W_o; there the default is that of the
        code (``attention_changes``). The code forces a norm, a scale of 1 and normal weights on adapters beside
        attention; here these are ordinary options. Adapters for each head apart are ``head-adapter``. The learning
        rates of the authors' scripts are 5e-5, with up to 100,000 steps, and 1e-4; the default is above them.

    Source:
        He et al. 2022, arXiv 2110.04366, sections 3.3 and 4.5; authors' code: jxhe/unify-parameter-efficient-tuning.
        Zhu et al. 2021, arXiv 2104.08154, is the first to place adapters beside layers.
    """

    width: int | str = with_default("width", 512)
    initialization: str = with_default("initialization", "kaiming")
    scale: float | str = with_default("scale", 4.0)
    dropout: float = with_default("dropout", 0.1)
    reads: str = option(
        "sublayer",
        "what is read where the model normalises before its sublayers: behind the norm, or the residual stream",
        choices=("sublayer", "stream"),
    )
    attention_changes: str = option(
        "heads",
        "what is changed beside attention: the joined heads before their matrix, or the result behind it",
        choices=("heads", "result"),
    )
    targets: Targets = option(Targets(("ffn",)), "beside which sublayers")

    name: ClassVar[str] = "parallel-adapter"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.PARALLEL
    paper: ClassVar[Paper] = Paper(
        "He et al.", "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, "2110.04366"
    )
    learning_rate: ClassVar[float] = 2e-4
    weight_decay: ClassVar[float] = 0.01

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A bottleneck beside every selected sublayer.

        Raises:
            TargetError: if a sublayer's norm is to be read and is not known.
        """
        stream, heads = self.reads == "stream", self.attention_changes == "heads"
        for site in parallel_sites(model, anatomy, self.targets, stream=stream, heads=heads):
            yield Placement(site, self.bottleneck(site, site.out_features))
