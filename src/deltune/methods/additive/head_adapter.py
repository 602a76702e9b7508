"""Adapters beside the heads of attention: what a prefix is without the softmax that it shares with the text.

Letters: d width of all heads, H heads, K key/value heads, D width of a head, r width of the adapter, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError, suggestion
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import HeadForm, HeadSite, Insertion, head_sites

__all__ = ["HeadAdapter", "HeadBottleneck"]

#: The activation that is none of transformers': over the r products of each query.
_SOFTMAX = "softmax"


class HeadBottleneck(HeadForm):
    r"""dh = s f(c q P_k^T) P_v for each head, q (Q, D) its queries and c what the model scales its products by.

    P_k and P_v are ``keys`` and ``values``, (H, r, D), or (K, r, D) where the query heads of one key/value head share
    theirs. There are no biases.

    Args:
        heads: H or K.
        width: r.
        head_dim: D.
        activation: name of f, as transformers knows it, or ``softmax`` over the r products.
        initialization: ``kaiming``: P_k uniform within 1 / sqrt(D), P_v zero, so that dh is zero; ``normal``: both
            normal with deviation 0.02.
        scale: s; ``learned`` for a trained scalar that starts at one.
        dropout: probability, of the r values behind f while training.
        dtype: type of the parameters.
        device: where they are.
    """

    formula: ClassVar[str] = "{f}({x} W_q P_k^T) P_v"

    scale: float | nn.Parameter

    def __init__(
        self,
        heads: int,
        width: int,
        head_dim: int,
        activation: str = "relu",
        initialization: str = "kaiming",
        scale: float | str = 1.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.empty(heads, width, head_dim, dtype=dtype, device=device))
        self.values = nn.Parameter(torch.zeros(heads, width, head_dim, dtype=dtype, device=device))
        if initialization == "normal":
            nn.init.normal_(self.keys, std=0.02)
            nn.init.normal_(self.values, std=0.02)
        else:
            nn.init.uniform_(self.keys, -1 / math.sqrt(head_dim), 1 / math.sqrt(head_dim))
        self.activation_name = activation
        function = nn.Softmax(dim=-1) if activation == _SOFTMAX else ACT2FN[activation]
        self.activation = function.to(dtype=dtype, device=device)
        self.dropout = dropout
        if isinstance(scale, str):
            self.scale = nn.Parameter(torch.ones((), dtype=dtype, device=device))
        else:
            self.scale = scale

    def as_text(self, x: str) -> str:
        """With the name of f."""
        return self.formula.format(f=self.activation_name, x=x)

    def forward(self, query: Tensor, scaling: float) -> Tensor:
        """The change (B, H, Q, D) for the query (B, H, Q, D)."""
        groups = query.shape[1] // self.keys.shape[0]
        keys, values = (rows.to(query.dtype).repeat_interleave(groups, dim=0) for rows in (self.keys, self.values))
        narrow = F.dropout(self.activation(scaling * query @ keys.mT), self.dropout, self.training)
        change = narrow.to(values.dtype) @ values
        if isinstance(self.scale, Tensor):
            return self.scale.to(change.dtype) * change
        return change if self.scale == 1.0 else self.scale * change


@register
@dataclass(frozen=True)
class HeadAdapter(Method):
    r"""An adapter beside each head of attention: head <- head + s f(c q P_k^T) P_v.

    q are the head's queries, after rotation and normalisation, and c what the model scales their products with keys
    by. With f = relu it is the multi-head parallel adapter, with W_down = W_q P_k^T and W_up = P_v; with
    ``activation=softmax, grouped=true`` it is prefix tuning whose prefix has a softmax of its own, so that it is added
    and takes no share of the attention to the text. P_v is zero at the start, so that the model is unchanged.

    When to use:
        Where the budget is tiny: at 0.1 % of the parameters the authors find changes of heads best, and a prefix and
        this on par. It is also the way to see what the gate of a prefix is worth (``activation=softmax``). With more
        to spend, change feed-forward sublayers, with ``parallel-adapter`` or ``mam``.

    Cost:
        Parameters: 2 r d for each attention function; 2 r K D with ``grouped``; one more with ``scale=learned``.
            BERT-base, r = 30: 552,960 (0.51 %).
        Memory: gradients and optimizer state of what trains. Activations: the queries, and r values more for each of
            them and each head.
        Time: two thin products more for each head.
        Inference: the same; it cannot be merged.

    Terms:
        Site: what each head of attention makes, before the matrix that joins them; by default in all of the model.
        Form: two small matrices for each head with a non-linearity between them, read by the head's queries.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.HeadAdapter(width=8))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 2 * 8 * 32 each
        1024

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/heads \
            --method head-adapter --width 16

    Differs from the paper:
        The paper's table writes relu(x W_down) W_up for each head; the authors' code lets a head's query read P_k, and
        so does this, which is why r for each head costs 2 r d in all. That code makes P_k and P_v by the network of
        prefix tuning; here they are parameters. The paper has no biases here, and says no scale (``scale=1``). In
        models that rotate queries the change depends on the position, as that of a prefix does. The learning rate is
        that of the other adapters; the authors' scripts have 5e-5, with up to 100,000 steps.

    Source:
        He et al. 2022, arXiv 2110.04366, sections 3.3 and 4.4; authors' code: jxhe/unify-parameter-efficient-tuning.
    """

    width: int = option(30, "width r of each head's adapter: what the length of a prefix is", minimum=1)
    activation: str = option("relu", "the non-linearity f, as transformers names it, or softmax over the r values")
    grouped: bool = option(False, "let the query heads that share a key/value head share an adapter, as in a prefix")
    initialization: str = option(
        "kaiming",
        "where weights start: kaiming (uniform, and P_v zero, which leaves the model unchanged), normal (0.02)",
        choices=("kaiming", "normal"),
    )
    scale: float | str = option(
        1.0, "factor s of the change: a number, or learned, a trained scalar from 1", minimum=0, exclusive=True
    )
    dropout: float = option(0.0, "dropout of the r values while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention",)), "in which attention functions")

    name: ClassVar[str] = "head-adapter"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.PARALLEL
    paper: ClassVar[Paper] = Paper(
        "He et al.", "Towards a Unified View of Parameter-Efficient Transfer Learning", 2022, "2110.04366"
    )
    learning_rate: ClassVar[float] = 1e-3
    weight_decay: ClassVar[float] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [*ACT2FN, _SOFTMAX]
        if self.activation not in known:
            raise MethodError(
                f"{self.name}: there is no activation {self.activation!r}. {suggestion(self.activation, known)}"
            )
        if isinstance(self.scale, str) and self.scale != "learned":
            raise MethodError(f"{self.name}: scale is a number above 0 or the word learned, not {self.scale!r}.")
        # the class says it for its defaults
        object.__setattr__(self, "unchanged_at_start", self.initialization == "kaiming")

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A form beside the heads of every selected attention function.

        Raises:
            TargetError: if a target selects nothing, or an attention function that cannot be reached.
        """
        for site in head_sites(model, anatomy, self.targets):
            yield Placement(site, self._form(site))

    def _form(self, site: HeadSite) -> HeadBottleneck:
        return HeadBottleneck(
            site.shape.key_value_heads if self.grouped else site.shape.heads,
            self.width,
            site.shape.head_dim,
            self.activation,
            self.initialization,
            self.scale,
            self.dropout,
            site.dtype,
            site.device,
        )
