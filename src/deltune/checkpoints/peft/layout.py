"""Names of files and keys, and which options of a configuration mean what to a reader."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deltune.errors import CheckpointError

__all__ = [
    "CONFIG_FILE",
    "PICKLE_FILE",
    "PREFIX",
    "PROMPT_KEY",
    "PROMPT_PREFIX",
    "TENSOR_FILE",
    "Options",
    "number",
    "pattern_value",
    "targeted",
]

CONFIG_FILE = "adapter_config.json"
TENSOR_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
#: In front of a module's name, and where the configuration is of prompt learning.
PREFIX, PROMPT_PREFIX = "base_model.model.", "base_model."
#: The one tensor of prompt learning.
PROMPT_KEY = "prompt_embeddings"

#: Options of every configuration that say nothing of values.
_ALWAYS = (
    "peft_type peft_version base_model_name_or_path revision task_type auto_mapping inference_mode runtime_config "
    "modules_to_save target_modules exclude_modules layers_to_transform layers_pattern ensure_weight_tying"
)


@dataclass(frozen=True)
class Options:
    """The options of one tuner.

    Attributes:
        used: those that its reader reads, or that say nothing of values, with blanks between.
        refused: those that change what the tensors mean in a way that deltune does not have, with what they do.
        training: those that act in training alone, with what is lost.
    """

    used: str
    refused: Mapping[str, str] = field(default_factory=dict)
    training: Mapping[str, str] = field(default_factory=dict)

    def check(self, config: Mapping[str, Any], folder: Any) -> list[str]:
        """Refuse what cannot be represented; what a user should know of the rest, one sentence each.

        Raises:
            CheckpointError: naming the option.
        """
        notes = []
        known = f"{_ALWAYS} {self.used}".split()
        for name, value in config.items():
            if not _is_set(value) or name in known:
                continue
            if name in self.refused:
                raise CheckpointError(
                    f"{folder} was saved with {name}={value!r}: {self.refused[name]}, which deltune does not have. "
                    "Nothing was loaded."
                )
            if name in self.training:
                notes.append(f"{name}={value!r} is not taken over: {self.training[name]}.")
            else:
                notes.append(f"the option {name}={value!r} is not known to deltune and was ignored.")
        return notes


def _is_set(value: Any) -> bool:
    return value not in (None, False, "", 0) and value != [] and value != {}


def pattern_value(pattern: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """The value that the first fitting entry of a ``rank_pattern`` or ``alpha_pattern`` gives ``module``."""
    for key, value in (pattern or {}).items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def number(name: str, value: Any) -> float:
    """The value of the option ``name`` as a number.

    Raises:
        CheckpointError: if it is none.
    """
    try:
        found = float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise CheckpointError(f"{CONFIG_FILE} says {name}={value!r}, which is no number. Nothing was loaded.")
    return found


def targeted(config: Mapping[str, Any], module: str) -> bool:
    """Whether a configuration says that ``module`` has an adapter; False where that cannot be known."""
    wanted, excluded = config.get("target_modules"), config.get("exclude_modules")
    if wanted is None or (isinstance(wanted, str) and wanted.lower() == "all-linear"):
        return False
    if excluded and _names(excluded, module):
        return False
    if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in config.get("modules_to_save") or ()):
        return False
    if not _names(wanted, module):
        return False
    layers = config.get("layers_to_transform")
    if isinstance(wanted, str) or layers is None or layers == []:
        return True
    patterns = config.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    # the first number behind the name of a list of layers, not the number of an expert inside one
    expressions = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for expression in expressions if (match := re.match(expression, module))), None)
    chosen = [layers] if isinstance(layers, int) else layers
    return found is not None and int(found[1]) in chosen


def _names(names: Any, module: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)
