"""The changes of an attachment as products of two thin matrices, for formats that hold nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

from torch import Tensor

from deltune.attachment import Attachment
from deltune.checkpoints.peft.tuners import joined_factors
from deltune.errors import StateError
from deltune.methods.reparameterized.low_rank import LowRank
from deltune.sites import WeightSite

__all__ = ["Factors", "factors_of"]


@dataclass(frozen=True)
class Factors:
    """The change s B A of one linear map.

    Attributes:
        module: its dotted name.
        A: (r, d_in), in float32 on the CPU.
        B: (d_out, r), likewise.
        scale: s.
    """

    module: str
    A: Tensor
    B: Tensor
    scale: float

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]


def factors_of(attachment: Attachment, format: str) -> Iterator[Factors]:
    """Of every linear map that ``attachment`` changes, as it would be saved.

    Several changes of one map, as a sum of methods has them, are joined to one of larger rank.

    Args:
        attachment: of a relative of LoRA.
        format: name of the format, for messages.

    Raises:
        StateError: if it trains something that is no product of two thin matrices.
    """
    if attachment.head_names:
        raise StateError(
            f"{format} has no place for a trained task head ({attachment.head_names[0]}). Export a model for text "
            "generation, or attach with train_head=False and train again."
        )
    if attachment.selected_names:
        _refuse(attachment, format, f"it changes {attachment.selected_names[0]} itself")
    by_module: dict[str, list[tuple[WeightSite, LowRank]]] = {}
    for key, site, form in attachment.sites:
        stored = form.stored()
        if stored is None:
            continue
        if not isinstance(site, WeightSite) or not isinstance(stored, LowRank) or stored.reads_matrix:
            _refuse(attachment, format, f"what it does at {key} is no sum with a product of two thin matrices")
        if site.kind != "linear" or site.rows is not None or site.transposed:
            part = "part of a larger matrix" if site.rows is not None else "transposed matrix"
            what = part if site.kind == "linear" else site.kind
            _refuse(attachment, format, f"{key} is {'an' if what[0] in 'aeio' else 'a'} {what}")
        by_module.setdefault(site.module, []).append((site, stored))
    for module, forms in by_module.items():
        A, B, scale = joined_factors(forms, forms[0][0].out_features)
        yield Factors(module, A.detach().float().cpu(), B.detach().float().cpu(), scale)


def _refuse(attachment: Attachment, format: str, reason: str) -> NoReturn:
    raise StateError(
        f"{format} holds changes of linear maps by LoRA, and {attachment.method} is none: {reason}. Fold it in with "
        "--format merged, if it can be merged, or train lora."
    )
