"""Where AdapterHub's library keeps what it adds: the names of its modules, by the parts that they belong to.

All names are relative to the model without its head, as the library's own transformers (4.57) has its modules; where
transformers 5 gave modules another name, the row says the old one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from deltune.backbone import Anatomy, Part, Targets
from deltune.errors import CheckpointError, TargetError
from deltune.sites.gate import GateSite, causal_at

__all__ = ["Names", "Weights", "covering", "known_model", "other_parts", "usable_name"]


@dataclass(frozen=True)
class _Stack:
    """One stack of layers.

    Attributes:
        layers: path of the list of its layers.
        attention: path in a layer of the module that holds bottlenecks behind self-attention.
        ffn: of that which holds those behind the feed-forward sublayer.
        cross: of that which holds those behind cross attention.
        prefix: name of its prefixes.
        modules: paths in a layer, by role, where transformers 5 has other ones.
    """

    layers: str
    attention: str
    ffn: str
    cross: str | None = None
    prefix: str = "self_prefix"
    modules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Family:
    """One family: its stacks in the order in which the library counts layers, and which matrix it calls what.

    Attributes:
        stacks: by the name that the anatomy gives them.
        intermediate: role of the matrix that ``intermediate_lora`` changes.
        output: of that which ``output_lora`` changes.
        prompts: whether the library has prompts for it.
    """

    stacks: Mapping[str, _Stack]
    intermediate: str = "ffn.up"
    output: str = "ffn.down"
    prompts: bool = False


_BESIDE = ("attention_adapters", "output_adapters")
_BERT = _Family(
    {"encoder": _Stack("encoder.layer", "attention.output", "output", "crossattention.output")}, prompts=True
)
# the library gives the two matrices of these feed-forward layers each other's names
_LLAMA = _Family({"decoder": _Stack("layers", *_BESIDE)}, intermediate="ffn.down", output="ffn.up")
_VIT_MODULES = {
    "attention": "attention.attention",
    "attention.query": "attention.attention.query",
    "attention.key": "attention.attention.key",
    "attention.value": "attention.attention.value",
    "ffn.up": "intermediate.dense",
    "ffn.down": "output.dense",
}

#: By the family that the anatomy names.
_FAMILIES: dict[str, _Family] = {
    "bert": _BERT,
    "roberta": _BERT,
    "electra": _BERT,
    "distilbert": _Family({"encoder": _Stack("transformer.layer", *_BESIDE, prefix="self")}, prompts=True),
    "gpt2": _Family({"decoder": _Stack("h", *_BESIDE)}),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "t5": _Family(
        {
            "encoder": _Stack("encoder.block", "layer.0", "layer.1", prefix="encoder_prefix"),
            "decoder": _Stack("decoder.block", "layer.0", "layer.2", "layer.1"),
        }
    ),
    "bart": _Family(
        {
            "encoder": _Stack("encoder.layers", *_BESIDE, prefix="encoder_prefix"),
            "decoder": _Stack("decoder.layers", *_BESIDE, "cross_attention_adapters"),
        }
    ),
    "vit": _Family(
        {"vision": _Stack("encoder.layer", "attention_adapters", "output.output_adapters", modules=_VIT_MODULES)},
        prompts=True,
    ),
}

#: First pieces of names outside of the layers.
_OUTSIDE = ("prefix_tuning", "prompt_tuning", "shared_parameters", "invertible_adapters")
#: What older versions called the modules that hold bottlenecks.
_OLD = {
    "attention_text_task_adapters": "adapters",
    "attention_text_lang_adapters": "adapters",
    "layer_text_task_adapters": "adapters",
    "layer_text_lang_adapters": "adapters",
    "invertible_lang_adapters": "invertible_adapters",
}


class Names:
    """The library's names for the parts of one model.

    Raises:
        CheckpointError: if the model's family is not among those that are known.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy) -> None:
        if anatomy.family not in _FAMILIES:
            raise CheckpointError(
                f"It is not known where AdapterHub's library keeps its modules in models of the family "
                f"{anatomy.family!r}. Families that are: {', '.join(_FAMILIES)}."
            )
        self.anatomy = anatomy
        self._model = model
        self.family = _FAMILIES[anatomy.family]
        base = getattr(model, "base_model", model)
        #: in front of all names in files
        self.prefix = "" if base is model else f"{model.base_model_prefix}."

    def parts(self, role: str, cross: bool) -> list[Part]:
        """The parts of that role in all stacks, in the library's order of layers, with those of cross attention or not.

        Those of cross attention come behind the others of their layer.
        """
        found = [
            part
            for part in self.anatomy.of(role)
            if part.layer is not None and (part.stack in self.family.stacks or (cross and self.is_cross(part)))
        ]
        return sorted(found, key=lambda part: (self.index(part), self.is_cross(part)))

    def is_cross(self, part: Part) -> bool:
        """Whether it belongs to cross attention."""
        return part.stack not in self.anatomy.stacks

    @property
    def model_class(self) -> str:
        """Name of the model's class."""
        return type(self._model).__name__

    def has_bias(self, part: Part) -> bool:
        """Whether the matrix has a bias."""
        return getattr(self._model.get_submodule(part.module), "bias", None) is not None

    def causal(self, part: Part) -> bool:
        """Whether a position there may not know of later ones."""
        return causal_at(GateSite(part, "", None, None), self.anatomy, self._model)

    def index(self, part: Part) -> int:
        """The number of its layer: those of a decoder go on behind those of its encoder."""
        assert part.layer is not None
        stack = self.anatomy.stack_of(part).name
        before = list(self.family.stacks)[: list(self.family.stacks).index(stack)]
        return part.layer + sum(len(self.anatomy.stacks[name]) for name in before if name in self.anatomy.stacks)

    def _row(self, part: Part) -> _Stack:
        return self.family.stacks[self.anatomy.stack_of(part).name]

    def _layer(self, part: Part) -> str:
        return f"{self._row(part).layers}.{part.layer}"

    def slot(self, part: Part) -> str:
        """The module that holds the bottlenecks of a sublayer."""
        row = self._row(part)
        inner = row.ffn if part.role == "ffn" else row.cross if self.is_cross(part) else row.attention
        return f"{self._layer(part)}.{inner}"

    def module(self, part: Part) -> str:
        """The module of a matrix, or of an attention function."""
        inner = self._row(part).modules.get(part.role)
        if inner is None:
            assert part.layer is not None
            layer = self.anatomy.stack_of(part).layers[part.layer]
            inner = part.module.removeprefix(f"{layer}.")
        return f"{self._layer(part)}.{inner}"

    def prefixes(self, part: Part) -> str:
        """What the prefixes of an attention function's kind are called."""
        return "cross_prefix" if self.is_cross(part) else self._row(part).prefix

    def relative(self, key: str) -> str:
        """A key of a file without the prefix of a model with a head, in today's names."""
        for old, new in _OLD.items():
            key = key.replace(f".{old}.", f".{new}.")
        first, _, rest = key.partition(".")
        starts = {row.layers.partition(".")[0] for row in self.family.stacks.values()}
        return rest if first not in starts and first not in _OUTSIDE else key


