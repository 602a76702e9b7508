"""Freezing: train the last layers only, whole or in part."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, ParameterSite, parameter_modules

__all__ = ["Freeze"]


@register
@dataclass(frozen=True)
class Freeze(Method):
    r"""Train the last ``layers`` layers of every stack (and the head); everything below stays frozen.

    ``targets`` says what of these layers trains: ``layer`` for all of it, ``ffn.*`` or ``attention.*`` for some
    of its matrices, with their biases. Below the lowest trained layer no gradient is computed. With
    ``layers`` = 0 only the head trains.

    When to use:
        Where memory or time is short and the file may be large: it is the one method here that keeps no
        activations below a certain layer. With ``layers=0`` it is the reference that every other method must beat:
        a trained head on the frozen model.

    Cost:
        Parameters: all of the chosen parts. A layer of BERT-base: 7,087,872 (6.5 %); its feed-forward part:
            4,722,432.
        Memory: optimizer state and gradients of these layers; activations of these layers alone.
        Time: a whole forward pass, but a backward pass through the last layers only; with ``frozen_states`` the lower
            layers run once for each text.
        Inference: none.

    Terms:
        Site: the last layers of each stack, or some of their parts.
        Form: none: the parameters themselves.
        Combination: the trained value stands in the place of the original.
        Control: live while active; the original values come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> tuned = deltune.attach(model, deltune.Freeze(layers=1))
        >>> sorted({name.split(".")[3] for name, _ in tuned.named_trainable_parameters() if "encoder" in name})
        ['1']

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/freeze \
            --method freeze --layers 2 --targets "ffn.*"

    Differs from the paper:
        There is no official code. Norms and poolers above the last layer stay frozen, and so does the head of a
        language model. Frozen layers stay in training mode with the rest, so their dropout is active.

    Source:
        Lee et al. 2019, arXiv 1911.03090.
    """

    layers: int = option(2, "how many of the last layers of each stack to train", minimum=0)
    targets: Targets = option(Targets(("layer",)), "what of these layers to train")

    name: ClassVar[str] = "freeze"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Lee et al.", "What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning", 2019, "1911.03090"
    )
    learning_rate: ClassVar[float] = 2e-4
    weight_decay: ClassVar[float] = 0.01
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The parameters of the selected parts of the last layers.

        Raises:
            MethodError: if the model has fewer layers, or nothing at all would train.
            TargetError: if a target selects nothing, a sublayer as a whole, or some of the rows of a fused matrix.
        """
        if self.layers == 0:
            if not anatomy.head:
                raise MethodError("freeze with layers=0 trains the head only, but this model has no task head.")
            return
        for name, stack in anatomy.stacks.items():
            if self.layers > len(stack):
                raise MethodError(f"freeze: the {name} has {len(stack)} layers, so layers cannot be {self.layers}.")
        targets = self.targets if self.targets.layers else replace(self.targets, layers=(f"-{self.layers}:",))
        for module in parameter_modules(model, anatomy, targets):
            for name, _ in model.get_submodule(module).named_parameters():
                yield Placement(ParameterSite(f"{module}.{name}"))
