"""LoRA, against its fact sheet and against Hugging Face peft.

Left for later: 11 (DoRA) and 12 (PiSSA), which are methods of their own; embeddings and convolutions as sites.
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods.reparameterized.low_rank import LowRank
from tests.methods.common import (
    attached,
    bits,
    build,
    loss_of,
    matrix_site,
    output,
    relative_error,
    singular_values,
    train,
)
from tests.methods.sizes import BERT_BASE, LLAMA, ROBERTA_BASE
from tests.zoo import ARCHITECTURES

ALL_MATRICES = "lora(rank=2, alpha=4, targets='attention.* ffn.*')"
#: Ordinary matrices, transposed fused ones, interleaved ones, fused queries/keys/values and gates, T5.
LAYOUTS = ["bert", "gpt2", "gpt_neox", "llama-gqa", "phi3", "modernbert", "t5"]


def forms_of(tuned: deltune.Tuned, name: str = "default") -> dict[str, LowRank]:
    return {key: form for key, _, form in tuned.attachments[name].sites}  # type: ignore[misc]


@pytest.mark.parametrize("name", LAYOUTS)
def test_1_step_0_is_exactly_the_frozen_model(name: str) -> None:
    model = build(name)
    batch = ARCHITECTURES[name].batch(head="classification" if name in ("bert", "modernbert") else "language")
    before = output(model, batch)
    deltune.attach(model, ALL_MATRICES)
    assert torch.equal(output(model, batch), before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_2_and_3_merged_equals_unmerged_and_unmerging_restores_the_bits(name: str) -> None:
    tuned, batch = attached(name, ALL_MATRICES)
    before = bits(tuned.model)
    train(tuned, batch)
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-5
    tuned.unmerge()
    with tuned.disabled():
        for key, value in tuned.model.state_dict().items():
            assert torch.equal(value, before[key]), key


def test_2_merging_for_good_leaves_an_ordinary_model() -> None:
    tuned, batch = attached("gpt2", ALL_MATRICES)
    train(tuned, batch)
    unmerged, keys = output(tuned.model, batch), build("gpt2").state_dict().keys()
    model = tuned.merge(reversible=False)
    assert relative_error(output(model, batch), unmerged) < 1e-5
    assert model.state_dict().keys() == keys
    assert all(value.requires_grad for value in model.parameters())


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_4_rank_of_the_change_is_at_most_r(rank: int) -> None:
    tuned, batch = attached("bert", f"lora(rank={rank}, targets='attention.* ffn.*')")
    train(tuned, batch)
    for form in forms_of(tuned).values():
        values = singular_values(form.weight_delta().detach())
        assert values[rank] < 1e-5 * values[0]
        assert values[0] > 0


@pytest.mark.parametrize("name", LAYOUTS)
def test_5_at_step_0_only_b_has_a_gradient(name: str) -> None:
    tuned, batch = attached(name, ALL_MATRICES)
    loss_of(tuned.model, batch).backward()
    for key, form in forms_of(tuned).items():
        assert form.A.grad is not None, key
        assert form.B.grad is not None, key
        assert not form.A.grad.any(), key
        assert form.B.grad.abs().max() > 0, key


def test_6_the_scale_is_alpha_over_rank() -> None:
    assert deltune.LoRA(rank=4, alpha=32).scale(4) == 8
    x = torch.randn(3, 6)
    plain, doubled, stable = (
        LowRank(matrix_site(6, 5), 4, deltune.LoRA(rank=4, **options).scale(4))
        for options in ({"alpha": 3}, {"alpha": 6}, {"alpha": 3, "rank_stabilized": True})
    )
    nn.init.normal_(plain.B)
    for other in (doubled, stable):
        other.load_state_dict(plain.state_dict())
    assert torch.equal(doubled(x), 2 * plain(x))
    assert torch.allclose(stable(x), math.sqrt(4) * plain(x), rtol=1e-6)
    assert torch.equal(doubled.weight_delta(), 2 * plain.weight_delta())
    assert torch.allclose(plain(x), x @ plain.weight_delta().T, atol=1e-6)
    base = torch.randn(3, 5)
    assert torch.allclose(plain.add_to(base, x, 0.3), base + 0.3 * plain(x), atol=1e-6)


def test_6_the_scale_reaches_the_model() -> None:
    outputs = []
    for alpha in (2, 4):
        tuned, batch = attached("bert", f"lora(rank=2, alpha={alpha}, targets=classifier)", head="tokens")
        with torch.no_grad():
            for form in forms_of(tuned).values():
                form.B.copy_(torch.randn(form.B.shape, generator=torch.Generator().manual_seed(0)))
        outputs.append(output(tuned.model, batch))
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert torch.allclose(outputs[1] - bare, 2 * (outputs[0] - bare), atol=1e-5)
    assert (outputs[0] - bare).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_7_only_a_and_b_train_and_frozen_bits_stay(name: str) -> None:
    model = build(name)
    before = bits(model)
    tuned = deltune.attach(model, ALL_MATRICES, train_head=False)
    assert {key.rsplit(".", 1)[1] for key, _ in tuned.named_trainable_parameters()} == {"A", "B"}
    trainable = {id(value) for value in tuned.trainable_parameters()}
    assert {id(value) for value in model.parameters() if value.requires_grad} == trainable
    head = "classification" if name == "bert" else "language"
    # everything is given to the optimizer: what has no gradient must not be decayed either
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for seed in range(4):
        optimizer.zero_grad()
        loss_of(model, ARCHITECTURES[name].batch(seed=seed, head=head)).backward()  # type: ignore[arg-type]
        optimizer.step()
    state = model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in before.items())


def fused_change(model: Any, tuned: deltune.Tuned, name: str) -> Tensor:
    """The change of a fused matrix by merging, as (out, in)."""
    before = model.get_submodule(name).weight.detach().clone()
    tuned.merge()
    change = (model.get_submodule(name).weight - before).detach()
    tuned.unmerge()
    return change.T if type(model.get_submodule(name)).__name__ == "Conv1D" else change


def test_8_fused_rows_change_alone_and_each_like_a_lora_of_its_own() -> None:
    """GPT-2's queries and values, not its keys."""
    model = build("gpt2")
    batch = ARCHITECTURES["gpt2"].batch(head="language")
    tuned = deltune.attach(model, "lora(rank=2, targets=attention.query,attention.value)")
    train(tuned, batch)
    query, key, value = fused_change(model, tuned, "transformer.h.1.attn.c_attn").split(32)
    assert not key.any()
    forms = forms_of(tuned)
    assert torch.allclose(query, forms["decoder.1.attention.query"].weight_delta(), atol=1e-6)
    assert torch.allclose(value, forms["decoder.1.attention.value"].weight_delta(), atol=1e-6)
    # the same forms on separate matrices: GPT-2's arithmetic, written out with three linear maps
    x = torch.randn(2, 5, 32)
    module = model.transformer.h[1].attn.c_attn
    with torch.no_grad():
        pieces = list((x @ module.weight + module.bias).split(32, -1))
        pieces[0] = pieces[0] + forms["decoder.1.attention.query"](x)
        pieces[2] = pieces[2] + forms["decoder.1.attention.value"](x)
        assert torch.allclose(module(x), torch.cat(pieces, -1), atol=1e-5)


