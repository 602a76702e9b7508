"""U-BitFit and S-BitFit: BitFit pruned by architecture search, entry by entry or bias by bias.

Letters: N entries of all biases together, K of them kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets, check_base_model, describe_base_model
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.pruning_search import Candidates, PruningSearch
from deltune.methods.registry import register
from deltune.methods.saved import read
from deltune.methods.selective.bitfit import BitFit
from deltune.sites import Form, Insertion, ParameterSite, SelectionForm

__all__ = ["SBitFit", "SearchedBiases", "UBitFit", "kept_biases"]

_PAPER = Paper(
    "Lawton et al.",
    "Neural Architecture Search for Parameter-Efficient Fine-tuning of Large Pre-trained Language Models",
    2023,
    "2305.16597",
)
#: Key of the form.
_SHARED = "biases"


class SearchedBiases(Candidates, SelectionForm):
    """The biases of a search: which of their entries, or which of them, are left.

    Args:
        structured: whether whole biases are kept or dropped. They are written whole; otherwise ``indices``, (K,), in
            all biases put one behind the other, and ``values``, (K,), which stand there.
        kept: the entries that are kept from the beginning: their number K, filled from a file, or where they are.
    """

    formula: ClassVar[str] = "{x} - theta_0 in K entries"

    def __init__(self, structured: bool, kept: int | Tensor | None = None) -> None:
        super().__init__()
        self.structured = structured
        self._given = kept
        self._biases: dict[str, nn.Parameter] = {}

    def select(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Make all entries of these biases candidates."""
        self._biases = dict(parameters)
        biases = self.searched()
        sizes = torch.tensor([bias.numel() for bias in biases])
        self.begin_search(biases, torch.arange(len(biases)).repeat_interleave(sizes))
        if isinstance(self._given, Tensor):
            self._keep_entries(self._given)
        elif self._given is not None:
            self.saved_buffers = ("indices", "values")
            self.register_buffer("indices", self.kept.new_zeros(self._given, dtype=torch.int32))
            self.register_buffer("values", self.start.new_zeros(self._given))

    def searched(self) -> Sequence[nn.Parameter]:
        """The biases."""
        return list(self._biases.values())

    def trained_count(self) -> int:
        """None of its own: what it searches stands in the model."""
        return 0

    def counts(self) -> dict[str, int]:
        """The number of kept entries of each bias."""
        count = torch.zeros(len(self._biases), dtype=torch.int64).index_add(0, self.vectors, self.kept_on_cpu().long())
        return dict(zip(self._biases, count.tolist(), strict=True))

    def left(self) -> dict[str, int]:
        """As :meth:`counts`, of those of which something is kept."""
        return {name: count for name, count in self.counts().items() if count}

    def whole(self) -> Iterable[str]:
        """Kept biases that are written whole."""
        return self.left() if self.structured else ()

    def stored(self) -> Form | None:
        """Where kept entries are, among those biases of which some are, and what stands there."""
        if self.structured:
            return None
        names = self.left()
        parts = [(part, bias) for name, (bias, part) in zip(self._biases, self._slices(), strict=True) if name in names]
        kept = torch.cat([self.kept[part] for part, _ in parts])
        values = torch.cat([bias.detach().to(self.start.device) for _, bias in parts])
        return _Entries(kept.nonzero()[:, 0].int(), values[kept])

    def restored(self) -> None:
        """Put the values of a file into the biases."""
        if self.saved_buffers:
            indices = self.get_buffer("indices").long()
            self._keep_entries(indices)
            flat = self.start.clone()
            flat[indices] = self.get_buffer("values")
            with torch.no_grad():
                for bias, part in self._slices():
                    bias.copy_(flat[part])

    def _keep_entries(self, indices: Tensor) -> None:
        self.kept.zero_()
        self.kept[indices.long()] = True


