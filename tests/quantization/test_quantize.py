"""Quantised models: which matrices, what they compute, what trains beside them. Numbers are those of the sheet.

The engine ``torch`` is tested everywhere, ``bitsandbytes`` where it is installed.
"""

from __future__ import annotations

import copy
import importlib.util
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltune
from deltune.errors import DeltuneError, StateError, TargetError
from deltune.quantization import dense_weight, dequantize, is_quantized, storage
from deltune.quantization.layers import NF4Linear, make_layer
from deltune.quantization.model import HANDLE, linear_maps
from tests.methods.common import build, output
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

TORCH = deltune.NF4(engine="torch")
needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
engines = pytest.mark.parametrize("engine", ["torch", pytest.param("bitsandbytes", marks=needs_bitsandbytes)])


def quantized(name: str, head: str | None = None, format: deltune.NF4 = TORCH, **options: Any) -> Any:
    return deltune.quantize(build(name, head, **options), format)


def head_of(name: str) -> Any:
    architecture = ARCHITECTURES[name]
    if architecture.generates:
        return "language"
    return "classification" if "classification" in architecture.heads else architecture.heads[0]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_9_a_quantised_model_equals_a_dense_one_with_the_dequantised_weights(name: str) -> None:
    architecture, head = ARCHITECTURES[name], head_of(name)
    model, dense = quantized(name, head), build(name, head)
    with torch.no_grad():
        for place, module in model.named_modules():
            if is_quantized(module):
                twin = dense.get_submodule(place)
                weight = dense_weight(module)
                twin.weight.copy_(weight.T if hasattr(twin, "nf") else weight)
        batch = architecture.batch(head=head)
        assert torch.equal(architecture.output(model(**batch)), architecture.output(dense(**batch)))


def test_only_linear_maps_of_the_layers_are_quantised() -> None:
    model = quantized("llama")
    names = {place for place, module in model.named_modules() if is_quantized(module)}
    assert len(names) == 3 * 7
    assert all(".layers." in place for place in names)
    before = build("llama").state_dict()
    for key, value in model.state_dict().items():
        if key.rpartition(".")[0] not in names:
            assert torch.equal(value, before[key]), key


def test_what_transformers_keeps_in_float32_is_left() -> None:
    """T5's feed-forward reads the type of ``wo`` and would turn its input into whole numbers."""
    model = quantized("t5")
    assert {type(module) for name, module in model.named_modules() if name.endswith(".wo")} == {nn.Linear}
    assert any(is_quantized(module) for name, module in model.named_modules() if name.endswith(".wi"))


def test_a_transposed_matrix_is_quantised_along_its_inputs() -> None:
    model, before = quantized("gpt2"), build("gpt2")
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)
    expected = make_layer(before.transformer.h[0].attn.c_attn.weight.T.contiguous(), None, TORCH)
    assert torch.equal(layer.weight, expected.weight)


