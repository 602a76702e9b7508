"""Where each family of models keeps each role: one row per architecture, as data.

Adding a family is adding a row to one of the lists here.
"""

from __future__ import annotations

from deltune.backbone.families.decoders import DECODERS
from deltune.backbone.families.encoder_decoders import ENCODER_DECODERS
from deltune.backbone.families.encoders import ENCODERS
from deltune.backbone.families.multimodal import MULTIMODAL
from deltune.backbone.families.rows import (
    AttentionRow,
    Cell,
    Family,
    FeedForwardRow,
    Fused,
    StackRow,
    TokenRow,
    path_of,
)

__all__ = [
    "FAMILIES",
    "AttentionRow",
    "Cell",
    "Family",
    "FeedForwardRow",
    "Fused",
    "StackRow",
    "TokenRow",
    "path_of",
]

#: Every family that has a row.
FAMILIES: tuple[Family, ...] = ENCODERS + DECODERS + ENCODER_DECODERS + MULTIMODAL
