"""Attention fusion: each token's states of all layers, mixed by an attention over the layers.

Letters: B batch, T positions, d hidden size, L number of mixed states, q the task's query, h_l the states of layer l.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, StackStates, StatesForm, StatesSite, states_sites

__all__ = ["AttentionFusion", "LayerAttention"]

#: Ways to score a layer at a token.
SCORES = ("query", "projected", "layer", "last-layer")
#: What is done to the states of the layers before they are scored and mixed.
NORMALIZATIONS = ("automatic", "none", "standard", "final")


class LayerAttention(StatesForm):
    r"""f = sum_l a_l v_l with a = softmax_l(s_l), for every token by itself.

    The scores s_l and the values v_l:
        query: s_l = q . h_l, v_l = h_l; q (d) starts at zero.
        projected: s_l = q . (K h_l + b_K), v_l = V h_l + b_V; K and V start as the identity. b_K adds the same to
            all layers, so that it has no effect; it is there because a linear map has one.
        layer: s_l is a trained scalar, the same for every token; v_l = h_l.
        last-layer: s_l = (W h_L) . h_l, v_l = h_l; W (d, d) starts at zero.

    Args:
        site: whose states are mixed.
        scores: one of the four.
        scaled: divide scores by sqrt(d).
        normalization: ``none``; ``standard`` for mean zero and variance one over the features of each state; ``final``
            for the model's own final norm. The last layer's state is the stack's final one in any case.
        residual: give h_L + w f with a trained scalar w that starts at zero, instead of f.
        embeddings: mix the embedding output too.
        dropout: of f while training.
    """

    def __init__(
        self,
        site: StatesSite,
        scores: str = "query",
        scaled: bool = False,
        normalization: str = "none",
        residual: bool = False,
        embeddings: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = site.hidden_size
        kind: dict[str, Any] = {"dtype": site.dtype, "device": site.device}
        self.reads_normalized = normalization == "final"
        self.standard = normalization == "standard"
        self.embeddings = embeddings
        self.dropout = dropout
        self.scale = width**-0.5 if scaled else 1.0
        shapes = {"layer": (site.layers + embeddings,), "last-layer": (width, width)}
        self.query = nn.Parameter(torch.zeros(shapes.get(scores, (width,)), **kind))
        self.scores = scores
        self.key = nn.Linear(width, width, **kind) if scores == "projected" else None
        self.value = nn.Linear(width, width, **kind) if scores == "projected" else None
        for linear in filter(None, (self.key, self.value)):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.weight = nn.Parameter(torch.zeros((), **kind)) if residual else None

    def as_text(self, x: str) -> str:
        """With the scores and values that it has."""
        score = {
            "query": "q . h_l",
            "projected": "q . (K h_l)",
            "layer": "s_l",
            "last-layer": "(W h_L) . h_l",
        }[self.scores]
        fused = f"sum_l softmax_l({score}) {'V h_l' if self.scores == 'projected' else 'h_l'}"
        return fused if self.weight is None else f"h_L + w {fused}"

    def layers(self, states: StackStates) -> list[Tensor]:
        """The L states that are mixed, each (B, T, d): the outputs of the layers, the last one being final."""
        chosen = [*states.hidden[0 if self.embeddings else 1 : -1], states.final]
        return [F.layer_norm(state, state.shape[-1:]) for state in chosen] if self.standard else chosen

    def weights(self, states: StackStates) -> Tensor:
        """How much each layer has in each token's state, (B, T, L): non-negative, and one in sum."""
        return self._weights(self.layers(states))

    def forward(self, states: StackStates) -> Tensor:
        """The fused states, (B, T, d)."""
        layers = self.layers(states)
        weights = self._weights(layers)
        if self.value is not None:
            layers = [_linear(self.value, state) for state in layers]
        fused = weights[..., :1] * layers[0]
        for index, state in enumerate(layers[1:], start=1):
            fused = fused + weights[..., index : index + 1] * state
        fused = F.dropout(fused, self.dropout, self.training)
        return fused if self.weight is None else states.final + self.weight.to(fused.dtype) * fused

    def _weights(self, layers: list[Tensor]) -> Tensor:
        query = self.query.to(layers[0].dtype)
        if self.scores == "layer":
            scores = query.expand(*layers[0].shape[:-1], -1)
        elif self.scores == "last-layer":
            queries = F.linear(layers[-1], query)
            scores = torch.stack([(queries * state).sum(-1) for state in layers], dim=-1)
        else:
            keys = layers if self.key is None else [_linear(self.key, state) for state in layers]
            scores = torch.stack([key @ query for key in keys], dim=-1)
        wide = torch.promote_types(scores.dtype, torch.float32)
        return torch.softmax(scores.to(wide) * self.scale, dim=-1).to(scores.dtype)


