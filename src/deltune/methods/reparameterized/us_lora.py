"""U-LoRA and S-LoRA: LoRA pruned by architecture search, entry by entry or component by component.

Letters: r rank, d_in and d_out the matrix's width and height, s the scale; a component is a row of A and the column of
B that belongs to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Paper, Placement
from deltune.methods.options import option
from deltune.methods.pruning_search import Candidates, PruningSearch
from deltune.methods.registry import register
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import LowRank, RankPattern, low_rank_of
from deltune.sites import Form, Insertion, WeightSite, weight_sites

__all__ = ["SLoRA", "SearchedLowRank", "ULoRA", "kept_components"]


class SearchedLowRank(Candidates, LowRank):
    r"""dh = s (B A - B0 A0) dropout(x), of which a search leaves some entries, or components.

    A0 (r, d_in) and B0 (d_out, r) are what A and B start from: normal with variances 1/d_in and 1/d_out, so that each
    row of the one and column of the other has a length of about one, and scores of both can be compared. The start's
    own product is subtracted, as if it were taken out of the frozen matrix. What is dropped is at its start again, so
    that a dropped component changes nothing.

    Args:
        site: the matrix.
        rank: r.
        scale: s.
        dropout: as for :class:`LowRank`.
    """

    formula: ClassVar[str] = "{x} W_down diag(kept) W_up"

    def __init__(self, site: WeightSite, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__(site, rank, scale, dropout)
        nn.init.normal_(self.A, std=site.in_features**-0.5)
        nn.init.normal_(self.B, std=site.out_features**-0.5)
        numbers = torch.arange(rank)
        of_A, of_B = numbers.repeat_interleave(site.in_features), numbers.repeat(site.out_features)
        self.begin_search([self.A, self.B], torch.cat([of_A, of_B]))

    def searched(self) -> Sequence[nn.Parameter]:
        """A and B."""
        return [self.A, self.B]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Of rank 2 r, with the product B (A - A0) + (B - B0) A0: exactly zero at the start."""
        start_A = self.start[: self.A.numel()].view_as(self.A)
        start_B = self.start[self.A.numel() :].view_as(self.B)
        return torch.cat([self.A - start_A, start_A]), torch.cat([self.B, self.B - start_B], dim=1)

    def components(self) -> Tensor:
        """Whether something is left of each component, (r,)."""
        count = torch.zeros(self.rank, dtype=torch.int64).index_add(0, self.vectors, self.kept_on_cpu().long())
        return count > 0

    def stored(self) -> LowRank | None:
        """The change as one of twice as many ranks as components are left; None if there is none."""
        left = self.components().repeat(2)
        count = int(left.sum())
        if not count:
            return None
        factor_A, factor_B = (factor.detach() for factor in self.factors())
        left = left.to(factor_A.device)
        # a file's scale is alpha / rank
        return low_rank_of(factor_A[left], factor_B[:, left] * (count / self.rank), self.scale * self.rank / count)


def kept_components(forms: Mapping[str, Form]) -> dict[str, int]:
    """The number of components that a search has left of each matrix, by key; also where none is left.

    Args:
        forms: the forms of an attachment by key, ``tuned.attachments["default"].forms``.
    """
    return {key: int(form.components().sum()) for key, form in forms.items() if isinstance(form, SearchedLowRank)}


