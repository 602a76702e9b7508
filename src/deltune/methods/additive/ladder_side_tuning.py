"""Ladder side-tuning: a narrow copy of the model beside it, so that no gradient goes through the model.

Letters: d hidden size, r the reduction, L number of layers, h_i the frozen model's hidden states, s_i the side ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets, anatomy_of
from deltune.errors import MethodError, TargetError
from deltune.methods.additive.narrow_layers import narrow_configuration, narrow_layer, narrow_norm, wide_layers
from deltune.methods.additive.side_network import SideNetwork
from deltune.methods.additive.structural_pruning import Importance, WideLayer, cut, magnitude, residual_features
from deltune.methods.base import Method, Paper, Placement
from deltune.methods.fisher_information import fisher_information
from deltune.methods.options import option
from deltune.methods.registry import register
from deltune.quantization import is_quantized
from deltune.sites import Form, Insertion, StatesSite, states_sites

__all__ = ["LadderSideTuning"]


@dataclass(frozen=True)
class _Stack:
    """A stack that has a side network: its layers, those that are kept, and the final norm, if any."""

    site: StatesSite
    layers: tuple[WideLayer, ...]
    kept: tuple[int, ...]
    norm: nn.Module | None

    @property
    def reads(self) -> bool:
        """Whether its layers read another stack."""
        return any(part.stack != self.site.stack.name for part in self.layers[0].parts)


@register
@dataclass(frozen=True)
class LadderSideTuning(Method):
    r"""A side network of width d / r, s_i = Block_i(g_i s_{i-1} + (1 - g_i) D_i h_i), with g_i = sigmoid(alpha_i / T).

    Block_i is a layer of the model's own kind, r times narrower: as many heads, each D / r wide. D_i (d / r, d) reads
    the frozen model's states of layer i, and s_0 = D_0 h_0 its embedded input. U norm(s_L) replaces the last layer's
    states, so that the model's own head reads it. In encoder-decoder models the decoder's side network reads that of
    the encoder. The start is not the frozen model.

    When to use:
        Where memory for training is what is missing: the frozen model needs none, neither for activations nor for
        gradients. The longer the texts, the more it saves. The paper finds it about one point below LoRA (GLUE,
        T5-base). It reads the frozen model's states, so together with a method that changes the layers, that method
        would learn nothing.

    Cost:
        Parameters: the blocks, about 1 / r^2 of the model's own; (k + 1) (d d/r + d/r) for k kept layers; U with
            d d/r + d; L gates. BERT-base, r = 8: 2,376,300 (2.2 %). T5-base, r = 8, 9 of 12 layers: 3,878,712 (1.7 %).
        Memory: activations of the side network, about 1 / r of the model's, and the hidden states that D_i read.
        Time: forward that of the model and a little more; backward that of the side network alone. With
            ``frozen_states`` the model runs once for each text, and later epochs take the side network's time alone.
        Inference: the side network runs beside the whole model and has a cache of its own. It cannot be merged.

    Terms:
        Site: the final hidden states of a stack; all of its layers' states are read.
        Form: a transformer, r times narrower, with gates between its own state and the model's.
        Combination: it replaces the final states. Those of an encoder that a decoder reads stay, and have the d / r
            features of the side encoder behind them.
        Control: live for every row while active. Two methods that replace the same states are not live together.

    Example:
        >>> import deltune
        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
        >>> tuned = deltune.attach(BertForSequenceClassification(config), deltune.LadderSideTuning(reduction=4))
        >>> summary = tuned.summary()
        >>> summary.parameters - summary.head_parameters  # 2 blocks of 600, 3 times 32 * 8 + 8, 8 * 32 + 32, 2 gates
        2282

        $ deltune tune --model models/encoder --data data/reviews.csv --evaluation 0.1 --output runs/ladder \
            --method ladder-side-tuning --reduction 8 --initialization magnitude

    Differs from the paper:
        The gate is that of the authors' code, where g weights the side state; in the paper it weights D_i h_i, which
        is the same with alpha of the other sign. As in the code, D_0 h_0 is not gated, and every layer of the stack
        has an entry among the gates, also where it is not kept. Initial blocks are cut out of the model as in the
        paper (Fisher information of ``examples`` single examples, given by ``prepare``; until then the size of the
        weights), but heads stay heads, pairs of rotated features stay together, and the features of the residual
        stream are the same in all layers; in the code rows are picked over all heads, and differ from layer to
        layer. T5's table of relative positions is copied. With r = 1 the blocks are those of the model.

    Source:
        Sung et al. 2022, arXiv 2206.06522, section 3; authors' code: ylsung/Ladder-Side-Tuning.
    """

    reduction: int = option(8, "how many times narrower the side network is, r", minimum=1)
    targets: Targets = option(
        Targets(("layer",)), "the layers beside which there are side layers: 'layer layers=1,3,5'"
    )
    initialization: str = option(
        "fisher",
        "what the side layers are cut out by: fisher (information from data; the weights' size before), magnitude "
        "(the weights' size), or random (not cut out)",
        choices=("fisher", "magnitude", "random"),
    )
    examples: int = option(1024, "number of examples for the Fisher information", minimum=1)
    temperature: float = option(0.1, "temperature T of the gates", minimum=0, exclusive=True)

    name: ClassVar[str] = "ladder-side-tuning"
    branch: ClassVar[str] = "additive"
    insertion: ClassVar[Insertion] = Insertion.REPLACE
    paper: ClassVar[Paper] = Paper(
        "Sung et al.",
        "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer Learning",
        2022,
        "2206.06522",
    )
    learning_rate: ClassVar[float] = 3e-3
    unchanged_at_start: ClassVar[bool] = False

    def place(self, model: nn.Module, anatomy: Anatomy) -> Iterator[Placement]:
        """A side network at the end of every stack of which a layer is selected."""
        stacks = self._stacks(model, anatomy)
        networks = {}
        for stack in stacks:
            read = next((other for other in stacks if other is not stack), None) if stack.reads else None
            networks[stack.site.key] = self._network(model, anatomy, stack, read, stacks)
        if self.initialization != "random":
            _cut_out(stacks, networks, self.reduction, magnitude)
        for stack in stacks:
            yield Placement(stack.site, networks[stack.site.key])

    def prepare(self, model: nn.Module, forms: Mapping[str, Form], batches: Iterable[Mapping[str, Any]]) -> None:
        """Cut the side layers out anew, by the Fisher information of the frozen model's weights.

        Raises:
            MethodError: if the batches have no labels, or the model is quantised.
        """
        if self.initialization != "fisher":
            return
        networks = {key: form for key, form in forms.items() if isinstance(form, SideNetwork)}
        stacks = self._stacks(model, anatomy_of(model))
        weights: dict[str, nn.Parameter] = {}
        for stack in stacks:
            for index in stack.kept:
                layer = stack.layers[index]
                for part in layer.parts:
                    if part.role != "attention":
                        weights[part.module] = _floating(part.module, layer.modules[part.module])
        for network in networks.values():
            network.transparent = True
        try:
            information = fisher_information(model, weights, batches, self.examples)
        finally:
            for network in networks.values():
                network.transparent = False

        def importance(name: str, module: nn.Module) -> Tensor:
            return information[name].T if hasattr(module, "nf") else information[name]

        _cut_out(stacks, networks, self.reduction, importance)

    def _stacks(self, model: nn.Module, anatomy: Anatomy) -> list[_Stack]:
        """The stacks of which a layer is selected.

        Raises:
            TargetError: if one of them can have no side network.
        """
        modules = dict(model.named_modules(remove_duplicate=False))
        selected = self.targets.select(anatomy, (), ("layer",))
        names = tuple(dict.fromkeys(part.stack for part in selected))
        stacks = []
        for site in states_sites(model, anatomy, names):
            own = [part.layer for part in selected if part.stack == site.stack.name and part.layer is not None]
            norm = None if site.stack.final_norm is None else modules[site.stack.final_norm]
            stacks.append(_Stack(site, wide_layers(anatomy, modules, site.stack), tuple(sorted(own)), norm))
        self._check_readers(model, anatomy, stacks)
        return stacks

    def _check_readers(self, model: nn.Module, anatomy: Anatomy, stacks: list[_Stack]) -> None:
        """Refuse cross-attention that has no side network to read, and side networks that nobody reads."""
        crossed = any(part.stack not in anatomy.stacks for part in anatomy.of("attention"))
        if not crossed:
            return
        if not getattr(model.config, "is_encoder_decoder", False):
            raise TargetError(
                f"The decoder of {anatomy.family} reads states that pass through other modules on their way, so that "
                "its side network could not read another one. Choose another method, such as attention-fusion."
            )
        if len(stacks) != 2:
            raise TargetError(
                f"In {anatomy.family} the decoder's side network reads that of the encoder, so each needs a layer; "
                f"selected are layers of the {stacks[0].site.stack.name} only."
            )

    def _network(
        self, model: nn.Module, anatomy: Anatomy, stack: _Stack, read: _Stack | None, stacks: list[_Stack]
    ) -> SideNetwork:
        site = stack.site
        blocks: dict[int, nn.Module] = {}
        config: Any = None
        for index in stack.kept:
            config = narrow_configuration(stack.layers[index], self.reduction, anatomy.family)
            blocks[index] = narrow_layer(
                model, stack.layers[index], config, index, index == stack.kept[0], site.dtype, site.device
            )
        width = site.hidden_size // self.reduction
        return SideNetwork(
            blocks,
            None if stack.norm is None else narrow_norm(model, stack.norm, config, width),
            site.layers,
            site.hidden_size,
            width,
            self.reduction,
            self.temperature,
            up=stack.reads or not any(other.reads for other in stacks),
            beside=0 if read is None else read.site.hidden_size // self.reduction,
            dtype=site.dtype,
            device=site.device,
        )


def _cut_out(stacks: list[_Stack], networks: Mapping[str, SideNetwork], reduction: int, importance: Importance) -> None:
    """Fill the networks' blocks and norms with the most important part of the model's."""
    features = {}
    for stack in stacks:
        layers = [stack.layers[index] for index in stack.kept]
        features[stack.site.key] = residual_features(layers, importance, stack.site.hidden_size // reduction)
    for stack in stacks:
        network, residual = networks[stack.site.key], features[stack.site.key]
        read = next((features[other.site.key] for other in stacks if other is not stack), None)
        for index, block in zip(stack.kept, network.blocks, strict=True):
            cut(stack.layers[index], block, importance, residual, reduction, read, stack.layers[0].module)
        if network.norm is not None and stack.norm is not None:
            with torch.no_grad():
                for name, value in network.norm.named_parameters():
                    value.copy_(stack.norm.get_parameter(name)[residual])


def _floating(name: str, module: nn.Module) -> nn.Parameter:
    """The weight, whose gradient is wanted.

    Raises:
        MethodError: if it is quantised.
    """
    if is_quantized(module):
        raise MethodError(
            f"The Fisher information needs gradients of the frozen matrices, and {name} is quantised. Use "
            "initialization=magnitude."
        )
    return module.get_parameter("weight")
