"""BitFit: train the bias vectors only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from deltune.backbone import PROJECTION_ROLES, Anatomy, Targets
from deltune.backbone.describe import out_features
from deltune.errors import MethodError
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.sites import Insertion, ParameterSite, parameter_modules

__all__ = ["BitFit"]

#: The roles that are modules with a bias of their own.
_ROLES = (*PROJECTION_ROLES, "norm")


@register
@dataclass(frozen=True)
class BitFit(Method):
    r"""Train every bias of the model (and the head): linear maps, norms, pooler. Weights stay frozen.

    ``targets`` restricts it to the biases of some roles, such as the paper's smaller variant
    ``attention.query,ffn.up``. Models without biases (LLaMA) are refused, unless ``missing`` is ``add``, which
    gives each linear map of the layers a bias of zeros. Position tables that are merely named "bias" are not
    biases and never selected.

    When to use:
        Encoders such as BERT with little data, and where a task must fit into very little space. It adds nothing to
        the model and slows nothing down. Models without biases have little to train; take LoRA there.

    Cost:
        Parameters: as many as there are biases. BERT-base: 102,912 (0.094 %); the variant of queries and ``ffn.up``:
            46,080.
        Memory: optimizer state of the biases. Fewer activations than LoRA keeps, because the gradient of a bias
            needs no input.
        Time: a forward and a backward pass without weight gradients; nothing is added.
        Inference: none.

    Terms:
        Site: the model's biases; with ``targets`` those of some roles.
        Form: none: the parameters themselves.
        Combination: the trained value stands in the place of the original.
        Control: live while active; the original values come back bit for bit.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> model = BertForSequenceClassification(config)
        >>> summary = deltune.attach(model, deltune.BitFit(targets="attention.query,ffn.up")).summary()
        >>> summary.parameters - summary.head_parameters  # 2 layers, 32 + 64 each
        192

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/bitfit \
            --method bitfit --learning-rate 1e-3

    Differs from the paper:
        The authors' code always trains the pooler's bias; here ``targets`` leave it out. Adding biases to models
        that have none is not in the paper. The bias of keys is selected as in the paper, although it has no effect,
        and so no gradient, unless positions are rotary.

    Source:
        Ben Zaken et al. 2021, arXiv 2106.10199, section 3; authors' code: benzakenelad/BitFit.
    """

    missing: str = option("refuse", "what to do where linear maps have no bias", choices=("refuse", "add"))
    targets: Targets | None = option(None, "the biases of which roles; all of the model's if none")

    name: ClassVar[str] = "bitfit"
    branch: ClassVar[str] = "selective"
    insertion: ClassVar[Insertion] = Insertion.SELECT
    paper: ClassVar[Paper] = Paper(
        "Ben Zaken et al.",
        "BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        2021,
        "2106.10199",
    )
    learning_rate: ClassVar[float] = 3e-3
    mergeable: ClassVar[bool] = True

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """The selected biases.

        Raises:
            MethodError: if there are none at all, or none at one of the targets.
            TargetError: if a target selects nothing, or some of the rows of a fused matrix.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        self._refuse_targets_without_bias(modules, anatomy)
        head = tuple(f"{name}." for name in anatomy.head)
        names = tuple(modules) if self.targets is None else parameter_modules(model, anatomy, self.targets, _ROLES)
        linear = {part.module for part in anatomy if part.role in PROJECTION_ROLES}
        found = False
        for name in dict.fromkeys(names):
            module = modules[name]
            if f"{name}.".startswith(head) or "bias" not in module._parameters:
                continue
            bias = module._parameters["bias"]
            if bias is not None and bias.dim() == 1:
                found = True
                yield Placement(ParameterSite(f"{name}.bias"))
            elif bias is None and self.missing == "add" and name in linear:
                found = True
                yield Placement(ParameterSite(f"{name}.bias", zeros=(out_features(module),)))
        if not found:
            raise MethodError(
                f"{anatomy.family} has no biases to train. Use bitfit(missing=add) to give every linear map of its "
                "layers a bias of zeros, or another method."
            )

    def _refuse_targets_without_bias(self, modules: dict[str, nn.Module], anatomy: Anatomy) -> None:
        """Each target must give something to train: Qwen2's queries have a bias, its ``ffn.up`` has none."""
        if self.targets is None or self.missing == "add":
            return
        for name in self.targets.names:
            parts = replace(self.targets, names=(name,)).select(anatomy, tuple(modules), _ROLES)
            if all(modules[part.module]._parameters.get("bias") is None for part in parts):
                raise MethodError(
                    f"{name} has no bias in this {anatomy.family}. Leave it out of the targets, or use "
                    "bitfit(missing=add) to give linear maps a bias of zeros."
                )
