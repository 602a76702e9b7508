"""Residual adapters: a small bottleneck with a norm of its own at the end of each layer, on the residual stream.

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
from deltune.sites import Insertion, layer_sites

__all__ = ["ResidualAdapter"]


@register
@dataclass(frozen=True)
class ResidualAdapter(BottleneckMethod):
    r"""An adapter behind each layer: x <- x + W_up phi(W_down LN(x) + b) + b, with a LayerNorm that is trained.

    x is the layer's output. Because the adapter normalises what it reads, the size to which the residual stream grows
    with depth does not matter to it. Near the identity at the start; exactly the identity with
    ``initialization=kaiming``.

    When to use:
        Generation with a frozen decoder that serves several tasks. Its authors take m from 10, for texts from tables,
        to 300, for translation: the farther a task is from what the model was trained on, the larger.

    Cost:
        Parameters: 2 d m + m + 3 d for each layer. GPT-2 small and BERT-base, m = 100: 1,872,048 (1.5 % and 1.7 %).
        Memory: gradients and optimizer state of what trains. Activations are kept in every layer above the lowest
            adapter, but fewer than in full fine-tuning, because frozen matrices need no input.
        Time: a norm and one small module more for each layer, one after the other with the rest.
        Inference: the same; it cannot be merged.

    Terms:
        Site: the outputs of layers.
        Form: a bottleneck: a LayerNorm, a linear map to m values, a non-linearity, a linear map back.
        Combination: a sum with its input, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2))
        >>> tuned = deltune.attach(model, deltune.ResidualAdapter(width=8))
        >>> tuned.summary().parameters  # 2 layers, 2 * 32 * 8 + 8 + 3 * 32 each
        1232

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/residual --method residual-adapter --width 32

    Differs from the paper:
        The paper also trains embeddings of new tokens that mark tasks and segments. They are no part of this method:
        deltune changes no vocabulary; join it with ``prompt-tuning`` where trained positions are wanted. The width is
        chosen for each task in the paper (300, 100 or 10). Its learning rates are 5e-4, 1e-3 and 5e-3. In the
        authors' code gradients of the frozen model are counted when gradients are clipped; here there are none.

    Source:
        Lin, Madotto and Fung 2020, arXiv 2004.03829; authors' code: zlinao/VGLM.
    """

    width: int | str = with_default("width", 100)
    layer_norm: bool = with_default("layer_norm", True)
    targets: Targets = option(Targets(("layer",)), "behind which layers")

    name: ClassVar[str] = "residual-adapter"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.SEQUENTIAL
    paper: ClassVar[Paper] = Paper(
        "Lin, Madotto and Fung",
        "Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning",
        2020,
        "2004.03829",
    )
    learning_rate: ClassVar[float] = 1e-3
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A bottleneck behind every selected layer."""
        for site in layer_sites(model, anatomy, self.targets):
            yield Placement(site, self.bottleneck(site))
