"""The mix-and-match adapter, against its fact sheet. 10 and 12 are also laws 5 and 3 (``tests/laws``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

import deltune
from deltune.errors import MethodError
from deltune.methods import Preset, Sum, parse
from deltune.methods.additive.bottleneck import Bottleneck
from deltune.methods.additive.prefix_forms import PrefixTrunk, ReparameterizedPrefix
from deltune.sites import Insertion
from tests.laws.gate_form import naive_attention
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

SMALL = "mam(length=3, prefix_width=6, width=4, dropout=0{})"
#: Normalised after the sum; before the sublayer, with grouped keys; an encoder and a decoder.
MODELS = ["bert", "llama-gqa", "bart", "t5"]


def filled(name: str, options: str = "", **model: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """MAM whose adapter changes something, and a batch."""
    tuned, batch = attached(name, SMALL.format(options), **model)
    for form in adapters(tuned).values():
        torch.nn.init.normal_(form.up.weight, std=0.3)
        torch.nn.init.normal_(form.up.bias, std=0.3)
    return tuned, batch


def part(tuned: deltune.Tuned, number: int) -> dict[str, Any]:
    """The forms of a part by the keys that it has alone."""
    forms = tuned.attachments["default"].forms
    return {key.partition(".")[2]: form for key, form in forms.items() if key.startswith(f"{number}.")}


def adapters(tuned: deltune.Tuned) -> dict[str, Bottleneck]:
    return part(tuned, 1)


def prefixes(tuned: deltune.Tuned) -> dict[str, tuple[Tensor, Tensor]]:
    """Keys and values by the name of the attention module."""
    with torch.no_grad():
        return {
            site.part.module: form()
            for _, site, form in tuned.attachments["default"].sites
            if site.insertion is Insertion.KEY_VALUE
        }


class Branch:
    """h <- h + s (W_up relu(W_down x + b_down) + b_up), by plain hooks of the test's own."""

    def __init__(self, form: Bottleneck, scale: float) -> None:
        self.form, self.scale = form, scale
        self.x = torch.empty(0)

    def read(self, module: Any, args: Any) -> None:
        self.x = args[0]

    def add(self, module: Any, args: Any, result: Any) -> Any:
        down, up = self.form.down, self.form.up
        narrow = (self.x @ down.weight.detach().T + down.bias.detach()).clamp(min=0)
        change = self.scale * (narrow @ up.weight.detach().T + up.bias.detach())
        return result + change if isinstance(result, Tensor) else (result[0] + change, *result[1:])


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_invariant_01_an_independent_composition(name: str, padding: Any) -> None:
    """The gate form of the prefix, written out head by head, and the branch, by other hooks, on a bare model."""
    tuned, _ = filled(name, dtype=torch.float64, attn_implementation="eager")
    batch = ARCHITECTURES[name].batch(padding=padding, head="classification" if name == "bert" else "language")
    reference = build(name, dtype=torch.float64, attn_implementation="eager")
    anatomy = deltune.anatomy_of(reference)
    for piece in anatomy.of("ffn"):
        branch = Branch(adapters(tuned)[piece.key], 4.0)
        up = next(up for up in anatomy.of("ffn.up", piece.stack) if up.layer == piece.layer)
        reference.get_submodule(up.module).register_forward_pre_hook(branch.read)
        reference.get_submodule(piece.result or piece.module).register_forward_hook(branch.add)
    bare = output(build(name, dtype=torch.float64, attn_implementation="eager"), batch)
    with naive_attention(reference, prefixes(tuned)):
        expected = output(reference, batch)
    # padding has no position of its own, so what stands there may be anything
    real = slice(None) if name == "bert" else ARCHITECTURES[name].real(batch)
    # LLaMA's and T5's norms, and some softmaxes, are float32 whatever the model is: equal up to their last bits
    tolerance = 1e-6 if name in ("llama-gqa", "t5") else 1e-12
    assert relative_error(output(tuned.model, batch)[real], expected[real]) < tolerance
    assert relative_error(expected[real], bare[real]) > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_invariant_02_without_one_part_it_is_the_other(name: str) -> None:
    tuned, batch = filled(name)
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert torch.equal(output(build(name), batch), bare)
    prefix, adapter = tuned.attachments["default"].method.parts
    for number, method in enumerate((prefix, adapter)):
        alone = deltune.attach(build(name), method)
        for key, form in alone.attachments["default"].forms.items():
            form.load_state_dict(part(tuned, number)[key].state_dict())
        both, _ = filled(name)
        for key, form in both.attachments["default"].forms.items():
            form.load_state_dict(tuned.attachments["default"].forms[key].state_dict())
        _switch_off(both, 1 - number)
        assert torch.equal(output(both.model, batch), output(alone.model, batch))
        assert not torch.equal(output(both.model, batch), bare)
        _switch_off(both, number)
        assert torch.equal(output(both.model, batch), bare)


