"""The mix-and-match adapter: a short prefix in attention and a wide, scaled adapter beside feed-forward sublayers.

Letters: L layers, P length of the prefix, d hidden size, d_kv width of all keys, m width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from deltune.backbone import Targets
from deltune.methods.additive.parallel_adapter import ParallelAdapter
from deltune.methods.additive.prefix_tuning import PrefixTuning
from deltune.methods.base import Method, Paper, Sum
from deltune.methods.options import option
from deltune.methods.preset import Preset
from deltune.methods.registry import register
from deltune.sites import Form

__all__ = ["MAM"]


@register
@dataclass(frozen=True)
class MAM(Preset):
    r"""Mix-and-match adapter: ``PrefixTuning`` in attention + ``ParallelAdapter`` beside feed-forward sublayers.

    Attention sees P trained keys and values more; h <- FFN(x) + s (W_up phi(W_down x + b) + b). The parts share
    neither parameters nor gates, and s scales the adapter alone. The adapter is zero at the start; the prefix is not,
    so that the model is changed.

    When to use:
        Where a method may cost some per cent of the model's parameters and shall come near full fine-tuning, in
        summaries and translation above all: the authors find that a small budget is best spent on attention and a
        larger one on feed-forward sublayers. For classification they take ``length=16, width=16, scale=2``;
        so small, it learns better at a rate of 1e-3 than at the default, which suits the wide adapter.

    Cost:
        Parameters: stored, 2 P d_kv for each attention function and 2 d m + m + d for each feed-forward sublayer.
            BERT-base, P = 30, m = 512: 552,960 + 9,452,544 = 10,005,504 (9.14 %). While training, the network that
            makes the prefix besides.
        Memory: gradients and optimizer state of both parts, the network included. Activations are kept in every
            layer, but fewer than in full fine-tuning, because frozen matrices need no input.
        Time: P more keys in each attention function, one small module more beside each feed-forward sublayer, and
            the network once a forward pass.
        Inference: the same without the network; neither part can be merged.

    Terms:
        Site: attention functions for the prefix; feed-forward sublayers, from their input to their result.
        Form: keys and values, made by a network that the layers of one kind of attention share; and a bottleneck: a
            linear map to m values, a non-linearity, a linear map back, times a scale.
        Combination: the prefix is joined with the real keys and values inside the softmax; the adapter is a sum.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> tuned = deltune.attach(model, deltune.MAM(length=5, width=8, reparameterize=False))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 * 5 * 32 and 2 * 32 * 8 + 8 + 32 each
        1744

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/mam \
            --method mam --length 16 --width 16 --scale 2

    Differs from the paper:
        Everything that ``prefix-tuning`` and ``parallel-adapter`` say of themselves holds here too: the prefix shifts
        no position, and where norms come before the sublayers the adapter reads behind the norm; ``reads=stream`` is
        what the authors' code does in mBART. That code also makes prefixes and adapters that are never used, which
        are absent here. Both parts learn at one rate, as there; the rates of the authors' scripts are 5e-5, with up
        to 100,000 steps, and 1e-4. For options of the parts that are not offered here write the sum itself,
        ``prefix-tuning(length=30, width=800, ...) + parallel-adapter(...)``.

    Source:
        He et al. 2022, arXiv 2110.04366, sections 3.3 and 4.6; authors' code: jxhe/unify-parameter-efficient-tuning.
    """

    length: int = option(30, "number P of additional keys and values", minimum=1)
    reparameterize: bool = option(True, "train the prefix through a small network that is dropped after training")
    prefix_width: int = option(800, "hidden width of that network", minimum=1)
    shift_positions: bool = option(False, "let the text begin at position P, as if the prefix were text before it")
    prefix_targets: Targets = option(Targets(("attention",)), "which attention functions have a prefix")
    width: int | str = option(512, "width m of the adapter: a number, or a part of the hidden size d", minimum=1)
    activation: str = option("relu", "the adapter's non-linearity, as transformers names it")
    scale: float | str = option(
        4.0,
        "factor s of the adapter's change: a number, or trained from 1: learned (a scalar), channel (one a feature)",
        minimum=0,
        exclusive=True,
    )
    dropout: float = option(0.1, "dropout inside the adapter while training", minimum=0, maximum=0.99)
    reads: str = option(
        "sublayer",
        "what the adapter reads where the model normalises before its sublayers: behind the norm, or the stream",
        choices=("sublayer", "stream"),
    )
    adapter_targets: Targets = option(Targets(("ffn",)), "beside which sublayers there is an adapter")

    name: ClassVar[str] = "mam"
    branch: ClassVar[str] = "hybrid"
    paper: ClassVar[Paper] = Paper(
        "He et al.", "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, "2110.04366"
    )
    learning_rate: ClassVar[float] = 2e-4
    weight_decay: ClassVar[float] = 0.01
    unchanged_at_start: ClassVar[bool] = False

    def definition(self) -> Sum:
        """The prefix, and the adapter."""
        prefix = PrefixTuning(
            length=self.length,
            reparameterize=self.reparameterize,
            width=self.prefix_width,
            shift_positions=self.shift_positions,
            targets=self.prefix_targets,
        )
        adapter = ParallelAdapter(
            width=self.width,
            activation=self.activation,
            scale=self.scale,
            dropout=self.dropout,
            reads=self.reads,
            targets=self.adapter_targets,
        )
        return prefix + adapter

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """Itself with the flat prefix."""
        return replace(self, reparameterize=False)
