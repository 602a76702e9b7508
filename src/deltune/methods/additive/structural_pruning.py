"""Structural pruning: a narrow copy of transformer layers, cut out of wide ones (Sung et al. 2022, appendix).

Letters: d hidden size, D width of a head, H heads, K key/value heads, F width of a feed-forward layer, r the reduction.

Importance is a non-negative number for each weight. In each group of matrices that have the same rows (queries, keys
and values; up and gate) importances are multiplied weight by weight, over the columns that are kept, and summed over
each row; the rows with the greatest sums are kept. Heads stay heads: D / r features are kept of each, the same for
the queries, keys and values that belong together, and for the matrix that joins them. The features of the residual
stream are the same in all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltune.backbone import AttentionShape, Part
from deltune.quantization import dense_weight

__all__ = ["Importance", "WideLayer", "cut", "magnitude", "residual_features"]

#: The importance of a module's weights, (out, in), by the module's dotted name.
Importance = Callable[[str, nn.Module], Tensor]

_READERS = ("attention.query", "attention.key", "attention.value")


@dataclass(frozen=True)
class WideLayer:
    """A layer to cut from.

    Attributes:
        name: its dotted name.
        module: itself.
        parts: its attention sublayers and its matrices.
        modules: the model's modules by dotted name.
        rotated: how many of the D features of a head are rotated by their position; 0 without rotary positions.
    """

    name: str
    module: nn.Module
    parts: tuple[Part, ...]
    modules: Mapping[str, nn.Module]
    rotated: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        shape = self.of("attention")[0].attention
        assert shape is not None
        return shape.head_dim

    def of(self, role: str, stack: str | None = None) -> list[Part]:
        """Its parts of one role."""
        return [part for part in self.parts if part.role == role and stack in (None, part.stack)]

    def rows(self, part: Part, kept: Tensor | None = None) -> Tensor:
        """Which output rows of its module a matrix owns, or only those of its own rows that are kept."""
        module = self.modules[part.module]
        weight = dense_weight(module)
        every = torch.arange(weight.shape[1] if hasattr(module, "nf") else weight.shape[0], device=weight.device)
        own = every if part.rows is None else part.rows.view(every, 0).flatten()
        return own if kept is None else own[kept]

    def importance(self, part: Part, importance: Importance) -> Tensor:
        """Of a matrix's own rows, (rows, in), in float64 and one at most, so that products do not vanish."""
        values = importance(part.module, self.modules[part.module])[self.rows(part)].double()
        return values / values.max().clamp(min=torch.finfo(torch.float64).tiny)


def magnitude(name: str, module: nn.Module) -> Tensor:
    """Size of each weight, (out, in)."""
    weight = dense_weight(module).detach().abs()
    return weight.T if hasattr(module, "nf") else weight


def residual_features(layers: Sequence[WideLayer], importance: Importance, count: int) -> Tensor:
    """The features of the residual stream that the matrices which write to it find most important, in order."""
    total: Tensor | None = None
    for layer in layers:
        for part in (*layer.of("attention.output"), *layer.of("ffn.down")):
            sums = layer.importance(part, importance).sum(1)
            share = sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
            total = share if total is None else total + share
    assert total is not None
    return _best(total, count)


