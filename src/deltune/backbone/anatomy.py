"""What a model is made of, in the terms that methods speak: roles, layers, stacks, rows of matrices.

An :class:`Anatomy` is plain data about one model: it names modules and never touches them. Families
(:mod:`deltune.backbone.families`) say where each role lives; :func:`deltune.backbone.anatomy_of` applies
the right family to a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["PROJECTION_ROLES", "ROLES", "Anatomy", "AttentionShape", "Part", "Rows", "Stack", "TokenEntry"]

#: Every role and what it means.
ROLES: dict[str, str] = {
    "embeddings": "the table of token (or patch) embeddings",
    "attention": "the attention sublayer: its function and its result before the residual sum",
    "attention.query": "the matrix that makes queries",
    "attention.key": "the matrix that makes keys",
    "attention.value": "the matrix that makes values",
    "attention.output": "the matrix that joins the heads",
    "ffn": "the feed-forward sublayer: its result before the residual sum",
    "ffn.up": "the matrix that widens",
    "ffn.gate": "the matrix of the gate, in gated feed-forward layers",
    "ffn.down": "the matrix that narrows again",
    "norm": "a normalisation layer",
    "layer": "a whole transformer layer",
    "head": "the task head on top of the pretrained model",
}

#: The roles that are matrices inside a layer.
PROJECTION_ROLES = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.output",
    "ffn.up",
    "ffn.gate",
    "ffn.down",
)


def _unflatten(tensor: torch.Tensor, dim: int, outer: int, inner: int) -> torch.Tensor:
    """A view of ``tensor`` with ``dim`` cut in two; the strides are kept, so that writing works."""
    shape = (*tensor.shape[:dim], outer, inner, *tensor.shape[dim + 1 :])
    return tensor.view(shape)


@dataclass(frozen=True)
class Rows:
    """The output rows of a fused matrix that one role owns.

    ``count`` blocks of ``length`` rows; block ``i`` begins at row ``start + i * stride``. One block is an
    ordinary range; several blocks occur where query, key and value alternate head by head (GPT-NeoX).
    """

    start: int
    length: int
    stride: int = 0
    count: int = 1

    @property
    def size(self) -> int:
        """Number of rows."""
        return self.length * self.count

    def view(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """These rows of ``tensor`` along ``dim``, as a view that can be written to.

        With several blocks the view has one dimension more: ``dim`` becomes (count, length).
        """
        dim = dim % tensor.dim()
        if self.count == 1:
            return tensor.narrow(dim, self.start, self.length)
        return _unflatten(tensor, dim, self.count, self.stride).narrow(dim + 1, self.start, self.length)

    def split(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        """Reshape a tensor that holds only these rows along ``dim`` to the shape that :meth:`view` has."""
        dim = dim % tensor.dim()
        return tensor if self.count == 1 else _unflatten(tensor, dim, self.count, self.length)


@dataclass(frozen=True)
class AttentionShape:
    """Heads of an attention function: ``heads`` queries share ``key_value_heads`` keys and values."""

    heads: int
    key_value_heads: int
    head_dim: int

    @property
    def key_value_features(self) -> int:
        """Width of all keys (or all values) of one position."""
        return self.key_value_heads * self.head_dim


@dataclass(frozen=True)
class Part:
    """One place in a model that plays a role.

    Attributes:
        role: one of :data:`ROLES`, or ``"module"`` for a module that was chosen by its name.
        stack: the stack it belongs to: ``encoder``, ``decoder``, ``cross``, ``text``, ``vision``, or "".
        layer: index in its stack, from 0; None outside of the layers.
        module: dotted name of the module in the model.
        rows: which output rows of a fused matrix; None for the whole of it.
        result: for sublayers: name of the module whose output is the sublayer's result, before the
            residual sum.
        attention: for the role ``attention``: the shape of its heads.
        dispatches: for the role ``attention``: whether it calls transformers' attention interface.
        index: number among parts of the same role in the same place (the two norms of a layer); None if
            alone.
        norm_before: for sublayers: name of the norm that reads the residual stream in front of it, where the model
            normalises before its sublayers; None elsewhere.
        norm_after: for sublayers: name of the norm that reads the sum of the result and the residual stream, where
            the model normalises afterwards; None elsewhere. Both are None where that is not known.
    """

    role: str
    stack: str
    layer: int | None
    module: str
    rows: Rows | None = None
    result: str | None = None
    attention: AttentionShape | None = None
    dispatches: bool = True
    index: int | None = None
    norm_before: str | None = None
    norm_after: str | None = None

    @property
    def key(self) -> str:
        """Stable name of this part, the same under every task head: ``encoder.3.attention.query``."""
        if self.role == "module":
            return self.module
        pieces = [self.stack or "model"]
        if self.layer is not None:
            pieces.append(str(self.layer))
        pieces.append(self.role)
        if self.index is not None:
            pieces.append(str(self.index))
        return ".".join(pieces)


@dataclass(frozen=True)
class TokenEntry:
    """Where additional input positions enter a stack, and where their outputs are dropped.

    Attributes:
        entry: module whose keyword arguments carry the input (ids or embeddings) and the padding mask.
        exit: module whose output loses the additional rows again; None where they must stay, as in the
            encoder of an encoder-decoder model, whose decoder reads them.
        reader: module that receives the encoder's padding mask and must have it widened, if any.
        embeddings: the embeddings module whose *output* is widened, for stacks that do not take embeddings
            as an input; None where the entry accepts ``inputs_embeds``.
        positions: number of positions in a learned table of absolute positions; None if unbounded.
        padding_offset: first position number where positions are counted over real tokens from
            ``padding_idx + 1`` (RoBERTa); None elsewhere.
        width: features of one input position at the entry, which are fewer than the hidden size in ALBERT
            and ELECTRA.
    """

    entry: str
    exit: str | None
    reader: str | None = None
    embeddings: str | None = None
    positions: int | None = None
    padding_offset: int | None = None
    width: int = 0


@dataclass(frozen=True)
class Stack:
    """A run of layers of one kind.

    Attributes:
        name: its name.
        layers: names of its layers, each once.
        hidden_size: features of the hidden states that go through its layers.
        tokens: where additional input positions enter; None if they cannot.
        repeats: how often each layer is applied in one forward pass: once, but in ALBERT.
        entry: module whose call is one pass through the stack; it holds the layers.
        exit: module whose (first) output is the stack's final hidden states, which head, pooler, language-model head
            or another stack's cross-attention read; None if that is not known.
        final_norm: the norm between the last layer and those final states, in models that normalise before each
            sublayer; None if there is none.
    """

    name: str
    layers: tuple[str, ...]
    hidden_size: int
    tokens: TokenEntry | None = None
    repeats: int = 1
    entry: str = ""
    exit: str | None = None
    final_norm: str | None = None

    def __len__(self) -> int:
        return len(self.layers)


@dataclass(frozen=True)
class Anatomy:
    """All parts of one model.

    Attributes:
        family: name of the family row that described it; ``"structure"`` where it was found by structure; the
            model's own type where nothing describes it, and then there are no stacks.
        stacks: its stacks by name. Cross attention is part of the decoder's layers but selected by its own
            stack name ``cross``.
        parts: every part, in the order of the forward pass as far as the names tell.
        head: names of the modules of a *task* head, which is trained with every method; empty if none.
        language_model_head: name of the module that maps hidden states to the vocabulary; None if none.
    """

    family: str
    stacks: dict[str, Stack]
    parts: tuple[Part, ...]
    head: tuple[str, ...] = ()
    language_model_head: str | None = None

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that this model has, in the order of :data:`ROLES`."""
        present = {part.role for part in self.parts}
        return tuple(role for role in ROLES if role in present)

    @property
    def stack_names(self) -> tuple[str, ...]:
        """Every stack name that a selection may use, ``cross`` included."""
        names = list(self.stacks)
        names.extend(part.stack for part in self.parts if part.stack and part.stack not in names)
        return tuple(dict.fromkeys(names))

    def layer_count(self, stack: str) -> int:
        """Number of layers of ``stack`` (for ``cross``: of the layers that have cross attention)."""
        if stack in self.stacks:
            return len(self.stacks[stack])
        return 1 + max(
            (part.layer for part in self.parts if part.stack == stack and part.layer is not None), default=-1
        )

    def stack_of(self, part: Part) -> Stack:
        """The stack whose layers hold ``part``: for cross-attention, that of the decoder.

        Raises:
            KeyError: if no stack holds it, as with a task head.
        """
        if part.stack in self.stacks:
            return self.stacks[part.stack]
        holding = self.layer_of(part.module)
        if holding is None:
            raise KeyError(part.key)
        return holding[0]

    def layer_of(self, module: str) -> tuple[Stack, str] | None:
        """The stack and the dotted name of the layer that is, or holds, the module of that dotted name."""
        for stack in self.stacks.values():
            for layer in stack.layers:
                if f"{module}.".startswith(f"{layer}."):
                    return stack, layer
        return None

    def of(self, role: str, stack: str | None = None) -> tuple[Part, ...]:
        """The parts that play ``role``, in all stacks or in one."""
        return tuple(part for part in self.parts if part.role == role and stack in (None, part.stack))

    def parameter_key(self, name: str) -> str:
        """Where the parameter of that full name is: its module's part, and what it is unless it is the weight.

        ``encoder.layer.3.attention.self.query.bias`` is ``encoder.3.attention.query.bias``. A name that belongs to no
        part stays as it is.
        """
        owner, _, attribute = name.rpartition(".")
        part = next((part for part in self.parts if part.module == owner and part.rows is None), None)
        if part is None or part.role == "layer":
            return name
        return part.key if attribute == "weight" else f"{part.key}.{attribute}"