@dataclass(frozen=True)
class _SearchedLoRA(PruningSearch):
    """What both have in common."""

    rank: int = option(8, "number r of components of every matrix at the start", minimum=1)
    alpha: float = option(16.0, "numerator of the scale alpha / rank", minimum=0, exclusive=True)
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.query", "attention.value")), "which matrices to change")

    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Lawton et al.",
        "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language Models",
        2023,
        "2305.16597",
    )
    learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A form of r components at every selected matrix.

        Raises:
            MethodError: if a matrix cannot hold twice the rank, as it is saved.
        """
        for site in weight_sites(model, anatomy, self.targets):
            largest = min(site.in_features, site.out_features) // 2
            if self.rank > largest:
                raise MethodError(
                    f"{self.name}: rank {self.rank} is more than half of what {site.key} can have; saved, it has twice "
                    f"as many ranks as components are left. Use a rank of {largest} at most."
                )
            yield Placement(site, SearchedLowRank(site, self.rank, self.alpha / self.rank, self.dropout))

    def stored(self, forms: Mapping[str, Form]) -> LoRA:
        """A LoRA of twice as many ranks as components are left."""
        ranks = {key: 2 * count for key, count in kept_components(forms).items()}
        return LoRA(
            rank=2 * self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_pattern=RankPattern.text(ranks, 2 * self.rank) or None,
            targets=self.targets,
        )


@register
@dataclass(frozen=True)
class ULoRA(_SearchedLoRA):
    r"""LoRA with few trained entries: h = W0 x + s (B A - B0 A0) x, of which a search leaves single entries of A and B.

    All entries train for a while; then, in a few steps of equal ratio, those are dropped whose updates are least
    useful by -delta dL/ddelta, a first-order estimate of what dropping them would change in the loss: by the mean of
    its absolute values over batches. When ``budget`` is reached, those that are left train from the start.

    When to use:
        To learn where a low-rank change has to act, entry by entry. Its file is that of a LoRA, as large as the
        components in which anything is left: where space matters, take ``s-lora``, or ``u-bitfit``.

    Cost:
        Parameters: r (d_in + d_out) for each matrix while searching; ``budget`` of them train in the end. BERT-base,
            queries and values, r = 8: 294,912; at 0.1 29,491 are left.
        Memory: as LoRA of rank r, and the starting values.
        Time: as LoRA of rank 2 r.
        Inference: as LoRA of twice as many ranks as components are left; none after merging.

    Terms:
        Site: linear maps; by default those that make queries and values.
        Form: s (B A - B0 A0), a product of two thin matrices less that at the start.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.ULoRA(rank=4, budget=0.2))
        >>> summary = tuned.summary()  # before the search: 4 matrices, 4 (32 + 32) each
        >>> summary.parameters - summary.head_parameters
        1024

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/u-lora \
            --method u-lora --rank 4 --budget 0.2

    Differs from the paper:
        There is no official code, and the text leaves open how scores are averaged, how many steps of pruning there
        are, and whether training begins anew; see ``u-bitfit``, also for ``criterion``. The paper's idea of a balanced
        start that is not zero is kept; how it is drawn is this library's choice.

    Source:
        Lawton et al. 2023, arXiv 2305.16597.
    """

    name: ClassVar[str] = "u-lora"

    @property
    def structured(self) -> bool:
        """Entries are kept or dropped each on its own."""
        return False


@register
@dataclass(frozen=True)
class SLoRA(_SearchedLoRA):
    r"""LoRA with few components: a search as of ``u-lora``, which keeps or drops a component as a whole.

    A component is a row of A and the column of B that belongs to it; its score is the sum of those of its entries.
    Components are kept in the order of their scores, until the next would be more than ``budget`` allows.

    When to use:
        Where the ranks that a task needs shall be found instead of set, as with ``adalora`` and ``increlora``: this one
        is simpler, with one kind of score and a fixed end of the search. ``deltune ranks`` shows what was found, two
        ranks for each component.

    Cost:
        Parameters: r (d_in + d_out) for each matrix while searching, at most ``budget`` of them in the end. BERT-base,
            queries and values, r = 8: 294,912; at 0.1 19 components of 1,536, 29,184.
        Memory: as LoRA of rank r, and the starting values.
        Time: as LoRA of rank 2 r.
        Inference: as LoRA of twice as many ranks as components are left; none after merging.

    Terms:
        Site: linear maps; by default those that make queries and values.
        Form: s (B A - B0 A0), a product of two thin matrices less that at the start.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active.

    Example:
        >>> import deltune, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), "s-lora(rank=4, budget=0.25)")
        >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
        >>> following = tuned.bind(optimizer, steps=20)
        >>> for _ in range(20):
        ...     ids = torch.randint(100, 1000, (4, 8))
        ...     tuned.model(ids, labels=torch.randint(2, (4,))).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> from deltune.methods.reparameterized.us_lora import kept_components
        >>> sum(kept_components(tuned.attachments["default"].forms).values())  # of 16
        4

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/s-lora \
            --method s-lora --budget 0.25

    Differs from the paper:
        As ``u-lora``.

    Source:
        Lawton et al. 2023, arXiv 2305.16597.
    """

    name: ClassVar[str] = "s-lora"

    @property
    def structured(self) -> bool:
        """Whole components are kept or dropped."""
        return True
