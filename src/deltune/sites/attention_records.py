"""Keys and values that attention functions make of a text, recorded in one pass.

Letters: T tokens, K key/value heads, D width of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from deltune.errors import StateError, TargetError
from deltune.sites.attention import KeyValueSite, dispatching_to, own_function

__all__ = ["recorded_keys_and_values"]

#: Name of the recording function in transformers' attention interface.
_RECORDING = "deltune_recording"
#: Attribute under which an attention module finds its record while one is made.
_RECORD = "_deltune_record"


class _Record:
    """What one attention function was given, call by call."""

    def __init__(self, implementation: str) -> None:
        self.implementation = implementation
        self.calls: list[tuple[Tensor, Tensor]] = []


def _recording(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """The model's own attention function, whose keys and values are noted."""
    record: _Record = vars(module)[_RECORD]
    record.calls.append((key[0].detach().clone(), value[0].detach().clone()))
    function = own_function(module, record.implementation)
    return function(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]


AttentionInterface.register(_RECORDING, _recording)


def recorded_keys_and_values(
    model: nn.Module, sites: Sequence[KeyValueSite], ids: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """The keys and values of each site when the model reads tokens, where additional ones enter: each (K, T, D).

    One pass in evaluation mode and without gradients, in which the tokens begin at the first position. An
    encoder-decoder model reads them with its encoder and again with its decoder, whose cross-attention reads the
    encoder's states. Where a layer is applied several times (ALBERT), the mean of its applications is taken.

    Args:
        model: the model, with nothing attached that is live.
        sites: attention functions of it.
        ids: the tokens, (T,).

    Raises:
        TargetError: if the model, or the stack of a site, does not read text alone.
        StateError: if the model's attention implementation does not let us record.
    """
    base: nn.Module = getattr(model, "base_model", model)
    names = inspect.signature(base.forward).parameters
    if "input_ids" not in names or "pixel_values" in names:
        raise TargetError(
            f"{type(model).__name__} does not read text alone, so there are no keys and values of words in it."
        )
    readers = [name for name in ("input_ids", "decoder_input_ids") if name in names]
    with _records(model, sites) as records, _evaluating(model), torch.no_grad():
        base(**dict.fromkeys(readers, ids[None]))
    for site, record in zip(sites, records, strict=True):
        if not record.calls:
            raise StateError(
                f"{site.part.module} made no keys and values when the model read words, or ignores transformers' "
                "attention interface."
            )
    return [_mean(record.calls) for record in records]


def _mean(calls: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    keys, values = zip(*calls, strict=True)
    return torch.stack(keys).mean(0), torch.stack(values).mean(0)


@contextmanager
def _records(model: nn.Module, sites: Sequence[KeyValueSite]) -> Iterator[list[_Record]]:
    """Inside the block the attention functions of these sites fill a record each."""
    modules: list[Any] = [model.get_submodule(site.part.module) for site in sites]
    originals = [module.config for module in modules]
    records: list[_Record] = []
    try:
        for module, config in zip(modules, originals, strict=True):
            implementation, private = dispatching_to(_RECORDING, config)
            record = _Record(implementation)
            module.__dict__[_RECORD] = record
            module.config = private
            records.append(record)
        yield records
    finally:
        for module, config in zip(modules, originals, strict=True):
            module.config = config
            module.__dict__.pop(_RECORD, None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Inside the block every module is in evaluation mode; afterwards each is in its own again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
