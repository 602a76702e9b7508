"""LoKr: the change of a matrix as a Kronecker product, read as :class:`deltune.KronA`.

Letters: w1 (a1, a2) and w2 (b1, b2) the factors, either of which may be a product of two thin ones; s the scale.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from deltune.checkpoints.expressions import sites_at
from deltune.checkpoints.peft.contents import Contents
from deltune.checkpoints.peft.layout import PREFIX, Options, number, pattern_value
from deltune.errors import CheckpointError
from deltune.methods import Method
from deltune.methods.reparameterized.krona import KronA, KroneckerWeight
from deltune.sites import WeightSite

__all__ = ["LOKR_OPTIONS", "read_lokr"]

LOKR_OPTIONS = Options(
    used="r alpha rank_pattern alpha_pattern init_weights decompose_both decompose_factor",
    refused={"use_effective_conv2d": "it decomposes kernels of convolutions otherwise"},
    training={
        "rank_dropout": "it drops rows of the change in training alone",
        "module_dropout": "it drops whole changes in training alone",
        "rank_dropout_scale": "it belongs to rank_dropout",
    },
)
_ENDINGS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")


def read_lokr(contents: Contents) -> list[tuple[Method, dict[str, Tensor]]]:
    """A method for each pair of shapes among the matrices, with its tensors by key.

    Raises:
        CheckpointError: if the change cannot be represented.
    """
    config = contents.config
    rank, alpha = number("r", config.get("r", 8)), number("alpha", config.get("alpha", 8))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    scales: dict[str, float] = {}
    for module, tensors in contents.adapters(_ENDINGS).items():
        own_rank = number("rank_pattern", pattern_value(config.get("rank_pattern"), module, rank))
        if own_rank < 1:
            raise CheckpointError(f"{contents.folder} says the rank {own_rank:g} of {module}. Nothing was loaded.")
        scales[module] = number("alpha_pattern", pattern_value(config.get("alpha_pattern"), module, alpha)) / own_rank
        left, right = (_factor(contents, module, tensors, name) for name in ("lokr_w1", "lokr_w2"))
        if left is not None and right is not None:
            factors[module] = left, right
    contents.finish_if_damaged()
    _, sites = sites_at(factors, contents.model, contents.anatomy, ("linear", "embedding"))
    groups: dict[tuple[int, int], list[str]] = {}
    for module, (left, right) in factors.items():
        site = sites[module]
        shape = (site.out_features // left.shape[0], site.in_features // left.shape[1])
        if contents.fits(f"{PREFIX}{module}.lokr_w2", right, shape):
            groups.setdefault((left.shape[0], left.shape[1]), []).append(module)
    contents.finish_if_damaged()
    scale = next(iter(scales.values()))
    method = KronA(scale=abs(scale) or 1.0, targets=sites_at(factors, contents.model, contents.anatomy, ("linear",))[0])
    made = {
        placement.site.key: placement.form.A.shape
        for placement in method.place(contents.model, contents.anatomy)
        if isinstance(placement.site, WeightSite) and isinstance(placement.form, KroneckerWeight)
    }
    if all(made[sites[module].key] == left.shape for module, (left, _) in factors.items()):
        parts = [(method, list(factors))]
    else:
        parts = []
        for (rows, columns), modules in groups.items():
            targets, _ = sites_at(modules, contents.model, contents.anatomy, ("linear",))
            parts.append((replace(method, rows=rows, columns=columns, targets=targets), modules))
    found: list[tuple[Method, dict[str, Tensor]]] = []
    for part, modules in parts:
        values: dict[str, Tensor] = {}
        for module in modules:
            left, right = factors[module]
            ratio = scales[module] / part.scale
            key = sites[module].key
            values |= {f"{key}.A": left if ratio == 1 else left.float() * ratio, f"{key}.B": right}
        found.append((part, values))
    return found


def _factor(contents: Contents, module: str, tensors: dict[str, Tensor], name: str) -> Tensor | None:
    """One factor, multiplied out; None if something of it is missing, which is noted.

    Raises:
        CheckpointError: if it is the kernel of a convolution.
    """
    if "lokr_t2" in tensors or any(tensor.dim() != 2 for tensor in tensors.values()):
        raise CheckpointError(
            f"{contents.folder} changes the convolution {module} by a Kronecker product, which deltune does not have. "
            "Nothing was loaded."
        )
    if name in tensors:
        return tensors[name]
    pair = [tensors.get(f"{name}_{side}") for side in "ab"]
    if all(tensor is None for tensor in pair):
        contents.missing(f"{PREFIX}{module}.{name}")
        return None
    for side, tensor in zip("ab", pair, strict=True):
        if tensor is None:
            contents.missing(f"{PREFIX}{module}.{name}_{side}")
    first, second = pair
    if first is None or second is None:
        return None
    if not contents.fits(f"{PREFIX}{module}.{name}_b", second, (first.shape[1], second.shape[1])):
        return None
    wide = torch.promote_types(first.dtype, torch.float32)
    return first.to(wide) @ second.to(wide)