@engines
@pytest.mark.parametrize("bias", [False, True])
def test_9_a_layer_is_exact_in_float32_and_in_bfloat16(engine: str, bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64), torch.randn(5, 3, 64)
    for dtype in (torch.float32, torch.bfloat16):
        vector = nn.Parameter(torch.randn(48)) if bias else None
        layer = make_layer(weight, vector, deltune.NF4(compute_dtype=dtype, engine=engine))
        found = layer(x)
        matrix = dense_weight(layer).to(dtype)
        expected = F.linear(x.to(dtype), matrix, None if vector is None else vector.to(dtype))
        assert found.dtype == x.dtype
        assert torch.equal(found, expected.to(x.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_9_gradients_equal_those_of_the_dense_layer(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = make_layer(torch.randn(10, 6, dtype=dtype), nn.Parameter(torch.randn(10, dtype=dtype)), TORCH)
    x = torch.randn(2, 4, 6, dtype=dtype, requires_grad=True)
    direction = torch.randn(2, 4, 10, dtype=dtype)
    (layer(x) * direction).sum().backward()
    twin_x, twin_bias = x.detach().clone().requires_grad_(), layer.bias.detach().clone().requires_grad_()
    (F.linear(twin_x, dense_weight(layer).to(dtype), twin_bias) * direction).sum().backward()
    assert torch.allclose(x.grad, twin_x.grad, atol=1e-6 if dtype != torch.bfloat16 else 1e-2)  # type: ignore[arg-type]
    assert torch.allclose(layer.bias.grad, twin_bias.grad)  # type: ignore[arg-type]
    assert layer.weight.grad is None


def test_the_dequantised_matrix_is_not_kept_for_the_backward_pass() -> None:
    layer = make_layer(torch.randn(256, 256), None, TORCH)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        layer(torch.randn(2, 256, requires_grad=True))
    assert not kept


def test_autocast_computes_in_its_type() -> None:
    layer = make_layer(torch.randn(8, 32), nn.Parameter(torch.randn(8)), TORCH)
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(x)
    expected = F.linear(x.bfloat16(), dense_weight(layer).bfloat16(), layer.bias.bfloat16())
    assert torch.equal(found, expected)


def test_changing_the_type_of_a_model_leaves_the_scales() -> None:
    """A cast of everything to 16 bits would round second scales and their mean."""
    model = quantized("llama")
    before = model.state_dict()
    model.bfloat16()
    after = model.state_dict()
    for key, value in before.items():
        kept = value.dtype == torch.uint8 or key.endswith(("scales", ".mean"))
        assert after[key].dtype == (value.dtype if kept else torch.bfloat16)
        assert not kept or torch.equal(after[key], value)
    assert output(model, ARCHITECTURES["llama"].batch(head="language")).dtype == torch.bfloat16


@engines
def test_8_bits_of_a_weight_in_a_model(engine: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    options = {"vocab_size": 50, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}
    for double, expected in ((True, 4.127), (False, 4.5)):
        model = LlamaForCausalLM(LlamaConfig(**options))  # type: ignore[arg-type]
        deltune.quantize(model, deltune.NF4(double_quantization=double, engine=engine))
        size = storage(model)
        assert size.parameters == 2 * (4 * 256 * 256 + 3 * 256 * 512)
        assert size.bits_per_parameter == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(
    ("published", "weights", "double", "plain"),
    [(LLAMA, 106_168_320, 54.77e6, 59.72e6), (BERT_BASE, 84_934_656, 43.8e6, 47.78e6)],
)
def test_8_published_sizes(published: Any, weights: int, double: float, plain: float) -> None:
    for format, expected in ((TORCH, double), (deltune.NF4(double_quantization=False, engine="torch"), plain)):
        with torch.device("meta"):
            model = published.model_class(published.config)
        size = storage(deltune.quantize(model, format))
        assert size.parameters == weights
        assert size.bytes == pytest.approx(expected, rel=1e-3)


@engines
def test_12_zero_blocks_and_odd_sizes(engine: str) -> None:
    weight = torch.randn(6, 64)
    weight[3] = 0
    layer = make_layer(weight, None, deltune.NF4(engine=engine))
    assert not dense_weight(layer)[3].any()
    assert torch.isfinite(layer(torch.randn(2, 64))).all()
    if engine == "torch":
        assert make_layer(torch.randn(5, 7), None, TORCH)(torch.randn(2, 7)).shape == (2, 5)


def test_13_state_survives_saving_and_loading(tmp_path: Any) -> None:
    model, batch = quantized("bert"), ARCHITECTURES["bert"].batch(head="classification")
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = quantized("bert", seed=5)
    assert not torch.equal(output(other, batch), output(model, batch))
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(output(other, batch), output(model, batch))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(copied, batch), output(model, batch))
        assert copied.state_dict().keys() == model.state_dict().keys()


@needs_bitsandbytes
def test_13_bitsandbytes_layers_survive_saving_and_loading() -> None:
    library = importlib.import_module("bitsandbytes")
    layer = make_layer(torch.randn(48, 64), None, deltune.NF4())
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    weight = state.pop("weight")
    stats = {key.removeprefix("weight."): value for key, value in state.items()}
    again = library.nn.Params4bit.from_prequantized(weight, stats, device="cpu")
    assert torch.equal(library.functional.dequantize_4bit(again.data, again.quant_state), dense_weight(layer))


@needs_bitsandbytes
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_both_engines_store_the_same_levels(name: str) -> None:
    one = quantized(name, format=deltune.NF4(double_quantization=False))
    other = quantized(name, format=deltune.NF4(double_quantization=False, engine="torch"))
    batch = ARCHITECTURES[name].batch(head=head_of(name))
    for place, module in other.named_modules():
        if is_quantized(module):
            assert torch.equal(one.get_submodule(place).weight.data, module.weight)
    assert torch.allclose(output(one, batch), output(other, batch), atol=1e-5)


# -- in place, one after the other -----------------------------------------------------------------------------


def test_no_second_copy_of_the_model_exists_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The float matrices before are gone when the next is quantised."""
    import weakref

    from deltune.quantization import model as place

    model = build("llama")
    alive: list[weakref.ref[Tensor]] = []
    original = place.quantized_layer

    def watched(name: str, module: nn.Module, weight: Tensor, format: Any) -> nn.Linear:
        assert sum(old() is not None for old in alive) == 0
        layer = original(name, module, weight, format)
        alive.append(weakref.ref(weight))
        return layer

    monkeypatch.setattr(place, "quantized_layer", watched)
    deltune.quantize(model, TORCH)
    assert len(alive) == 21


def test_one_module_under_two_names_is_quantised_once() -> None:
    model = build("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    deltune.quantize(model, TORCH)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    model = build("llama")
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    deltune.quantize(model, TORCH)
    assert model.model.layers[1].mlp.up_proj is model.model.layers[0].mlp.up_proj
    assert isinstance(model.model.layers[1].mlp.up_proj, NF4Linear)


def test_dequantising_gives_ordinary_layers_with_the_same_output() -> None:
    for name in ("llama", "gpt2", "bert"):
        model, batch = quantized(name), ARCHITECTURES[name].batch(head=head_of(name))
        before = output(model, batch)
        dequantize(model)
        assert not any(is_quantized(module) for module in model.modules())
        assert torch.equal(output(model, batch), before)
        with pytest.raises(StateError, match="Nothing"):
            dequantize(model)


# -- errors ----------------------------------------------------------------------------------------------------


def test_without_bitsandbytes_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    model = build("llama")
    before = model.state_dict()
    with pytest.raises(DeltuneError, match=r"pip install 'deltune\[quant\]'"):
        deltune.quantize(model)
    assert model.state_dict().keys() == before.keys()
    assert not any(is_quantized(module) for module in model.modules())


def test_importing_deltune_imports_neither_torch_nor_bitsandbytes() -> None:
    code = (
        "import sys, deltune; assert not {'torch', 'bitsandbytes'} & set(sys.modules); deltune.NF4; deltune.quantize; "
    )
    code += "assert 'bitsandbytes' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_cannot_be_quantised_is_refused() -> None:
    with pytest.raises(TargetError, match="not known"):
        deltune.quantize(nn.Sequential(nn.Linear(3, 3)), TORCH)
    model = quantized("llama")
    with pytest.raises(StateError, match="already"):
        deltune.quantize(model, TORCH)
    model = build("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(StateError, match=r"layers\.2\.mlp\.up_proj.*finite"):
        deltune.quantize(model, TORCH)
    with pytest.raises(StateError, match="Nothing"):
        storage(build("llama"))


def test_a_model_with_methods_attached_is_refused() -> None:
    from deltune.tuned import HANDLE as WHERE

    assert HANDLE == WHERE
    model = build("llama")
    tuned = deltune.attach(model, "lora(rank=2)")
    for _ in range(2):
        with pytest.raises(StateError, match="Detach first"):
            deltune.quantize(model, TORCH)
        tuned.activate()
    tuned.detach()
    deltune.quantize(model, TORCH)
    hooked = build("llama")
    hooked.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(StateError, match="hooks"):
        deltune.quantize(hooked, TORCH)


def test_linear_maps_are_found_without_values() -> None:
    assert len(linear_maps(LLAMA.model())) == 210
    assert len(linear_maps(BERT_BASE.model())) == 72


@engines
def test_a_dequantised_model_has_one_type_whatever_the_layers_computed_in(engine: str) -> None:
    model = dequantize(quantized("llama", "language", deltune.NF4(compute_dtype=torch.bfloat16, engine=engine)))
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert output(model, ARCHITECTURES["llama"].batch(head="language")).dtype == torch.float32
