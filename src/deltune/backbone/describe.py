"""Apply a family row to a model: from data to an :class:`Anatomy`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from deltune.backbone.anatomy import Anatomy, AttentionShape, Part, Rows, Stack, TokenEntry
from deltune.backbone.families import (
    FAMILIES,
    AttentionRow,
    Cell,
    Family,
    FeedForwardRow,
    Fused,
    StackRow,
    TokenRow,
    path_of,
)
from deltune.backbone.heads import heads_of
from deltune.backbone.matrices import out_features
from deltune.backbone.structure import structural_family
from deltune.errors import TargetError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["anatomy_of", "out_features"]


def anatomy_of(model: nn.Module) -> Anatomy:
    """Describe ``model`` in roles.

    Args:
        model: a transformers model, with or without a head. Where its family has no row and its structure
            cannot be read safely, the anatomy has no stacks: only module patterns select something then.

    Raises:
        TargetError: if the model says it is of a known family but is not built like it.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    family = next((row for row in FAMILIES if model_type in row.model_types), None)
    if family is None:
        family = structural_family(model)
    if family is None:
        head, language_model_head = heads_of(model)
        return Anatomy(str(model_type or type(model).__name__), {}, _head_parts(head), head, language_model_head)
    return _Describer(model, family).anatomy()


def _head_parts(head: tuple[str, ...]) -> tuple[Part, ...]:
    """The parts of a task head, numbered if they are several."""
    return tuple(
        Part("head", "", None, name, index=index if len(head) > 1 else None) for index, name in enumerate(head)
    )


def _join(*pieces: str) -> str:
    return ".".join(piece for piece in pieces if piece)


