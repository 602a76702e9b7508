"""Target expressions: how a person says which places of a model a method acts on.

Grammar, clauses separated by blanks or semicolons::

    attention.query,attention.value  layers=-4:  stacks=decoder

* a list of roles, joined by commas; ``*`` matches within the name: ``attention.*``, ``ffn.*``, ``*`` alone;
* ``layers=``: a Python-like slice (``-4:``, ``:6``, ``2:10:2``), an index, or several joined by commas;
* ``stacks=``: one or several stacks, joined by commas (``cross`` is the decoder's cross attention);
* anything that is not a role is a pattern of module names (``*.q_proj``, ``encoder.*.fc1``), for models that
  nobody has described. A pattern matches the whole dotted name, or its end after a dot.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from deltune.backbone.anatomy import ROLES, Anatomy, Part
from deltune.errors import TargetError, nearest, suggestion

__all__ = ["Targets", "place_lookup"]

_INDEX = re.compile(r"-?\d+")
_SLICE = re.compile(r"(-?\d+)?:(-?\d+)?(:(-?\d+)?)?")


@dataclass(frozen=True)
class Targets:
    """A parsed selection; ``Targets.parse(str(targets)) == targets``.

    Attributes:
        names: roles, globs of roles, or patterns of module names.
        layers: indices and slices as text (``"-4:"``), counted within each stack; empty for all layers.
        stacks: names of stacks; empty for all.
    """

    names: tuple[str, ...]
    layers: tuple[str, ...] = ()
    stacks: tuple[str, ...] = ()

    @classmethod
    def parse(cls, expression: str | Iterable[str] | Targets) -> Targets:
        """Read an expression, or a sequence of names as methods have in their defaults.

        Raises:
            TargetError: if a clause is malformed or no name is given.
        """
        if isinstance(expression, Targets):
            return expression
        if not isinstance(expression, str):
            expression = " ".join(str(item) for item in expression)
        names: list[str] = []
        layers: list[str] = []
        stacks: list[str] = []
        for clause in re.split(r"[\s;]+", expression.strip()):
            keyword, equals, value = clause.partition("=")
            if not equals:
                names.extend(name for name in clause.split(",") if name)
            elif keyword in ("layers", "layer"):
                layers.extend(_checked_layers(value, clause))
            elif keyword in ("stacks", "stack"):
                stacks.extend(_checked_stacks(value, clause))
            else:
                raise TargetError(
                    f"Target expressions know no clause {keyword!r}. {suggestion(keyword, ['layers', 'stacks'])}"
                )
        if not names:
            raise TargetError(
                f"The target expression {expression!r} names no role. Write for example "
                "'attention.query,attention.value layers=-4:'; roles are: " + ", ".join(ROLES)
            )
        return cls(tuple(dict.fromkeys(names)), tuple(dict.fromkeys(layers)), tuple(dict.fromkeys(stacks)))

    def __str__(self) -> str:
        text = ",".join(self.names)
        if self.layers:
            text += f" layers={','.join(self.layers)}"
        if self.stacks:
            text += f" stacks={','.join(self.stacks)}"
        return text

    def select(self, anatomy: Anatomy, module_names: Sequence[str] = (), roles: Sequence[str] = ()) -> tuple[Part, ...]:
        """The parts of ``anatomy`` that this selection names.

        Args:
            anatomy: the model's anatomy.
            module_names: all module names, for patterns.
            roles: the roles that the asking method can act on; empty for any. A glob selects only among
                these; a role said in full that is not among them is an error.

        Raises:
            TargetError: if any name, stack or layer selects nothing; the message lists what is nearest.
        """
        self._check_stacks(anatomy)
        self._check_layers(anatomy)
        chosen: dict[str, Part] = {}
        for name in self.names:
            found = _parts_named(name, anatomy, module_names, tuple(roles) or tuple(ROLES))
            kept = [part for part in found if self._in_layers(part, anatomy) and self._in_stacks(part)]
            if not kept:
                raise TargetError(self._nothing_left(name, found, anatomy))
            for part in kept:
                chosen.setdefault(part.key, part)
        return tuple(chosen.values())

    def _check_stacks(self, anatomy: Anatomy) -> None:
        for stack in self.stacks:
            if stack not in anatomy.stack_names:
                raise TargetError(f"This model has no stack {stack!r}. {suggestion(stack, anatomy.stack_names)}")

    def _check_layers(self, anatomy: Anatomy) -> None:
        stacks = self.stacks or anatomy.stack_names
        if self.layers and not stacks:
            raise TargetError(f"{_undescribed(anatomy)} So it has no numbered layers for layers= to choose from.")
        for layers in self.layers:
            if not any(_selects(layers, anatomy.layer_count(stack)) for stack in stacks):
                raise TargetError(f"layers={layers} selects no layer: {_extent(anatomy, stacks)}.")

    def _in_stacks(self, part: Part) -> bool:
        return not self.stacks or part.stack in self.stacks

    def _in_layers(self, part: Part, anatomy: Anatomy) -> bool:
        if not self.layers:
            return True
        if part.layer is None:
            return False
        count = anatomy.layer_count(part.stack)
        return any(part.layer in _selects(layers, count) for layers in self.layers)

    def _nothing_left(self, name: str, found: Sequence[Part], anatomy: Anatomy) -> str:
        """Why nothing is left of what ``name`` names."""
        stacks = list(dict.fromkeys(part.stack for part in found))
        if self.stacks and not any(self._in_stacks(part) for part in found):
            place = ", ".join(stack for stack in stacks if stack)
            return f"{name!r} selects nothing in the stacks {', '.join(self.stacks)}: " + (
                f"this model has it in {place}." if place else "it belongs to no stack."
            )
        if all(part.layer is None for part in found):
            return f"{name!r} is outside of the layers, so layers={','.join(self.layers)} leaves nothing of it."
        return (
            f"{name!r} selects nothing in layers {','.join(self.layers)}"
            + (f" of {', '.join(self.stacks)}" if self.stacks else "")
            + f": {_extent(anatomy, [stack for stack in stacks if stack])}."
        )


def _parts_named(name: str, anatomy: Anatomy, module_names: Sequence[str], allowed: tuple[str, ...]) -> list[Part]:
    """All parts that one name names, before layers and stacks are looked at."""
    if name in ROLES:
        if name not in allowed:
            raise TargetError(f"This method cannot act on the role {name!r}. {suggestion(name, allowed)}")
        found = [part for part in anatomy if part.role == name]
        if found:
            return found
        if not anatomy.stacks:
            raise TargetError(f"{_undescribed(anatomy)} {_patterns(name, module_names)}")
        raise TargetError(
            f"This model ({anatomy.family}) has no role {name!r}. Its roles are: "
            f"{', '.join(anatomy.roles)}. {suggestion(name, anatomy.roles)}"
        )
    by_role = [part for part in anatomy if fnmatchcase(part.role, name)]
    permitted = [part for part in by_role if part.role in allowed]
    if permitted:
        return permitted
    if by_role:
        roles = ", ".join(dict.fromkeys(part.role for part in by_role))
        raise TargetError(
            f"This method cannot act on any role that {name!r} names ({roles}). {suggestion(name, allowed)}"
        )
    place_of = place_lookup(anatomy)
    by_module = [
        Part("module", stack, layer, module)
        for module in module_names
        if module and (fnmatchcase(module, name) or fnmatchcase(module, f"*.{name}"))
        for stack, layer in [place_of(module)]
    ]
    if by_module:
        return by_module
    if not anatomy.stacks:
        raise TargetError(f"No module matches {name!r}. {_undescribed(anatomy)} {_patterns(name, module_names)}")
    raise TargetError(
        f"The target {name!r} matches no role and no module of this model. "
        f"{suggestion(name, [*anatomy.roles, *_endings(module_names)])} `deltune sites MODEL` shows all of them."
    )


def _checked_layers(value: str, clause: str) -> list[str]:
    pieces = [piece for piece in value.split(",") if piece]
    for piece in pieces:
        sliced = _SLICE.fullmatch(piece)
        step = sliced.group(4) if sliced else None
        if not (sliced or _INDEX.fullmatch(piece)) or (step is not None and int(step) == 0):
            raise TargetError(
                f"{clause!r} is no selection of layers. Write an index (layers=3), a slice (layers=-4:, "
                "layers=:6, layers=2:10:2), or several joined by commas (layers=0,1,-1)."
            )
    if not pieces:
        raise TargetError(f"{clause!r} selects no layer. Write for example layers=-4: for the last four.")
    return pieces


def _checked_stacks(value: str, clause: str) -> list[str]:
    pieces = [piece for piece in value.split(",") if piece]
    if not pieces:
        raise TargetError(f"{clause!r} selects no stack. Write for example stacks=decoder.")
    return pieces


def _selects(layers: str, count: int) -> range:
    """The layers among ``count`` that one index or slice selects."""
    if ":" in layers:
        return range(count)[slice(*(int(piece) if piece else None for piece in layers.split(":")))]
    index = int(layers)
    index = index if index >= 0 else count + index
    return range(index, index + 1) if 0 <= index < count else range(0)


def _extent(anatomy: Anatomy, stacks: Iterable[str]) -> str:
    """How many layers each stack has, in words."""
    return "; ".join(f"{stack} has layers 0 to {anatomy.layer_count(stack) - 1}" for stack in stacks)


def _undescribed(anatomy: Anatomy) -> str:
    return f"Models of the type {anatomy.family!r} are not described, and this one's structure is not plain."


def _patterns(name: str, module_names: Sequence[str]) -> str:
    """Advice to use module patterns, with the names that come nearest."""
    endings = _endings(module_names)
    close = nearest(name.rsplit(".", 1)[-1], endings)
    examples = close or endings[:8]
    return (
        "Use module patterns, such as "
        + (", ".join(repr(f"*.{ending}") for ending in examples) if examples else "'*.q_proj'")
        + "."
    )


def _endings(module_names: Sequence[str]) -> list[str]:
    """The last pieces of all module names, without the numbers of lists."""
    endings = {module.rsplit(".", 1)[-1] for module in module_names}
    return sorted(ending for ending in endings if ending and not ending.isdigit())


def place_lookup(anatomy: Anatomy) -> Callable[[str], tuple[str, int | None]]:
    """A function from a module's name to its stack and layer."""
    places = [
        (f"{layer}.", stack.name, index)
        for stack in anatomy.stacks.values()
        for index, layer in enumerate(stack.layers)
    ]

    def find(module: str) -> tuple[str, int | None]:
        for prefix, stack, index in places:
            if f"{module}.".startswith(prefix):
                return stack, index
        return "", None

    return find
