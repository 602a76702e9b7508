"""KronA in models, against its fact sheet, torch.kron and the LoKr of Hugging Face peft.

Numbers are those of the sheet's invariants; see also test_krona_product.py and, for KronA_B, test_krona_b.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError, StateError
from deltune.methods.reparameterized.krona import Kronecker
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

ALL_MATRICES = "krona(scale=2, targets='attention.* ffn.*')"
#: Ordinary matrices, transposed fused ones, interleaved ones, fused queries/keys/values and gates, T5.
LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, Kronecker]:
    return {key: form for key, _, form in tuned.attachments[name].sites if isinstance(form, Kronecker)}


def by_entries(A: Tensor, B: Tensor) -> Tensor:
    """A kron B from the formula of its entries, one by one."""
    (a1, a2), (b1, b2) = A.shape, B.shape
    product = A.new_empty(a1 * b1, a2 * b2)
    for i in range(a1):
        for j in range(a2):
            for p in range(b1):
                for q in range(b2):
                    product[i * b1 + p, j * b2 + q] = A[i, j] * B[p, q]
    return product


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("rows=5", r"rows=5 does not divide the height 32 of encoder\.0\.attention\.query.* 1, 2, 4, 8, 16, 32"),
        ("columns=64", "columns=64 does not divide the width 32"),
        ("rows=8, columns=3", "columns=3"),
        ("rows=0", "at least 1"),
        ("scale=0", "greater than 0"),
        ("zero=none", "'none'"),
        ("zero=C", "cannot be"),
    ],
)
def test_3_shapes_that_do_not_divide_are_refused(options: str, words: str) -> None:
    with pytest.raises(MethodError, match=words):
        attached("bert", f"krona({options})")


def test_3_shapes_as_declared() -> None:
    tuned, _ = attached("llama-gqa", "krona(rows=2, targets='attention.* ffn.*')")
    for key, site, form in tuned.attachments["default"].sites:
        assert isinstance(form, Kronecker)
        assert form.A.shape[0] == 2, key
        sides = [one * other for one, other in zip(form.A.shape, form.B.shape, strict=True)]
        assert sides == [site.out_features, site.in_features], key  # type: ignore[attr-defined]
    chosen = "krona(rows=4, columns=2, targets=attention.query) + krona(rows=16, targets=attention.value)"
    tuned, _ = attached("bert", chosen)
    forms = forms_of(tuned)
    assert forms["0.encoder.0.attention.query"].A.shape == (4, 2)
    assert forms["0.encoder.0.attention.query"].B.shape == (8, 16)
    assert forms["1.encoder.0.attention.value"].A.shape == (16, 4)
    assert forms["1.encoder.0.attention.value"].B.shape == (2, 8)


@pytest.mark.parametrize(
    ("side", "pair"),
    [
        (768, (24, 32)),
        (576, (24, 24)),
        (1024, (32, 32)),
        (3072, (48, 64)),
        (1536, (32, 48)),
        (192, (12, 16)),
        (31, (1, 31)),
    ],
)
def test_3_the_default_is_near_square(side: int, pair: tuple[int, int]) -> None:
    (placed,) = _placed(side, 6)
    assert (placed.A.shape[0], placed.B.shape[0]) == pair
    assert (placed.A.shape[1], placed.B.shape[1]) == (2, 3)
    (placed,) = _placed(6, side)
    assert (placed.A.shape[1], placed.B.shape[1]) == pair


def _placed(out_features: int, in_features: int) -> list[Kronecker]:
    model = nn.ModuleDict({"map": nn.Linear(in_features, out_features, device="meta")})
    return list(forms_of(deltune.attach(model, "krona(targets=map)")).values())


@pytest.mark.parametrize("zero", ["A", "B"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_5_step_0_is_the_frozen_model_and_only_the_zero_factor_has_a_gradient(name: str, zero: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    before = output(model, batch)
    tuned = deltune.attach(model, f"krona(zero={zero}, targets='attention.* ffn.*')")
    assert torch.equal(output(model, batch), before)
    loss_of(model, batch).backward()
    for key, form in forms_of(tuned).items():
        empty, other = (form.A, form.B) if zero == "A" else (form.B, form.A)
        assert not empty.any(), key
        assert other.any(), key
        assert empty.grad is not None, key
        assert empty.grad.abs().max() > 0, key
        assert other.grad is not None, key
        assert not other.grad.any(), key
    train(tuned, batch)
    assert relative_error(output(model, batch), before) > 1e-4


@pytest.mark.parametrize("name", LAYOUTS)
def test_6_merged_equals_unmerged_and_unmerging_restores_the_bits(name: str) -> None:
    tuned, batch = attached(name, ALL_MATRICES)
    before = bits(tuned.model)
    train(tuned, batch)
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    assert torch.equal(output(tuned.model, batch), unmerged)
    with tuned.disabled():
        for key, value in tuned.model.state_dict().items():
            assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_6_the_merged_change_of_fused_rows_is_the_explicit_product(name: str) -> None:
    tuned, batch = attached(name, "krona(scale=2, rows=2, columns=8)")
    train(tuned, batch)
    module = {"gpt2": "transformer.h.1.attn.c_attn", "gpt_neox": "gpt_neox.layers.1.attention.query_key_value"}[name]
    before = tuned.model.get_submodule(module).weight.detach().clone()
    tuned.merge()
    change = tuned.model.get_submodule(module).weight.detach() - before
    query, key, value = change.T.split(32) if name == "gpt2" else change.view(4, 3, 8, 32).unbind(1)
    assert not key.any()
    forms = forms_of(tuned)
    for role, found in (("query", query), ("value", value)):
        form = forms[f"decoder.1.attention.{role}"]
        assert form.A.shape == (2, 8)
        expected = 2 * by_entries(form.A.detach(), form.B.detach())
        assert torch.allclose(found.reshape(32, 32), expected, atol=1e-6), role


@pytest.mark.parametrize("name", LAYOUTS)
def test_7_the_count_is_the_formulas_and_the_file_holds_the_factors_alone(name: str, tmp_path: Path) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    torch.manual_seed(1)
    tuned = deltune.attach(model, ALL_MATRICES, train_head=False)
    train(tuned, batch)
    assert {key.rsplit(".", 1)[1] for key, _ in tuned.named_trainable_parameters()} == {"A", "B"}
    shapes = [(*form.A.shape, *form.B.shape) for form in forms_of(tuned).values()]
    assert tuned.summary().parameters == sum(a1 * a2 + b1 * b2 for a1, a2, b1, b2 in shapes)
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build(name), tmp_path).model, batch), output(model, batch))


def test_7_published_counts() -> None:
    assert BERT_BASE.count("krona(columns=32)") == 36_864
    assert BERT_BASE.count("krona(columns=32)") == BERT_BASE.count("lora(rank=1)")
    assert BERT_BASE.count("krona") == 38_400
    assert LLAMA.count("krona(targets=attention.query)") == 30 * 1_152
    assert LLAMA.count("krona") == 54_720


def test_8_the_scale_is_a_factor_of_the_change() -> None:
    outputs = []
    for scale in (2, 4):
        tuned, batch = attached("bert", f"krona(scale={scale}, targets=classifier)", head="tokens")
        with torch.no_grad():
            for form in forms_of(tuned).values():
                form.B.copy_(torch.randn(form.B.shape, generator=torch.Generator().manual_seed(0)))
        outputs.append(output(tuned.model, batch))
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert torch.allclose(outputs[1] - bare, 2 * (outputs[0] - bare), atol=1e-5)
    assert (outputs[0] - bare).abs().max() > 1e-2


# -- initial values, embeddings, options ------------------------------------------------------------------------


def test_the_defaults_are_the_papers() -> None:
    method = deltune.KronA()
    assert (method.scale, method.rows, method.columns, method.zero) == (1, None, None, "B")
    assert method.targets.names == ("attention.query", "attention.value")
    assert method.mergeable


@pytest.mark.parametrize("name", ["bert", "gemma2"])
def test_an_embedding_is_a_matrix_too(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name == "bert" else "language")
    bare = output(model, batch)
    torch.manual_seed(1)
    tuned = deltune.attach(model, "krona(targets=embeddings)", train_head=False)
    assert torch.equal(output(model, batch), bare)
    (form,) = forms_of(tuned).values()
    assert form.A.shape[1] * form.B.shape[1] == 100  # the vocabulary is the input
    train(tuned, batch)
    trained = output(model, batch)
    assert relative_error(trained, bare) > 1e-4
    if name == "gemma2":
        with pytest.raises(StateError, match="tied"):
            tuned.merge()
        return
    tuned.merge()
    assert relative_error(output(model, batch), trained) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_number_types(dtype: torch.dtype) -> None:
    tuned, batch = attached("bert", ALL_MATRICES, dtype=dtype)
    train(tuned, batch)
    assert {value.dtype for value in tuned.trainable_parameters()} == {dtype}
    found = output(tuned.model, batch)
    assert found.dtype == dtype
    tuned.merge()
    assert relative_error(output(tuned.model, batch), found) < (1e-12 if dtype == torch.float64 else 0.1)


def test_two_attachments_and_weights() -> None:
    """At one matrix the weighted sum is the sum of the weighted changes."""
    model, batch = build("bert", "tokens"), ARCHITECTURES["bert"].batch(head="tokens")
    bare = output(model, batch)
    tuned = deltune.attach(model, "krona(targets=classifier)", "one", train_head=False)
    train(tuned, batch, lr=0.1)
    one = output(model, batch)
    tuned.attach("krona(rows=1, zero=A, targets=classifier)", "other", train_head=False)
    train(tuned, batch, lr=0.1)
    other = output(model, batch)
    assert min(relative_error(one, bare), relative_error(other, bare)) > 1e-3
    tuned.activate("one", "other", weights=(0.5, 2.0))
    assert torch.allclose(output(model, batch), bare + 0.5 * (one - bare) + 2 * (other - bare), atol=1e-5)


# -- Hugging Face peft as a reference ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "llama-gqa"])
def test_equals_the_full_lokr_of_huggingface_peft(name: str) -> None:
    """With both factors full; its scale alpha / r, of a rank that then means nothing, is set to ours."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    tuned, batch = attached(name, "krona(scale=1.5)", dtype=torch.float64)
    names = ["query", "value"] if name == "bert" else ["q_proj", "v_proj"]
    theirs = peft.get_peft_model(
        build(name, dtype=torch.float64), peft.LoKrConfig(r=64, alpha=96, target_modules=names)
    )
    modules = dict(theirs.base_model.model.named_modules())
    pairs = []
    for _, site, form in tuned.attachments["default"].sites:
        assert isinstance(form, Kronecker)
        nn.init.normal_(form.B)
        module = modules[site.part.module]
        for mine, other in ((form.A, module.lokr_w1["default"]), (form.B, module.lokr_w2["default"])):
            other.data.copy_(mine.data)  # of the same shapes
            pairs.append((site.key, mine, other))
    assert len(pairs) == sum("lokr_" in key for key, _ in theirs.named_parameters())
    theirs.eval()
    assert relative_error(output(tuned.model, batch), output(theirs, batch)) < 1e-6
    loss_of(tuned.model, batch).backward()
    loss_of(theirs, batch).backward()
    for key, mine, other in pairs:
        assert relative_error(mine.grad, other.grad) < 1e-6, key
