"""Diff pruning: differences from all of a model's parameters, whose gates learn which few of them are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import nn

from deltune.backbone import Anatomy, Targets
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.optimizer_groups import join, leave, restore_groups, split_groups
from deltune.methods.options import check_steps, number_of_steps, option
from deltune.methods.registry import register
from deltune.methods.selective.gated_differences import GatedDifferences
from deltune.methods.selective.hard_concrete import HardConcrete
from deltune.sites import EntriesForm, Form, Insertion, entries_below, entries_site

__all__ = ["DiffPruning"]


@register
@dataclass(frozen=True)
class DiffPruning(Method):
    r"""Train differences behind gates, theta = theta_0 + z z_g w, and keep the greatest few of them.

    Every entry of the model's parameters has a difference w and a gate z in [0, 1], every parameter tensor a gate z_g
    (``structured``). Gates are hard-concrete: z = min(1, max(0, s (r - l) + l)) with
    s = sigmoid(log u - log(1 - u) + alpha), u uniform, so that they are exactly 0 or 1 with some probability and have
    a gradient. A penalty, lambda times the expected number of open gates, sum P(z > 0), P(z > 0) = sigmoid(alpha -
    log(-l/r)), closes those that serve little. After the first phase the k entries with the greatest |z z_g w| are
    kept, by the gates of evaluation (u = 1/2), and trained to the end as one vector without gates; all others are those
    of the model again, bit for bit. w starts at 0, so that the model is unchanged whatever the gates are.

    When to use:
        Where a task must fit into very little space at the quality of training everything, memory for training is no
        matter, and there are many steps: which entries matter is learned, and not guessed before the training as by
        ``fish-mask``. It has to know the number of steps: ``deltune.fit`` and the trainers say it; in a loop of your
        own write ``tuned.bind(optimizer, steps)``, without which the gates never end and train at the common rate. The
        learning rate is one for training everything; a new task head wants a higher one (``head_learning_rate``), and
        so do other methods in a sum.

    Cost:
        Parameters: two for each of the model's and one for each tensor while the gates learn, then k; the head's on
            top. BERT-base: 218,964,679 and the head, then 547,411 (0.5 %) and the head.
        Memory: in the first phase ten numbers for each parameter with AdamW, of model, differences, gates, gradients
            and optimizer: the highest of all methods. Afterwards as for ``fish-mask``.
        Time: a full forward and backward pass, weight gradients included; in the first phase also some passes over all
            parameters at each step.
        Inference: none. On disk 12 bytes for each kept entry: its position and its difference.

    Terms:
        Site: single entries of the model's parameters, all but the head's; with ``targets`` those of some modules.
        Form: a difference behind two gates, in the end the difference alone.
        Combination: a sum, which a weight can scale.
        Control: live while active; the original entries come back bit for bit.

    Example:
        >>> import deltune, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> total = model.num_parameters() - 66  # without the head
        >>> tuned = deltune.attach(model, deltune.DiffPruning(ratio=0.01))
        >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=5e-5)
        >>> following = tuned.bind(optimizer, steps=8)
        >>> _ = tuned.model.train()
        >>> for _ in range(8):
        ...     ids = torch.randint(100, 1000, (4, 8))
        ...     tuned.model(ids, labels=torch.randint(2, (4,))).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> tuned.summary().parameters == int(0.01 * total) + 66
        True

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/diff \
            --method diff-pruning --ratio 0.01

    Differs from the paper:
        The penalty of structured gates adds the probabilities of entries and of tensors, each tensor's once, as in the
        authors' code; ``penalty_form=product`` is the paper's, of an entry's and its tensor's gate together. Both are
        sums, so that the pull on one gate does not depend on the model's size; it does on the loss, here a mean. The
        authors project a saved sample of random gates, and measure their share on head and model together; here gates
        of evaluation count, and entries without the head. What is saved during the first phase is what would be
        kept then, with z z_g w as its values, while evaluation and merging use all differences; ``deltune.fit``
        therefore looks for the best weights in the second phase alone. One training holds both phases, with one
        schedule; theirs are two, with rates of 1e-5 and 5e-5. Here the second has ``final_rate`` times the rate of the
        first, because a few entries have to move further than all. Gates have their own rate in either, constant as
        in their code, and no decay. Gradients of w and alpha are clipped together, if at all, not apart.

    Source:
        Guo, Rush and Kim 2020, arXiv 2012.07463, section 3; authors' code: dguo98/DiffPruning.
    """

    ratio: float = option(
        0.005, "share of the model's parameters, without the head, that is kept at most", minimum=0, maximum=1
    )
    structured: bool = option(True, "whether each parameter tensor has a gate of its own as well")
    penalty_weight: float = option(1.25e-7, "lambda, for each gate that is expected to be open", minimum=0)
    penalty_form: str = option(
        "sum",
        "of structured gates: sum of entries' and tensors' as in the authors' code, or product as in the paper",
        choices=("sum", "product"),
    )
    initial: float = option(
        0.5, "steps in which the gates learn: a share of all below 1, else a number", minimum=0, exclusive=True
    )
    restart: str = option(
        "difference",
        "where kept entries start in the second phase: difference, w without its gates, or zero",
        choices=("difference", "zero"),
    )
    final_rate: float = option(
        20.0,
        "learning rate of what is kept, in the second phase, as a multiple of that of the first, in which all train",
        minimum=0,
        exclusive=True,
    )
    gate_rate: float = option(0.1, "learning rate of the gates, constant", minimum=0, exclusive=True)
    alpha: float = option(5.0, "where the parameters of all gates start; at 5 0.7 % are closed")
    low: float = option(-1.5, "l, below 0: from where gates are stretched", maximum=-1e-6)
    high: float = option(1.5, "r, above 1: to where", minimum=1, exclusive=True)
    seed: int = option(0, "draws the gates", minimum=0)
    targets: Targets | None = option(None, "entries of which modules; all of the model's but the head's if none")
    kept: int | None = option(
        None, "number of entries that a first phase has kept; files of trained differences say it", minimum=0
    )

    name: ClassVar[str] = "diff-pruning"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Guo, Rush and Kim", "Parameter-Efficient Transfer Learning with Diff Pruning", 2020, "2012.07463"
    )
    learning_rate: ClassVar[float] = 5e-5
    mergeable: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self.name, initial=self.initial)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A difference of every entry; of ``kept`` entries alone where a first phase has chosen them.

        Raises:
            MethodError: if ``ratio`` keeps no entry, or more than the chosen modules have.
            TargetError: if a target selects nothing.
        """
        site = entries_site(model, anatomy)
        if self.kept is not None:
            indices = torch.arange(self.kept, device=site.device)
            yield Placement(site, EntriesForm(site, indices, indices.to(site.dtype) * 0, relative=True))
            return
        names = entries_below(model, anatomy, site, self.targets)
        total = sum(site.sizes)
        available = sum(size for name, size in zip(site.names, site.sizes, strict=True) if name in set(names))
        count = int(self.ratio * total)
        if not 1 <= count <= available:
            raise MethodError(
                f"{self.name}: ratio={self.ratio:g} of {total:,} entries are {count:,}, of {available:,} that can be "
                f"kept. Take a ratio between {1 / total:.2g} and {available / total:.2g}."
            )
        yield Placement(
            site,
            GatedDifferences(
                site,
                names,
                HardConcrete(self.low, self.high),
                kept=count,
                alpha=self.alpha,
                grouped=self.structured,
                strength=self.penalty_weight,
                product=self.penalty_form == "product",
                seed=self.seed,
            ),
        )

    def begin(self, forms: Mapping[str, Form], steps: int | None) -> None:
        """Lay out the phases.

        Raises:
            MethodError: if nobody says how many steps there are, or the first phase takes all of them.
        """
        for form in _gated(forms):
            if steps is None and self.initial < 1:
                raise MethodError(
                    "diff-pruning has to know how many steps training will have. Pass it when binding the optimizer, "
                    "tuned.bind(optimizer, steps), or give the number of steps of its first phase, as in initial=1000."
                )
            last = max(1, number_of_steps(self.initial, steps or 0))
            if steps is not None and last >= steps:
                raise MethodError(
                    f"diff-pruning: the first phase has {last} of {steps} steps, so that none are left to train what "
                    "is kept. Lower initial, or train longer."
                )
            form.last_gated = last

    def before_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Give the gates their own rate for this step, and what is kept another than all had.

        Raises:
            MethodError: if the phases were not laid out, because another attachment was live at that time.
        """
        gates: dict[int, float] = {}
        for form in _gated(forms):
            if form.last_gated is None:
                raise MethodError("diff-pruning was not active when the optimizer was bound. Bind the optimizer again.")
            gates |= {id(value): 1.0 for value in (form.alpha, form.group_alpha) if value is not None}
        split_groups(optimizer, gates, lr=self.gate_rate, weight_decay=0.0)
        kept = [form.values for form in forms.values() if isinstance(form, EntriesForm) and form not in _gated(forms)]
        if self.final_rate != 1:
            split_groups(optimizer, {id(value): self.final_rate for value in kept}, present=True)

    def after_step(self, forms: Mapping[str, Form], step: int, optimizer: torch.optim.Optimizer) -> None:
        """Put the optimizer's groups back; after the first phase, let it train what is kept in the place of all.

        Raises:
            MethodError: if every gate has closed, or the optimizer trains none of the differences.
        """
        restore_groups(optimizer)
        for form in _gated(forms):
            if form.last_gated is not None and step >= form.last_gated:
                before = list(form.parameters())
                form.keep(restart=self.restart == "zero")
                if not len(form.values):
                    raise MethodError(
                        f"diff-pruning: after {step} steps no difference is left, because all gates have closed. Lower "
                        f"penalty_weight, which is {self.penalty_weight:g}, or gate_rate."
                    )
                join(optimizer, [[before, [form.values]]], self.name)
                leave(optimizer, before)

    def settled(self, forms: Mapping[str, Form]) -> bool:
        """Whether the gates are done."""
        return not _gated(forms)

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """Itself, with the number of entries that are kept."""
        (form,) = (form for form in forms.values() if isinstance(form, EntriesForm))
        stored = form.stored()
        assert isinstance(stored, EntriesForm)
        return replace(self, kept=len(stored.values))


def _gated(forms: Mapping[str, Form]) -> list[GatedDifferences]:
    """The forms whose gates still learn."""
    return [form for form in forms.values() if isinstance(form, GatedDifferences) and form.gated]