def _switch_off(tuned: deltune.Tuned, number: int) -> None:
    """Take the forms of a part out of their taps, as if it did not exist."""
    taken = {id(form) for form in part(tuned, number).values()}
    for tap in tuned._installation.taps.values():
        tap.forms["default"] = [form for form in tap.forms["default"] if id(form) not in taken]


@pytest.mark.parametrize("name", MODELS)
def test_invariant_03_with_zero_weights_upwards_it_is_prefix_tuning(name: str) -> None:
    tuned, batch = attached(name, SMALL.format(""))
    assert not any(form.up.weight.any() or form.up.bias.any() for form in adapters(tuned).values())
    alone = deltune.attach(build(name), "prefix-tuning(length=3, width=6)")
    for key, form in alone.attachments["default"].forms.items():
        form.load_state_dict(part(tuned, 0)[key].state_dict())
    assert torch.equal(output(tuned.model, batch), output(alone.model, batch))


def test_invariant_04_published_counts() -> None:
    stored = "mam(reparameterize=false)"
    assert BERT_BASE.count(stored) == 552_960 + 9_452_544 == 10_005_504
    assert LLAMA.count(stored) == 345_600 + 17_727_360 == 18_072_960
    assert BERT_BASE.count("mam(reparameterize=false, length=16, width=16)") == 599_232
    assert LLAMA.count("mam(reparameterize=false, length=16, width=16)") == 755_040
    network = 30 * 768 + 768 * 800 + 800 + (800 + 1) * 2 * 12 * 768
    assert BERT_BASE.count("mam") == network + 9_452_544


@pytest.mark.parametrize("name", MODELS)
def test_invariant_05_exported_equals_the_form_of_training(name: str, tmp_path: Path) -> None:
    tuned, batch = filled(name)
    train(tuned, batch)
    trained = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name), tmp_path)
    assert relative_error(output(loaded.model, batch), trained) < 1e-6
    kinds = {type(form) for form in loaded.attachments["default"].forms.values()}
    assert not kinds & {PrefixTrunk, ReparameterizedPrefix}


@pytest.mark.parametrize("name", MODELS)
def test_invariant_06_every_trained_tensor_gets_a_gradient(name: str) -> None:
    tuned, batch = filled(name)
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.any(), key


@pytest.mark.parametrize("name", MODELS)
def test_invariant_07_the_scale_is_the_adapters(name: str) -> None:
    """Four times the change for s = 4 as for s = 1; the prefix is the same."""
    changes = []
    for scale in (1, 4):
        tuned, _ = filled(name, f", scale={scale}", dtype=torch.float64)
        x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        with torch.no_grad():
            changes.append([form(x) for form in adapters(tuned).values()])
        prefix = prefixes(tuned)
    for one, four in zip(*changes, strict=True):
        assert torch.equal(four, 4 * one)
        assert one.abs().max() > 1e-2
    other, _ = filled(name, ", scale=1", dtype=torch.float64)
    assert all(torch.equal(a, b) for key in prefix for a, b in zip(prefix[key], prefixes(other)[key], strict=True))


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_invariant_08_encoder_decoder(name: str) -> None:
    """Prefixes for encoder, decoder and cross attention, none shared; an adapter for each feed-forward sublayer."""
    tuned, _ = filled(name)
    anatomy = tuned.anatomy
    keys = {key.removesuffix(".attention") for key in part(tuned, 0) if key.endswith(".attention")}
    assert keys == {f"{piece.stack}.{piece.layer}" for piece in anatomy.of("attention")}
    assert {key.split(".")[0] for key in keys} == {"encoder", "decoder", "cross"}
    assert {key for key in part(tuned, 0) if key.endswith(".prefix")} == {
        "encoder.prefix",
        "decoder.prefix",
        "cross.prefix",
    }
    tensors = [value for _, value in tuned.attachments["default"].form_parameters()]
    assert len({value.data_ptr() for value in tensors}) == len(tensors)
    assert list(adapters(tuned)) == [piece.key for piece in anatomy.of("ffn")]
    assert {key.split(".")[0] for key in adapters(tuned)} == {"encoder", "decoder"}


def test_invariant_09_grouped_keys_have_grouped_prefixes() -> None:
    tuned, _ = filled("llama-gqa")
    shape = tuned.anatomy.of("attention")[0].attention
    assert shape is not None
    assert shape.key_value_heads < shape.heads
    for keys, values in prefixes(tuned).values():
        assert keys.shape == values.shape == (shape.key_value_heads, 3, shape.head_dim)