def test_8_interleaved_rows_are_those_of_their_heads() -> None:
    """GPT-NeoX: query, key, value alternate head by head, 8 rows each."""
    model = build("gpt_neox")
    batch = ARCHITECTURES["gpt_neox"].batch(head="language")
    tuned = deltune.attach(model, "lora(rank=2, targets=attention.query,attention.value)")
    train(tuned, batch)
    change = fused_change(model, tuned, "gpt_neox.layers.0.attention.query_key_value").view(4, 3, 8, 32)
    forms = forms_of(tuned)
    assert not change[:, 1].any()
    assert torch.allclose(change[:, 0].reshape(32, 32), forms["decoder.0.attention.query"].weight_delta(), atol=1e-6)
    assert torch.allclose(change[:, 2].reshape(32, 32), forms["decoder.0.attention.value"].weight_delta(), atol=1e-6)


def test_9_dropout_touches_the_branchs_input_alone_and_only_in_training() -> None:
    form = LowRank(matrix_site(6, 5), 2, 1.5, dropout=0.5)
    nn.init.normal_(form.B)
    x, base = torch.randn(40, 6), torch.randn(40, 5)
    exact = x @ form.weight_delta().T
    assert torch.allclose(form.eval()(x), exact, atol=1e-6)
    torch.manual_seed(0)
    noisy = form.train().add_to(base, x)
    torch.manual_seed(0)
    # of the input, not of the branch's output, which would be another method
    expected = base + F.dropout(x, 0.5) @ form.weight_delta().T
    assert torch.allclose(noisy, expected, atol=1e-6)
    assert not torch.allclose(noisy, base + exact, atol=1e-2)

    tuned, batch = attached("bert", "lora(rank=2, dropout=0.9)")
    tuned.model.train()  # the model itself has no dropout: with B = 0 the frozen path is exact
    with tuned.disabled():
        bare = output(tuned.model, batch)
    assert torch.equal(output(tuned.model, batch), bare)


