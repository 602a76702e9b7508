"""ATTEMPT: a prompt for each text, mixed from the prompts of other tasks by a small attention network.

Letters: B batch, T positions of the text, P number of rows, d width of an embedding, t number of source prompts,
w width of the attention network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from deltune.backbone import Anatomy
from deltune.errors import MethodError
from deltune.methods.additive.prompt_rows import random_rows, token_table
from deltune.methods.additive.prompt_start import PromptMethod
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Form, Insertion, ReadingTokenForm, TokenSite

__all__ = ["ATTEMPT", "InstancePrompt", "max_pooled"]


def max_pooled(embedded: Tensor, mask: Tensor | None) -> Tensor:
    """The greatest value of each feature over the real positions, (B, d); zeros for a row without any.

    Args:
        embedded: (B, T, d).
        mask: (B, T), 1 or True at real positions; None if all are.
    """
    if mask is None:
        return embedded.amax(1)
    real = mask.bool()
    pooled = embedded.masked_fill(~real[..., None], -torch.inf).amax(1)
    return pooled.masked_fill(~real.any(1, keepdim=True), 0)


class InstancePrompt(ReadingTokenForm):
    """P_inst = P_target + sum_j a_j P_j, the sum over the sources and the target; (B, P, d).

    a = softmax_j(h . p_j / temperature), with p_j (d) the maximum of P_j over its rows, and h (d) what the network
    makes of x (d), the maximum of the embedded text over its positions: h = LayerNorm(W_up SiLU(W_down x)).
    Without sources there is no network: a is 1, and P_inst is twice P_target.

    Args:
        rows: the initial target prompt, (P, d).
        sources: the frozen prompts, (t, P, d).
        width: w, the height of W_down (w, d).
        temperature: divides the products.
        pool_padding: whether x covers padding too.
    """

    formula: ClassVar[str] = "P + sum_j a_j(h) P_j"

    sources: Tensor

    def __init__(self, rows: Tensor, sources: Tensor, width: int, temperature: float, pool_padding: bool) -> None:
        super().__init__()
        self.length = rows.shape[0]
        self.temperature = temperature
        self.pool_padding = pool_padding
        self.target = nn.Parameter(rows.detach().clone())
        self.register_buffer("sources", sources.detach().clone())
        if len(sources):
            self.saved_buffers = ("sources",)
            like: dict[str, Any] = {"dtype": rows.dtype, "device": rows.device}
            self.down = nn.Linear(rows.shape[1], width, bias=False, **like)
            self.up = nn.Linear(width, rows.shape[1], bias=False, **like)
            self.norm = nn.LayerNorm(rows.shape[1], **like)

    def prompts(self) -> Tensor:
        """The sources and, as the last, the target, (t + 1, P, d)."""
        return torch.cat([self.sources, self.target[None]])

    def weights(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """The attention a of each row of the batch, (B, t + 1), in float32 at least.

        Args:
            embedded: the embedded text, (B, T, d).
            mask: its padding mask, (B, T); None if nothing is padding.
        """
        wide = torch.promote_types(embedded.dtype, torch.float32)
        with torch.autocast(embedded.device.type, enabled=False):
            pooled = max_pooled(embedded.to(wide), None if self.pool_padding else mask)
            hidden = functional.silu(functional.linear(pooled, self.down.weight.to(wide)))
            hidden = functional.linear(hidden, self.up.weight.to(wide))
            weight, bias = self.norm.weight.to(wide), self.norm.bias.to(wide)
            hidden = functional.layer_norm(hidden, weight.shape, weight, bias, self.norm.eps)
            keys = self.prompts().amax(1).to(wide)
            return (hidden @ keys.T / self.temperature).softmax(1)

    def forward(self, embedded: Tensor, mask: Tensor | None) -> Tensor:
        """The prompt of each text, (B, P, d); without sources the one prompt of all, (P, d)."""
        if not len(self.sources):
            return 2 * self.target
        weights = self.weights(embedded, mask)
        with torch.autocast(embedded.device.type, enabled=False):
            mixture = torch.einsum("bj,jpd->bpd", weights, self.prompts().to(weights.dtype))
            return self.target + mixture


@register
@dataclass(frozen=True)
class ATTEMPT(PromptMethod):
    r"""Attentional mixtures of soft prompts: P_inst = P_target + sum_j a_j P_j, a prompt for each text.

    P_j are frozen prompts of other tasks, and the trained P_target once more. The weights a_j come from a small
    network that reads the greatest value of each feature of the embedded text. Without sources P_inst is twice
    P_target, whatever the text.

    When to use:
        A small target task, and trained prompts of large tasks on the same model: give their folders in ``sources``.
        Without sources it is prompt tuning with a factor of two. Not for decoders that are trained on whole texts,
        where the mixture would see the answer; there use prompt-tuning with start_from and similar_to.

    Cost:
        Parameters: P d + 2 w d + 2 d; P d without sources. BERT-base, P = 100, w = 100: 231,936 (0.2 %).
        Memory: as prompt tuning, and t P d values of the frozen sources. These are in the file as well.
        Time: as prompt tuning; the network is small.
        Inference: as prompt tuning. The prompt depends on the text and is made once for each.

    Terms:
        Site: the embedded input of a stack; by default of the first.
        Form: frozen prompts, a trained prompt and a network that weights them.
        Combination: joined with the embedded text.
        Control: live for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> method = deltune.ATTEMPT(length=10, sources=2, width=8)  # in earnest: sources=("runs/mnli", "runs/qnli")
        >>> tuned = deltune.attach(BertForSequenceClassification(config), method)
        >>> tuned.summary().parameters - tuned.summary().head_parameters  # 10 * 32 + 2 * 8 * 32 + 2 * 32
        896

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/attempt \
            --method attempt --length 10 --sources 2 --width 8

    Differs from the paper:
        The maximum over the text leaves padding out; the authors' code takes it over padding too, so that results
        depend on the length to which a batch is padded: ``pool_padding`` does as they do. The weights are computed in
        float32. The temperature is d e as in the code; learning it is not offered. 20 rows by default, the paper has
        100. One learning rate for prompt and network, as in the authors' code, whose group for the network is empty
        by an oversight. A saved delta holds its sources; their number then stands for their folders. A number in
        their place otherwise means so many random prompts from the vocabulary, a baseline of sources that know
        nothing. An attention network that several target tasks share is not offered.

    Source:
        Asai et al. 2022, arXiv 2205.11961, section 3; authors' code: AkariAsai/ATTEMPT.
    """

    sources: tuple[str, ...] | int = option((), "folders of saved prompts, or a number of random ones", minimum=0)
    width: int = option(100, "width w of the attention network", minimum=1)
    temperature: float | None = option(None, "divides the scores; d e if none", minimum=0, exclusive=True)
    pool_padding: bool = option(False, "whether the network reads padding too, as the authors' code does")

    name: ClassVar[str] = "attempt"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.TOKENS
    paper: ClassVar[Paper] = Paper(
        "Asai et al.",
        "ATTEMPT: Parameter-Efficient Multi-task Tuning via Attentional Mixtures of Soft Prompts",
        2022,
        "2205.11961",
    )
    learning_rate: ClassVar[float] = 5e-2
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A mixture for the input of every selected stack.

        Raises:
            MethodError: if the mixture would see what the model is to predict, or its padding.
            CheckpointError: if a folder holds no prompt that fits.
        """
        for site, rows in self.prompt_sites(model, anatomy):
            sources = self._sources(model, site)
            if len(sources):
                self._check(site, anatomy)
            temperature = self.temperature or site.hidden_size * math.e
            yield Placement(site, InstancePrompt(rows, sources, self.width, temperature, self.pool_padding))

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """With the number of the sources in the place of their folders: the file holds them."""
        count = self.sources if isinstance(self.sources, int) else len(self.sources)
        return replace(super().stored(forms), sources=count or ())  # type: ignore[call-arg]

    def _sources(self, model: nn.Module, site: TokenSite) -> Tensor:
        if isinstance(self.sources, int):
            table = token_table(model, site)
            found = [random_rows(site, table, self.length, "vocabulary") for _ in range(self.sources)]
        else:
            found = [self.saved_rows(model, site, folder) for folder in self.sources]
        none = torch.empty(0, self.length, site.hidden_size, dtype=site.dtype, device=site.device)
        return torch.stack(found) if found else none

    def _check(self, site: TokenSite, anatomy: Anatomy) -> None:
        stack = site.part.stack
        if anatomy.language_model_head is not None and stack not in ("encoder", "vision"):
            raise MethodError(
                f"{self.name} would let the prompt of a language model see what the model is to predict: it is made "
                f"of the whole input of the {stack}, the answer included. Use prompt-tuning with start_from and "
                "similar_to, an encoder-decoder, or a model with a head for classification."
            )
        if not site.sees_padding and not self.pool_padding:
            raise MethodError(
                f"{self.name} cannot tell padding from text in the {stack} of {anatomy.family}. With "
                "pool_padding=true it reads both, as the authors' code does."
            )
