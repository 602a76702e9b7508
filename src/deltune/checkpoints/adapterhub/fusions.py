"""Fusions of AdapterHub's library: a set-up with a folder for each adapter and one for the attention over them.

The library computes softmax(q . k_t / T) over the adapters' changes as ours does; with ``value_before_softmax`` or not,
the sum is the same, because the values' map is linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deltune.attachment import Attachment
from deltune.backbone import Anatomy
from deltune.checkpoints.adapterhub.names import Names, Weights, known_model, other_parts, usable_name
from deltune.checkpoints.adapterhub.pieces import Acting, Stored, completed, refuse
from deltune.checkpoints.formats import Saved
from deltune.errors import CheckpointError
from deltune.methods import parse
from deltune.methods.additive.adapter_fusion import AdapterFusion, FusedAdapters
from deltune.methods.additive.bottleneck import BottleneckMethod

__all__ = ["read_fusion", "written_fusion"]

_DEFAULTS: dict[str, Any] = {
    "key": True,
    "query": True,
    "value": True,
    "query_before_ln": False,
    "regularization": True,
    "residual_before": False,
    "temperature": False,
    "value_before_softmax": True,
    "value_initialized": True,
    "dropout_prob": None,
}
_REFUSED = {
    "query_before_ln": "queries that are read in front of the norm",
    "residual_before": "the residual stream as a part of the values",
    "temperature": "a temperature that falls in training and is not stored",
}
_LINEAR = {"query.weight", "query.bias", "key.weight", "key.bias"}


def read_fusion(
    described: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    adapters: Sequence[Saved],
    model: nn.Module,
    anatomy: Anatomy,
) -> Saved:
    """What a fusion is in deltune's terms.

    Args:
        described: the content of ``adapter_fusion_config.json``.
        tensors: those of its file.
        adapters: the adapters that are fused, in their order.
        model: the model that it is for.
        anatomy: its parts.

    Raises:
        CheckpointError: if it says what deltune cannot do, or these adapters cannot be fused.
    """
    config, unknown = completed(described.get("config") or {}, _DEFAULTS)
    refuse(config, _REFUSED)
    if not (config["query"] and config["key"]):
        raise CheckpointError(
            "The fusion has no maps of queries or of keys. deltune's adapter-fusion has both, so it cannot be read."
        )
    name = str(described["name"])
    method = AdapterFusion(
        adapters=tuple(str(adapter.method) for adapter in adapters),
        value=bool(config["value"]),
        dropout=config["dropout_prob"] or getattr(model.config, "attention_probs_dropout_prob", 0.0),
        regularization=0.01 if config["regularization"] else 0.0,
    )
    names = Names(model, anatomy)
    weights = Weights(tensors, names)
    values: dict[str, Tensor] = {}
    first = adapters[0].method
    if not isinstance(first, BottleneckMethod):
        raise CheckpointError(f"The fused adapters are {first}, which is no adapter of one width in all its layers.")
    for placement in first.place(model, anatomy):
        part = getattr(placement.site, "part", None)
        assert part is not None
        sublayer = other_parts(anatomy, [part], "ffn")[0] if part.role == "layer" else part
        module = f"{names.slot(sublayer)}.adapter_fusion_layer.{name}"
        own = _LINEAR | ({"value.weight"} if config["value"] else set())
        weights.take_into(values, {f"{part.key}.{each}": f"{module}.{each}" for each in sorted(own)})
        values[f"{part.key}.kept"] = torch.ones(len(adapters), dtype=torch.bool)
    for number, adapter in enumerate(adapters):
        for key, value in adapter.tensors.items():
            place, parameter = _split(key)
            values[f"{place}.adapters.{number}.{parameter}"] = value
    return Saved(
        name=usable_name(name),
        method=method,
        tensors={**values, **weights.left},
        base_model=known_model(described, model),
        notes=tuple(dict.fromkeys((*unknown, *(note for adapter in adapters for note in adapter.notes)))),
    )


def _split(key: str) -> tuple[str, str]:
    """The site and the name of one of a bottleneck's parameters."""
    if key.endswith(".scale"):
        return key.removesuffix(".scale"), "scale"
    place, module, attribute = key.rsplit(".", 2)
    return place, f"{module}.{attribute}"


def written_fusion(attachment: Attachment, names: Names) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Stored]]:
    """The configuration of a fusion, its tensors, and its adapters by name.

    Raises:
        CheckpointError: if the library has no form for it.
    """
    method = attachment.method.stored(attachment.forms)
    assert isinstance(method, AdapterFusion)
    if method.temperature != 1:
        raise CheckpointError(
            f"AdapterHub's library has no fusion of the temperature {method.temperature:g}. Save it in deltune's own "
            "format."
        )
    adapters: dict[str, Stored] = {}
    for number, text in enumerate(method.adapters):
        adapters[f"{attachment.name}_{number + 1}"] = Stored(parse(text), [])
    together = ",".join(adapters)
    tensors: dict[str, Tensor] = {}
    for placed in attachment.placed.values():
        assert placed.site is not None
        form, part = placed.form, placed.site.part
        assert isinstance(form, FusedAdapters)
        if not bool(form.kept.all()):
            raise CheckpointError(
                f"Adapters of this fusion are left out at {part.key}, which AdapterHub cannot say. Save it in "
                "deltune's own format."
            )
        for stored, adapter in zip(adapters.values(), form.adapters, strict=True):
            stored.forms.append(Acting(part, adapter))
        sublayer = other_parts(names.anatomy, [part], "ffn")[0] if part.role == "layer" else part
        module = f"{names.slot(sublayer)}.adapter_fusion_layer.{together}"
        tensors |= {f"{module}.{name}": value for name, value in form.named_parameters()}
    config = {
        **_DEFAULTS,
        "value": method.value,
        "value_initialized": method.value,
        "regularization": bool(method.regularization),
        "dropout_prob": method.dropout or None,
    }
    return {"config": config, "adapter_names": list(adapters), "name": together}, tensors, adapters
