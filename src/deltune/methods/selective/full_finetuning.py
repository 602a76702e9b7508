"""Full fine-tuning: the reference that every other method is compared with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, ParameterSite, parameter_modules

__all__ = ["FullFineTuning"]


@register
@dataclass(frozen=True)
class FullFineTuning(Method):
    """Train every parameter of the model, or of some modules. Tied tensors are one parameter, trained and saved once.

    When to use:
        As the reference for all others, and where memory and storage are no matter. Small data make it unstable
        from seed to seed: run several seeds. With ``targets`` it trains some modules whole, which another method can be
        added to: ``lora + full(targets=embeddings)``.

    Cost:
        Parameters: all of them, a whole copy of the model for each task.
        Memory: 16 bytes for each parameter in float32 with AdamW (weight, gradient, two moments), and all
            activations. Attached with ``reversible=True``, the default in Python, 4 more for the original values.
        Time: the most: every gradient is computed and every parameter updated.
        Inference: none.

    Terms:
        Site: every parameter.
        Form: none: the parameters themselves.
        Combination: the trained value stands in the place of the original.
        Control: live while active; the original values come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> deltune.attach(model, deltune.FullFineTuning(), reversible=False).summary().share
        1.0

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/full --method full

    Differs from the paper:
        AdamW here corrects the bias of its moments; the original BERT code does not.

    Source:
        Devlin et al. 2019, arXiv 1810.04805, section 4; authors' code: google-research/bert.
    """

    targets: Targets | None = option(None, "the parameters of which modules; all of the model's if none")

    name: ClassVar[str] = "full"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Devlin et al.",
        "BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding",
        2019,
        "1810.04805",
    )
    learning_rate: ClassVar[float] = 5e-5
    weight_decay: ClassVar[float] = 0.01
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Every parameter, or those of the targets.

        Raises:
            TargetError: if a target selects nothing, a sublayer as a whole, or some of the rows of a fused matrix.
        """
        modules = ("",) if self.targets is None else parameter_modules(model, anatomy, self.targets)
        for module in modules:
            for name, _ in model.get_submodule(module).named_parameters(prefix=module):
                yield Placement(ParameterSite(name))
