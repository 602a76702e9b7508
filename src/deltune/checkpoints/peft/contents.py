"""The tensors of a folder, while they are taken out one by one: what is missing, misshapen or left over is told."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from deltune.backbone import Anatomy
from deltune.checkpoints.peft.layout import PREFIX, PROMPT_PREFIX, targeted
from deltune.errors import CheckpointError

__all__ = ["Contents"]


class Contents:
    """What a folder holds, for one model.

    Attributes:
        folder: where it was read.
        config: its configuration.
        model: the model, bare.
        anatomy: its parts.
        modules: the model's modules by name.
        tensors: by their name in the file; those that were taken are gone.
        notes: what a user should know, one sentence each.
    """

    def __init__(
        self, folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, anatomy: Anatomy
    ) -> None:
        self.folder, self.config, self.model, self.anatomy = folder, config, model, anatomy
        self.tensors = dict(tensors)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.notes: list[str] = []
        self._problems: dict[str, list[str]] = {}

    def module_of(self, name: str) -> str | None:
        """The module that the file calls ``name``, in the model at hand; None if it has none.

        A delta of a bare model fits the same model below a head, and the other way round.
        """
        base = getattr(self.model, "base_model_prefix", "")
        for candidate in (name, f"{base}.{name}", name.removeprefix(f"{base}.")):
            if candidate in self.modules:
                return candidate
        return None

    def adapters(self, endings: Collection[str]) -> dict[str, dict[str, Tensor]]:
        """Take the tensors whose names end so: by module, then by ending.

        Raises:
            CheckpointError: if there are none.
        """
        found: dict[str, dict[str, Tensor]] = {}
        for key in list(self.tensors):
            ending = next((ending for ending in endings if key.endswith(f".{ending}")), None)
            module = None if ending is None else self.module_of(key.removeprefix(PREFIX)[: -len(ending) - 1])
            if ending is not None and module is not None and key.startswith(PREFIX):
                if ending in found.setdefault(module, {}):
                    self._problems.setdefault("twice", []).append(f"{key}, which another name in the file means too")
                found[module][ending] = self.tensors.pop(key)
        if not found:
            self.finish()
            raise CheckpointError(f"{self.folder} has no tensors of a {self.config['peft_type']} adapter.")
        for module in self.modules:
            if module not in found and targeted(self.config, module) and hasattr(self.modules[module], "weight"):
                self.missing(f"{PREFIX}{module}.{next(iter(endings))}")
        return found

    def plain(self) -> Iterator[tuple[str, str | None, str, Tensor]]:
        """Take what is left: name in the file, module in the model or None, name of the parameter, value.

        With ``bias="all"`` peft stores biases of modules that are trained whole once more, and those before training.
        """
        for key in list(self.tensors):
            if ".original_module." in key or key.replace(".modules_to_save.", ".") in self.tensors.keys() - {key}:
                del self.tensors[key]
        for key in list(self.tensors):
            prefix = PREFIX if key.startswith(PREFIX) else PROMPT_PREFIX
            owner, _, attribute = key.removeprefix(prefix).rpartition(".")
            owner = owner.removesuffix(".base_layer").removesuffix(".modules_to_save")
            yield key, self.module_of(owner) if key.startswith(prefix) else None, attribute, self.tensors.pop(key)

    def missing(self, key: str) -> None:
        """Note that there is no tensor ``key``."""
        self._problems.setdefault("missing", []).append(key)

    def unexpected(self, key: str) -> None:
        """Note that nothing of this model takes the tensor ``key``."""
        self._problems.setdefault("unexpected", []).append(key)

    def fits(self, key: str, tensor: Tensor, shape: tuple[int, ...]) -> bool:
        """Whether ``tensor`` has this shape, and holds floating-point numbers; noted if not."""
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            self._problems.setdefault("no floating-point numbers", []).append(f"{key} is {kind}")
            return False
        if tuple(tensor.shape) != shape:
            self._problems.setdefault("misshapen", []).append(
                f"{key} is {tuple(tensor.shape)} in the file and {shape} in the model"
            )
        return tuple(tensor.shape) == shape

    def finish(self) -> None:
        """Refuse a folder that does not fit the model.

        Raises:
            CheckpointError: naming every missing, unexpected and misshapen tensor.
        """
        for key in self.tensors:
            self.unexpected(key)
        self.finish_if_damaged()

    def finish_if_damaged(self) -> None:
        """Refuse a folder in which something is missing or misshapen so far.

        Raises:
            CheckpointError: naming every such tensor.
        """
        problems = [
            f"{label}: {'; '.join(items[:8])}" + (f"; and {len(items) - 8} more" if len(items) > 8 else "")
            for label, items in self._problems.items()
        ]
        if problems:
            raise CheckpointError(
                f"{self.folder} does not fit this model ({type(self.model).__name__}). {'. '.join(problems)}. "
                "Load it into the model that it was trained on, of the same class."
            )