class Weights:
    """The tensors of a file by their relative names, from which readers take what they know.

    Raises:
        CheckpointError: if two tensors have one relative name.
    """

    def __init__(self, tensors: Mapping[str, Tensor], names: Names) -> None:
        self.left: dict[str, Tensor] = {}
        for key, value in tensors.items():
            relative = names.relative(key)
            if relative in self.left:
                raise CheckpointError(f"The file has the tensor {relative} twice, once as {key}. Copy it again.")
            self.left[relative] = value

    def take(self, name: str) -> Tensor | None:
        """The tensor of that name, which is then gone; None if there is none.

        Raises:
            CheckpointError: if it holds no floating-point numbers.
        """
        value = self.left.pop(name, None)
        if value is not None and not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise CheckpointError(f"{name} is {kind} in the file, where floating-point numbers belong.")
        return value

    def take_into(self, values: dict[str, Tensor], found: Mapping[str, str]) -> None:
        """Move tensors to ``values``: from the library's name, the value in ``found``, to ours, its key."""
        for ours, theirs in found.items():
            tensor = self.take(theirs)
            if tensor is not None:
                values[ours] = tensor

    def drop_copies(self, copy: str, original: str) -> None:
        """Forget the tensor ``copy``, which the library wrote twice.

        Raises:
            CheckpointError: if it is not that of ``original``.
        """
        value, other = self.take(copy), self.left.get(original)
        if value is not None and other is not None and not value.equal(other):
            raise CheckpointError(f"{copy} and {original} are one tensor to the library, but differ in this file.")


def known_model(described: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """All that a configuration says to know the base model again: its type."""
    config: Any = model.config
    return {"model_type": described.get("model_type", config.model_type), "sample": {}}


def usable_name(name: str) -> str:
    """A name of the library's as deltune can have it: without commas and the like, and none of a module's methods."""
    found = re.sub(r"[^\w-]", "_", name)
    return f"{found}_" if hasattr(nn.Module, found) else found


def covering(anatomy: Anatomy, parts: Iterable[Part]) -> list[tuple[Targets, list[Part]]]:
    """As few target expressions as are found that select exactly these parts, each with those that it selects."""
    parts = list(parts)
    wanted = {part.key for part in parts}
    roles = tuple(dict.fromkeys(part.role for part in parts))
    stacks = tuple(dict.fromkeys(part.stack for part in parts))
    layers = tuple(dict.fromkeys(str(part.layer) for part in parts))
    for named, numbered in ((False, False), (True, False), (False, True), (True, True)):
        targets = Targets(roles, layers if numbered else (), stacks if named else ())
        if _selected(targets, anatomy) == wanted:
            return [(targets, parts)]
    for attribute in ("stack", "role", "layer"):
        groups: dict[object, list[Part]] = {}
        for part in parts:
            groups.setdefault(getattr(part, attribute), []).append(part)
        if len(groups) > 1:
            return [found for group in groups.values() for found in covering(anatomy, group)]
    raise AssertionError(f"{wanted} cannot be selected")


def _selected(targets: Targets, anatomy: Anatomy) -> set[str]:
    try:
        return {part.key for part in targets.select(anatomy)}
    except TargetError:
        return set()


def other_parts(anatomy: Anatomy, parts: Iterable[Part], role: str) -> list[Part]:
    """The parts of another role in the layers of ``parts``."""
    return [next(other for other in anatomy.of(role, part.stack) if other.layer == part.layer) for part in parts]
