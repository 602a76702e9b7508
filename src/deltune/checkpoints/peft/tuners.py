"""Forms as tensors and options of peft, one function for each tuner.

Letters: r rank, s the scale of a change s B A.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from deltune.backbone import Anatomy, out_features
from deltune.checkpoints.peft.layout import PREFIX, PROMPT_KEY
from deltune.checkpoints.peft.prompts import prefix_method, prefix_sites, prefix_slots, refuse_pooled_prompts
from deltune.errors import CheckpointError
from deltune.methods.additive.ia3 import InputScale, OutputScale
from deltune.methods.additive.prefix_forms import Prefix, joined_prefixes
from deltune.methods.additive.prompt_rows import first_stack
from deltune.methods.reparameterized.krona import KroneckerWeight
from deltune.methods.reparameterized.low_rank import DecomposedLowRank, LowRank
from deltune.sites import Form, PositionShift, Site, TokenSite, WeightSite, token_sites

__all__ = ["Placed", "Written", "joined_factors", "write_ia3", "write_lokr", "write_lora", "write_prefix", "write_rows"]


@dataclass(frozen=True)
class Placed:
    """A form as it is stored, and its site."""

    site: Site | None
    form: Form


@dataclass(frozen=True)
class Written:
    """Options and tensors of a tuner; for LoRA the scale of each module's change."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    scales: dict[str, float] = field(default_factory=dict)


def write_lora(placed: list[Placed], model: nn.Module, anatomy: Anatomy) -> Written:
    """LoRA, with the changes of rows of one matrix joined to one change of larger rank.

    Raises:
        CheckpointError: if peft cannot hold it.
    """
    by_module: dict[str, list[tuple[WeightSite, LowRank]]] = {}
    for item in placed:
        assert isinstance(item.site, WeightSite)
        assert isinstance(item.form, LowRank)
        by_module.setdefault(item.site.module, []).append((item.site, item.form))
    decomposed = [isinstance(form, DecomposedLowRank) for forms in by_module.values() for _, form in forms]
    if any(decomposed) and not (all(decomposed) and all(_alone(forms) for forms in by_module.values())):
        raise CheckpointError(
            "peft has magnitudes (DoRA) for all matrices or for none, and not for rows of a fused one. Save with "
            "format='deltune'."
        )
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    scales: dict[str, float] = {}
    for module, forms in by_module.items():
        whole = next((site.out_features for site, _ in forms if site.rows is None), None)
        rows = out_features(model.get_submodule(module)) if whole is None else whole
        factor_A, factor_B, scales[module] = joined_factors(forms, rows)
        ranks[module] = factor_A.shape[0]
        site = forms[0][0]
        name = f"{PREFIX}{module}"
        if site.kind == "embedding":
            tensors |= {f"{name}.lora_embedding_A": factor_A, f"{name}.lora_embedding_B": factor_B}
        else:
            if site.kind == "convolution":
                kernel = model.get_submodule(module).get_parameter("weight").shape[1:]
                factor_A = factor_A.reshape(-1, *kernel)
                factor_B = factor_B.reshape(*factor_B.shape, *[1] * (len(kernel) - 1))
            tensors |= {f"{name}.lora_A.weight": factor_A, f"{name}.lora_B.weight": factor_B}
        if isinstance(forms[0][1], DecomposedLowRank):
            tensors[f"{name}.lora_magnitude_vector"] = forms[0][1].magnitude
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alphas = {module: scales[module] * ranks[module] for module in by_module}
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    config = {
        "alpha_pattern": {module: value for module, value in alphas.items() if not math.isclose(value, alpha)},
        "bias": "none",
        "fan_in_fan_out": any(hasattr(model.get_submodule(module), "nf") for module in by_module),
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_bias": False,
        "lora_dropout": max(form.dropout for forms in by_module.values() for _, form in forms),
        "r": rank,
        "rank_pattern": {module: value for module, value in ranks.items() if value != rank},
        "target_modules": _target_modules(by_module, model),
        "use_dora": any(decomposed),
        "use_rslora": False,
    }
    return Written(config, tensors, scales)


def _alone(forms: list[tuple[WeightSite, LowRank]]) -> bool:
    return len(forms) == 1 and forms[0][0].rows is None


