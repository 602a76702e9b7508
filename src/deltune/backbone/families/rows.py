"""The types of the rows that say where a family of models keeps each role.

Paths are dotted names. Those of a :class:`StackRow` are relative to the pretrained model without its head
(``model.base_model``); those of an :class:`AttentionRow` or :class:`FeedForwardRow` are relative to a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

__all__ = ["AttentionRow", "Cell", "Family", "FeedForwardRow", "Fused", "StackRow", "TokenRow", "path_of"]


@dataclass(frozen=True)
class Fused:
    """One part of a matrix that serves several roles.

    Layouts: ``blocks`` stacks query, key and value one below the other (sizes follow from the heads);
    ``heads`` alternates them head by head; ``halves`` has two equal parts, numbered 0 and 1.
    """

    path: str
    layout: Literal["blocks", "heads", "halves"]
    index: int


#: Where a matrix is: its path, or a part of a fused one.
Cell = str | Fused


def path_of(cell: Cell) -> str:
    """The path of the module that holds ``cell``."""
    return cell.path if isinstance(cell, Fused) else cell


@dataclass(frozen=True)
class AttentionRow:
    """An attention sublayer of a layer.

    Attributes:
        block: the module that computes queries, keys and values and calls the attention function.
        query: where the queries' matrix is.
        key: where the keys' matrix is.
        value: where the values' matrix is.
        output: the matrix that joins the heads.
        result: the module whose output is added to the residual stream: a dropout module where it serves
            this sublayer alone, else the last linear map.
        dispatches: whether the block calls transformers' attention interface.
        norm_before: the norm that reads the residual stream in front of this sublayer, where the model normalises
            before its sublayers.
        norm_after: the norm that reads the sum of the result and the residual stream, where it normalises afterwards.
    """

    block: str
    query: Cell
    key: Cell
    value: Cell
    output: str
    result: str
    dispatches: bool = True
    norm_before: str | None = None
    norm_after: str | None = None

    def paths(self) -> Iterator[str]:
        """Every path that this row names."""
        yield from (self.block, path_of(self.query), path_of(self.key), path_of(self.value))
        yield from (self.output, self.result)


@dataclass(frozen=True)
class FeedForwardRow:
    """A feed-forward sublayer of a layer.

    Attributes:
        up: where the matrix is that widens.
        down: the matrix that narrows again.
        result: the module whose output is added to the residual stream.
        gate: where the gate's matrix is, whose product with ``up`` goes through ``down``, if any. The gate
            is the half that passes through the activation.
        block: the module that holds the sublayer and receives its input; None where the layer does it all.
        norm_before: as in :class:`AttentionRow`.
        norm_after: as in :class:`AttentionRow`.
    """

    up: Cell
    down: str
    result: str
    gate: Cell | None = None
    block: str | None = None
    norm_before: str | None = None
    norm_after: str | None = None

    def paths(self) -> Iterator[str]:
        """Every path that this row names."""
        yield from (path_of(self.up), self.down, self.result)
        if self.gate is not None:
            yield path_of(self.gate)
        if self.block is not None:
            yield self.block


@dataclass(frozen=True)
class TokenRow:
    """Where additional input positions enter; see :class:`deltune.backbone.anatomy.TokenEntry`.

    Attributes:
        entry: path of the module that receives the inputs and the padding mask.
        exit: path of the module whose output loses the additional positions.
        reader: path of the module that reads the whole output and its padding mask, an encoder's decoder:
            in a model that has it the additional positions stay.
        embeddings: path of the embeddings module whose output is widened, where no embeddings are accepted.
        table: path of the table of absolute positions; positions are unbounded in a model without it.
        reserved: rows at the start of the table that stand for no position.
        after_padding: whether positions are counted over real tokens, from the padding id + 1.
    """

    entry: str = ""
    exit: str = ""
    reader: str | None = None
    embeddings: str | None = None
    table: str | None = None
    reserved: int = 0
    after_padding: bool = False


@dataclass(frozen=True)
class StackRow:
    """A stack of layers.

    Attributes:
        name: name of the stack.
        layers: path of the list of layers; ``*`` stands for every index of a list on the way to it.
        embeddings: path of the table of embeddings.
        attention: the self-attention of a layer.
        ffn: the feed-forward sublayer of a layer.
        norms: paths in a layer; those that a model lacks are passed over.
        outer_norms: paths in the base model; those that a model lacks are passed over.
        cross: the cross-attention of a layer, in models whose layers have its block.
        cross_name: the name under which cross-attention is selected.
        tokens: where additional positions enter; None where they cannot.
        heads: the configuration's attribute with the number of attention heads.
        config: the sub-configuration that holds it; "" for the configuration itself.
        repeats: two attributes of the configuration, whose quotient is how often each layer is applied;
            None where that is once.
        final_norm: path of the norm between the last layer and the stack's final hidden states, if there is one.
        exit: path of the module whose output is these states, where ``tokens`` does not say it.
    """

    name: str
    layers: str
    embeddings: str
    attention: AttentionRow
    ffn: FeedForwardRow
    norms: tuple[str, ...]
    outer_norms: tuple[str, ...] = ()
    cross: AttentionRow | None = None
    cross_name: str = "cross"
    tokens: TokenRow | None = None
    heads: str = "num_attention_heads"
    config: str = ""
    repeats: tuple[str, str] | None = None
    final_norm: str | None = None
    exit: str | None = None

    def layer_paths(self) -> tuple[str, ...]:
        """The paths inside a layer that a model must have for this row to describe it."""
        return (*self.attention.paths(), *self.ffn.paths())


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        name: its name.
        model_types: the values of ``config.model_type`` that it describes.
        stacks: its stacks. Several rows with one name are alternatives: the first that fits the model counts.
        pretrained: modules beside the base model that come pretrained although a task class has them, and
            so are no task head.
        language_model_head: path in the model of the map to the vocabulary, where the model's class does not
            say it.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[StackRow, ...]
    pretrained: tuple[str, ...] = ()
    language_model_head: str | None = None
