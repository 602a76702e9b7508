"""Prefix tuning: trainable keys and values in front of the real ones, in every attention function.

Letters: P length of the prefix, K key/value heads, D width of a head, d hidden size, M width of the
reparameterisation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Form, Insertion, KeyValueForm, KeyValueSite, key_value_sites

__all__ = ["Prefix", "PrefixTrunk", "PrefixTuning", "ReparameterizedPrefix"]


class Prefix(KeyValueForm):
    """Keys and values as plain parameters, each (K, P, D), standard normal at the start."""

    def __init__(
        self,
        heads: int,
        length: int,
        head_dim: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.keys = nn.Parameter(torch.randn(heads, length, head_dim, dtype=dtype, device=device))
        self.values = nn.Parameter(torch.randn(heads, length, head_dim, dtype=dtype, device=device))
        self.dropout = dropout

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (K, P, D)."""
        return F.dropout(self.keys, self.dropout, self.training), F.dropout(self.values, self.dropout, self.training)


class PrefixTrunk(Form):
    """tanh(W P' + b): the part of the reparameterisation that the layers of one kind of attention share.

    P' is (P, d), standard normal; the result is (P, M).
    """

    def __init__(
        self, length: int, features: int, width: int, dtype: torch.dtype, device: torch.device | None = None
    ) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, features, dtype=dtype, device=device))
        self.linear = nn.Linear(features, width, dtype=dtype, device=device)

    def forward(self) -> Tensor:
        """The shared hidden rows, (P, M)."""
        return torch.tanh(self.linear(self.rows))

    def stored(self) -> None:
        """Not written: the layers' flat prefixes say everything."""
        return


class ReparameterizedPrefix(KeyValueForm):
    """One layer's keys and values as a linear map of the trunk's rows; flat once stored.

    The paper's last linear map serves all layers at once; here each layer owns its rows of it, which is the
    same map.
    """

    def __init__(
        self,
        trunk: PrefixTrunk,
        heads: int,
        head_dim: int,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        # in a tuple, so that the shared trunk is not registered again with every layer
        self._trunk = (trunk,)
        self.linear = nn.Linear(trunk.linear.out_features, 2 * heads * head_dim, dtype=dtype, device=device)
        self.heads, self.head_dim = heads, head_dim
        self.dropout = dropout

    def forward(self) -> tuple[Tensor, Tensor]:
        """Keys and values, each (K, P, D)."""
        both = F.dropout(self.linear(self._trunk[0]()), self.dropout, self.training)
        keys, values = both.view(-1, 2, self.heads, self.head_dim).permute(1, 2, 0, 3)
        return keys, values

    @torch.no_grad()
    def stored(self) -> Prefix:
        """The same keys and values as plain parameters."""
        training = self.training
        keys, values = self.eval()()
        self.train(training)
        flat = Prefix(self.heads, keys.shape[1], self.head_dim, self.dropout, keys.dtype, keys.device)
        flat.keys.copy_(keys)
        flat.values.copy_(values)
        return flat.train(training)


@register
@dataclass(frozen=True)
class PrefixTuning(Method):
    r"""P trainable keys and values in front of the real ones: softmax(q [P_k; K]^T / sqrt(D)) [P_v; V].

    With ``reparameterize`` they are made by a small network, [P_k, P_v] = W2 tanh(W1 P' + b1) + b2, which
    trains more steadily and is dropped when the delta is saved; without it they are parameters themselves.
    In encoder-decoder models the encoder, the decoder and its cross attention have a prefix each. Not the
    identity at the start: more keys take their share of every softmax.

    When to use:
        Generation with a frozen decoder or encoder-decoder, and wherever one batch shall hold several tasks, since
        the prefix is data and no change of weights. Short prefixes (5 to 20) suit short outputs; the paper takes
        200 for summaries. Leave ``reparameterize`` on unless memory forbids it.

    Cost:
        Parameters: stored, 2 P times the width of all keys, for each attention function. BERT-base, P = 10:
            184,320 (0.17 %). While training with the network far more: 9,857,024 there.
        Memory: gradients and optimizer state of what trains, the network included. No weight gradients, but
            the backward pass goes through the whole model.
        Time: P more keys in each attention function, and the network once a forward pass.
        Inference: P more keys in each attention function. They are not in the cache, take no position, and
            cannot be merged.

    Terms:
        Site: attention functions; by default all of the model's.
        Form: keys and values, free or made by a network that the layers of one kind of attention share.
        Combination: joined with the real keys and values inside the softmax.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2))
        >>> tuned = deltune.attach(model, deltune.PrefixTuning(length=5, reparameterize=False))
        >>> tuned.summary().parameters  # 2 layers, keys and values, 5 of 32 each
        640

        $ deltune tune --model models/decoder --data data/instructions.jsonl --task instruction-tuning \
            --output runs/prefix --method prefix-tuning --length 20

    Differs from the paper:
        A prefix shifts no position of the text (in the authors' code for GPT-2 the text begins at position P), and
        it enters after rotary embeddings and normalisation of keys. The paper's last linear map serves all layers
        at once; here each layer owns its rows of it, which is the same map. Prefixes of real words are not offered.

    Source:
        Li and Liang 2021, arXiv 2101.00190, section 4; authors' code: XiangLi1999/PrefixTuning.
    """

    length: int = option(10, "number P of additional keys and values", minimum=1)
    reparameterize: bool = option(True, "train through a small network that is dropped after training")
    width: int = option(512, "hidden width M of that network", minimum=1)
    dropout: float = option(0.0, "dropout of keys and values while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention",)), "which attention functions")

    name: ClassVar[str] = "prefix-tuning"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.KEY_VALUE
    paper: ClassVar[Paper] = Paper(
        "Li and Liang", "Prefix-Tuning: Optimizing Continuous Prompts for Generation", 2021, "2101.00190"
    )
    learning_rate: ClassVar[float] = 1e-3
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A prefix in every selected attention function, and one shared trunk per kind of attention."""
        trunks: dict[str, PrefixTrunk] = {}
        for site in key_value_sites(model, anatomy, self.targets):
            if self.reparameterize and site.part.stack not in trunks:
                trunk = PrefixTrunk(self.length, site.hidden_size, self.width, site.dtype, site.device)
                trunks[site.part.stack] = trunk
                yield Placement(None, trunk, shared=f"{site.part.stack}.prefix")
            yield Placement(site, self._form(site, trunks.get(site.part.stack)))

    def _form(self, site: KeyValueSite, trunk: PrefixTrunk | None) -> KeyValueForm:
        heads, head_dim = site.shape.key_value_heads, site.shape.head_dim
        if trunk is None:
            return Prefix(heads, self.length, head_dim, self.dropout, site.dtype, site.device)
        return ReparameterizedPrefix(trunk, heads, head_dim, self.dropout, site.dtype, site.device)

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The flat form: the network is not kept."""
        return replace(self, reparameterize=False)
