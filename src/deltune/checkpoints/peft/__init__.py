"""Folders of Hugging Face peft: ``adapter_config.json`` and ``adapter_model.safetensors``.

Layout and meaning are those of peft 0.21.2, found by reading its files and running it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltune.checkpoints.formats import Format, Saved
from deltune.checkpoints.peft.layout import CONFIG_FILE, PICKLE_FILE, TENSOR_FILE

if TYPE_CHECKING:
    from torch import nn

    from deltune.attachment import Attachment
    from deltune.backbone import Anatomy

__all__ = ["PEFT"]


class PEFT(Format):
    """The format of Hugging Face peft."""

    name = "peft"
    wanted = f"{CONFIG_FILE} with {TENSOR_FILE}"

    def recognises(self, folder: Path) -> bool:
        """By its weights, whose name no other library takes, or by a ``peft_type`` in its configuration."""
        if (folder / TENSOR_FILE).is_file() or (folder / PICKLE_FILE).is_file():
            return True
        try:
            return b'"peft_type"' in (folder / CONFIG_FILE).read_bytes()
        except OSError:
            return False

    def read(self, folder: Path, model: nn.Module, anatomy: Anatomy, pickled: bool) -> Saved:
        """What the folder holds, as a method of deltune that gives the same outputs."""
        from deltune.checkpoints.peft.reading import read

        return read(folder, model, anatomy, pickled)

    def write(
        self, attachment: Attachment, model: nn.Module, anatomy: Anatomy, base_model: Mapping[str, Any], folder: Path
    ) -> Path:
        """Write what peft reads and gives the same outputs with."""
        from deltune.checkpoints.peft.writing import write

        return write(attachment, model, anatomy, folder)
