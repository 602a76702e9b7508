"""What the comparison tells a worker process."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Job"]


@dataclass(frozen=True)
class Job:
    """What a process has to do.

    Attributes:
        comparison: the comparison, as a dictionary.
        row: which row of it.
        folders: by seed, where a run keeps its training checkpoints and what it trained.
        threads: how many threads may compute.
        keep: whether to keep what was trained.
    """

    comparison: dict[str, Any]
    row: str
    folders: dict[int, str]
    threads: int
    keep: bool = False

    def to_json(self) -> str:
        """As text for a file."""
        return json.dumps(asdict(self), indent=2, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Job:
        """What :meth:`to_json` wrote."""
        values = json.loads(text)
        values["folders"] = {int(seed): folder for seed, folder in values["folders"].items()}
        return cls(**values)
