"""FISH mask: the entries of a model's parameters that matter most for the data, trained as one sparse vector."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from deltune.backbone import Anatomy, Targets, anatomy_of
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.fisher_information import fisher_information
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.methods.selective.greatest import greatest
from deltune.sites import EntriesForm, EntriesSite, Form, Insertion, entries_below, entries_site

__all__ = ["FishMask"]


@register
@dataclass(frozen=True)
class FishMask(Method):
    r"""Train the k entries with the greatest Fisher information, F_i = sum_examples (d log p(y|x) / d theta_i)^2.

    Entries of all parameters are ranked together, one number at a time; the task head trains whole. The mask is
    chosen by ``prepare`` from ``examples`` single examples, before training, and stays. The chosen entries are one
    vector, so that optimizer state, gradients and the file are of its size and not of the model's.

    When to use:
        Where the task must fit into little space at the quality of training everything, and nothing may be added to
        the model: it runs as it did. Choosing the mask costs as many backward passes of single examples. The
        backward pass itself is that of training everything, so it saves memory of optimizer and gradients, not time.

    Cost:
        Parameters: ``ratio`` of the model's, the head's included. BERT-base at 0.005: 547,418.
        Memory: optimizer state of the k entries; the gradient of one parameter at a time; activations as for ``full``.
            Choosing the mask takes two numbers for each parameter.
        Time: a full forward and backward pass, weight gradients included.
        Inference: none. On disk 12 bytes for each entry: its position and its value.

    Terms:
        Site: single entries of the model's parameters, all but the head's; with ``targets`` those of some modules.
        Form: none: the entries themselves, as one vector.
        Combination: trained values stand in the place of the originals; with several live, their changes are added.
        Control: live while active; the original entries come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> total = model.num_parameters()
        >>> tuned = deltune.attach(model, deltune.FishMask(ratio=0.01))
        >>> tuned.summary().parameters == int(0.01 * total)  # the head's 66 included
        True

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/fish \
            --method fish-mask --ratio 0.01 --examples 64

    Differs from the paper:
        Until ``prepare`` was called (``deltune.fit`` and ``deltune tune`` do it) the greatest weights are selected. The
        authors' code keeps dense gradients and optimizer state and multiplies by the mask; here both are sparse, with
        the same steps. Its published scripts take squared gradients of the given labels, as the default here, though
        its own default is the absolute value. Weight decay never reaches the entries, as in the scripts, where it is 0.
        Where a model has no task head (language models) nothing is trained besides the entries. The default rate is
        above that of the paper, which goes with up to seven epochs.

    Source:
        Sung, Nair and Raffel 2021, arXiv 2111.09839, section 3; authors' code: varunnair18/FISH.
    """

    ratio: float = option(0.005, "share of the model's parameters that trains, head included", minimum=0, maximum=1)
    examples: int = option(1024, "number of examples for the Fisher information", minimum=1)
    power: str = option(
        "square", "of the gradients that are summed: square or absolute", choices=("square", "absolute")
    )
    labels: str = option(
        "given",
        "labels whose gradients count: given, or expected (all classes, by their probability under the model)",
        choices=("given", "expected"),
    )
    targets: Targets | None = option(None, "entries of which modules; all of the model's but the head's if none")

    name: ClassVar[str] = "fish-mask"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Sung, Nair and Raffel", "Training Neural Networks with Fixed Sparse Masks", 2021, "2111.09839"
    )
    learning_rate: ClassVar[float] = 1e-3
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The entries with the greatest weights; :meth:`prepare` selects better ones.

        Raises:
            MethodError: if the head alone is more than ``ratio`` allows, or the chosen modules have fewer entries.
            TargetError: if a target selects nothing.
        """
        site = entries_site(model, anatomy)
        parameters = _parameters(model, site)
        weights = {name: parameters[name].detach().abs() for name in entries_below(model, anatomy, site, self.targets)}
        indices = greatest(weights, self._count(model, anatomy), site.starts)
        yield Placement(site, EntriesForm(site, indices, site.gather(parameters, indices)))

    def prepare(self, model: nn.Module, forms: Mapping[str, Form], batches: Iterable[Mapping[str, Any]]) -> None:
        """Select the entries with the greatest Fisher information.

        Called again during a training, it selects anew at the present values; entries that leave get their original
        values back. Make a new optimizer then: the state of the old one belongs to the old entries.

        Raises:
            MethodError: if the batches have no labels.
        """
        for form in forms.values():
            if isinstance(form, EntriesForm):
                site = form.site
                parameters = _parameters(model, site)
                names = entries_below(model, anatomy_of(model), site, self.targets)
                information = fisher_information(
                    model,
                    {name: parameters[name] for name in names},
                    batches,
                    self.examples,
                    power=self.power,
                    labels=self.labels,
                )
                indices = greatest(information, len(form.indices), site.starts)
                form.select(indices, site.gather(parameters, indices))

    def _count(self, model: nn.Module, anatomy: Anatomy) -> int:
        total = sum(value.numel() for value in model.parameters())
        head = sum(value.numel() for name in anatomy.head for value in model.get_submodule(name).parameters())
        count = int(self.ratio * total) - head
        if count < 1:
            raise MethodError(
                f"{self.name}: ratio={self.ratio:g} of {total:,} parameters are {int(self.ratio * total):,}, and the "
                f"task head alone has {head:,}. Take a ratio above {(head + 1) / total:.2g}."
            )
        return count


def _parameters(model: nn.Module, site: EntriesSite) -> dict[str, nn.Parameter]:
    return {name: model.get_parameter(name) for name in site.names}