@pytest.mark.parametrize("name", ["llama-gqa", "bart", "t5"])
def test_invariant_10_cached_generation_equals_uncached(name: str) -> None:
    tuned, batch = filled(name)
    inputs = {key: value for key, value in batch.items() if key in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (tuned.model.generate(**inputs, **options, use_cache=cache) for cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for one, other in zip(cached.logits, uncached.logits, strict=True):
        assert relative_error(one, other) < 1e-5


def test_invariant_11_one_file_with_both_parts_and_the_options(tmp_path: Path) -> None:
    tuned, batch = filled("bert", ", scale=2, shift_positions=true")
    trained = output(tuned.model, batch)
    tuned.save(tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    with safe_open(str(tmp_path / "delta.safetensors"), "pt") as stream:
        parts = {key.split(".")[0] for key in stream.keys()}  # noqa: SIM118
    assert parts == {"0", "1", "classifier"}
    described = json.loads((tmp_path / "deltune.json").read_text(encoding="utf-8"))["method"]
    expected = {"name": "mam", "length": 3, "width": 4, "scale": 2.0, "prefix_width": 6, "shift_positions": True}
    assert expected.items() <= described.items()
    loaded = deltune.load(build("bert"), tmp_path)
    assert torch.equal(output(loaded.model, batch), trained)
    assert loaded.attachments["default"].method == parse(
        SMALL.format(", scale=2, shift_positions=true, reparameterize=false")
    )


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_invariant_12_the_backbone_keeps_its_bits(name: str) -> None:
    before = bits(build(name))
    tuned, batch = filled(name)
    train(tuned, batch)
    with tuned.disabled():
        after = bits(tuned.model)
    head = set(tuned.attachments["default"].head_names)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before.keys() - head)


def test_it_is_the_sum_of_its_parts() -> None:
    method = deltune.MAM(length=3, width=4)  # type: ignore[attr-defined]
    expected = parse("prefix-tuning(length=3, width=800) + parallel-adapter(width=4)")
    assert isinstance(expected, Sum)
    assert method.whole == expected
    assert method.parts == expected.methods
    # one rate for both parts, that of the adapter, which a rate for prompts would destroy
    assert (method.learning_rate, method.weight_decay) == (expected.learning_rate, 0.01)
    assert method.insertions() == (Insertion.KEY_VALUE, Insertion.PARALLEL)


def test_it_can_be_part_of_a_sum(tmp_path: Path) -> None:
    """The keys of its parts then have both numbers; saved, it is flat there too."""
    tuned, batch = attached("bert", f"{SMALL.format('')} + lora(rank=2)")
    keys = [key for key in tuned.attachments["default"].forms if key.split(".")[0] == "0"]
    assert {key.split(".")[1] for key in keys} == {"0", "1"}
    train(tuned, batch)
    trained = output(tuned.model, batch)
    tuned.save(tmp_path)
    loaded = deltune.load(build("bert"), tmp_path)
    assert torch.equal(output(loaded.model, batch), trained)
    assert [part.name for part in loaded.attachments["default"].method.parts] == [
        "prefix-tuning",
        "parallel-adapter",
        "lora",
    ]


def test_a_preset_follows_the_schedules_of_its_parts() -> None:
    """What is said for the parts is asked of them with their forms by their own keys."""
    called: list[tuple[str, tuple[str, ...]]] = []

    class Followed(deltune.LoRA):  # type: ignore[name-defined,misc]
        def begin(self, forms: Any, steps: Any) -> None:
            called.append(("begin", tuple(forms)))

        def before_step(self, forms: Any, step: int, optimizer: Any) -> None:
            called.append(("before", tuple(forms)))

        def after_step(self, forms: Any, step: int, optimizer: Any) -> None:
            called.append(("after", tuple(forms)))

        def prepare(self, model: Any, forms: Any, batches: Any) -> None:
            called.append(("prepare", tuple(forms)))

        def penalty(self, forms: Any) -> Any:
            return sum(form.A.square().sum() for form in forms.values())

        def settled(self, forms: Any) -> bool:
            return False

    class Pair(Preset):
        name = "pair"
        learning_rate = 1e-3

        def definition(self) -> Sum:
            return Followed(rank=2) + deltune.BitFit()  # type: ignore[attr-defined,no-any-return]

    model = build("bert")
    tuned = deltune.attach(model, Pair())
    assert tuned.attachments["default"].settled is False
    penalty = tuned.penalty()
    assert penalty is not None
    assert penalty > 0
    optimizer = torch.optim.SGD(tuned.trainable_parameters(), lr=1e-2)
    tuned.bind(optimizer, 2)
    tuned.prepare([])
    loss_of(model, ARCHITECTURES["bert"].batch(head="classification")).backward()
    optimizer.step()
    keys = tuple(f"encoder.{layer}.attention.{role}" for role in ("query", "value") for layer in range(3))
    assert called == [(word, keys) for word in ("begin", "prepare", "before", "after")]


def test_what_a_part_cannot_have_is_refused_when_it_is_built() -> None:
    with pytest.raises(MethodError, match="mam: length must be at least 1"):
        parse("mam(length=0)")
    with pytest.raises(MethodError, match=r"there is no activation 'rellu'. Did you mean 'relu'"):
        parse("mam(activation=rellu)")
