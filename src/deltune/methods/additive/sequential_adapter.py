"""Sequential adapters: a small bottleneck after each sublayer, with its own residual connection.

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
from deltune.sites import Insertion, ParameterSite, sublayer_sites

__all__ = ["SequentialAdapter"]


@register
@dataclass(frozen=True)
class SequentialAdapter(BottleneckMethod):
    r"""Adapters after the attention and the feed-forward sublayer: h <- h + W_up phi(W_down h + b) + b.

    They act on a sublayer's result before it joins the residual stream. Near the identity at the start; exactly
    the identity with ``initialization=kaiming``. With ``train_norms`` every normalisation layer is trained too.

    When to use:
        Where a change of weights is not enough and the additional modules may stay: many tasks on one frozen
        model, each with a file of its own. The width matters little over a wide range, so begin with the default
        and make it smaller to save space.

    Cost:
        Parameters: 2 d m + m + d for each adapter, two adapters in a layer, and the normalisation layers.
            BERT-base, m = 64: 2,379,264 in adapters and 38,400 in norms (2.2 %).
        Memory: gradients and optimizer state of what trains. Activations are kept in every layer above the
            lowest adapter, but fewer than in full fine-tuning, because frozen matrices need no input.
        Time: two small modules more in a layer, one after the other with the rest.
        Inference: the same modules; the non-linearity cannot be merged. 4 to 6 % slower was measured on GPUs by
            Rückle et al. 2021 (arXiv 2010.11918).

    Terms:
        Site: the results of attention and feed-forward sublayers; with ``train_norms`` all norms besides.
        Form: a bottleneck: a linear map to m values, a non-linearity, a linear map back.
        Combination: a sum with its input, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> method = deltune.SequentialAdapter(width=8, train_norms=False)
        >>> summary = deltune.attach(model, method).summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 adapters, 2 * 32 * 8 + 8 + 32 each
        2208

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/adapter \
            --method sequential-adapter --width 16

    Differs from the paper:
        Weights start with the paper's standard deviation of 1e-2; the authors' code uses 1e-3. On models that
        normalise before each sublayer, which the paper does not treat, adapters act on the same place: the
        sublayer's result before the residual sum. Decay spares biases and norms.

    Source:
        Houlsby et al. 2019, arXiv 1902.00751, section 2.1; authors' code: google-research/adapter-bert.
    """

    width: int | str = with_default("width", 64)
    activation: str = with_default("activation", "gelu_pytorch_tanh")
    initialization: str = with_default("initialization", "truncated")
    train_norms: bool = option(True, "train the normalisation layers too, as the paper does")
    targets: Targets = option(Targets(("attention", "ffn")), "after which sublayers")

    name: ClassVar[str] = "sequential-adapter"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    paper: ClassVar[Paper] = Paper(
        "Houlsby et al.", "Parameter-Efficient Transfer Learning for NLP", 2019, "1902.00751"
    )
    learning_rate: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 0.01
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A bottleneck after every selected sublayer, and the normalisation layers."""
        for site in sublayer_sites(model, anatomy, self.targets):
            yield Placement(site, self.bottleneck(site))
        if self.train_norms:
            modules = dict(model.named_modules(remove_duplicate=False))
            for part in anatomy.of("norm"):
                for name, _ in modules[part.module].named_parameters(recurse=False):
                    yield Placement(ParameterSite(f"{part.module}.{name}"))