class _Entries(Form):
    """Kept entries as they are written."""

    saved_buffers = ("indices", "values")

    def __init__(self, indices: Tensor, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", indices)
        self.register_buffer("values", values)


def kept_biases(forms: Mapping[str, Form]) -> dict[str, int]:
    """The number of entries that a search has kept of each bias, by the bias's full name; others are not named.

    Args:
        forms: the forms of an attachment by key, ``tuned.attachments["default"].forms``.
    """
    return {
        name: count
        for form in forms.values()
        if isinstance(form, SearchedBiases)
        for name, count in form.left().items()
    }


@dataclass(frozen=True)
class _SearchedBitFit(PruningSearch):
    """What both have in common."""

    architecture: str | None = option(
        None, "folder of a delta whose biases, or entries, are to be trained; they are searched for if none"
    )
    missing: str = option("add", "what to do where linear maps have no bias", choices=("refuse", "add"))
    targets: Targets | None = option(None, "the biases of which roles to begin with; all of the model's if none")
    biases: tuple[str, ...] = option((), "full names of the biases that were found; in files of a search")
    kept: int | None = option(None, "number of entries that were found; in files of a search", minimum=1)
    final_rate: float = option(
        3.0,
        "learning rate of what is left once the search is over, as a multiple of that of the search: few entries have "
        "to move further",
        minimum=0,
        exclusive=True,
    )

    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = _PAPER
    learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True

    def is_found(self) -> bool:
        """Whether it is known what to train."""
        return bool(self.architecture or self.biases)

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The biases, and the form that knows which of them are left.

        Raises:
            MethodError: if there are no biases, or not those of the architecture that is given.
            TargetError: if a target selects nothing.
            CheckpointError: if the folder of an architecture holds none, or one of another model.
        """
        sites = {
            placement.site.name: placement.site
            for placement in BitFit(missing=self.missing, targets=self.targets).place(model, anatomy)
            if isinstance(placement.site, ParameterSite)
        }
        names, kept = self._found(model)
        absent = [name for name in names if name not in sites]
        if absent:
            raise MethodError(
                f"{self.name}: this model has no bias {absent[0]} to train"
                + (f", and {len(absent) - 1} more of the architecture are missing" if absent[1:] else "")
                + ". Take the kind of model, and the targets, that the architecture was found with."
            )
        for name in names or sites:
            yield Placement(sites[name])
        yield Placement(None, SearchedBiases(self.structured, kept), shared=_SHARED)

    def _found(self, model: nn.Module) -> tuple[tuple[str, ...], int | Tensor | None]:
        """Names of the biases to train, and which of their entries; no name if they have to be searched for."""
        if self.architecture is None:
            return self.biases, self.kept
        description, tensors = read(self.architecture)
        check_base_model(description["base_model"], describe_base_model(model))
        found = description["method"]
        if found["name"] != self.name or found["budget"] == 1:
            raise MethodError(
                f"{self.name}: {self.architecture} holds a delta of {found['name']}, not of a finished search of "
                f"{self.name}."
            )
        return tuple(found["biases"]), None if self.structured else tensors[f"{_SHARED}.indices"]

    def stored(self, forms: Mapping[str, Form]) -> Method:
        """With what was found; of an unfinished search with a budget of 1, as all that is left is kept then."""
        counts = kept_biases(forms)
        return replace(
            self,
            budget=self.budget if self.settled(forms) else 1.0,
            architecture=None,
            biases=tuple(counts),
            kept=None if self.structured else sum(counts.values()),
        )


@register
@dataclass(frozen=True)
class UBitFit(_SearchedBitFit):
    r"""BitFit with few entries: b = b_0 + delta, where a search leaves K entries of all deltas, each on its own.

    All biases train for a while; then, in a few steps of equal ratio, the entries are dropped whose updates are
    least useful by -delta dL/ddelta, a first-order estimate of what dropping them would change in the loss: by the mean
    of its absolute values over batches. When ``budget`` is reached those that are left train from the start, at a
    higher rate. A dropped entry has its original value, bit for bit, and does not come back.

    When to use:
        Where a task must fit into a few kilobytes, or to learn which biases matter for it. What was found for one
        task can be trained for another: ``architecture=FOLDER``.

    Cost:
        Parameters: while searching as BitFit; ``budget`` of them in the end. BERT-base at 0.1: 10,291 of 102,912.
        Memory: as BitFit.
        Time: as BitFit; ``search`` of the training goes into finding.
        Inference: none. On disk 8 bytes for each entry: its position and its value.

    Terms:
        Site: entries of the model's biases; with ``targets`` of those of some roles.
        Form: none: the parameters themselves.
        Combination: the trained value stands in the place of the original.
        Control: live while active; the original values come back bit for bit.

    Example:
        >>> import deltune, torch
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), "u-bitfit(budget=0.1)")
        >>> optimizer = torch.optim.AdamW(tuned.trainable_parameters(), lr=3e-3)
        >>> following = tuned.bind(optimizer, steps=20)
        >>> for _ in range(20):
        ...     ids = torch.randint(100, 1000, (4, 8))
        ...     tuned.model(ids, labels=torch.randint(2, (4,))).loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        >>> from deltune.methods.selective.us_bitfit import kept_biases
        >>> sum(kept_biases(tuned.attachments["default"].forms).values())  # of 640
        64

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/u-bitfit \
            --method u-bitfit --budget 0.1

    Differs from the paper:
        There is no official code, and the text leaves open how scores are averaged, how many steps of pruning there
        are, and whether training begins anew. Here: the mean since the last pruning, ``events`` in equal ratios, and
        anew (``restart``). Batches differ in sign where an update neither helps nor harms for long, so that the mean
        of -delta dL/ddelta itself (``criterion=signed``) is close to zero for the entries that matter as well; with
        the mean of absolute values better ones were kept. What is left trains at three times the rate of the search
        (``final_rate``), because a tenth of the entries has to move further for the same change. The task head trains
        all the time and is no candidate. Where gradients are clipped, those of dropped entries still count in their
        norm.

    Source:
        Lawton et al. 2023, arXiv 2305.16597.
    """

    name: ClassVar[str] = "u-bitfit"

    @property
    def structured(self) -> bool:
        """Entries are kept or dropped each on its own."""
        return False


@register
@dataclass(frozen=True)
class SBitFit(_SearchedBitFit):
    r"""BitFit with few biases: a search as of ``u-bitfit``, which keeps or drops a bias as a whole.

    The score of a bias is the sum of those of its entries. Biases are kept in the order of their scores, until the
    next would be more than ``budget`` allows.

    When to use:
        As ``u-bitfit``, where the places that matter shall be few, so that they can be read, and the rest of the model
        truly stays as it is. What was found is trained for another task with ``architecture=FOLDER``.

    Cost:
        Parameters: while searching as BitFit; at most ``budget`` of them in the end. BERT-base at 0.1: up to 13 biases
            of 768.
        Memory: as BitFit.
        Time: as BitFit; ``search`` of the training goes into finding.
        Inference: none. On disk the kept biases.

    Terms:
        Site: the model's biases; with ``targets`` those of some roles.
        Form: none: the parameters themselves.
        Combination: the trained value stands in the place of the original.
        Control: live while active; the original values come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.SBitFit(budget=0.2))
        >>> summary = tuned.summary()  # before the search
        >>> summary.parameters - summary.head_parameters
        640

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/s-bitfit \
            --method s-bitfit --budget 0.2

    Differs from the paper:
        As ``u-bitfit``. The sum over a bias is not divided by its length, so long biases have it easier.

    Source:
        Lawton et al. 2023, arXiv 2305.16597.
    """

    name: ClassVar[str] = "s-bitfit"

    @property
    def structured(self) -> bool:
        """Whole biases are kept or dropped."""
        return True
