"""An attention with a prefix that shares no code with ours: the gate form, in float64, head by head.

    (1 - lam) Attn(q, K, V) + lam softmax(q P_k^T) P_v,  lam = the prefix's share of the softmax

Letters: B batch, H heads, K key/value heads, Q queries, T keys, P additional keys, D width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import deltune

__all__ = ["gated_attention", "naive_attention", "prefixes_of"]

#: Keys and values, each (K, P, D), by the identity of the attention module.
Prefixes = dict[int, tuple[Tensor, Tensor]]


def gated_attention(
    prefixes: Prefixes,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The gate form in float64, one key/value head after the other."""
    prefix_keys, prefix_values = (tensor.detach().double() for tensor in prefixes[id(module)])
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]

    def scores(queries: Tensor, keys: Tensor) -> Tensor:
        raw = torch.einsum("bqd,bkd->bqk", queries, keys) * scaling
        return raw if softcap is None else softcap * torch.tanh(raw / softcap)

    heads = []
    for head in range(query.shape[1]):
        source = head // groups
        queries = query[:, head].double()
        real = scores(queries, key[:, source].double())
        if position_bias is not None:
            real = real + position_bias.expand(-1, query.shape[1], -1, -1)[:, head].double()
        if mask is not None:
            assert mask.dtype != torch.bool
            real = real + mask.expand(-1, query.shape[1], -1, -1)[:, head].double()
        added = scores(queries, prefix_keys[source].expand(query.shape[0], -1, -1))
        gate = torch.sigmoid(added.logsumexp(-1) - real.logsumexp(-1))[..., None]
        alone = real.softmax(-1) @ value[:, source].double()
        heads.append((1 - gate) * alone + gate * (added.softmax(-1) @ prefix_values[source]))
    return torch.stack(heads, dim=2).to(query.dtype), None


@contextmanager
def naive_attention(model: nn.Module, prefixes: dict[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """``model``, built with eager attention, computes the gate form with these prefixes by module name."""
    modules = dict(model.named_modules())
    by_identity = {id(modules[name]): pair for name, pair in prefixes.items()}
    called: set[int] = set()

    def function(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        called.add(id(module))
        return gated_attention(by_identity, module, *args, **kwargs)

    files = {sys.modules[type(modules[name]).__module__] for name in prefixes}
    originals = {file: vars(file)["eager_attention_forward"] for file in files}
    try:
        for file in files:
            vars(file)["eager_attention_forward"] = function
        yield
    finally:
        for file, original in originals.items():
            vars(file)["eager_attention_forward"] = original
    assert called == set(by_identity), "the reference did not reach every attention"


def prefixes_of(tuned: deltune.Tuned) -> dict[str, tuple[Tensor, Tensor]]:
    """What the prefix is at every attention module."""
    attachment = tuned.attachments["default"]
    return {site.part.module: form() for _, site, form in attachment.sites}