@pytest.mark.parametrize("name", LAYOUTS)
def test_10_count_is_the_formulas_and_the_file_holds_the_adapter_alone(name: str, tmp_path: Path) -> None:
    model = build(name)
    head = "classification" if name in ("bert", "modernbert") else "language"
    batch = ARCHITECTURES[name].batch(head=head)  # type: ignore[arg-type]
    tuned = deltune.attach(model, ALL_MATRICES, train_head=False)
    train(tuned, batch)
    expected = sum(2 * (form.A.shape[1] + form.B.shape[0]) for form in forms_of(tuned).values())
    assert tuned.summary().parameters == expected
    tuned.save(tmp_path)
    tensors = load_file(tmp_path / "delta.safetensors")
    assert {key.rsplit(".", 1)[1] for key in tensors} == {"A", "B"}
    assert sum(value.numel() for value in tensors.values()) == expected
    assert torch.equal(output(deltune.load(build(name), tmp_path).model, batch), output(model, batch))


def test_10_published_counts() -> None:
    assert BERT_BASE.count("lora") == 294_912
    assert BERT_BASE.summary("lora").bytes == 4 * 294_912  # 1.18 MB
    assert BERT_BASE.summary("lora", head=True).head_parameters == 1_538
    assert BERT_BASE.count("lora(rank=8, targets='attention.* ffn.*')") == 1_327_104
    assert BERT_BASE.count("lora(rank=1, targets='attention.* ffn.*')") == 165_888
    assert ROBERTA_BASE.summary("lora", head=True).head_parameters == 592_130
    assert LLAMA.count("lora") == 460_800
    assert LLAMA.count("lora(targets='attention.* ffn.*')") == 2_442_240
    assert LLAMA.count("lora(rank=16, targets='attention.* ffn.*')") == 4_884_480


def test_initial_values_are_uniform_by_the_width_of_the_input() -> None:
    """Not by that of the output, which would be another scale."""
    form = LowRank(matrix_site(400, 25), 16, 1.0)
    assert not form.B.any()
    assert form.A.abs().max() <= 1 / math.sqrt(400)
    assert form.A.abs().max() > 0.98 / math.sqrt(400)
    assert abs(float(form.A.std()) - 1 / math.sqrt(3 * 400)) < 2e-3


def test_the_defaults_are_the_papers() -> None:
    method = deltune.LoRA()
    assert (method.rank, method.alpha, method.dropout) == (8, 16, 0)
    assert method.targets.names == ("attention.query", "attention.value")


# -- faults of peers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", ["rank=2", "rank=4, rank_stabilized=true"])
def test_a_sum_with_weight_1_is_the_adapter_itself(options: str) -> None:
    """A peer is off by 92 % for rsLoRA."""
    tuned, batch = attached("bert", f"lora({options})")
    train(tuned, batch)
    alone = output(tuned.model, batch)
    tuned.activate("default", weights=(1.0,))
    assert torch.equal(output(tuned.model, batch), alone)


def test_a_misspelt_target_is_an_error_also_beside_a_right_one() -> None:
    with pytest.raises(TargetError, match=r"attention\.query"):
        deltune.attach(build("bert"), "lora(targets=attention.query,attention.quary)")


