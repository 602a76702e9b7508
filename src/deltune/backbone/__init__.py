"""What a model is made of, as data: roles, families, target expressions."""

from __future__ import annotations

from deltune.backbone.anatomy import (
    PROJECTION_ROLES,
    ROLES,
    Anatomy,
    AttentionShape,
    Part,
    Rows,
    Stack,
    TokenEntry,
)
from deltune.backbone.describe import anatomy_of
from deltune.backbone.identity import check_base_model, describe_base_model
from deltune.backbone.matrices import matrix_shape, out_features
from deltune.backbone.targets import Targets, place_lookup
from deltune.backbone.tree import render_tree

__all__ = [
    "PROJECTION_ROLES",
    "ROLES",
    "Anatomy",
    "AttentionShape",
    "Part",
    "Rows",
    "Stack",
    "Targets",
    "TokenEntry",
    "anatomy_of",
    "check_base_model",
    "describe_base_model",
    "matrix_shape",
    "out_features",
    "place_lookup",
    "render_tree",
]
