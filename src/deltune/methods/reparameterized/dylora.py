"""DyLoRA: a low-rank change that can be cut to any smaller rank after training.

Letters: d_in and d_out the matrix's width and height, r the rank, b the number of components in use.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import LowRank, RankPattern, checked_rank, low_rank_of
from deltune.sites import Form, Insertion, WeightSite, weight_sites

__all__ = ["DyLoRA", "DynamicLowRank"]


class DynamicLowRank(LowRank):
    r"""dh = (alpha / b) B[:, :b] A[:b] dropout(x), with A (r, d_in) and B (d_out, r).

    In evaluation b is the rank that :meth:`set_rank` chose, r at first. In training it is the one drawn for the step,
    once there is one.

    Args:
        site: the matrix.
        rank: r.
        alpha: numerator of the scale.
        dropout: as for :class:`LowRank`.
        frozen: whether a step trains component b alone, and not all of the first b.
    """

    formula: ClassVar[str] = "{x} W_down[:, :b] W_up[:b]"

    steps: Tensor

    def __init__(self, site: WeightSite, rank: int, alpha: float, dropout: float = 0.0, frozen: bool = True) -> None:
        super().__init__(site, rank, alpha / rank, dropout)
        self.alpha = alpha
        self.frozen = frozen
        self.chosen = rank
        self.drawn: int | None = None
        # how many steps were taken, from which the rank of the next one follows; in a buffer too, for checkpoints
        self.taken = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.long, device=site.device))
        self._kept: dict[tuple[str, str], Tensor] = {}

    @property
    def active(self) -> int:
        """The rank b in use: while training that of the step, otherwise the chosen one."""
        return self.drawn if self.training and self.drawn is not None else self.chosen

    @property
    def scale(self) -> float:
        """Alpha / b."""
        return self.alpha / self.active

    @scale.setter
    def scale(self, value: float) -> None:
        self.alpha = value * self.rank

    def set_rank(self, rank: int) -> None:
        """Use the first ``rank`` components in evaluation, when merged, and in files.

        Raises:
            MethodError: if there are not so many.
        """
        if not 1 <= rank <= self.rank:
            raise MethodError(f"This change has the ranks 1 to {self.rank}, not {rank}.")
        self.chosen = rank

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (b, d_in) and B (d_out, b); what the step does not train is constant."""
        factor_A, factor_B = self.A[: self.active], self.B[:, : self.active]
        first, _ = self._trained()
        if first:
            factor_A = torch.cat([factor_A[:first].detach(), factor_A[first:]])
            factor_B = torch.cat([factor_B[:, :first].detach(), factor_B[:, first:]], dim=1)
        return factor_A, factor_B

    def weight_delta(self) -> Tensor:
        """(alpha / b) B[:, :b] A[:b], (d_out, d_in), at the chosen rank, in training too."""
        return (self.alpha / self.chosen) * (self.B[:, : self.chosen] @ self.A[: self.chosen])

    def stored(self) -> LowRank:
        """The first b components as a plain change of rank b; itself if these are all."""
        if self.chosen == self.rank:
            return self
        return low_rank_of(self.A[: self.chosen], self.B[:, : self.chosen], self.alpha / self.chosen)

    def draw(self, taken: int, rank: int) -> None:
        """Train at ``rank`` until the next call, ``taken`` steps having been taken."""
        self.taken = taken
        self.steps.fill_(taken)
        self.drawn = rank

    def _trained(self) -> tuple[int, int]:
        """The components that train at present: the first of them, and their number."""
        if not (self.training and self.drawn is not None):
            return 0, self.active
        return (self.drawn - 1, 1) if self.frozen else (0, self.drawn)

    @torch.no_grad()
    def keep_others(self, optimizer: torch.optim.Optimizer) -> None:
        """Remember the components that the step to come does not train, and the optimizer's moments of them."""
        self._kept.clear()
        if self._trained()[1] < self.rank:
            self._kept.update({key: tensor.clone() for key, _, tensor in self._tensors(optimizer)})

    @torch.no_grad()
    def restore_others(self, optimizer: torch.optim.Optimizer) -> None:
        """Put them back: neither old momentum nor weight decay moves them."""
        if not self._kept:
            return
        for key, dim, tensor in self._tensors(optimizer):
            # moments that the step made are zero where nothing was trained
            kept = self._kept.get(key)
            kept = torch.zeros_like(tensor) if kept is None else kept
            kept.narrow(dim, *self._trained()).copy_(tensor.narrow(dim, *self._trained()))
            tensor.copy_(kept)
        self._kept.clear()

    def _tensors(self, optimizer: torch.optim.Optimizer) -> Iterator[tuple[tuple[str, str], int, Tensor]]:
        """A, B and the optimizer's tensors of their shapes: a key, the dimension of the components, the tensor."""
        for name, dim, parameter in (("A", 0, self.A), ("B", 1, self.B)):
            yield (name, ""), dim, parameter
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point():
                    yield (name, key), dim, value


