"""IncreLoRA: low-rank changes in the form of a singular value decomposition, of which important matrices gain more.

Letters: d_in and d_out the matrix's width and height, r its rank, n the ranks that a growth adds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.optimizer_groups import join, leave, restore_groups, split_groups
from deltune.methods.options import check_steps, number_of_steps, option
from deltune.methods.registry import register
from deltune.methods.reparameterized.growth import GrowthSchedule
from deltune.methods.reparameterized.incremental_triplets import IncrementalTriplets, grow
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import RankPattern, checked_rank
from deltune.methods.reparameterized.singular_triplets import final_ranks
from deltune.sites import Form, Insertion, weight_sites

__all__ = ["IncreLoRA"]


@register
@dataclass(frozen=True)
class IncreLoRA(Method):
    r"""Incremental allocation of ranks: h = W0 x + (alpha / r) sum_i lambda_i b_i a_i x, with r growing from 1.

    Every matrix begins with one component, of vectors a_i (1, d_in) and b_i (d_out, 1) and a number lambda_i, and with
    n more in reserve: their vectors train behind a tiny constant instead of lambda (advance learning). A matrix's
    score is sum |dW * dL/ddW| over its change dW, smoothed over steps, times its smoothed distance from that mean. At
    regular steps the matrices with the highest scores take their reserve into use and get a new one, until the budget
    is used up. What is new has a learning rate that warms up by itself. Lambda starts at zero: the model is unchanged.

    When to use:
        Where the number of parameters is tight and it is not known which matrices need them, as AdaLoRA; ranks are
        added and not cut away, so that it never holds much more than it ends with. It needs enough steps to grow and
        then to learn, and their number beforehand: ``deltune.fit`` and the trainers say it; in a loop of your own
        write ``tuned.bind(optimizer, steps)``. If the best weights of all evaluations are kept, they may be from
        before the end of growth, and have fewer ranks.

    Cost:
        Parameters: r (d_in + d_out + 1) for each matrix, and n (d_in + d_out) in reserve while ranks grow. BERT-base,
            all matrices of the layers, ``target_rank=2``: 165,960 at first, 331,848 from the first step, 331,920 at
            the end (0.30 %).
        Memory: as LoRA of rank r; while ranks grow also the gradient of each whole matrix, of which scores are made.
        Time: as LoRA of rank r; while ranks grow also the product that gives each matrix's gradient, as in full
            fine-tuning.
        Inference: as LoRA of the ranks that were chosen, once saved and loaded; none after merging.

    Terms:
        Site: linear maps; by default all of attention and feed-forward.
        Form: a sum of components of rank 1, in the form of a singular value decomposition.
        Combination: a sum, which a weight can scale.
        Control: live in every layer and for every row while active; scores decide how much of it there is.

    Example:
        >>> import deltune, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), "increlora(target_rank=2)")
        >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=1e-3)
        >>> following = tuned.bind(optimizer, steps=20)
        >>> for _ in range(20):
        ...     ids = torch.randint(100, 1000, (4, 8))
        ...     tuned.model(ids, labels=torch.randint(2, (4,))).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> from deltune.methods.reparameterized.singular_triplets import final_ranks
        >>> sum(final_ranks(tuned.attachments["default"].forms).values())  # 12 matrices
        24

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/increlora \
            --method increlora --target-rank 4

    Differs from the paper:
        As in the authors' code ranks grow before the optimizer's step, at multiples of ``interval`` after ``initial``,
        and the divisor grows too: alpha / r (theirs is r + 1e-5, of which a file knows nothing), so that a growth from
        r to r + n shrinks what is there by r / (r + n); ``divisor=target`` keeps it at ``target_rank``. A score is the
        sum by the root of the matrix's size, as there; ``score=mean`` is the paper's mean, which favours large matrices
        less. Growth stops exactly at the target, which their test for equality may jump over; then what is in
        reserve leaves model and optimizer, where they zero its lambda. In evaluation the reserve does not act, so that
        what is measured is what is saved. New parameters join a group of the optimizer that exists, because torch's
        schedulers know those alone; during a step those with a rate of their own stand in groups apart. Their rise and
        linear fall start from the group's initial rate, whatever the scheduler; the first reserve trains like all that
        is there at the start. Phases follow from the length of the training, because step counts fit one data set only.
        The default learning rate is above the authors' 3.5e-4 to 2.2e-3; it was found for short trainings.
        ``initial_rank=0`` is an extension: a matrix that is never chosen ends without a change.

    Source:
        Zhang et al. 2023, arXiv 2308.12043, section 3; authors' code: FeiyuZhang98/IncreLoRA.
    """

    target_rank: int = option(2, "rank of a matrix at the end, on average", minimum=1)
    initial_rank: int = option(1, "rank of every matrix at the start; 0 lets matrices end without a change", minimum=0)
    added: int | None = option(
        None, "ranks n that a matrix gains at a time, by default half of target_rank, 1 at least", minimum=1
    )
    alpha: float = option(16.0, "numerator of the scale", minimum=0, exclusive=True)
    divisor: str = option(
        "rank",
        "denominator of the scale: the matrix's present rank, or target_rank, constant",
        choices=("rank", "target"),
    )
    initial: float = option(0.1, "steps before anything grows: a share of all below 1, else a number", minimum=0)
    final: float = option(
        0.5, "steps at the end with settled ranks, where they are not needed: a share below 1, else a number", minimum=0
    )
    interval: int | None = option(None, "steps from one growth to the next, by default what fits", minimum=1)
    top: int | None = option(None, "matrices that grow at a time, by default as many as it takes", minimum=1)
    warmup: float = option(
        0.06, "steps in which the rate of what is new rises: a share of all below 1, else a number", minimum=0
    )
    beta1: float = option(0.85, "smoothing of the score", minimum=0, maximum=0.9999)
    beta2: float = option(0.85, "smoothing of the distance from it", minimum=0, maximum=0.9999)
    score: str = option(
        "root",
        "of a matrix: the sum by the root of its size, as in the authors' code, or the mean, as in the paper",
        choices=("root", "mean"),
    )
    orthogonality: float = option(0.1, "weight gamma of the penalty on vectors that are not orthonormal", minimum=0)
    dropout: float = option(0.0, "dropout of the branch's input while training", minimum=0, maximum=0.99)
    targets: Targets = option(Targets(("attention.*", "ffn.*")), "which matrices to change")

    name: ClassVar[str] = "increlora"
    branch: ClassVar[str] = "reparameterized"
    insertion: ClassVar[Insertion] = Insertion.WEIGHT
    paper: ClassVar[Paper] = Paper(
        "Zhang et al.",
        "IncreLoRA: Incremental Parameter Allocation Method for Parameter-Efficient Fine-tuning",
        2023,
        "2308.12043",
    )
    learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target_rank <= self.initial_rank:
            raise MethodError(
                f"increlora: target_rank is {self.target_rank} and initial_rank {self.initial_rank}, but ranks can "
                "only grow. Raise target_rank, or lower initial_rank."
            )
        check_steps(self.name, initial=self.initial, final=self.final, warmup=self.warmup)

    @property
    def _added(self) -> int:
        return self.added or max(1, self.target_rank // 2)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A form with its first components at every selected matrix.

        Raises:
            MethodError: if no matrix can have the rank that is the target on average.
        """
        sites = weight_sites(model, anatomy, self.targets)
        checked_rank(self.target_rank, max(sites, key=lambda site: min(site.in_features, site.out_features)))
        for site in sites:
            form = IncrementalTriplets(
                site,
                min(self.initial_rank, site.in_features, site.out_features),
                self.alpha,
                self.target_rank if self.divisor == "target" else None,
                reserves=self._added,
                dropout=self.dropout,
            )
            yield Placement(site, form)

    def penalty(self, forms: Mapping[str, Form]) -> Tensor | None:
        """How far the vectors, also those in reserve, are from orthonormal, times gamma; None if gamma is zero."""
        distances = [torch.linalg.matrix_norm(item) for form in _triplets(forms) for item in form.deviations()]
        if not self.orthogonality or not distances:
            return None
        return self.orthogonality * torch.stack([item.to(distances[0].device) for item in distances]).mean()

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Lay out the schedule, and let what is in reserve learn.

        Raises:
            MethodError: if nobody says how many steps there are, or the target cannot be reached in them.
        """
        if steps is None:
            raise MethodError(
                "increlora has to know how many steps training will have. Pass it when binding the optimizer: "
                "tuned.bind(optimizer, steps)."
            )
        together = torch.distributed.is_available() and torch.distributed.is_initialized()
        if together and torch.distributed.get_world_size() > 1:
            raise MethodError(
                "increlora trains in one process: each would choose by its own batches which matrices grow. Train in "
                "one, or use adalora."
            )
        triplets = _triplets(forms)
        finished = all(form.total >= 0 and len(form.a) == form.rank for form in triplets)
        if finished:
            # what grew belongs to the training in which it did, which a further one does not change
            steps = int(triplets[0].total)
        for form in triplets:
            form.total.fill_(steps)
        # from the start, not from the present: a run that goes on has the schedule that it had
        schedule = GrowthSchedule.plan(
            sum(min(self.initial_rank, form.capacity) for form in triplets),
            min(self.target_rank * len(triplets), sum(form.capacity for form in triplets)),
            len(triplets),
            added=self._added,
            total=steps,
            initial=number_of_steps(self.initial, steps),
            final=number_of_steps(self.final, steps),
            warmup=number_of_steps(self.warmup, steps),
            interval=self.interval,
            top=self.top,
        )
        grows = sum(form.rank for form in triplets) < schedule.target
        for form in triplets:
            form.schedule, form.observed = schedule, grows

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Learn the scores, let matrices grow, and give what is new its own rate for this step.

        Raises:
            MethodError: if the schedule was not laid out, because another attachment was live at that time; or if the
                optimizer trains none of the parameters.
        """
        triplets = _triplets(forms)
        schedule = triplets[0].schedule
        if schedule is None:
            raise MethodError("increlora was not active when the optimizer was bound. Bind the optimizer again.")
        if triplets[0].observed:
            for form in triplets:
                form.observe(self.beta1, self.beta2, self.score == "mean")
            first = not any(len(form.a) > form.rank for form in triplets)
            if first:
                for form in triplets:
                    form.reserve(0)
            if schedule.grows(step):
                grow(triplets, schedule, step)
                if sum(form.rank for form in triplets) >= schedule.target:
                    leave(optimizer, [value for form in triplets for value in form.finish()])
            if first or schedule.grows(step):
                join(optimizer, [(list(form.a), list(form.b), list(form.lambdas)) for form in triplets], self.name)
        multipliers = {}
        for form in triplets:
            for value, joined in form.trained_since():
                share = schedule.multiplier(joined, step)
                if share is not None:
                    multipliers[id(value)] = share
        split_groups(optimizer, multipliers)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's groups back."""
        restore_groups(optimizer)

    def stored(self, forms: Mapping[str, Form]) -> LoRA:
        """A LoRA of the ranks that were chosen; matrices without any are left out."""
        return LoRA(
            rank=self.target_rank,
            alpha=self.alpha,
            dropout=self.dropout,
            rank_pattern=RankPattern.text(final_ranks(forms), self.target_rank),
            targets=self.targets,
        )


def _triplets(forms: Mapping[str, Form]) -> list[IncrementalTriplets]:
    return [form for form in forms.values() if isinstance(form, IncrementalTriplets)]
