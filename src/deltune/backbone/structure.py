"""Families that have no row: read their structure where that is safe, else leave it.

A model is read if its layers are alike and hold projections under well-known names, each exactly once, with
shapes that fit together. What is found is a family row like any other. Everything else is refused: fused
matrices, experts, layers of several kinds, second attentions that no name tells apart.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from deltune.backbone.families import AttentionRow, Family, FeedForwardRow, StackRow
from deltune.backbone.matrices import matrix_shape

if TYPE_CHECKING:
    from torch import nn

__all__ = ["structural_family"]

#: Names of query, key and value that belong together.
_ATTENTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("query_proj", "key_proj", "value_proj"),
    ("q_lin", "k_lin", "v_lin"),
    ("wq", "wk", "wv"),
    ("to_q", "to_k", "to_v"),
    ("q", "k", "v"),
)

#: Names of the matrix that joins the heads, in the attention block or (first two) beside it.
_OUTPUTS = ("output.dense", "dense", "o_proj", "out_proj", "out_lin", "wo", "to_out", "o", "projection")

#: Names of up, gate and down that belong together; those with a gate first, as others may be a part of them.
_FEED_FORWARDS = (
    ("up_proj", "gate_proj", "down_proj"),
    ("wi_1", "wi_0", "wo"),
    ("w3", "w1", "w2"),
    ("fc1", None, "fc2"),
    ("lin1", None, "lin2"),
    ("linear1", None, "linear2"),
    ("wi", None, "wo"),
    ("c_fc", None, "c_proj"),
    ("intermediate.dense", None, "output.dense"),
    ("dense_h_to_4h", None, "dense_4h_to_h"),
    ("ffn", None, "ffn_output"),
)

#: Path of the embeddings where a stack's own table is not known.
_NO_TABLE = "<none>"

#: Parts of a name that say that an attention reads another stack.
_CROSS = ("cross", "encdec", "encoder_attn")


def structural_family(model: nn.Module) -> Family | None:
    """A family row for ``model``, made from its structure; None where that is not safe."""
    if getattr(model, "config", None) is None:
        return None
    base = getattr(model, "base_model", model)
    modules = dict(base.named_modules(remove_duplicate=False))
    rows = []
    for path in _layer_lists(modules):
        row = _stack_row(model, modules, path)
        if row is None:
            return None
        rows.append(row)
    if not rows or len({row.name for row in rows}) < len(rows):
        return None
    if len(rows) > 1:  # the table that the model names may be a mere store for those of its stacks
        rows = [replace(row, embeddings=_NO_TABLE) for row in rows]
    return Family("structure", (), tuple(rows))


def _layer_lists(modules: dict[str, nn.Module]) -> Iterator[str]:
    """Paths of the outermost lists of modules that have modules inside: all that may be stacks of layers."""
    found: list[str] = []
    for path, module in modules.items():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        deep = any(next(child.children(), None) is not None for child in module.children())
        if type(module).__name__ == "ModuleList" and deep and not inside:
            found.append(path)
    yield from found


@dataclass(frozen=True)
class _Layer:
    """The linear maps of one layer, by their paths in it."""

    modules: dict[str, nn.Module]
    name: str

    def shape(self, path: str) -> tuple[int, ...] | None:
        module = self.modules.get(f"{self.name}.{path}")
        return None if module is None else matrix_shape(module)

    def parents(self, names: Sequence[str]) -> list[str]:
        """Paths of the modules that hold a matrix under every one of ``names``."""
        inner = [path.removeprefix(self.name) for path in self.modules if f"{path}.".startswith(f"{self.name}.")]
        parents = [f"{path}.".removeprefix(".") for path in inner]
        return [parent for parent in parents if all(len(self.shape(f"{parent}{name}") or ()) == 2 for name in names)]

    def attentions(self) -> list[tuple[str, tuple[str, str, str]]]:
        """Every block that has query, key and value, with the names of these."""
        return [(parent, names) for names in _ATTENTIONS for parent in self.parents(names)]

    def attention_row(self, block: str, names: tuple[str, str, str]) -> AttentionRow | None:
        """The row of one attention; None if its output is not found or shapes do not fit."""
        beside = block.removesuffix(".").rpartition(".")[0]
        places = [f"{block}{name}" for name in _OUTPUTS]
        places += [f"{beside}.{name}".removeprefix(".") for name in _OUTPUTS[:2] if beside]
        outputs = [path for path in dict.fromkeys(places) if len(self.shape(path) or ()) == 2]
        query, key, value = (f"{block}{name}" for name in names)
        if not block or len(outputs) != 1:
            return None
        shape = self.shape(query)
        if shape is None or self.shape(outputs[0]) != (shape[1], shape[0]) or self.shape(key) != self.shape(value):
            return None
        module = self.modules[f"{self.name}.{block.removesuffix('.')}"]
        return AttentionRow(
            block.removesuffix("."), query, key, value, outputs[0], outputs[0], dispatches=_dispatches(module)
        )

    def feed_forward_row(self, attentions: Sequence[AttentionRow]) -> FeedForwardRow | None:
        """The row of the feed-forward sublayer; None if there is not exactly one, or shapes do not fit."""
        taken = {attention.output for attention in attentions}
        found: dict[str, FeedForwardRow] = {}
        for up, gate, down in _FEED_FORWARDS:
            for parent in self.parents([name for name in (up, gate, down) if name is not None]):
                path = f"{parent}{down}"
                if path not in taken and path not in found:
                    found[path] = FeedForwardRow(
                        up=f"{parent}{up}",
                        gate=None if gate is None else f"{parent}{gate}",
                        down=path,
                        result=path,
                        block=parent.removesuffix(".") or None,
                    )
        if len(found) != 1:
            return None
        (row,) = found.values()
        wide = self.shape(str(row.up))
        fits = wide is not None and self.shape(row.down) == (wide[1], wide[0])
        return row if fits and (row.gate is None or self.shape(str(row.gate)) == wide) else None

    def norms(self) -> tuple[str, ...]:
        """Paths of its normalisation layers."""
        start = f"{self.name}."
        return tuple(
            path.removeprefix(start)
            for path, module in self.modules.items()
            if path.startswith(start) and type(module).__name__.endswith("Norm")
        )


def _stack_row(model: nn.Module, modules: dict[str, nn.Module], path: str) -> StackRow | None:
    """The row of one list of layers; None if its layers are not alike or not understood."""
    layers = [_Layer(modules, f"{path}.{name}") for name, _ in modules[path].named_children()]
    first = layers[0]
    attention, cross = _sorted_attentions(first)
    if attention is None or any(layer.attentions() != first.attentions() for layer in layers):
        return None
    ffn = first.feed_forward_row([attention] if cross is None else [attention, cross])
    if ffn is None or any(_shapes(layer, attention, ffn) != _shapes(first, attention, ffn) for layer in layers):
        return None
    block = modules[f"{first.name}.{attention.block}"]
    name, config = _stack_name(model, path, block)
    row = StackRow(
        name=name,
        layers=path,
        embeddings=_embeddings(model, modules),
        attention=attention,
        ffn=ffn,
        norms=first.norms(),
        cross=cross,
        config=config,
    )
    heads = _configured(model, row, f"{name}_attention_heads", "num_attention_heads", "num_heads", "n_heads")
    number = _configured(model, row, f"{name}_layers", f"num_{name}_layers", "num_hidden_layers", "num_layers")
    width = (first.shape(str(attention.query)) or (0,))[0]
    if heads is None or number is None or number[1] != len(layers) or width % heads[1]:
        return None
    if getattr(block, "head_dim", width // heads[1]) != width // heads[1]:
        return None
    return replace(row, heads=heads[0])


def _sorted_attentions(layer: _Layer) -> tuple[AttentionRow | None, AttentionRow | None]:
    """Self-attention and cross-attention; no self-attention where they cannot be told apart."""
    rows = [layer.attention_row(block, names) for block, names in layer.attentions()]
    known = [row for row in rows if row is not None]
    cross = [row for row in known if any(word in row.block.lower() for word in _CROSS)]
    own = [row for row in known if row not in cross]
    if len(known) != len(rows) or len(own) != 1 or len(cross) > 1:
        return None, None
    return own[0], cross[0] if cross else None


def _shapes(layer: _Layer, attention: AttentionRow, ffn: FeedForwardRow) -> list[tuple[int, ...] | None]:
    matrices = (attention.query, attention.key, attention.value, attention.output, ffn.up, ffn.gate, ffn.down)
    return [layer.shape(str(path)) for path in matrices if path is not None]


def _stack_name(model: nn.Module, path: str, block: nn.Module) -> tuple[str, str]:
    """Name of a stack and of its configuration: by its path, what it reads, and whether it is causal."""
    for word in ("vision", "text"):
        if word in path:
            return word, f"{word}_config"
    if getattr(model, "main_input_name", None) == "pixel_values":
        return "vision", ""
    for word in ("encoder", "decoder"):
        if word in path:
            return word, ""
    return ("decoder" if getattr(block, "is_causal", False) else "encoder"), ""


def _embeddings(model: nn.Module, modules: dict[str, nn.Module]) -> str:
    """Path of the table of token embeddings; a path that no model has where there is none."""
    getter: Any = getattr(model, "get_input_embeddings", None)
    try:
        table = None if getter is None else getter()
    except NotImplementedError:
        table = None
    paths = (path for path, module in modules.items() if module is table)
    return next(paths, _NO_TABLE) if getattr(table, "num_embeddings", None) else _NO_TABLE


def _configured(model: nn.Module, row: StackRow, *attributes: str) -> tuple[str, int] | None:
    """The first of some attributes that the configuration of a stack has, and its value."""
    config: Any = model.config
    config = getattr(config, row.config, config) if row.config else config
    values = ((attribute, getattr(config, attribute, None)) for attribute in attributes)
    return next(((attribute, value) for attribute, value in values if isinstance(value, int)), None)


def _dispatches(block: nn.Module) -> bool:
    """Whether the block can be given another attention function, as its code and its attributes tell."""
    code = vars(sys.modules[type(block).__module__])
    return "eager_attention_forward" in code and "config" in vars(block)