def _linear(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight.to(x.dtype), linear.bias.to(x.dtype))


@register
@dataclass(frozen=True)
class AttentionFusion(Method):
    r"""Late fusion of all layers: a trained query mixes each token's states, f = sum_l softmax_l(q . h_l) h_l.

    The model stays frozen as a whole; f replaces the last layer's states, and whatever reads these (head, pooler,
    language-model head) reads f. With q = 0, at the start, f is the mean of the layers. **This is a reconstruction**:
    no code was published, and the formula is inferred from the paper's description and its parameter count.

    When to use:
        Where the training must be cheap above all: one vector and the head are trained, no gradient goes through
        the model, and its states can serve many tasks. Compare it with a head on the frozen model, which it has to
        beat, and with a method that changes the layers, which has far more freedom.

    Cost:
        Parameters: d for the query. BERT-base: 768, which is 0.0009 % of the encoder's layers. The head is not
            counted. Other ``scores`` have more: projected 2 d^2 + 3 d, last-layer d^2, layer L.
        Memory: the states of all layers, L + 1 tensors (B, T, d), and nothing else of the model.
        Time: a forward pass, and a backward pass through one weighted sum and the head. With ``frozen_states`` the
            model runs once for each text.
        Inference: L scalar products of length d for each token. It cannot be merged.

    Terms:
        Site: the final hidden states of a stack; in encoder-decoder models those of the decoder.
        Form: an attention over layers with one query for the task.
        Combination: it replaces them; with ``residual`` it is added to them with a trained weight.
        Control: live for every row while active. Two methods that replace the same states are not live together.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.AttentionFusion())
        >>> tuned.summary().parameters - tuned.summary().head_parameters  # one query of 32
        32

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/fusion \
            --method attention-fusion --learning-rate 0.005

    Differs from the paper:
        All that the paper's abstract leaves open is chosen here: keys and values are the states themselves, scores
        are not scaled, the query starts at zero, the embedding output is left out. Models that normalise before each
        sublayer (GPT-2, LLaMA, T5, ViT), which the paper does not treat, have states of very different sizes; there
        ``automatic`` lets the states of all layers pass through the model's own final norm, as the last one does.
        ``layer`` is the scalar mix of ELMo (arXiv 1802.05365) without its factor, as a baseline. ``last-layer`` takes
        the query from the last layer, as DWAtt does (arXiv 2209.15168), by one linear map.

    Source:
        Cao et al. 2022, "Attention Fusion", Findings of NAACL 2022, pages 857 to 866.
    """

    scores: str = option("query", "what scores a layer at a token", choices=SCORES)
    scaled: bool = option(False, "divide scores by the square root of the hidden size")
    normalization: str = option(
        "automatic",
        "of the layers' states: final (by the model's final norm), standard (mean 0, variance 1), none, or automatic "
        "(final where the stack has such a norm, else none)",
        choices=NORMALIZATIONS,
    )
    residual: bool = option(False, "add to the last layer, with a weight that starts at zero, instead of replacing it")
    embeddings: bool = option(False, "mix the embedding output too")
    dropout: float = option(0.1, "dropout of the fused states while training", minimum=0, maximum=0.99)
    stack: str | None = option(None, "name of the stack; by default every one that no other stack reads")

    name: ClassVar[str] = "attention-fusion"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.REPLACE
    paper: ClassVar[Paper] = Paper(
        "Cao et al.",
        "Attention Fusion: a light yet efficient late fusion mechanism for task adaptation in NLU",
        2022,
    )
    learning_rate: ClassVar[float] = 5e-3
    unchanged_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "unchanged_at_start", self.residual)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A form at the end of every selected stack."""
        for site in states_sites(model, anatomy, (self.stack,) if self.stack else ()):
            normalization = self.normalization
            if normalization == "automatic":
                normalization = "final" if site.stack.final_norm is not None else "none"
            yield Placement(
                site,
                LayerAttention(
                    site, self.scores, self.scaled, normalization, self.residual, self.embeddings, self.dropout
                ),
            )
