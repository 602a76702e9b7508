"""AdaLoRA: low-rank changes in the form of a singular value decomposition, which share one shrinking budget of ranks.

Letters: d_in and d_out the matrix's width and height, r the initial rank, t the step, from 0, and T their number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import check_steps, number_of_steps, option
from deltune.methods.registry import register
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import RankPattern, checked_rank
from deltune.methods.reparameterized.singular_triplets import (
    BudgetSchedule,
    SingularTriplets,
    allocate,
    final_ranks,
)
from deltune.sites import Form, Insertion, weight_sites

__all__ = ["AdaLoRA", "final_ranks"]


@register
@dataclass(frozen=True)
class AdaLoRA(Method):
    r"""Adaptive budget allocation: h = W0 x + s P diag(Lambda) Q x, with s = alpha / (r + 1e-5).

    Every matrix begins with r triplets: a column of P (d_out, r), an entry of Lambda and a row of Q (r, d_in). A
    triplet's score is its sensitivity |w dL/dw| times the uncertainty of it, both smoothed over steps. While
    the common budget shrinks along a cubic curve, the entries of Lambda with the lowest scores in the whole model are
    set to zero, so that important matrices end with more triplets than others. A penalty draws P and Q towards
    orthonormal vectors. Lambda starts at zero: the model is unchanged at the start.

    When to use:
        Where the number of parameters is tight and it is not known which matrices need them; it gains most at small
        budgets. It needs enough steps for scores to settle, and the number of steps beforehand: ``deltune.fit``
        and the trainers say it; in a loop of your own write ``tuned.bind(optimizer, steps)``. Where the best
        weights of all evaluations are kept, only those count that have met the budget.

    Cost:
        Parameters: r (d_in + d_out + 1) for each matrix while training; what is saved has ``target_rank`` triplets on
            average. BERT-base, all matrices of the layers, r = 12: 1,991,520 (1.82 %); 8 of 12 are kept.
        Memory: as LoRA of rank r, and two running averages for each trained value.
        Time: as LoRA of rank r, and a few passes over the trained values for the scores and the penalty.
        Inference: as LoRA of the ranks that are left, once saved and loaded; none after merging.

    Terms:
        Site: linear maps; by default all of attention and feed-forward.
        Form: s P diag(Lambda) Q, a product in the form of a singular value decomposition.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active; the budget decides how much of it is left.

    Example:
        >>> import deltune, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), "adalora(initial_rank=3, target_rank=2)")
        >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
        >>> following = tuned.bind(optimizer, steps=20)
        >>> for _ in range(20):
        ...     ids = torch.randint(100, 1000, (4, 8))
        ...     tuned.model(ids, labels=torch.randint(2, (4,))).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> from deltune.methods.reparameterized.adalora import final_ranks
        >>> ranks = final_ranks(tuned.attachments["default"].forms)  # deltune.measure.rank_table shows them
        >>> sum(ranks.values())  # 12 matrices
        24

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/adalora \
            --method adalora --initial-rank 12 --target-rank 8

    Differs from the paper:
        The penalty is the authors' code's, gamma times the mean of the norms ||P^T P - I|| and ||Q Q^T - I||, which
        does not grow with the number of matrices; ``orthogonality_form=squares`` is the paper's sum of squared norms.
        Phases are shares of the training by default, close to those of the authors' scripts, because step counts
        fit one data set only. Of equal scores the first in the model count as higher, where the authors' code may
        zero more than it should. The last step always meets the target, also where there is no last phase. A matrix
        with a side shorter than r gets as many triplets as that side. Saved, it is a plain LoRA whose ranks differ.

    Source:
        Zhang et al. 2023, arXiv 2303.10512, section 3; authors' code: QingruZhang/AdaLoRA.
    """

    initial_rank: int = option(12, "number r of triplets of every matrix at the start", minimum=1)
    target_rank: int = option(8, "number of triplets that a matrix keeps on average", minimum=1)
    alpha: float = option(16.0, "numerator of the scale alpha / initial_rank", minimum=0, exclusive=True)
    initial: float = option(
        0.15, "steps before anything is zeroed: a share of all below 1, else a number of steps", minimum=0
    )
    final: float = option(0.5, "steps at the end with settled ranks: a share of all below 1, else a number", minimum=0)
    interval: int = option(1, "steps from one allocation to the next", minimum=1)
    total_steps: int | None = option(
        None, "number of steps of the schedule, by default that of the training", minimum=1
    )
    beta1: float = option(0.85, "smoothing of the sensitivity", minimum=0, maximum=0.9999)
    beta2: float = option(0.85, "smoothing of the uncertainty", minimum=0, maximum=0.9999)
    orthogonality: float = option(0.1, "weight gamma of the penalty on P and Q that are not orthonormal", minimum=0)
    orthogonality_form: str = option(
        "norms",
        "the penalty: norms, their mean as in the authors' code, or squares, their sum as in the paper",
        choices=("norms", "squares"),
    )
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.*", "ffn.*")), "which matrices to change")

    name: ClassVar[str] = "adalora"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Zhang et al.", "Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning", 2023, "2303.10512"
    )
    learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank > self.initial_rank:
            raise MethodError(
                f"adalora: target_rank is {self.target_rank} and initial_rank {self.initial_rank}, but the budget can "
                "only shrink. Raise initial_rank; one and a half times the target is usual."
            )
        check_steps(self.name, initial=self.initial, final=self.final)

    @property
    def _file_alpha(self) -> float:
        return self.alpha * self.initial_rank / (self.initial_rank + 1e-5)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A form of r triplets at every selected matrix.

        Raises:
            MethodError: if no matrix can have the initial rank.
        """
        sites = weight_sites(model, anatomy, self.targets)
        largest = max(sites, key=lambda site: min(site.in_features, site.out_features))
        checked_rank(self.initial_rank, largest)
        # computed as a file's scale is, to be the same number
        scale = self._file_alpha / self.initial_rank
        for site in sites:
            rank = min(self.initial_rank, site.in_features, site.out_features)
            yield Placement(site, SingularTriplets(site, rank, scale, self.initial_rank, self.dropout))

    def penalty(self, forms: Mapping[str, Form]) -> Tensor | None:
        """How far P and Q of all matrices are from orthonormal, times gamma; None if gamma is zero."""
        if not self.orthogonality:
            return None
        distances = [torch.linalg.matrix_norm(item) for form in _triplets(forms) for item in form.deviations()]
        together = torch.stack([distance.to(distances[0].device) for distance in distances])
        return self.orthogonality * (together.mean() if self.orthogonality_form == "norms" else together.square().sum())

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Lay out the schedule.

        Raises:
            MethodError: if nobody says how many steps there are, or the schedule does not fit into them.
        """
        total = self.total_steps or steps
        if total is None:
            raise MethodError(
                "adalora has to know how many steps training will have. Pass it when binding the optimizer, "
                "tuned.bind(optimizer, steps), or set the option total_steps."
            )
        if steps is not None and total > steps:
            raise MethodError(f"adalora: total_steps is {total}, but training has {steps} steps. Leave it out.")
        initial, final = (number_of_steps(value, total) for value in (self.initial, self.final))
        if initial + final >= total:
            raise MethodError(
                f"adalora: the phases initial ({initial} steps) and final ({final} steps) leave nothing of {total} "
                "steps to shrink the budget in. Shorten them; below 1 they are shares of all steps."
            )
        triplets = _triplets(forms)
        start = sum(form.rank for form in triplets)
        for form in triplets:
            form.schedule = BudgetSchedule(start, self._target(triplets), initial, final, total, self.interval)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Learn the scores from this step, and zero what the budget does not allow.

        Raises:
            MethodError: if the schedule was not laid out, because another attachment was live at that time.
        """
        triplets = _triplets(forms)
        schedule = triplets[0].schedule
        if schedule is None:
            raise MethodError("adalora was not active when the optimizer was bound. Bind the optimizer again.")
        if schedule.observes(step - 1):
            for form in triplets:
                form.observe(self.beta1, self.beta2)
        if schedule.allocates(step - 1):
            allocate(triplets, schedule.budget(step - 1))

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether no more triplets are left than in the end."""
        triplets = _triplets(forms)
        return sum(int(form.alive().sum()) for form in triplets) <= self._target(triplets)

    def _target(self, triplets: Sequence[SingularTriplets]) -> int:
        return sum(min(self.target_rank, form.rank) for form in triplets)

    def stored(self, forms: Mapping[str, Form]) -> LoRA:
        """A LoRA of the ranks that are left; matrices without any are left out."""
        pattern = RankPattern.text(final_ranks(forms), self.initial_rank)
        return LoRA(
            rank=self.initial_rank,
            alpha=self._file_alpha,
            dropout=self.dropout,
            rank_pattern=pattern,
            targets=self.targets,
        )


def _triplets(forms: Mapping[str, Form]) -> list[SingularTriplets]:
    return [form for form in forms.values() if isinstance(form, SingularTriplets)]