@register
@dataclass(frozen=True)
class DyLoRA(Method):
    r"""Dynamic low-rank adaptation: h = W0 x + (alpha / b) B[:, :b] A[:b] x, for every b from 1 to r.

    Each optimizer step draws one rank b, which all matrices share, and trains the change cut to it. The first
    components learn to do without the later ones, so that after training any b up to r can be chosen. A (r, d_in) is
    uniform within 1/sqrt(d_in) at the start and B (d_out, r) is zero, so that the model is unchanged.

    When to use:
        Where the right rank is not known, or several are needed from one training: train once at the largest, then
        compare ranks with ``tuned.set_rank(b)``. At the full rank a plain LoRA of that rank, trained alone, learns
        more in the same number of steps. In a training loop of your own, ``tuned.bind(optimizer)`` draws the ranks,
        for steps that are taken in training mode; without it the full rank trains, or the one that was drawn last.

    Cost:
        Parameters: r (d_in + d_out) for each matrix. BERT-base, queries and values, r = 8: 294,912 (0.27 %); b / r of
            them at rank b.
        Memory: as LoRA of rank r; during an optimizer step also a copy of A, B and their moments.
        Time: as LoRA of rank b, which is (r + 1) / 2 on average. Somewhat more steps than for one rank, and several
            times as many with ``update=frozen``, since each trains one component then.
        Inference: as LoRA of the chosen rank; none after merging.

    Terms:
        Site: linear maps and tables of embeddings; by default the maps that make queries and values.
        Form: the first b components of two thin matrices.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active; the rank is chosen by ``set_rank``.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.DyLoRA(rank=8), train_head=False)
        >>> tuned.summary().parameters  # 2 layers, 2 matrices, 8 (32 + 32) each
        2048
        >>> tuned.set_rank(2)  # after training; what is merged or saved now is a plain LoRA of rank 2

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/dylora \
            --method dylora --rank 16 --epochs 6

    Differs from the paper:
        ``update=nested`` trains the first b components in a step; ``frozen``, as in the authors' script, component b
        alone, which takes that many times more steps: on movie reviews 470 steps brought 82 % nested and 77 % frozen,
        so nested is the default here. The paper's frozen components do not move. In the authors' code they do, by
        momentum from earlier steps and by weight decay: ``leak`` reproduces that; by default values and moments of all
        components that the step does not train are put back, in both modes. Adam's count of steps is that of the whole
        matrix. The rank of a step follows from ``rank_seed`` and the step's number, so that a stopped run goes on with
        the same ranks and all processes agree. The default learning rate is above the 4e-4 to 5e-4 of the authors'
        scripts, and there is no weight decay instead of 0.1. Their code changes linear maps alone, and a fused matrix
        of queries, keys and values by a plain LoRA; here its parts are as dynamic as others. Saved at its full rank, a
        DyLoRA stays one, of which any rank can be chosen after loading; cut to a smaller rank, the file is a plain LoRA
        of that rank.

    Source:
        Valipour et al. 2022, arXiv 2210.07558, section 4; authors' code: huawei-noah/Efficient-NLP, DyLoRA.
    """

    rank: int = option(8, "largest rank r; every smaller one can be chosen after training", minimum=1)
    alpha: float = option(16.0, "numerator of the scale alpha / b", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    update: str = option(
        "nested",
        "what a step of rank b trains: the first b components (nested), or component b alone (frozen)",
        choices=("nested", "frozen"),
    )
    leak: bool = option(False, "let momentum and weight decay move what a step does not train, as in the authors' code")
    distribution: str = option("uniform", "law of the ranks: uniform or geometric", choices=("uniform", "geometric"))
    probability: float = option(
        0.5,
        "of the geometric law: share of rank 1, then of rank 2 in the rest, and so on up to r",
        minimum=0.001,
        maximum=0.999,
    )
    rank_seed: int = option(0, "draws the ranks, together with the number of the step", minimum=0)
    targets: Targets = option(Targets(("attention.query", "attention.value")), "which matrices to change")

    name: ClassVar[str] = "dylora"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Valipour et al.",
        "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation",
        2022,
        "2210.07558",
    )
    learning_rate: ClassVar[float] = 2e-3
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A dynamic low-rank form at every selected matrix.

        Raises:
            MethodError: if the rank exceeds what a matrix can have.
        """
        for site in weight_sites(model, anatomy, self.targets, ("linear", "embedding")):
            rank = checked_rank(self.rank, site)
            yield Placement(site, DynamicLowRank(site, rank, self.alpha, self.dropout, self.update == "frozen"))

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """A plain LoRA if it was cut to a smaller rank."""
        ranks = {key: form.chosen for key, form in _dynamic(forms).items()}
        largest = max(ranks.values(), default=self.rank)
        pattern = RankPattern.text(ranks, largest)
        if largest == self.rank and not pattern:
            return self
        return LoRA(rank=largest, alpha=self.alpha, dropout=self.dropout, rank_pattern=pattern, targets=self.targets)

    def step_rank(self, step: int) -> int:
        """The rank b that the step of that number, from 1, trains at."""
        number = random.Random(f"{self.rank_seed}/{step}").random()
        if self.distribution == "uniform":
            return 1 + int(number * self.rank)
        # the inverse of the cumulated law, cut at r and scaled to one
        rest = 1 - self.probability
        return min(self.rank, 1 + int(math.log1p(-number * (1 - rest**self.rank)) / math.log(rest)))

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Draw the rank of the step to come: the first, or the next of a run whose state was loaded before."""
        for form in _dynamic(forms).values():
            taken = 0 if form.steps.is_meta else int(form.steps)
            form.draw(taken, self.step_rank(taken + 1))

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Remember what the step is not to change."""
        if not self.leak:
            for form in _dynamic(forms).values():
                form.keep_others(optimizer)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Put that back, and draw the rank of the next step."""
        for form in _dynamic(forms).values():
            form.restore_others(optimizer)
            form.draw(form.taken + 1, self.step_rank(form.taken + 2))


def _dynamic(forms: Mapping[str, Form]) -> dict[str, DynamicLowRank]:
    return {key: form for key, form in forms.items() if isinstance(form, DynamicLowRank)}