def cut(
    layer: WideLayer,
    narrow: nn.Module,
    importance: Importance,
    residual: Tensor,
    reduction: int,
    read: Tensor | None = None,
    first: nn.Module | None = None,
) -> None:
    """Copy the most important rows and columns of ``layer`` into ``narrow``.

    Args:
        layer: the wide layer.
        narrow: the same kind of layer, r times narrower; its values are overwritten.
        importance: of the weights.
        residual: the kept features of the residual stream, (d / r).
        reduction: r.
        read: the kept features of the states that cross-attention reads.
        first: the first layer of the stack, which has what the layers share (T5's table of relative positions).
    """
    shared = _has_norms_of_heads(layer)
    rows: dict[str, list[Tensor]] = {}
    columns: dict[str, Tensor] = {}

    def keep(part: Part, kept: Tensor, inputs: Tensor) -> None:
        rows.setdefault(part.module, []).append(layer.rows(part, kept))
        columns[part.module] = inputs

    heads = residual[:0]
    for attention in layer.of("attention"):
        shape, stack = attention.attention, attention.stack
        assert shape is not None
        query, key, value = (layer.of(role, stack)[0] for role in _READERS)
        inputs = residual if read is None or stack == layer.parts[0].stack else read
        heads = _kept_of_heads(layer, (query, key, value), importance, (residual, inputs), shape, reduction, shared)
        own = _positions(heads, shape.head_dim)
        queries = _positions(heads.repeat_interleave(shape.heads // shape.key_value_heads, 0), shape.head_dim)
        keep(query, queries, residual)
        keep(key, own, inputs)
        keep(value, own, inputs)
        keep(layer.of("attention.output", stack)[0], residual, queries)
    up, gate, down = layer.of("ffn.up")[0], layer.of("ffn.gate"), layer.of("ffn.down")[0]
    product = torch.stack([layer.importance(part, importance)[:, residual] for part in (up, *gate)]).prod(0)
    middle = _best(product.sum(1), product.shape[0] // reduction)
    for part in (up, *gate):
        keep(part, middle, residual)
    keep(down, residual, middle)
    features = {layer.head_dim: heads[0], layer.rows(down).numel(): residual}
    _copy(layer, narrow, rows, columns, features, first)


def _kept_of_heads(
    layer: WideLayer,
    parts: Sequence[Part],
    importance: Importance,
    inputs: tuple[Tensor, Tensor],
    shape: AttentionShape,
    reduction: int,
    shared: bool,
) -> Tensor:
    """The kept features of each key/value head, (K, D / r), in order; those of its query heads are the same.

    Both features of a pair that is rotated together are kept or left.
    """
    blocks = (shape.key_value_heads, -1, shape.head_dim)
    query = layer.importance(parts[0], importance)[:, inputs[0]].view(*blocks, len(inputs[0])).prod(1)
    key, value = (
        layer.importance(part, importance)[:, inputs[1]].view(shape.key_value_heads, shape.head_dim, -1)
        for part in parts[1:]
    )
    # in cross-attention, queries read other features than keys and values do
    alike = inputs[0] is inputs[1]
    scores = (query * key * value).sum(-1) if alike else query.sum(-1) * (key * value).sum(-1)
    if shared:
        scores = scores.sum(0, keepdim=True).expand_as(scores)
    half = layer.rotated // 2
    pairs = _best(scores[:, :half] + scores[:, half : 2 * half], half // reduction)
    rest = _best(scores[:, 2 * half :], (shape.head_dim - 2 * half) // reduction) + 2 * half
    return torch.cat([pairs, pairs + half, rest], dim=1)


def _best(scores: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` greatest along the last dimension, in order."""
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values


def _positions(heads: Tensor, head_dim: int) -> Tensor:
    """Features within each head as features of all heads, one after the other."""
    return (torch.arange(heads.shape[0], device=heads.device)[:, None] * head_dim + heads).flatten()


def _projections(layer: WideLayer) -> set[str]:
    return {part.module.removeprefix(f"{layer.name}.") for part in layer.parts if part.role != "attention"}


def _has_norms_of_heads(layer: WideLayer) -> bool:
    """Whether one norm serves every head, whose features must then be the same in all of them."""
    others = _projections(layer)
    return any(
        value.shape == (layer.head_dim,) and name.rpartition(".")[0] not in others
        for name, value in layer.module.named_parameters()
    )


def _copy(
    layer: WideLayer,
    narrow: nn.Module,
    rows: Mapping[str, Sequence[Tensor]],
    columns: Mapping[str, Tensor],
    features: Mapping[int, Tensor],
    first: nn.Module | None,
) -> None:
    """Fill ``narrow``: matrices, and norms by the ``features`` of their width; tables are taken whole."""
    with torch.no_grad():
        for name in rows:
            module, target = layer.modules[name], narrow.get_submodule(name.removeprefix(f"{layer.name}."))
            kept = torch.cat(list(rows[name])).sort().values
            weight = dense_weight(module)
            matrix = (weight.T if hasattr(module, "nf") else weight)[kept][:, columns[name]]
            target.get_parameter("weight").copy_(matrix.T if hasattr(module, "nf") else matrix)
            bias = getattr(module, "bias", None)
            if bias is not None:
                target.get_parameter("bias").copy_(bias[kept])
        known = {*dict(layer.module.named_parameters())}
        for name, value in narrow.named_parameters():
            if name.rpartition(".")[0] in _projections(layer):
                continue
            source = layer.module if name in known or first is None else first
            wide = source.get_parameter(name)
            if wide.shape == value.shape:
                value.copy_(wide)
            else:
                value.copy_(wide[features[wide.shape[0]]])
