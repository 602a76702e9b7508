"""P-tuning: embeddings of pseudo tokens, made by a small recurrent network.

Letters: P number of pseudo tokens, d width of an embedding, h width of the network, w width of each direction of its
LSTM.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.additive.prompt_rows import first_stack
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Form, Insertion, PseudoTokenSite, TokenForm, TokenSite, pseudo_token_sites, token_sites

__all__ = ["BidirectionalLSTM", "PTuning", "PromptEncoder", "PseudoTokens"]


class BidirectionalLSTM(nn.Module):
    """One layer of a bidirectional LSTM over one sequence (Hochreiter and Schmidhuber 1997; PyTorch's equations).

    Both directions run as one batch. PyTorch's own LSTM computes the same, but cannot be compiled.

    Args:
        features: width of the input.
        width: w, width of each direction.
        dtype: of the parameters, which are drawn from U(-1/sqrt(w), 1/sqrt(w)).
        device: of the parameters.
    """

    def __init__(self, features: int, width: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        bound = width**-0.5

        def uniform(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(2, *shape, dtype=dtype, device=device).uniform_(-bound, bound))

        # first dimension: forward, backward; in each, rows of the input, forget, cell and output gate
        self.input_weight = uniform(4 * width, features)
        self.hidden_weight = uniform(4 * width, width)
        self.input_bias = uniform(4 * width)
        self.hidden_bias = uniform(4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states of both directions, (P, 2 w), for x (P, features)."""
        both = torch.stack([x, x.flip(0)])
        bias = (self.input_bias.to(x) + self.hidden_bias.to(x))[:, None]
        from_input = torch.baddbmm(bias, both, self.input_weight.to(x).mT)
        recurrent = self.hidden_weight.to(x).mT
        hidden = cell = x.new_zeros(2, 1, recurrent.shape[1])
        states = []
        for step in range(x.shape[0]):
            gates = torch.baddbmm(from_input[:, step : step + 1], hidden, recurrent)
            enter, forget, new, leave = gates.chunk(4, dim=-1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            hidden = leave.sigmoid() * cell.tanh()
            states.append(hidden)
        forward, backward = torch.cat(states, dim=1)
        return torch.cat([forward, backward.flip(0)], dim=-1)


class PseudoTokens(TokenForm):
    """Embeddings of P pseudo tokens as plain parameters, (P, d), standard normal at the start."""

    formula: ClassVar[str] = "P"

    def __init__(self, length: int, features: int, dtype: torch.dtype, device: torch.device | None = None) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(length, features, dtype=dtype, device=device))
        self.length = length

    def forward(self) -> Tensor:
        """The rows, (P, d)."""
        return self.rows


class PromptEncoder(TokenForm):
    """Embeddings of P pseudo tokens made by a network: table (P, h), LSTM of two layers, linear, ReLU, linear to d.

    Computed in float32 at least, whatever the type of its parameters, and also under autocast: a recurrence in half
    precision drifts, and not every processor has one.

    Args:
        length: P.
        features: d.
        width: h.
        lstm_width: w; None for a network without an LSTM.
        dtype: of the parameters.
        device: of the parameters.
    """

    formula: ClassVar[str] = "relu(LSTM(P') W_1) W_2"

    def __init__(
        self,
        length: int,
        features: int,
        width: int,
        lstm_width: int | None,
        dtype: torch.dtype,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.length = length
        self.rows = nn.Parameter(torch.randn(length, width, dtype=dtype, device=device))
        self.lstm = nn.Sequential()
        if lstm_width is not None:
            for inside in (width, 2 * lstm_width):
                self.lstm.append(BidirectionalLSTM(inside, lstm_width, dtype, device))
        self.inner = nn.Linear(2 * lstm_width if lstm_width else width, width, dtype=dtype, device=device)
        self.outer = nn.Linear(width, features, dtype=dtype, device=device)

    def as_text(self, x: str) -> str:
        """Without LSTM where there is none."""
        return super().as_text(x) if len(self.lstm) else super().as_text(x).replace("LSTM(P')", "P'")

    def forward(self) -> Tensor:
        """The rows, (P, d)."""
        wide = torch.promote_types(self.rows.dtype, torch.float32)
        with torch.autocast(self.rows.device.type, enabled=False):
            return _linear(self.outer, F.relu(_linear(self.inner, self.lstm(self.rows.to(wide)))))

    @torch.no_grad()
    def stored(self) -> PseudoTokens:
        """The same rows as plain parameters."""
        rows = self()
        flat = PseudoTokens(rows.shape[0], rows.shape[1], self.rows.dtype, rows.device)
        flat.rows.copy_(rows)
        return flat.train(self.training)


def _linear(map: nn.Linear, x: Tensor) -> Tensor:
    """``map`` in the type of ``x``."""
    return F.linear(x, map.weight.to(x), map.bias.to(x))


@register
@dataclass(frozen=True)
class PTuning(Method):
    r"""P pseudo tokens whose embeddings a small network makes: (h_0 .. h_P) = MLP(LSTM(e_0 .. e_P)).

    With ``placement=template`` they stand where the template of a cloze puts them, before, between and behind the
    columns and among ordinary words, which keep their own embeddings (the paper's anchors); the language model answers
    at [MASK] or with the next token. With ``placement=front`` they stand in front of any task's text, as the rows of
    prompt tuning do. The network makes them depend on each other while training and is dropped when the delta is
    saved. Not the identity at the start.

    When to use:
        Few labelled examples and a language model that half knows the answer: classification and knowledge as a cloze,
        with ``placement=template``. To tune the language model along, as the paper does where it competes with
        fine-tuning, sum it: ``p-tuning(placement=template) + full``. In front of a text prefer prompt or prefix
        tuning.

    Cost:
        Parameters: stored, P d. BERT-base, P = 9: 6,912 (0.006 %). While training with the network far more:
            8,278,272 there.
        Memory: gradients and optimizer state of what trains, the network included, and activations of P positions
            more.
        Time: that of P more positions, and the network once a forward pass; the backward pass goes down to the input.
        Inference: P more positions in every layer, and in the cache. The rows are constants. It cannot be merged.

    Terms:
        Site: the embedded input of a stack: marked positions, or in front; by default of the first stack.
        Form: rows made by a bidirectional LSTM and two linear maps.
        Combination: rows stand in the place of the pseudo tokens' embeddings, or are joined with the text.
        Control: live for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForMaskedLM
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForMaskedLM(config), deltune.PTuning(length=4, placement="template"))
        >>> tuned.summary().parameters  # 4 rows of 32, 12,800 in the LSTM, two linear maps of 32 by 32
        15040

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/p-tuning \
            --method p-tuning --length 9

    Differs from the paper:
        By default (``placement=front``) the pseudo tokens stand in front of the text, which is all that Hugging Face
        peft offers under this name; the paper's method is ``placement=template``. The network is that of the authors'
        knowledge probing; that of their few-shot experiments is ``lstm_width`` = ``width``, or ``encoder=mlp``. Their
        code marks positions with a word of the vocabulary, here ids beyond it do. Their learning rates are 1e-5
        (probing) and 1e-4 (few-shot). A language model that is tuned along has the same learning rate in
        ``deltune.fit``; in a loop of your own give it another.

    Source:
        Liu et al. 2021, arXiv 2103.10385, section 3; authors' code: THUDM/P-tuning.
    """

    length: int = option(9, "number P of pseudo tokens; with placement=template that of the template", minimum=1)
    placement: str = option(
        "front", "where they stand: in front of the text, or where a template has them", choices=("front", "template")
    )
    encoder: str = option(
        "lstm",
        "what makes their embeddings: an LSTM and two linear maps, these alone, or nothing: free rows",
        choices=("lstm", "mlp", "none"),
    )
    width: int | None = option(None, "width h of the network; that of the model's embeddings if none", minimum=1)
    lstm_width: int | None = option(None, "width of each direction of the LSTM; half of width if none", minimum=1)
    targets: Targets | None = option(None, "the input of which stacks; of the first that is possible if none")

    name: ClassVar[str] = "p-tuning"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.TOKENS
    paper: ClassVar[Paper] = Paper("Liu et al.", "GPT Understands, Too", 2021, "2103.10385")
    learning_rate: ClassVar[float] = 1e-3
    unchanged_at_start: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.encoder != "lstm" and self.lstm_width is not None:
            raise MethodError(
                f"{self.name}: lstm_width is given, but encoder={self.encoder} has no LSTM. Leave it out."
            )
        if self.encoder == "none" and self.width is not None:
            raise MethodError(f"{self.name}: width is given, but encoder=none has no network. Leave it out.")

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """Rows for the input of every selected stack."""
        sites: tuple[TokenSite | PseudoTokenSite, ...]
        if self.placement == "template":
            sites = pseudo_token_sites(model, anatomy, self.targets)
        else:
            sites = token_sites(model, anatomy, self.targets or first_stack(anatomy))
        for site in sites:
            yield Placement(site, self._form(site))

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """The flat form: the network is not kept."""
        return replace(self, encoder="none", width=None, lstm_width=None)

    def _form(self, site: TokenSite | PseudoTokenSite) -> TokenForm:
        dtype, features = site.dtype, site.hidden_size
        if self.encoder == "none":
            return PseudoTokens(self.length, features, dtype, site.device)
        width = self.width or features
        if self.encoder == "mlp":
            return PromptEncoder(self.length, features, width, None, dtype, site.device)
        if self.lstm_width is None and width % 2:
            raise MethodError(
                f"{self.name}: the width {width} is odd, so it has no half for each direction of the LSTM. Give "
                "lstm_width, or another width."
            )
        return PromptEncoder(self.length, features, width, self.lstm_width or width // 2, dtype, site.device)