def test_switching_between_modes_accumulates_nothing() -> None:
    """The authors' code merges in eval and unmerges in train, adding a rounding error each time."""
    tuned, batch = attached("bert", ALL_MATRICES)
    train(tuned, batch)
    before, first = bits(tuned.model), output(tuned.model, batch)
    for _ in range(5):
        tuned.merge()
        tuned.unmerge()
        tuned.model.train()
        tuned.model.eval()
    assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())
    assert torch.equal(output(tuned.model, batch), first)


def test_merging_into_half_precision_adds_in_float32() -> None:
    """A change that is kept in float32 is rounded once, with the sum; not by itself first."""
    tuned, _ = attached("bert", "lora(rank=4, targets=attention.query)", dtype=torch.bfloat16)
    form = forms_of(tuned)["encoder.0.attention.query"].float()
    nn.init.normal_(form.B)
    module = tuned.model.bert.encoder.layer[0].attention.self.query
    change = form.weight_delta().detach()
    once, twice = ((module.weight.float() + part.float()).bfloat16() for part in (change, change.bfloat16()))
    assert not torch.equal(once, twice)
    tuned.merge()
    assert torch.equal(module.weight, once)


def test_twice_merged_and_saved_while_merged_are_refused(tmp_path: Path) -> None:
    tuned, _ = attached("bert", "lora(rank=2)")
    tuned.merge()
    for refused in (tuned.merge, lambda: tuned.save(tmp_path), lambda: tuned.attach("lora", name="second")):
        with pytest.raises(StateError, match="unmerge"):
            refused()
    assert not list(tmp_path.iterdir())


def test_a_matrix_tied_to_another_is_not_merged() -> None:
    """It would change the embeddings too."""
    model = build("gpt2")
    tuned = deltune.attach(model, "lora(rank=2, targets=lm_head)")
    with pytest.raises(StateError, match="tied"):
        tuned.merge()


@pytest.mark.parametrize("options", ["rank=0", "alpha=0", "dropout=1", "rank=33"])
def test_impossible_options_are_refused(options: str) -> None:
    with pytest.raises(MethodError):
        deltune.attach(build("bert"), f"lora({options})")


# -- Hugging Face peft as a reference -------------------------------------------------------------------------

PEFT_CASES = {
    # ours, theirs, whether their matrix is stored transposed
    "bert": ("attention.query,attention.value,ffn.up", ["query", "value", "intermediate.dense"], False),
    "gpt2": ("*.attn.c_attn,*.mlp.c_proj", ["attn.c_attn", "mlp.c_proj"], True),
    "llama-gqa": (
        "attention.* ffn.*",
        ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj"],
        False,
    ),
}


@pytest.mark.parametrize("stabilized", [False, True])
@pytest.mark.parametrize("name", PEFT_CASES)
def test_equals_huggingface_peft(name: str, stabilized: bool) -> None:
    """Same A and B: equal outputs, and equal gradients of both."""
    peft = pytest.importorskip("peft", reason="Hugging Face peft is not installed")
    targets, names, transposed = PEFT_CASES[name]
    method = f"lora(rank=3, alpha=5, rank_stabilized={stabilized}, targets='{targets}')"
    tuned, batch = attached(name, method, dtype=torch.float64)
    with torch.no_grad():
        for form in forms_of(tuned).values():
            form.B.normal_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(
            build(name, dtype=torch.float64),
            peft.LoraConfig(r=3, lora_alpha=5, target_modules=names, fan_in_fan_out=transposed, use_rslora=stabilized),
        )
    modules = dict(theirs.base_model.model.named_modules())
    pairs = []
    for _, site, form in tuned.attachments["default"].sites:
        module = modules[site.part.module]
        for mine, other in ((form.A, module.lora_A["default"].weight), (form.B, module.lora_B["default"].weight)):
            other.data.copy_(mine.data)
            pairs.append((site.key, mine, other))
    assert len(pairs) == sum("lora_" in key for key, _ in theirs.named_parameters())
    theirs.eval()
    assert relative_error(output(tuned.model, batch), output(theirs, batch)) < 1e-6
    loss_of(tuned.model, batch).backward()
    loss_of(theirs, batch).backward()
    for key, mine, other in pairs:
        assert relative_error(mine.grad, other.grad) < 1e-6, key