def joined_factors(forms: list[tuple[WeightSite, LowRank]], rows: int) -> tuple[Tensor, Tensor, float]:
    """A (R, in), B (rows, R) and s of all changes of one matrix of so many rows."""
    first = forms[0][1]
    if _alone(forms):
        return first.A, first.B, first.scale
    blocks = []
    for site, form in forms:
        block = form.B.new_zeros(rows, form.B.shape[1])
        own = form.B.detach() * (form.scale / first.scale)
        if site.rows is None:
            block += own
        else:
            view = site.rows.view(block, 0)
            view += site.rows.split(own, 0)
        blocks.append(block)
    return torch.cat([form.A.detach() for _, form in forms]), torch.cat(blocks, dim=1), first.scale


def write_lokr(placed: list[Placed], model: nn.Module, anatomy: Anatomy) -> Written:
    """LoKr with both factors whole, as peft has them if the rank is large; the shapes must be those that it chooses.

    Raises:
        CheckpointError: if peft would choose other shapes, or a matrix is a part of a fused one.
    """
    tensors: dict[str, Tensor] = {}
    scales, shapes, modules = [], [], []
    for item in placed:
        site, form = item.site, item.form
        assert isinstance(site, WeightSite)
        assert isinstance(form, KroneckerWeight)
        if site.rows is not None or site.kind != "linear" or hasattr(model.get_submodule(site.module), "nf"):
            raise CheckpointError(
                f"peft's LoKr acts on whole linear maps, and {site.key} is a part of a fused or transposed one, or no "
                "linear map. Save with format='deltune'."
            )
        modules.append(site.module)
        scales.append(form.scale)
        shapes.append(((form.A.shape[0], form.B.shape[0]), (form.A.shape[1], form.B.shape[1])))
        tensors |= {f"{PREFIX}{site.module}.lokr_w1": form.A, f"{PREFIX}{site.module}.lokr_w2": form.B}
    pairs = [pair for shape in shapes for pair in shape]
    factor = next(
        (
            candidate
            for candidate in (-1, *sorted({size for pair in pairs for size in pair}))
            if all(_factorized(first * second, candidate) == (first, second) for first, second in pairs)
        ),
        None,
    )
    if factor is None:
        raise CheckpointError(
            "peft chooses the shapes of LoKr's factors by one number for all matrices, and none gives these. Leave out "
            "rows and columns when training, or save with format='deltune'."
        )
    rank = max(size for pair in pairs for size in pair)  # so large that peft takes no thin factors
    usual = Counter(scales).most_common(1)[0][0]
    config = {
        "alpha": usual * rank,
        "alpha_pattern": {
            module: scale * rank for module, scale in zip(modules, scales, strict=True) if scale != usual
        },
        "decompose_both": False,
        "decompose_factor": factor,
        "init_weights": True,
        "module_dropout": 0.0,
        "r": rank,
        "rank_dropout": 0.0,
        "rank_pattern": {},
        "target_modules": _target_modules(modules, model),
        "use_effective_conv2d": False,
    }
    return Written(config, tensors)


def _factorized(size: int, factor: int) -> tuple[int, int]:
    """How peft, as LyCORIS, cuts a side in two: at ``factor`` if it divides it, else near the root and not above it."""
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    limit = size if factor < 0 else factor
    best = (1, size)
    for first in range(2, math.isqrt(size) + 1):
        if size % first == 0 and first <= limit:
            best = first, size // first
    return best


def write_ia3(placed: list[Placed], model: nn.Module, anatomy: Anatomy) -> Written:
    """(IA)^3.

    Raises:
        CheckpointError: if a vector belongs to a part of a fused matrix whose other rows have none.
    """
    tensors: dict[str, Tensor] = {}
    reading: dict[str, Tensor] = {}
    writing: dict[str, Tensor] = {}
    for item in placed:
        site, form = item.site, item.form
        assert isinstance(site, WeightSite)
        assert isinstance(form, InputScale | OutputScale)
        if isinstance(form, InputScale):
            if site.rows is not None:
                raise CheckpointError(
                    f"peft scales the input of whole matrices, and {site.key} is a part of one. Save with "
                    "format='deltune'."
                )
            reading[site.module] = form.scale.detach()
            continue
        module = model.get_submodule(site.module)
        if site.rows is None:
            writing[site.module] = form.scale.detach()
        else:
            whole = writing.setdefault(site.module, form.scale.detach().new_ones(out_features(module)))
            site.rows.view(whole, 0).copy_(site.rows.split(form.scale.detach(), 0))
    twice = reading.keys() & writing.keys()
    if twice:
        raise CheckpointError(f"peft scales the input or the output of {min(twice)}, not both. Use format='deltune'.")
    tensors |= {f"{PREFIX}{module}.ia3_l": vector[None] for module, vector in reading.items()}
    tensors |= {f"{PREFIX}{module}.ia3_l": vector[:, None] for module, vector in writing.items()}
    modules = [*writing, *reading]
    chosen = _target_modules(modules, model)
    read = _target_modules(reading, model)
    if not set(read) <= set(chosen):
        chosen, read = sorted(modules), sorted(reading)
    config = {
        "fan_in_fan_out": any(hasattr(model.get_submodule(module), "nf") for module in modules),
        "feedforward_modules": read,
        "init_ia3_weights": True,
        "target_modules": chosen,
    }
    return Written(config, tensors)


