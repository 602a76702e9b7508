"""LoRA and AdaLoRA: low-rank changes, both read as :class:`deltune.LoRA`.

Letters: r rank, s the scale of a change s B A.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from deltune.backbone import matrix_shape
from deltune.checkpoints.expressions import sites_at
from deltune.checkpoints.peft.contents import Contents
from deltune.checkpoints.peft.layout import PREFIX, Options, number, pattern_value
from deltune.errors import CheckpointError
from deltune.methods.reparameterized.lora import LoRA
from deltune.methods.reparameterized.low_rank import RankPattern
from deltune.sites import WeightSite

__all__ = ["ADALORA_OPTIONS", "LORA_OPTIONS", "Factors", "read_adalora", "read_lora"]

#: Initialisations that leave the frozen model as it is.
_HARMLESS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_USED = "lora_alpha lora_dropout fan_in_fan_out bias alpha_pattern rank_pattern init_lora_weights"
_IGNORED = "loftq_config eva_config corda_config lora_ga_config megatron_config megatron_core"
_REFUSED = {
    "alora_invocation_tokens": "its change acts from certain tokens on (aLoRA)",
    "use_qalora": "it pools the input of its matrices (QALoRA)",
    "layer_replication": "it repeats layers of the model",
    "target_parameters": "it changes parameters that are no matrix of a linear map, such as those of fused experts",
    "trainable_token_indices": "it trains single rows of the table of embeddings",
    "use_bdlora": "its factors are block-diagonal (BD-LoRA)",
    "arrow_config": "it routes tokens among several adapters (Arrow)",
    "kasa_config": "it cuts the frozen matrices and has singular values beside its factors (KaSA)",
}
_TRAINING = {
    "velora_config": "it compresses activations in training alone",
    "monteclora_config": "it draws factors at random in training alone",
}
LORA_OPTIONS = Options(
    used=f"r use_rslora use_dora lora_bias qalora_group_size {_USED} {_IGNORED}",
    refused=_REFUSED,
    training=_TRAINING,
)
ADALORA_OPTIONS = Options(
    used="r init_r target_r tinit tfinal deltaT beta1 beta2 orth_reg_weight total_step qalora_group_size "
    f"{_USED} {_IGNORED}",
    refused={
        **_REFUSED,
        "use_dora": "peft has no weight-decomposed AdaLoRA",
        "use_rslora": "peft has no rank-stabilised AdaLoRA",
        "lora_bias": "peft has no biases in AdaLoRA",
    },
    training=_TRAINING,
)


@dataclass(frozen=True)
class Factors:
    """The change of one matrix: s B A with A (r, in) and B (out, r); perhaps a bias s b and magnitudes m (out)."""

    A: Tensor
    B: Tensor
    scale: float
    bias: Tensor | None = None
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.A.shape[0]

    def scaled(self, scale: float) -> Factors:
        """The same change with the scale ``scale``: what the two differ by goes into B, in float32 at least."""
        if math.isclose(scale, self.scale, rel_tol=1e-12):
            return self
        wide = (self.B.double() * (self.scale / scale)).to(torch.promote_types(self.B.dtype, torch.float32))
        return replace(self, B=wide, scale=scale, bias=None if self.bias is None else self.bias * (self.scale / scale))

    def fitting(self, site: WeightSite) -> Factors:
        """The same change with a rank that the matrix can have: the product and a unit matrix where r is larger."""
        largest = min(site.in_features, site.out_features)
        if self.rank <= largest:
            return self
        product, unit = self.B.float() @ self.A.float(), torch.eye(largest)
        wide = site.in_features > site.out_features
        return replace(self, A=product if wide else unit, B=unit if wide else product)


def read_lora(contents: Contents) -> tuple[LoRA, dict[str, Tensor], dict[str, Tensor]]:
    """The method, its tensors by key, and what is added to biases of the model, by module.

    Raises:
        CheckpointError: if the change cannot be represented.
    """
    config = contents.config
    start = config.get("init_lora_weights")
    if start not in _HARMLESS:
        raise CheckpointError(
            f"{contents.folder} was saved with init_lora_weights={start!r}, which changes the frozen model too, so "
            "that its factors mean nothing on the original one. Save it in peft with "
            "path_initial_model_for_weight_conversion, which makes an ordinary LoRA of it. Nothing was loaded."
        )
    alpha = number("lora_alpha", config.get("lora_alpha", 8))
    stabilized = bool(config.get("use_rslora", False))
    found = {}
    alphas: set[float] = set()
    for module, tensors in contents.adapters(_ENDINGS).items():
        site_alpha = number("alpha_pattern", pattern_value(config.get("alpha_pattern"), module, alpha))
        factors = _factors(contents, module, tensors)
        if factors is not None:
            divisor = math.sqrt(factors.rank) if stabilized else factors.rank
            found[module] = replace(factors, scale=site_alpha / divisor)
            alphas.add(site_alpha)
    contents.finish_if_damaged()
    if len({factors.magnitude is None for factors in found.values()}) > 1:
        raise CheckpointError(
            f"{contents.folder} has magnitudes (DoRA) for some of its matrices alone, which deltune does not have. "
            "Nothing was loaded."
        )
    if len(alphas) > 1:
        contents.notes.append(
            "some matrices have another alpha than the rest (alpha_pattern), which went into their B."
        )
    if min(alphas, default=1.0) <= 0:
        contents.notes.append("an alpha is not positive; the factor that it makes of each change went into B.")
    method, tensors = _method(contents, found, alpha, stabilized)
    biases = {module: factors.scale * factors.bias for module, factors in found.items() if factors.bias is not None}
    return method, tensors, biases


def read_adalora(contents: Contents) -> tuple[LoRA, dict[str, Tensor], dict[str, Tensor]]:
    """As :func:`read_lora`. peft computes B diag(E) A alpha / (r0 + 1e-5) whatever ranks are left of the initial r0.

    Raises:
        CheckpointError: if the change cannot be represented.
    """
    config = contents.config
    initial = int(number("init_r", config.get("init_r", 12)))
    alpha = number("lora_alpha", config.get("lora_alpha", 8))
    scale = (alpha if alpha > 0 else float(initial)) / (initial + 1e-5)
    found = {}
    for module, tensors in contents.adapters(("lora_A", "lora_B", "lora_E")).items():
        named = {f"lora_{name}.weight": tensors[f"lora_{name}"] for name in "AB" if f"lora_{name}" in tensors}
        factors = _factors(contents, module, named)
        values = tensors.get("lora_E")
        if values is None:
            contents.missing(f"{PREFIX}{module}.lora_E")
        elif factors is not None and contents.fits(f"{PREFIX}{module}.lora_E", values, (factors.rank, 1)):
            wide = (factors.B.double() * values.double().T).to(torch.promote_types(values.dtype, torch.float32))
            found[module] = replace(factors, B=wide, scale=scale)
    contents.finish_if_damaged()
    kept = {module: factors for module, factors in found.items() if factors.rank}
    if not kept:
        raise CheckpointError(f"{contents.folder} has no ranks left in any matrix: it changes nothing.")
    method, tensors = _method(contents, kept, alpha if alpha > 0 else float(initial), False)
    return method, tensors, {}


_ENDINGS = (
    "lora_A.weight",
    "lora_B.weight",
    "lora_B.bias",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_embedding_A",
    "lora_embedding_B",
)


def _factors(contents: Contents, module: str, tensors: Mapping[str, Tensor]) -> Factors | None:
    """The factors of one module as matrices; None if some are missing or misshapen, which is noted."""
    embedding = any(ending.startswith("lora_embedding") for ending in tensors)
    names = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
    for name in names:
        if name not in tensors:
            contents.missing(f"{PREFIX}{module}.{name}")
    if any(name not in tensors for name in names):
        return None
    factor_A, factor_B = (tensors[name] for name in names)
    target: Any = contents.modules[module]
    if getattr(target, "groups", 1) > 1:
        raise CheckpointError(f"{contents.folder} changes {module}, a convolution in groups, which deltune refuses.")
    shape = matrix_shape(target)
    assert shape is not None
    out_features, in_shape = (shape[1], shape[:1]) if isinstance(target, nn.Embedding) else (shape[0], shape[1:])
    rank = factor_A.shape[0]
    key_A, key_B = (f"{PREFIX}{module}.{name}" for name in names)
    if factor_A.dim() == 2:  # of AdaLoRA a convolution's is a matrix already
        in_shape = (math.prod(in_shape),)
    good = contents.fits(key_A, factor_A, (rank, *in_shape))
    if not contents.fits(key_B, factor_B, (out_features, rank, *[1] * (factor_B.dim() - 2))) or not good:
        return None
    magnitude = tensors.get("lora_magnitude_vector", tensors.get("lora_magnitude_vector.weight"))
    key = f"{PREFIX}{module}.lora_magnitude_vector"
    if contents.config.get("use_dora") and magnitude is None:
        contents.missing(key)
    if magnitude is not None and not contents.fits(key, magnitude, (out_features, *[1] * (factor_B.dim() - 2))):
        return None
    bias = tensors.get("lora_B.bias")
    if bias is not None and not contents.fits(f"{PREFIX}{module}.lora_B.bias", bias, (out_features,)):
        return None
    return Factors(factor_A.flatten(1), factor_B.flatten(1), 1.0, bias, magnitude)


def _method(
    contents: Contents, found: Mapping[str, Factors], alpha: float, stabilized: bool
) -> tuple[LoRA, dict[str, Tensor]]:
    """The method that places forms for these factors, and its tensors by key."""
    decomposed = next(iter(found.values())).magnitude is not None
    targets, sites = sites_at(found, contents.model, contents.anatomy, ("linear", "embedding", "convolution"))
    fitted = {module: factors.fitting(sites[module]) for module, factors in found.items()}
    cut = [module for module, factors in fitted.items() if factors is not found[module]]
    if cut:
        others = " and others" if len(cut) > 3 else ""
        contents.notes.append(
            f"the rank of {', '.join(cut[:3])}{others} is more than such a matrix can have; the factors were "
            "multiplied out, which changes no output."
        )
    ranks = {sites[module].key: factors.rank for module, factors in fitted.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    method = LoRA(
        rank=rank,
        alpha=_usual_alpha(found.values(), alpha, stabilized),
        dropout=number("lora_dropout", contents.config.get("lora_dropout", 0.0)),
        rank_stabilized=stabilized,
        weight_decomposed=decomposed,
        rank_pattern=RankPattern.text(ranks, rank) or None,
        targets=targets,
    )
    tensors: dict[str, Tensor] = {}
    for module, factors in fitted.items():
        scaled = factors.scaled(method.scale(factors.rank))
        key = sites[module].key
        tensors |= {f"{key}.A": scaled.A, f"{key}.B": scaled.B}
        if factors.magnitude is not None:
            tensors[f"{key}.magnitude"] = factors.magnitude.flatten()
    return method, tensors


def _usual_alpha(found: Any, alpha: float, stabilized: bool) -> float:
    """The alpha of most matrices, so that fewest values of B must be scaled; without its sign, which goes into B."""
    alphas = [factors.scale * (math.sqrt(factors.rank) if stabilized else factors.rank) for factors in found]
    usual = Counter(round(value, 9) for value in alphas).most_common(1)[0][0]
    return abs(alpha if math.isclose(usual, alpha) else usual) or 1.0
