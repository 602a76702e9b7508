"""Sequential adapters, against their fact sheet.

Its invariant 7, and the halves of 1, 2, 3 and 6 that concern the placement of Pfeiffer et al., are in
``test_pfeiffer_adapter``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.methods import parse
from deltune.methods.additive.bottleneck import Bottleneck
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, BERT_LARGE, LLAMA
from tests.zoo import ARCHITECTURES

#: Normalised after the sum, and before the sublayer.
POST, PRE = ["bert", "bart"], ["gpt2", "llama-gqa", "t5"]
SMALL = "sequential-adapter(width=4, standard_deviation=0.1)"


def forms_of(tuned: deltune.Tuned) -> dict[str, Bottleneck]:
    return {key: form for key, _, form in tuned.attachments["default"].sites}  # type: ignore[misc]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", POST + PRE)
def test_invariant_01_zero_weights_upwards_are_the_frozen_model(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype=dtype)
    architecture = ARCHITECTURES[name]
    batch = architecture.batch(head="language" if architecture.generates else "classification")
    before = output(model, batch)
    tuned = deltune.attach(model, SMALL)
    assert not torch.equal(output(model, batch), before)
    with torch.no_grad():
        for form in forms_of(tuned).values():
            form.up.weight.zero_()
            form.up.bias.zero_()
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_invariant_02_near_the_identity_at_the_start(name: str) -> None:
    model = build(name, head="base")
    batch = ARCHITECTURES[name].batch()
    before = output(model, batch)
    deltune.attach(model, "sequential-adapter(width=8)")
    difference = (output(model, batch) - before).abs().max()
    assert 0 < difference < 5e-2


def test_invariant_02_initial_weights_are_truncated_at_two_deviations() -> None:
    form = Bottleneck(300, 40, initialization="truncated", standard_deviation=1e-2)
    for linear in (form.down, form.up):
        assert not linear.bias.any()
        assert linear.weight.abs().max() <= 2e-2
        assert 0.86e-2 < float(linear.weight.std()) < 0.90e-2  # of a normal one of 1e-2, cut at two


def test_invariant_03_published_counts() -> None:
    without = "sequential-adapter(width={}, train_norms=false)"
    for width, expected in ((8, 313_536), (64, 2_379_264), (256, 9_461_760)):
        assert BERT_BASE.count(without.format(width)) == expected
    assert BERT_BASE.count("sequential-adapter(width=64)") == 2_379_264 + 38_400
    assert BERT_BASE.summary("sequential-adapter", head=True).parameters == 2_417_664 + 1_538
    for width, expected in ((8, 588_000), (64, 4_462_080), (256, 17_744_640)):
        assert LLAMA.count(without.format(width)) == expected
    assert LLAMA.count("sequential-adapter(width=64)") == 4_497_216
    for width, expected in ((8, 936_320), (64, 6_444_032), (256, 25_327_616)):
        assert BERT_LARGE.count(f"sequential-adapter(width={width})") == expected


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_invariant_04_frozen_values_stay_and_have_no_gradient(name: str) -> None:
    tuned, batch = attached(name, SMALL)
    with tuned.disabled():
        before = bits(tuned.model)
    optimizer = torch.optim.AdamW(tuned.model.parameters(), lr=1e-2, weight_decay=0.5)
    trainable = {id(value) for value in tuned.trainable_parameters()}
    for _ in range(10):
        optimizer.zero_grad()
        loss_of(tuned.model, batch).backward()
        assert all(value.grad is None for value in tuned.model.parameters() if id(value) not in trainable)
        optimizer.step()
    with tuned.disabled():
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu_pytorch_tanh", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
        ("gelu", lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5))),
        ("relu", lambda x: x.clamp(min=0)),
        ("silu", lambda x: x / (1 + torch.exp(-x))),
    ],
)
def test_invariant_05_the_module_is_its_formula(activation: str, function: object) -> None:
    form = Bottleneck(6, 3, activation, dtype=torch.float64)
    for parameter in form.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    narrow = function(x @ form.down.weight.T + form.down.bias)  # type: ignore[operator]
    assert (form(x) - (narrow @ form.up.weight.T + form.up.bias)).abs().max() < 1e-12


def adapted(form: Bottleneck, x: Tensor) -> Tensor:
    """A(x), with its own residual connection."""
    return x + F.linear(
        F.gelu(F.linear(x, form.down.weight, form.down.bias), approximate="tanh"), *form.up.parameters()
    )


def test_invariant_06_placement_where_norms_follow_the_sum() -> None:
    """BERT, written out: a = LN1(x + A1(attn)), y = LN2(a + A2(ffn(a)))."""
    tuned, batch = attached("bert", SMALL, head="base", dtype=torch.float64)
    train(tuned, batch)
    model, forms = tuned.model, forms_of(tuned)
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        for index, layer in enumerate(model.encoder.layer):
            x = hidden[index]
            # the projection without what is attached to it
            attention = layer.attention.output.dense(layer.attention.self(x)[0])
            a = layer.attention.output.LayerNorm(x + adapted(forms[f"encoder.{index}.attention"], attention))
            projection = layer.output.dense(layer.intermediate(a))
            y = layer.output.LayerNorm(a + adapted(forms[f"encoder.{index}.ffn"], projection))
            assert relative_error(hidden[index + 1], y) < 1e-12


def test_invariant_06_placement_where_norms_come_first() -> None:
    """GPT-2, written out: s = x + A1(attn(ln1(x))), y = s + A2(mlp(ln2(s)))."""
    tuned, batch = attached("gpt2", SMALL, dtype=torch.float64)
    train(tuned, batch)
    model, forms = tuned.model, forms_of(tuned)
    seen: dict[int, list[Tensor]] = {}
    handles = [
        block.register_forward_hook(
            lambda module, args, result, index=index: seen.update({index: [args[0], result]})  # type: ignore[misc]
        )
        for index, block in enumerate(model.transformer.h)
    ]
    output(model, batch)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for index, block in enumerate(model.transformer.h):
            x, y = seen[index]
            y = y if isinstance(y, Tensor) else y[0]
            queries, keys, values = (
                piece.unflatten(-1, (4, 8)).transpose(1, 2) for piece in block.attn.c_attn(block.ln_1(x)).split(32, -1)
            )
            mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True).transpose(1, 2).flatten(2)
            s = x + adapted(forms[f"decoder.{index}.attention"], block.attn.c_proj(mixed))
            inner = block.mlp.c_proj(block.mlp.act(block.mlp.c_fc(block.ln_2(s))))
            assert relative_error(y, s + adapted(forms[f"decoder.{index}.ffn"], inner)) < 1e-12


@pytest.mark.parametrize(("name", "module"), [("bert", "bert.encoder.layer.0.output"), ("gpt2", "transformer.h.0.mlp")])
def test_invariant_06_it_reads_the_result_after_dropout(name: str, module: str) -> None:
    model = build(name, dropout=0.5)
    tuned = deltune.attach(model, SMALL)
    site = next(site for key, site, _ in tuned.attachments["default"].sites if key.endswith(".0.ffn"))
    assert site.result == f"{module}.dropout"  # type: ignore[union-attr]
    assert isinstance(model.get_submodule(site.result), nn.Dropout)  # type: ignore[union-attr]


@pytest.mark.parametrize(("published", "norms"), [(BERT_BASE, 25), (LLAMA, 61)])
def test_invariant_08_every_norm_trains_or_none(published: object, norms: int) -> None:
    model = published.model()  # type: ignore[attr-defined]
    for on in (True, False):
        rows = published.summary(f"sequential-adapter(train_norms={on})").rows  # type: ignore[attr-defined]
        selected = {row.site.rpartition(".")[0] for row in rows if row.kind == "select"}
        kinds = {type(model.get_submodule(name)).__name__ for name in selected}
        assert len(selected) == (norms if on else 0)
        assert all("Norm" in kind for kind in kinds)
        assert len(kinds) == int(on)


def test_invariant_09_tokens_are_adapted_one_by_one() -> None:
    form = Bottleneck(6, 3, initialization="normal", standard_deviation=0.5, dtype=torch.float64)
    x = torch.randn(2, 7, 6, dtype=torch.float64)
    order = torch.randperm(7)
    assert (form(x)[:, order] - form(x[:, order])).abs().max() < 1e-12
    other = x.clone()
    other[:, 3] = 100
    change = (form(other) - form(x)).abs().amax((0, 2))
    assert (change > 0).tolist() == [place == 3 for place in range(7)]


def test_invariant_10_the_file_alone_reproduces_logits(tmp_path: Path) -> None:
    tuned, batch = attached("bert", "sequential-adapter(width=16)")
    train(tuned, batch)
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build("bert"), tmp_path).model, batch), output(tuned.model, batch))
    content = 4 * tuned.summary().parameters
    assert sum(value.nbytes for value in load_file(tmp_path / "delta.safetensors").values()) == content
    assert content < (tmp_path / "delta.safetensors").stat().st_size < content + 16_000


def test_invariant_11_off_is_the_frozen_model() -> None:
    tuned, batch = attached("bert", SMALL)
    train(tuned, batch)
    bare = output(build("bert"), batch)
    assert not torch.equal(output(tuned.model, batch), bare)
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), bare)
    tuned.activate()
    assert torch.equal(output(tuned.model, batch), bare)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_invariant_12_half_precision_stays_half(dtype: torch.dtype) -> None:
    model = build("bert", dtype=dtype)
    tuned = deltune.attach(model, SMALL)
    assert output(model, ARCHITECTURES["bert"].batch()).dtype == dtype
    assert {value.dtype for value in tuned.trainable_parameters()} == {dtype}
    # a form kept in another type computes in that of its input
    assert Bottleneck(4, 2)(torch.randn(3, 4, dtype=dtype)).dtype == dtype


def test_files_written_before_there_were_more_options_are_read() -> None:
    saved = {"name": "sequential-adapter", "width": 8, "activation": "relu", "standard_deviation": 0.01}
    saved |= {"train_norms": False, "targets": "attention,ffn"}
    method = parse(saved)
    assert method == deltune.SequentialAdapter(width=8, activation="relu", standard_deviation=0.01, train_norms=False)
    tuned, _ = attached("bert", str(method))
    assert set(forms_of(tuned)["encoder.0.ffn"].state_dict()) == {"down.weight", "down.bias", "up.weight", "up.bias"}