def write_prefix(placed: list[Placed], model: nn.Module, anatomy: Anatomy) -> Written:
    """A prefix in every layer of the one stack.

    Raises:
        CheckpointError: if it leaves out layers, or does not shift the positions of the text.
    """
    forms = {item.site.key: item.form for item in placed if item.site is not None}
    prefixes = {key: form for key, form in forms.items() if isinstance(form, Prefix)}
    length = next(iter(prefixes.values())).length
    sites = prefix_sites(prefix_method(length, anatomy), model, anatomy)
    absent = [site.key for site in sites if site.key not in prefixes]
    if absent or len(prefixes) != len(sites):
        raise CheckpointError(
            f"A prefix of peft is in every attention function of the stack, and this one is not in "
            f"{', '.join(absent[:4]) or 'one stack alone'}. Save with format='deltune'."
        )
    if not any(isinstance(form, PositionShift) for form in forms.values()):
        raise CheckpointError(
            "peft's prefixes shift the positions of the text, and this one was trained without. Train with "
            "shift_positions=True, or save with format='deltune'."
        )
    shape = sites[0].shape
    submodules = min(len(anatomy.stacks), 2)
    # an odd number of layers gives each of them slots of its own, see prefix_slots
    count = len(sites) + (1 - len(sites) % 2 if submodules > 1 else 0)
    first = prefixes[sites[0].key]
    slots = [torch.zeros_like(first.keys)] * (2 * count)
    for site, (keys, values) in zip(sites, prefix_slots(len(sites), count, submodules), strict=True):
        slots[keys], slots[values] = prefixes[site.key].keys, prefixes[site.key].values
    table = joined_prefixes(list(zip(slots[::2], slots[1::2], strict=True)))
    config = {
        "encoder_hidden_size": None,
        "prefix_projection": False,
        **_sizes(length, shape.key_value_features, submodules, shape.key_value_heads, count),
    }
    return Written(config, {PROMPT_KEY: table})


def write_rows(placed: list[Placed], model: nn.Module, anatomy: Anatomy) -> Written:
    """Rows in front of the embedded text, of prompt tuning or p-tuning.

    Raises:
        CheckpointError: if peft would not put them where they were trained.
    """
    refuse_pooled_prompts(model, anatomy)
    if len(placed) != 1:
        raise CheckpointError("A prompt of peft is in front of one stack. Save with format='deltune'.")
    (item,) = placed
    (usual,) = token_sites(model, anatomy, first_stack(anatomy))
    if isinstance(item.site, TokenSite) and item.site.identity != usual.identity:
        raise CheckpointError(
            "A prompt of peft has positions, like text, and is in front of the first stack; this one is not "
            "(behind_embeddings or targets). Save with format='deltune'."
        )
    rows = item.form.get_parameter("rows").detach()
    submodules = 2 if len(anatomy.stacks) > 1 else 1
    # peft stores as many rows again for the decoder and never reads them
    table = torch.cat([rows, torch.zeros_like(rows)]) if submodules == 2 else rows
    stack = next(iter(anatomy.stacks.values()))
    heads = next((part.attention.heads for part in anatomy.of("attention") if part.attention is not None), 1)
    return Written(_sizes(len(rows), rows.shape[1], submodules, heads, len(stack)), {PROMPT_KEY: table})


def _sizes(length: int, width: int, submodules: int, heads: int, layers: int) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": submodules,
        "num_virtual_tokens": length,
        "token_dim": width,
    }


def _target_modules(modules: Collection[str] | Iterable[str], model: nn.Module) -> list[str]:
    """The ends of names that mean exactly these modules; their full names where there are no such."""
    wanted = set(modules)
    endings = {module.rpartition(".")[2] for module in wanted}
    meant = {
        name
        for name, _ in model.named_modules(remove_duplicate=False)
        if name.rpartition(".")[2] in endings and not name.rpartition(".")[2].isdigit()
    }
    return sorted(endings) if meant == wanted else sorted(wanted)
