"""Ladder side-tuning with a cache: invariant 12. Beams, sampling and padding are in tests/laws/test_batches.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

import deltune
from deltune.errors import StateError
from tests.methods.common import attached, build, output, relative_error, train
from tests.zoo import ARCHITECTURES

SMALL = "ladder-side-tuning(reduction=2)"
DECODERS = ["gpt2", "gpt_neox", "llama-gqa", "mistral", "qwen3", "gemma2", "phi3", "smollm3"]


def trained(name: str, targets: str = "layer", **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    tuned, batch = attached(name, f"ladder-side-tuning(reduction=2, targets='{targets}')", **options)
    train(tuned, batch)
    tuned.model.eval()
    return tuned, batch


def stepwise(model: Any, ids: Tensor, cache: Any, first: int) -> Tensor:
    """Logits of ``first`` tokens at once, then of one at a time."""
    pieces = [ids[:, :first], *ids[:, first:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat([model(input_ids=piece, past_key_values=cache, use_cache=True).logits for piece in pieces], 1)


@pytest.mark.parametrize("targets", ["layer", "layer layers=1:"])
@pytest.mark.parametrize("name", DECODERS)
def test_invariant_12_cached_equals_uncached(name: str, targets: str) -> None:
    tuned, _ = trained(name, targets)
    ids = ARCHITECTURES[name].batch(2, 12, head="language")["input_ids"]
    whole = output(tuned.model, {"input_ids": ids})
    cache = DynamicCache(config=tuned.model.config)
    assert relative_error(stepwise(tuned.model, ids, cache, 5), whole) < 1e-5
    # and a cache that knows nothing of the model's configuration, where no window cuts it
    if name not in ("mistral", "gemma2"):
        assert relative_error(stepwise(tuned.model, ids, DynamicCache(), 3), whole) < 1e-5


def test_invariant_12_the_side_network_has_its_own_cache() -> None:
    tuned, batch = trained("llama-gqa", "layer layers=0,2")
    cache = DynamicCache(config=tuned.model.config)
    ids = batch["input_ids"]
    stepwise(tuned.model, ids, cache, 4)
    assert [tuple(layer.keys.shape) for layer in cache.layers] == [(3, 2, 7, 8)] * 3 + [(3, 2, 7, 4)] * 2
    # what reorders the model's cache reorders that of the side network
    keys = [layer.keys.clone() for layer in cache.layers]
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert all(torch.equal(layer.keys, kept[[2, 0, 0]]) for layer, kept in zip(cache.layers, keys, strict=True))
    with torch.no_grad():
        after = tuned.model(input_ids=ids[[2, 0, 0], :1], past_key_values=cache).logits
    expected = output(tuned.model, {"input_ids": torch.cat([ids[[2, 0, 0]], ids[[2, 0, 0], :1]], dim=1)})[:, -1:]
    assert relative_error(after, expected) < 1e-5
    # and what crops it crops both
    cache.crop(-3)
    with torch.no_grad():
        again = tuned.model(input_ids=ids[[2, 0, 0], 5:6], past_key_values=cache).logits
    expected = output(tuned.model, {"input_ids": torch.cat([ids[[2, 0, 0], :5], ids[[2, 0, 0], 5:6]], dim=1)})[:, -1:]
    assert relative_error(again, expected) < 1e-5


@pytest.mark.parametrize("targets", ["layer", "layer layers=1:"])
@pytest.mark.parametrize("name", ["t5", "t5-gated", "bart", "whisper"])
def test_invariant_12_encoder_decoder(name: str, targets: str) -> None:
    tuned, batch = trained(name, targets)
    model = tuned.model
    whole = output(model, batch)
    ids = batch.pop("decoder_input_ids")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    logits = []
    with torch.no_grad():
        encoded = model.get_encoder()(**batch)
        for piece in ids.split(1, dim=1):
            given = {"attention_mask": batch["attention_mask"]} if "attention_mask" in batch else {}
            result = model(
                encoder_outputs=encoded, decoder_input_ids=piece, past_key_values=cache, use_cache=True, **given
            )
            logits.append(result.logits)
    assert relative_error(torch.cat(logits, dim=1), whole) < 1e-5


def test_a_cache_that_was_filled_without_the_side_network_is_refused() -> None:
    tuned, batch = trained("gpt2")
    ids = batch["input_ids"]
    cache = DynamicCache(config=tuned.model.config)
    with tuned.disabled(), torch.no_grad():
        tuned.model(input_ids=ids[:, :4], past_key_values=cache)
    with pytest.raises(StateError, match="Begin with an empty cache"):
        tuned.model(input_ids=ids[:, 4:], past_key_values=cache)


def test_a_static_cache_is_refused() -> None:
    tuned, batch = trained("llama-gqa")
    cache = StaticCache(config=tuned.model.config, max_cache_len=16)
    with pytest.raises(StateError, match="not possible in a cache of StaticLayers"):
        tuned.model(input_ids=batch["input_ids"], past_key_values=cache)
    # and the next call is as if nothing had been
    fresh = output(tuned.model, batch)
    assert torch.isfinite(fresh).all()


@pytest.mark.parametrize("name", ["llama-gqa", "t5"])
def test_two_side_networks_beside_one_cache(name: str) -> None:
    """Rows are routed to one or the other; each has its own further layers."""
    tuned, batch = trained(name)
    tuned.attach("ladder-side-tuning(reduction=1)", name="other")
    train(tuned, batch)
    tuned.model.eval()
    prompt = {key: value for key, value in batch.items() if key != "decoder_input_ids"}
    alone = {}
    for attachment in ("default", "other"):
        tuned.activate(attachment)
        alone[attachment] = tuned.model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with tuned.routed(["other", "default", None]):
        together = tuned.model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    with tuned.disabled():
        bare = tuned.model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert torch.equal(together, torch.stack([alone["other"][0], alone["default"][1], bare[2]]))
    assert not torch.equal(alone["other"], alone["default"])


def test_the_bare_model_is_unchanged_by_further_layers_of_a_cache() -> None:
    tuned, batch = trained("gpt2")
    ids = batch["input_ids"]
    cache = DynamicCache(config=tuned.model.config)
    with torch.no_grad():
        tuned.model(input_ids=ids[:, :4], past_key_values=cache)
        with tuned.disabled():
            found = tuned.model(input_ids=ids[:, 4:], past_key_values=cache).logits
    expected = output(build("gpt2"), {"input_ids": ids})[:, 4:]
    assert relative_error(found, expected) < 1e-5
