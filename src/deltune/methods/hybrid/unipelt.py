"""UniPELT: an adapter, a prefix and LoRA in each layer, each multiplied by a gate.

Letters: L layers, P length of the prefix, d hidden size, d_kv width of all keys, m width of the bottleneck, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from deltune.errors import MethodError
from deltune.methods.additive.pfeiffer_adapter import PfeifferAdapter
from deltune.methods.additive.prefix_tuning import PrefixTuning
from deltune.methods.base import Method, Paper
from deltune.methods.hybrid.gated import gated
from deltune.methods.options import option
from deltune.methods.preset import Preset
from deltune.methods.registry import register
from deltune.methods.reparameterized.lora import LoRA
from deltune.sites import Form

__all__ = ["UniPELT"]

#: alpha of LoRA where no gate takes the place of its scale, as in the authors' code.
_ALPHA = 16.0


@register
@dataclass(frozen=True)
class UniPELT(Preset):
    r"""An adapter, a prefix and LoRA at once, each multiplied by a gate that learns how much of it to use.

    y = LN(s + G_A (W_up relu(W_down z + b) + b)) with z = LN(s) behind the feed-forward sublayer; attention sees
    [G_P P_k; K] and [G_P P_v; V]; queries and values are W x + G_L B A x. Each gate is G = mean_t sigmoid(w h_t + b) of
    what its part reads, one number between 0 and 1 for each row of the batch and each layer. A gate of zero takes the
    adapter and LoRA out of the layer; keys of zero still have their share of the softmax.

    When to use:
        Where it is not known which method suits the task, and with little data: the authors find it at or above the
        best of its parts, above all with 100 to 1,000 examples, for half more time than one part. Which parts the
        layers use can be seen with :func:`deltune.gate_values`. ``variant=ap`` leaves LoRA out.

    Cost:
        Parameters: stored, L (2 d m + m + d) for adapters, 2 L P d_kv for the prefix, r (d_in + d_out) for each matrix
            with LoRA, and d + 1 for each gate. BERT-base: 1,401,444 (1.28 %); without LoRA 1,097,304. While training,
            the network that makes the prefix besides.
        Memory: gradients and optimizer state of all parts. Activations are kept in every layer, but fewer than in full
            fine-tuning, because frozen matrices need no input.
        Time: that of its parts together. The authors measured 67 % of full fine-tuning's in training, and 127 % in
            inference.
        Inference: all parts stay beside the model; nothing can be merged, as gates depend on the input. In decoders a
            prefix with a gate for each token makes the attention function twice as wide.

    Terms:
        Site: residual sums behind feed-forward sublayers; attention functions; query and value matrices.
        Form: a bottleneck; keys and values; a product of two thin matrices.
        Combination: each part times a gate that is computed from what it reads.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> method = deltune.UniPELT(length=5, reparameterize=False, width=8, rank=4)
        >>> tuned = deltune.attach(model, method)
        >>> summary = tuned.summary()
        >>> # 2 layers, in each an adapter, a prefix, LoRA of two matrices, and three gates of 33
        >>> summary.parameters - summary.head_parameters
        2966
        >>> import torch
        >>> gates = deltune.gate_values(tuned, [{"input_ids": torch.tensor([[5, 6, 7]])}])
        >>> len(gates), sorted(gates)[0]
        (6, 'encoder.0.lora attention.projections')

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/unipelt \
            --method unipelt --rank 4
        $ deltune gates runs/unipelt --model models/encoder --data data/reviews.csv --picture gates.svg

    Differs from the paper:
        The mean of a gate leaves padding out, so that a row's result does not depend on the other rows; the authors'
        code counts it, as ``pooling=all`` does. Their code has a gate each for LoRA's query and value matrix, the
        paper one (``separate_gates=true`` is the code's). In decoders a mean over the text would read later tokens, and
        cached generation would differ: there each token has a gate of its own, which the paper does not treat.
        Where norms come before the sublayers, LoRA's and the prefix's gates read behind the norm. ``gates=central``
        follows the authors' code: LoRA and prefix are weighed against each other, the adapter has its own gate. LoRA's
        scale alpha / r is 1 where a gate takes its place, and 16 / r without gates; ``alpha`` sets it. The default
        learning rate is above the authors' 5e-4, which goes with 50 epochs.

    Source:
        Mao et al. 2022, arXiv 2110.07577, section 3; authors' code: morningmoni/UniPELT.
    """

    variant: str = option("apl", "which parts: adapter and prefix (ap), or LoRA besides (apl)", choices=("apl", "ap"))
    gates: str = option(
        "input",
        "a gate for each part from its own input; central: LoRA and prefix weighed against each other; none",
        choices=("input", "central", "none"),
    )
    pooling: str = option(
        "auto",
        "how a gate's values of a row's positions become one: their mean, padding left out (mean) or counted (all), or "
        "each for itself (token); auto: mean in encoders, token elsewhere",
        choices=("auto", "mean", "all", "token"),
    )
    separate_gates: bool = option(False, "a gate each for LoRA's query and value matrix")
    width: int | str = option("d/16", "width m of the adapter: a number, or a part of the hidden size d", minimum=1)
    activation: str = option("relu", "the adapter's non-linearity, as transformers names it")
    length: int = option(10, "number P of additional keys and values", minimum=1)
    reparameterize: bool = option(True, "train the prefix through a small network that is dropped after training")
    prefix_width: int = option(512, "hidden width of that network", minimum=1)
    rank: int = option(8, "rank r of LoRA", minimum=1)
    alpha: float | None = option(
        None, "LoRA's change is scaled by alpha / r; not given, by 1 with gates and 16 / r without", minimum=0
    )
    dropout: float = option(0.0, "dropout inside the parts while training", minimum=0, maximum=0.99)

    name: ClassVar[str] = "unipelt"
    branch: ClassVar[str] = "hybrid"
    paper: ClassVar[Paper] = Paper(
        "Mao et al.", "UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning", 2022, "2110.07577"
    )
    learning_rate: ClassVar[float] = 1e-3
    unchanged_at_start: ClassVar[bool] = False

    def definition(self) -> Method:
        """The gated sum of adapter, prefix and LoRA, in this order.

        Raises:
            MethodError: if an option is given that nothing reads.
        """
        self._refuse_unread()
        adapter = PfeifferAdapter(width=self.width, activation=self.activation, dropout=self.dropout)
        prefix = PrefixTuning(
            length=self.length, reparameterize=self.reparameterize, width=self.prefix_width, dropout=self.dropout
        )
        given = self.alpha
        alpha = given if given is not None else _ALPHA if self.gates == "none" else float(self.rank)
        lora = LoRA(rank=self.rank, alpha=alpha, dropout=self.dropout)
        low = (lora,) if self.variant == "apl" else ()
        options: dict[str, Any] = {"pooling": self.pooling, "shared": not self.separate_gates}
        if self.gates == "none":
            whole: Method = adapter + prefix
            return whole + lora if low else whole
        if self.gates == "central" and low:
            return gated(adapter, **options) + gated(prefix, lora, gate="central", **options)
        return gated(adapter, prefix, *low, **options)

    def _refuse_unread(self) -> None:
        if self.gates == "none" and (self.pooling != "auto" or self.separate_gates):
            raise MethodError("unipelt: without gates there is neither pooling nor separate_gates. Leave them out.")
        if self.variant == "ap" and (self.gates == "central" or self.alpha is not None or self.separate_gates):
            raise MethodError(
                "unipelt: variant=ap has no LoRA, so that there is no alpha, nothing to weigh by gates=central, and no "
                "separate_gates. Leave them out, or take variant=apl."
            )

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """Itself with the flat prefix."""
        return replace(self, reparameterize=False)