class _Describer:
    """Builds the anatomy of one model from one family row."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model = model
        self.family = family
        # One module may have several names, such as the embeddings that an encoder and a decoder share.
        self.modules = dict(model.named_modules(remove_duplicate=False))
        base = getattr(model, "base_model", model)
        self.prefix = next(name for name, module in self.modules.items() if module is base)

    def anatomy(self) -> Anatomy:
        stacks: dict[str, Stack] = {}
        parts: list[Part] = []
        for row in self.family.stacks:
            layers = self._layers(row)
            if row.name not in stacks and layers and self._fits(row, layers[0]):
                stacks[row.name] = self._stack(row, layers)
                parts.extend(self._parts(row, layers))
        if not stacks:
            raise TargetError(
                f"This {type(self.model).__name__} says it is of the family {self.family.name!r} but is not "
                f"built like it: {self._misfit()}. It may have been changed, or come from another version of "
                "transformers; use module patterns as targets instead, such as '*.q_proj'."
            )
        head, language_model_head = heads_of(self.model, self.family.pretrained)
        if language_model_head is None and self.family.language_model_head in self.modules:
            language_model_head = self.family.language_model_head
        parts.extend(_head_parts(head))
        return Anatomy(self.family.name, stacks, tuple(parts), head, language_model_head)

    # -- where things are

    def _name(self, path: str) -> str:
        return _join(self.prefix, path)

    def _has(self, path: str) -> bool:
        return self._name(path) in self.modules

    def _layers(self, row: StackRow) -> tuple[str, ...]:
        """Names of the layers of ``row``, in order; none if the model has no such stack."""
        lists = [self.prefix]
        for piece in row.layers.split("."):
            if piece == "*":
                lists = [name for parent in lists for name in self._children(parent)]
            else:
                lists = [_join(parent, piece) for parent in lists]
        return tuple(name for parent in lists for name in self._children(parent))

    def _children(self, name: str) -> list[str]:
        module = self.modules.get(name)
        return [] if module is None else [f"{name}.{child}" for child, _ in module.named_children()]

    def _fits(self, row: StackRow, layer: str) -> bool:
        return all(f"{layer}.{path}" in self.modules for path in row.layer_paths())

    def _misfit(self) -> str:
        """What the model lacks, in words."""
        for row in self.family.stacks:
            for layer in self._layers(row)[:1]:
                missing = [path for path in row.layer_paths() if f"{layer}.{path}" not in self.modules]
                return f"its layer {layer} has no {', '.join(dict.fromkeys(missing))}"
        return f"it has no {' or '.join(dict.fromkeys(row.layers for row in self.family.stacks))}"

    def _config(self, row: StackRow) -> Any:
        """The configuration of a stack: its own one where there is one inside the model's."""
        config: Any = self.model.config
        return getattr(config, row.config, config) if row.config else config

    # -- what they are

    def _stack(self, row: StackRow, layers: tuple[str, ...]) -> Stack:
        repeats = 1
        if row.repeats is not None:
            total, distinct = (int(getattr(self._config(row), attribute)) for attribute in row.repeats)
            repeats = total // distinct
        hidden_size = out_features(self.modules[f"{layers[0]}.{row.ffn.down}"])
        tokens = self._tokens(row, row.tokens, hidden_size) if row.tokens else None
        exit_path = row.exit if row.exit is not None or row.tokens is None else row.tokens.exit
        entry_path = exit_path or "" if row.tokens is None else row.tokens.entry
        normed = row.final_norm is not None and self._has(row.final_norm)
        return Stack(
            row.name,
            layers,
            hidden_size,
            tokens,
            repeats,
            entry=self._name(entry_path),
            exit=None if exit_path is None else self._name(exit_path),
            final_norm=self._name(row.final_norm) if normed and row.final_norm else None,
        )

    def _parts(self, row: StackRow, layers: tuple[str, ...]) -> Iterator[Part]:
        if self._has(row.embeddings):
            yield Part("embeddings", row.name, None, self._name(row.embeddings))
        for index, layer in enumerate(layers):
            yield from self._layer(row, index, layer)
        outer = [self._name(path) for path in row.outer_norms if self._has(path)]
        for number, name in enumerate(outer):
            yield Part("norm", row.name, None, name, index=number)

    def _layer(self, row: StackRow, index: int, layer: str) -> Iterator[Part]:
        yield Part("layer", row.name, index, layer)
        yield from self._attention(row, row.attention, row.name, index, layer)
        if row.cross is not None and f"{layer}.{row.cross.block}" in self.modules:
            yield from self._attention(row, row.cross, row.cross_name, index, layer)
        ffn = row.ffn
        block = f"{layer}.{ffn.block}" if ffn.block else layer
        norms = self._norms(ffn, layer)
        yield Part("ffn", row.name, index, block, result=f"{layer}.{ffn.result}", **norms)
        for role, cell in (("ffn.up", ffn.up), ("ffn.gate", ffn.gate), ("ffn.down", ffn.down)):
            if cell is not None:
                yield self._matrix(role, row.name, index, layer, cell, None)
        present = [f"{layer}.{path}" for path in row.norms if f"{layer}.{path}" in self.modules]
        for number, name in enumerate(present):
            yield Part("norm", row.name, index, name, index=number)

    def _norms(self, sublayer: AttentionRow | FeedForwardRow, layer: str) -> dict[str, Any]:
        """The norm before or after a sublayer, if the row says it and the model has it."""
        paths = {"norm_before": sublayer.norm_before, "norm_after": sublayer.norm_after}
        names = {place: f"{layer}.{path}" for place, path in paths.items() if path is not None}
        return {place: name for place, name in names.items() if name in self.modules}

    def _attention(self, row: StackRow, attention: AttentionRow, stack: str, index: int, layer: str) -> Iterator[Part]:
        shape = self._attention_shape(row, attention, layer)
        block = f"{layer}.{attention.block}"
        result = f"{layer}.{attention.result}"
        norms = self._norms(attention, layer)
        yield Part("attention", stack, index, block, None, result, shape, attention.dispatches, **norms)
        for role, cell in (
            ("attention.query", attention.query),
            ("attention.key", attention.key),
            ("attention.value", attention.value),
            ("attention.output", attention.output),
        ):
            yield self._matrix(role, stack, index, layer, cell, shape)

    def _attention_shape(self, row: StackRow, attention: AttentionRow, layer: str) -> AttentionShape:
        config = self._config(row)
        heads = int(getattr(config, row.heads))
        query = out_features(self.modules[f"{layer}.{path_of(attention.query)}"])
        if isinstance(attention.query, Fused):
            key_value_heads = int(getattr(config, "num_key_value_heads", None) or heads)
            return AttentionShape(heads, key_value_heads, query // (heads + 2 * key_value_heads))
        head_dim = query // heads
        key = out_features(self.modules[f"{layer}.{path_of(attention.key)}"])
        return AttentionShape(heads, key // head_dim, head_dim)

    def _matrix(self, role: str, stack: str, index: int, layer: str, cell: Cell, shape: AttentionShape | None) -> Part:
        if isinstance(cell, str):
            return Part(role, stack, index, f"{layer}.{cell}")
        module = f"{layer}.{cell.path}"
        total = out_features(self.modules[module])
        if cell.layout == "halves":
            rows = Rows(cell.index * (total // 2), total // 2)
        elif shape is None:
            raise TargetError(f"The layout {cell.layout!r} of {module} needs an attention shape.")
        elif cell.layout == "heads":
            rows = Rows(cell.index * shape.head_dim, shape.head_dim, 3 * shape.head_dim, shape.heads)
        else:
            query = shape.heads * shape.head_dim
            sizes = (query, shape.key_value_features, shape.key_value_features)
            rows = Rows(sum(sizes[: cell.index]), sizes[cell.index])
        return Part(role, stack, index, module, rows)

    def _tokens(self, row: StackRow, tokens: TokenRow, hidden_size: int) -> TokenEntry:
        read = tokens.reader is not None and self._has(tokens.reader)
        offset = int(self._config(row).pad_token_id) + 1 if tokens.after_padding else None
        positions = None
        if tokens.table is not None and self._has(tokens.table):
            table = self.modules[self._name(tokens.table)]
            positions = int(table.num_embeddings) - tokens.reserved - (offset or 0)
        words = self.modules.get(self._name(row.embeddings))
        return TokenEntry(
            entry=self._name(tokens.entry),
            exit=None if read else self._name(tokens.exit),
            reader=self._name(tokens.reader) if read and tokens.reader else None,
            embeddings=None if tokens.embeddings is None else self._name(tokens.embeddings),
            positions=positions,
            padding_offset=offset,
            width=int(getattr(words, "embedding_dim", hidden_size)),
        )
