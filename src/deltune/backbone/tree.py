"""A model's roles as a tree for the terminal."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from deltune.backbone.anatomy import Anatomy, Part, Rows, Stack
from deltune.backbone.matrices import matrix_shape

if TYPE_CHECKING:
    from rich.tree import Tree
    from torch import nn

__all__ = ["render_tree"]

#: Roles that are several matrices together; they have no shape of their own.
_BLOCKS = frozenset({"attention", "ffn", "layer", "head"})


@dataclass(frozen=True)
class _Line:
    """One part as it is shown; equal lines in neighbouring layers are shown once."""

    role: str
    shape: str
    place: str
    selected: bool

    def markup(self) -> str:
        """The line in rich's markup."""
        role = _marked(self.role) if self.selected else self.role
        return "  ".join(text for text in (role, self.shape, self.place and f"[dim]{self.place}[/dim]") if text)


def _marked(text: str) -> str:
    return f"[bold green]● {text}[/bold green]"


def render_tree(anatomy: Anatomy, model: nn.Module, selected: Sequence[Part] = ()) -> Tree:
    """The stacks, layers and roles of a model, with the shapes of their matrices.

    Shapes are outputs x inputs, also where the weight is stored transposed. Layers that look the same are
    shown once, as a range.

    Args:
        anatomy: the model's anatomy.
        model: the model.
        selected: parts to mark and to count.
    """
    from rich.tree import Tree

    modules = dict(model.named_modules(remove_duplicate=False))
    keys = {part.key for part in selected}
    tree = Tree(f"[bold]{type(model).__name__}[/bold] ({anatomy.family})")
    for stack in anatomy.stacks.values():
        branch = tree.add(_stack_title(stack))
        loose = [part for part in anatomy if part.stack == stack.name and part.layer is None]
        lines = {part.key: _line(part, stack, modules, keys) for part in loose}
        for part in (part for part in loose if part.role == "embeddings"):
            branch.add(lines[part.key].markup())
        for title, group in _layers(anatomy, stack, modules, keys):
            layer = branch.add(title)
            for line in group:
                layer.add(line.markup())
        for part in (part for part in loose if part.role != "embeddings"):
            branch.add(lines[part.key].markup())
    for part in anatomy:
        if part.role == "head":
            tree.add(_line(part, None, modules, keys).markup())
    if anatomy.language_model_head is not None:
        shape = _shape(modules[anatomy.language_model_head], None)
        tree.add(f"language-model head  {shape}  [dim]{anatomy.language_model_head}[/dim]")
    for line in _module_lines(selected, modules):
        tree.add(line.markup())
    if not anatomy.stacks:
        tree.add("[yellow]not described: use module patterns as targets, such as '*.q_proj'[/yellow]")
    if selected:
        tree.add(_count(selected, modules))
    return tree


def _module_lines(selected: Iterable[Part], modules: dict[str, nn.Module]) -> Iterator[_Line]:
    """Modules that were chosen by name, those that differ in numbers alone on one line."""
    alike: dict[tuple[str, str], list[str]] = {}
    for part in selected:
        if part.role == "module":
            pattern = re.sub(r"(?<=\.)\d+(?=\.)", "*", part.module)
            alike.setdefault((pattern, _shape(modules[part.module], None)), []).append(part.module)
    for (pattern, shape), names in alike.items():
        yield _Line(names[0] if len(names) == 1 else f"{pattern} ({len(names)} modules)", shape, "", True)


def _stack_title(stack: Stack) -> str:
    layers = f"{len(stack)} {'layer' if len(stack) == 1 else 'layers'}"
    title = f"[bold]{stack.name}[/bold]: {layers} of width {stack.hidden_size}"
    return title if stack.repeats == 1 else f"{title}, applied {stack.repeats} times"


def _layers(
    anatomy: Anatomy, stack: Stack, modules: dict[str, nn.Module], keys: set[str]
) -> Iterator[tuple[str, tuple[_Line, ...]]]:
    """Ranges of layers that look the same, each with its title and lines."""
    inside: list[list[_Line]] = [[] for _ in stack.layers]
    marked = [False] * len(stack)
    for part in anatomy:
        if part.layer is None or anatomy.stack_of(part) is not stack:
            continue
        if part.role == "layer":
            marked[part.layer] = part.key in keys
        else:
            inside[part.layer].append(_line(part, stack, modules, keys))
    start = 0
    for index in range(1, len(stack) + 1):
        if index < len(stack) and (inside[index], marked[index]) == (inside[start], marked[start]):
            continue
        title = f"layer {start}" if index == start + 1 else f"layers {start}-{index - 1}"
        yield (_marked(title) if marked[start] else title), tuple(inside[start])
        start = index


def _line(part: Part, stack: Stack | None, modules: dict[str, nn.Module], keys: set[str]) -> _Line:
    module = modules[part.module]
    place = part.module
    if stack is not None and part.layer is not None:
        place = place.removeprefix(stack.layers[part.layer]).removeprefix(".")
    if part.result is not None:
        result = (
            part.result
            if stack is None or part.layer is None
            else part.result.removeprefix(f"{stack.layers[part.layer]}.")
        )
        place = f"{place} → {result}" if place and place != result else result
    role = part.role if stack is None or part.stack in ("", stack.name) else f"{part.stack}: {part.role}"
    shape = _shape(module, part.rows) if part.role not in _BLOCKS else _heads(part)
    return _Line(role, shape, place, part.key in keys)


def _heads(part: Part) -> str:
    shape = part.attention
    if shape is None:
        return ""
    shared = "" if shape.heads == shape.key_value_heads else f", {shape.key_value_heads} key/value heads"
    return f"{shape.heads} heads of {shape.head_dim}{shared}"


def _shape(module: nn.Module, rows: Rows | None) -> str:
    shape = matrix_shape(module)
    if shape is None:
        return ""
    if rows is None:
        return " x ".join(str(size) for size in shape)
    text = f"{rows.size} x {' x '.join(str(size) for size in shape[1:])}"
    if rows.count == 1:
        return f"{text} (rows {rows.start}-{rows.start + rows.length - 1} of {shape[0]})"
    return f"{text} ({rows.count} blocks of {rows.length} rows from {rows.start}, one every {rows.stride})"


def _count(selected: Iterable[Part], modules: dict[str, nn.Module]) -> str:
    """How many parts are selected, and how many parameters their matrices have."""
    parts = list(selected)
    total = 0
    for part in parts:
        shape = matrix_shape(modules[part.module]) if part.role not in _BLOCKS else None
        if shape is not None:
            total += prod(shape) if part.rows is None else part.rows.size * prod(shape[1:])
    noun = "part" if len(parts) == 1 else "parts"
    matrices = f", {total:,} parameters in their matrices" if total else ""
    return _marked(f"{len(parts)} {noun} selected{matrices}")
