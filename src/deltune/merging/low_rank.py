"""Changes of matrices as low-rank ones: concatenated factors, or the best approximation of a rank.

Letters: A (r, d_in) and B (d_out, r) factors of a change, w its weight, R the sum of all r.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, Targets
from deltune.methods import Method
from deltune.methods.reparameterized.decompositions import truncated_svd
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import RankPattern
from deltune.sites import WeightSite, weight_sites

__all__ = ["Factors", "compressed", "concatenated", "lora_of"]


@dataclass(frozen=True)
class Factors:
    """A change B A, with A (r, d_in) and B (d_out, r).

    Attributes:
        A: the one.
        B: the other.
        whole: the squared Frobenius norm of the change that it stands for.
        lost: that of what it misses.
    """

    A: Tensor
    B: Tensor
    whole: float = 0.0
    lost: float = 0.0

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]

    def cut(self, rank: int) -> Factors:
        """The best approximation of a rank, found without the product: from QR of both factors, then an SVD (R, R)."""
        left, upper_B = torch.linalg.qr(self.B)
        right, upper_A = torch.linalg.qr(self.A.T)
        core_left, values, core_right = truncated_svd(upper_B @ upper_A.T, self.rank)
        return _split(left @ core_left, values, core_right @ right.T, rank)


def concatenated(pairs: Sequence[tuple[Tensor, Tensor]], weights: Sequence[float]) -> Factors:
    """sum_i w_i B_i A_i, exactly: the A_i below each other, the w_i B_i beside each other; of rank R.

    Where the matrix cannot have the rank R, of the greatest that it can have.

    Args:
        pairs: A_i and B_i of each.
        weights: one for each.
    """
    joined = Factors(
        torch.cat([factor_A for factor_A, _ in pairs]),
        torch.cat([weight * factor_B for weight, (_, factor_B) in zip(weights, pairs, strict=True)], dim=1),
    )
    largest = min(joined.A.shape[1], joined.B.shape[0])
    return joined.cut(largest) if joined.rank > largest else joined


def compressed(change: Tensor, rank: int) -> Factors:
    """The best approximation of ``change`` (d_out, d_in) of a rank."""
    return _split(*truncated_svd(change, min(change.shape)), rank)


def _split(left: Tensor, values: Tensor, right: Tensor, rank: int) -> Factors:
    """Half of each singular value for either factor; of (m, k), (k), (k, n) the greatest ``rank``."""
    root = values[:rank].sqrt()
    squares = values.double().square()
    return Factors(
        root[:, None] * right[:rank], left[:, :rank] * root, float(squares.sum()), float(squares[rank:].sum())
    )


def lora_of(
    ranks: Mapping[str, int], methods: Sequence[Method], model: nn.Module, anatomy: Anatomy
) -> tuple[LoRA, dict[str, float]]:
    """The LoRA that places forms of these ranks at these sites, and nothing else; and its scale at each.

    Args:
        ranks: by key of the site.
        methods: of the deltas, whose targets are taken if all have the same and these select every site.
        model: the bare model.
        anatomy: its parts.
    """
    targets = {getattr(method, "targets", None) for method in methods}
    (common,) = targets if len(targets) == 1 else (None,)
    chosen = common if isinstance(common, Targets) else None
    every = {} if chosen is None else {site.key: 0 for site in _sites(model, anatomy, chosen)}
    if chosen is None or not ranks.keys() <= every.keys():
        chosen = _targets_of(ranks, model, anatomy)
        every = {site.key: 0 for site in _sites(model, anatomy, chosen)}
    default, _ = Counter(ranks.values()).most_common(1)[0]
    pattern = RankPattern.text({**every, **ranks}, default) or None
    method = LoRA(rank=default, alpha=float(default), rank_pattern=pattern, targets=chosen)
    return method, {key: method.scale(rank) for key, rank in ranks.items()}


def _sites(model: nn.Module, anatomy: Anatomy, targets: Targets) -> tuple[WeightSite, ...]:
    return weight_sites(model, anatomy, targets, ("linear", "embedding", "convolution"))


def _targets_of(keys: Mapping[str, int], model: nn.Module, anatomy: Anatomy) -> Targets:
    """The roles, or names of modules, of these sites."""
    by_key = {part.key: part.role for part in anatomy}
    return Targets(tuple(dict.fromkeys(by_key.get(key, key) for key in keys)))
