"""The narrow network beside a frozen stack that ladder side-tuning trains.

Letters: B batch, T positions, d hidden size, r the reduction, w = d / r the width of the side network, L the number
of the stack's layers, h_0 ... h_L its hidden states.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Collection, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from deltune.errors import StateError
from deltune.sites import StackStates, StatesForm
from deltune.sites.base import first_tensor

__all__ = ["SideNetwork"]

#: Arguments of a layer that hold the cache of keys and values.
_CACHES = ("past_key_values", "layer_past")
#: Arguments of T5's layers that each layer hands on to the next, and where its output has them.
_BIASES = {"position_bias": 1, "encoder_decoder_position_bias": 2}
#: Arguments that carry a gradient. Re-entrant checkpointing sees it only where they are given by position.
_WITH_GRADIENT = (*_BIASES, "encoder_hidden_states")


class SideNetwork(StatesForm):
    r"""s_0 = D_0 h_0; s_i = Block_i(g_i s_{i-1} + (1 - g_i) D_i h_i), g_i = sigmoid(alpha_i / temperature).

    i counts the kept layers only; h_i is the output of the layer that stands behind the i-th of them. The result is
    U norm(s), of width d, or norm(s) itself where another side network reads it. D_i and U are linear maps with
    biases; alpha is zero at the start.

    Args:
        blocks: the side blocks, by the numbers of the layers that they stand beside, in order.
        norm: the final norm, of width w; None where the stack has none.
        layers: L.
        features: d.
        width: w.
        reduction: r, by which rotary positions are thinned out for the narrower heads.
        temperature: of the gates.
        up: whether U is there.
        beside: width of the states of another side network that the blocks' cross-attention reads; 0 for none.
        dtype: type of the parameters.
        device: where they are.
    """

    formula: ClassVar[str] = "U norm(s_L), s_i = Block_i(g_i s_(i-1) + (1 - g_i) D_i h_i)"

    def __init__(
        self,
        blocks: Mapping[int, nn.Module],
        norm: nn.Module | None,
        layers: int,
        features: int,
        width: int,
        reduction: int,
        temperature: float = 0.1,
        up: bool = True,
        beside: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        self.kept = tuple(blocks)
        self.reduction = reduction
        self.temperature = temperature
        self.appended = 0 if up else width
        self.beside = beside
        self.gates = nn.Parameter(torch.zeros(layers, **kind))
        self.downs = nn.ModuleList(nn.Linear(features, width, **kind) for _ in range(len(blocks) + 1))
        self.blocks = nn.ModuleList(blocks.values())
        self.positional = _positional(self.blocks[0])
        self.norm = norm
        self.up = nn.Linear(width, features, **kind) if up else None
        #: Attribute of a cache under which the layers of this network's own cache are.
        self.cache_key = f"_deltune_side_{uuid.uuid4().hex}"

    def gate(self, index: int) -> Tensor:
        """The share g of the side state before the block at the layer of that number, a scalar."""
        return torch.sigmoid(self.gates[index] / self.temperature)

    def reads(self, layers: int) -> Collection[int]:
        """The embedded input, and the outputs of the layers that have a block beside them."""
        return 0, *(index + 1 for index in self.kept)

    def forward(self, states: StackStates) -> Tensor:
        """The new final states (B, T, d), or (B, T, w) without U."""
        kind = self.gates.dtype
        side: Tensor = self.downs[0](states.hidden[0].to(kind))
        carried: dict[str, Any] = {}
        for down, block, index in zip(self.downs[1:], self.blocks, self.kept, strict=True):
            gate = self.gate(index)
            side = gate * side + (1 - gate) * down(states.hidden[index + 1].to(kind))
            arguments = self._arguments(states, index, carried)
            output = block(side, *(arguments.pop(name, None) for name in self.positional), **arguments)
            side = first_tensor(output)
            carried = {name: output[place] for name, place in _BIASES.items() if name in states.calls[index]}
        if self.norm is not None:
            side = self.norm(side)
        if self.up is not None:
            side = self.up(side)
        return side.to(states.final.dtype)

    def _arguments(self, states: StackStates, index: int, carried: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of the layer beside the block, as the narrower block needs them."""
        arguments = dict(states.calls[index])
        for name, value in arguments.items():
            if name == "position_embeddings" and value is not None:
                # each r-th frequency: those of a head that is r times narrower
                arguments[name] = tuple(part[..., :: self.reduction] for part in value)
            elif name in _CACHES and value is not None:
                arguments[name] = self._cache(value, states.hidden[0].shape[1])
            elif name in _BIASES:
                arguments[name] = carried.get(name)
            elif name == "encoder_hidden_states" and states.beside is not None:
                arguments[name] = states.beside.to(self.gates.dtype)
        return arguments

    def _cache(self, cache: Any, length: int) -> Cache | None:
        """This network's own cache: further layers of the model's, so that they are kept in step with it.

        Whatever is done to the model's cache as a whole (reordering for beam search, cropping, repeating) is done
        to its further layers likewise.

        Raises:
            StateError: if the model's cache is of a kind that cannot have further layers, or was filled without this
                network.
        """
        if not cache.get_seq_length():
            return None  # the model itself keeps nothing, as under gradient checkpointing
        if isinstance(cache, EncoderDecoderCache):
            own = self._further(cache.self_attention_cache, length)
            return EncoderDecoderCache(own, self._further(cache.cross_attention_cache, None))
        return self._further(cache, length)

    def _further(self, cache: Any, length: int | None) -> Cache:
        """The layers beyond those of the model; made in the first call, which adds ``length`` positions if given."""
        layers: list[Any] | None = getattr(cache, self.cache_key, None)
        if layers is None:
            if length is not None and cache.get_seq_length() > length:
                raise StateError(
                    "The cache holds positions that were computed while this side network was not active, so that it "
                    "knows nothing of them. Begin with an empty cache."
                )
            made = {index: _layer_like(cache.layers[index]) for index in self.kept}
            cache.layers.extend(made.values())
            # where there is no block, the first one's says how many positions there are
            layers = [made.get(index, made[self.kept[0]]) for index in range(self.gates.shape[0])]
            setattr(cache, self.cache_key, layers)
        return Cache(layers=layers)


def _positional(block: nn.Module) -> tuple[str, ...]:
    """Names of a block's arguments behind the hidden states, up to the last that carries a gradient."""
    names = list(inspect.signature(block.forward).parameters)
    last = max((names.index(name) for name in _WITH_GRADIENT if name in names), default=0)
    return tuple(names[1 : last + 1])


def _layer_like(layer: Any) -> DynamicLayer:
    """An empty layer of a cache for the same positions."""
    if type(layer) is DynamicLayer:
        return DynamicLayer()
    if type(layer) is DynamicSlidingWindowLayer:
        new = DynamicSlidingWindowLayer(sliding_window=layer.sliding_window)
        new.record_past = layer.record_past
        return new
    raise StateError(
        f"A side network keeps keys and values of its own beside the model's, which is not possible in a cache of "
        f"{type(layer).__name__}s. Generate with the default cache, which grows, or with use_cache=False."
    )
