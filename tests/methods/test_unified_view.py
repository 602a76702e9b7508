"""The unified view, against its fact sheet: the table says what the methods compute, and the variants it suggests.

Rows are checked by computing what they say (``stated_rows.py``): the text of a form is evaluated with the form's own
matrices, put where the row says, and combined as the row says, by hooks of the tests' own. The table itself is tested
in ``test_unified_table.py``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import MethodError, StateError, TargetError
from deltune.methods import all_variants, parse
from deltune.methods.additive.head_adapter import HeadBottleneck
from deltune.methods.additive.prefix_forms import Prefix
from deltune.sites import KeyValueSite
from tests.laws.gate_form import naive_attention, prefixes_of
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.stated_rows import rows_computed
from tests.zoo import ARCHITECTURES

#: Normalised after the sum; before the sublayer, with grouped keys; an encoder and a decoder.
MODELS = ["bert", "llama-gqa", "bart"]
NORMAL = "initialization=normal, dropout=0"
#: The rows of He et al., and those beside them, small.
ROWS = {
    "prefix tuning": "prefix-tuning(length=3, reparameterize=false)",
    "prefix, added": "added-prefix(width=3, initialization=normal)",
    "prefix, scaled": "scaled-prefix(width=3, initialization=normal)",
    "adapter": f"sequential-adapter(width=4, activation=relu, train_norms=false, {NORMAL})",
    "LoRA": "lora(rank=2, alpha=8)",
    "parallel adapter": f"plain-parallel-adapter(width=4, {NORMAL})",
    "parallel adapter, attention": "parallel-attention-adapter(width=4, layer_norm=false, dropout=0)",
    "multi-head parallel adapter": "multi-head-parallel-adapter(width=3, initialization=normal)",
    "scaled parallel adapter": f"scaled-parallel-adapter(width=4, {NORMAL})",
    "gelu": f"scaled-parallel-adapter(width=4, activation=gelu, scale=learned, {NORMAL})",
}


def filled(name: str, method: str, **options: Any) -> tuple[deltune.Tuned, dict[str, Tensor]]:
    """``method`` with weights of some size, so that what it changes is to be seen; biases stay as they are."""
    tuned, batch = attached(name, method, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for form in tuned.attachments["default"].forms.values():
            for value in form.parameters():
                if value.dim() > 1:
                    value.copy_(0.4 * torch.randn(value.shape, generator=generator))
    return tuned, batch


# -- the invariants ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "bart"])
def test_invariant_01_the_gate_form_is_joined_attention(name: str, padding: Any) -> None:
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    tuned, _ = attached(name, ROWS["prefix tuning"], **options)
    batch = ARCHITECTURES[name].batch(padding=padding, head="classification" if name == "bert" else "language")
    reference = build(name, **options)
    with naive_attention(reference, prefixes_of(tuned)):
        expected = output(reference, batch)
    real = slice(None) if name == "bert" else ARCHITECTURES[name].real(batch)
    assert relative_error(output(tuned.model, batch)[real], expected[real]) < 1e-12
    assert relative_error(expected[real], output(build(name, **options), batch)[real]) > 1e-3


@contextmanager
def recorded_queries(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """The queries (B, H, Q, D) of each attention module by name, as the model's eager function is given them."""
    anatomy = deltune.anatomy_of(model)
    modules = {id(model.get_submodule(part.module)): part.module for part in anatomy.of("attention")}
    file = sys.modules[type(model.get_submodule(next(iter(modules.values())))).__module__]
    original, found = vars(file)["eager_attention_forward"], {}

    def function(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        found[modules[id(module)]] = query
        return original(module, query, *args, **kwargs)

    try:
        vars(file)["eager_attention_forward"] = function
        yield found
    finally:
        vars(file)["eager_attention_forward"] = original


@pytest.mark.parametrize("name", MODELS)
def test_invariant_02_the_gate_is_between_none_and_all(name: str) -> None:
    """lam is in (0, 1), and goes to 0 as the products with the prefix go to minus infinity; so it is without one.

    With one token there is one query for each head, and a key against it.
    """
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    tuned, batch = attached(name, "prefix-tuning(length=1, reparameterize=false)", **options)
    batch = {key: value[:1, :1] for key, value in batch.items()}
    bare = build(name, **options)
    with recorded_queries(bare) as queries:
        expected = output(bare, batch)
    against, gates, errors = [0.0, 1.0, 1e4], [], []
    for size in against:
        for _, site, form in tuned.attachments["default"].sites:
            assert isinstance(form, Prefix)
            each = nn.functional.normalize(queries[site.part.module][0, :, 0], dim=-1)
            with torch.no_grad():  # of the query heads that share a key
                form.keys.copy_(-size * each.view(form.keys.shape[0], -1, each.shape[-1]).sum(1, keepdim=True))
        errors.append(relative_error(output(tuned.model, batch), expected))
        q, key = queries[site.part.module][0, :, 0], form.keys.detach()[:, 0]
        logits = (q.view(len(key), -1, q.shape[-1]) * key[:, None]).sum(-1) * q.shape[-1] ** -0.5
        gates.append(torch.sigmoid(logits))
    # with one real key too, lam compares the two products alone
    assert all(((gate >= 0) & (gate < 1)).all() for gate in gates)
    assert (gates[0] > gates[1]).all()
    assert (gates[1] > gates[2]).all()
    assert gates[2].max() < 1e-12
    assert errors[0] > 1e-2
    assert errors[2] < (1e-6 if name == "llama-gqa" else 1e-12)
    with torch.no_grad():
        for _, _, form in tuned.attachments["default"].sites:
            form.keys, form.values = (nn.Parameter(rows[:, :0]) for rows in (form.keys, form.values))  # type: ignore[assignment,index]
    assert relative_error(output(tuned.model, batch), expected) < (1e-6 if name == "llama-gqa" else 1e-12)


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", MODELS)
def test_invariant_03_each_row_is_what_it_says(name: str, row: str) -> None:
    """The row, computed from its own words on the bare model, equals the method."""
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    tuned, batch = filled(name, ROWS[row], **options)
    reference = build(name, **options)
    bare = output(reference, batch)
    with rows_computed(reference, tuned):
        expected = output(reference, batch)
    # LLaMA's norms and softmax are float32 whatever the model is: equal up to their last bits
    assert relative_error(output(tuned.model, batch), expected) < (1e-6 if name == "llama-gqa" else 1e-12)
    assert relative_error(expected, bare) > 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "method",
    [
        "parallel-adapter(width=4)",
        "parallel-attention-adapter(width=4, initialization=kaiming)",
        "sequential-adapter(width=4, initialization=kaiming, train_norms=false)",
        "multi-head-parallel-adapter(width=4)",
        "scaled-prefix(width=4)",
    ],
)
def test_invariant_04_zero_upwards_is_the_frozen_model(name: str, method: str) -> None:
    tuned, batch = attached(name, method)
    assert tuned.attachments["default"].method.unchanged_at_start
    assert torch.equal(output(tuned.model, batch), output(build(name), batch))
    train(tuned, batch)
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert not torch.equal(output(tuned.model, batch), before)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", ["scaled parallel adapter", "prefix, scaled", "multi-head parallel adapter", "LoRA"])
def test_invariant_05_the_scale_is_of_the_change_alone(name: str, row: str) -> None:
    """s = 0 is the frozen model bit for bit, and what one form changes at its place grows with s."""
    tuned, batch = filled(name, ROWS[row], dtype=torch.float64)
    forms = tuned.attachments["default"].forms
    for form in forms.values():
        form.scale = 0.0  # type: ignore[assignment]
    assert torch.equal(output(tuned.model, batch), output(build(name, dtype=torch.float64), batch))
    form = next(iter(forms.values()))
    width = (3, form.keys.shape[0], 5, form.keys.shape[2]) if isinstance(form, HeadBottleneck) else (3, 5, 32)
    x = torch.randn(*width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    more = (0.5,) if isinstance(form, HeadBottleneck) else ()
    changes = []
    for scale in (1.0, 4.0):
        form.scale = scale  # type: ignore[assignment]
        changes.append(form(x, *more).detach())
    assert torch.equal(changes[1], 4 * changes[0])
    assert changes[0].abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_invariant_06_multi_head_adapters_are_blocks_of_one(name: str) -> None:
    """Adapters of single heads, joined; equal to one adapter of block-diagonal matrices on the joined queries."""
    options = {"dtype": torch.float64, "attn_implementation": "eager"}
    tuned, batch = filled(name, "multi-head-parallel-adapter(width=3, initialization=normal, scale=2)", **options)
    _, site, form = list(tuned.attachments["default"].sites)[-1]
    assert isinstance(form, HeadBottleneck)
    assert isinstance(site, KeyValueSite)
    heads, width = site.shape.heads, site.shape.heads * site.shape.head_dim
    assert form.keys.shape == form.values.shape == (heads, 3, site.shape.head_dim)
    # r for each head, 2 r d in all, where the heads are as wide as the hidden size
    assert sum(value.numel() for value in form.parameters()) == 2 * 3 * width == 2 * 3 * 32

    anatomy = tuned.anatomy
    matrix = next(part for part in anatomy.of("attention.output", site.part.stack) if part.layer == site.part.layer)
    joined: list[Tensor] = []
    tuned.model.get_submodule(matrix.module).register_forward_pre_hook(lambda module, args: joined.append(args[0]))
    with recorded_queries(tuned.model) as queries:
        # the recorded function is the model's own, which ours calls
        output(tuned.model, batch)
    query = queries[site.part.module]
    others = [other for _, _, other in tuned.attachments["default"].sites][:-1]
    assert others
    form.scale = 0.0
    output(tuned.model, batch)
    change = joined[0] - joined[1]
    single = [
        2 * (query[:, head] * site.shape.head_dim**-0.5 @ form.keys[head].T).clamp(min=0) @ form.values[head]
        for head in range(heads)
    ]
    assert (change - torch.cat(single, dim=-1).detach()).abs().max() < 1e-12
    down = torch.block_diag(*(form.keys[head].T for head in range(heads)))
    up = torch.block_diag(*(form.values[head] for head in range(heads)))
    flat = query.transpose(1, 2).flatten(2) * site.shape.head_dim**-0.5
    assert (change - 2 * ((flat @ down).clamp(min=0) @ up).detach()).abs().max() < 1e-12
    assert change.abs().max() > 1e-2


def test_invariant_07_only_linear_rows_merge() -> None:
    tuned, batch = filled("bert", ROWS["LoRA"])
    unmerged = output(tuned.model, batch)
    tuned.merge()
    assert relative_error(output(tuned.model, batch), unmerged) < 1e-6
    for row in set(ROWS) - {"LoRA"}:
        other, _ = attached("bert", ROWS[row])
        with pytest.raises(StateError, match="cannot be merged: its change is not a change of weights"):
            other.merge()


def test_invariant_08_parameters_of_each_row() -> None:
    """2 l d for a prefix, 2 r d for adapters, 4 r d for LoRA in attention and 10 r d beside it; biases apart."""
    layers, d, kv = 12, 768, 192
    assert BERT_BASE.count("prefix-tuning(length=30, reparameterize=false)") == layers * 2 * 30 * d == layers * 46_080
    assert BERT_BASE.count("parallel-adapter") == layers * (2 * 512 * d + 512 + d) == layers * (786_432 + 1_280)
    assert BERT_BASE.count("parallel-attention-adapter(width=200)") == layers * (2 * 200 * d + 200 + d + 2 * d)
    assert BERT_BASE.count("multi-head-parallel-adapter") == layers * 2 * 30 * d
    assert BERT_BASE.count("added-prefix") == layers * 2 * 30 * d
    assert BERT_BASE.count("lora(rank=8)") == layers * 4 * 8 * d == layers * 24_576
    assert BERT_BASE.count("feed-forward-lora(rank=8)") == layers * 10 * 8 * d == layers * 61_440
    assert LLAMA.count("prefix-tuning(length=30, reparameterize=false)") == 30 * 11_520
    assert LLAMA.count("parallel-adapter") == 30 * (589_824 + 1_088)
    assert LLAMA.count("lora(rank=8)") == 30 * (9_216 + 6_144)
    # per query head beside heads, per key/value head in a prefix and where it is added
    assert LLAMA.count("multi-head-parallel-adapter") == 30 * 2 * 30 * 576
    assert LLAMA.count("added-prefix") == 30 * 2 * 30 * kv
    assert BERT_BASE.count("multi-head-mam") == BERT_BASE.count("mam(reparameterize=false)")
    assert BERT_BASE.count("prefix-and-feed-forward-lora") == BERT_BASE.count("prefix-tuning(width=800, length=30)") + (
        layers * 10 * 102 * d
    )


#: Every variant in a small form; sums are written out where a part would be too wide for the tiny models.
SMALL = {
    "added-prefix": "added-prefix(width=3)",
    "feed-forward-lora": "feed-forward-lora(rank=3, alpha=12)",
    "multi-head-mam": "multi-head-mam",
    "multi-head-parallel-adapter": "multi-head-parallel-adapter(width=3)",
    "parallel-attention-adapter": "parallel-attention-adapter(width=4)",
    "parallel-mam": "parallel-mam",
    "plain-parallel-adapter": "plain-parallel-adapter(width=4)",
    "prefix-and-feed-forward-lora": "prefix-tuning(length=3, width=6) + feed-forward-lora(rank=3, alpha=12)",
    "scaled-multi-head-parallel-adapter": "scaled-multi-head-parallel-adapter(width=3)",
    "scaled-parallel-adapter": "scaled-parallel-adapter(width=4)",
    "scaled-prefix": "scaled-prefix(width=3)",
    "sequential-beside-parallel": "sequential-beside-parallel",
}


def test_every_variant_is_tested() -> None:
    assert SMALL.keys() == all_variants().keys()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", [*SMALL.values(), *ROWS.values()])
def test_invariant_09_nothing_trains_unused(name: str, method: str) -> None:
    tuned, batch = filled(name, method)
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.any(), key


@pytest.mark.parametrize("grouped", [True, False])
def test_invariant_10_the_softmax_bottleneck_is_a_convex_combination(grouped: bool) -> None:
    tuned, _ = attached(
        "llama-gqa", f"head-adapter(width=3, activation=softmax, grouped={grouped})", dtype=torch.float64
    )
    form = next(iter(tuned.attachments["default"].forms.values()))
    assert isinstance(form, HeadBottleneck)
    shape = tuned.anatomy.of("attention")[0].attention
    assert shape is not None
    query = torch.randn(2, shape.heads, 5, shape.head_dim, dtype=torch.float64)
    with torch.no_grad():
        form.keys.normal_()
        form.values.normal_()
        change = form(query, 0.5)
        values = form.values.repeat_interleave(shape.heads // len(form.values), dim=0)[None]
        # the weights, read off by values that tell the rows apart
        form.values.copy_(torch.eye(3, shape.head_dim, dtype=torch.float64).expand_as(form.values))
        weights = form(query, 0.5)[..., :3]
    assert (weights > 0).all()
    assert (weights.sum(-1) - 1).abs().max() < 1e-12
    assert (change - weights @ values).abs().max() < 1e-12
    assert (change <= values.max(2, keepdim=True).values + 1e-12).all()
    assert (change >= values.min(2, keepdim=True).values - 1e-12).all()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("variant", SMALL)
def test_invariant_11_every_combination_runs(name: str, variant: str, tmp_path: Path) -> None:
    """It trains, leaves the frozen model as it was, is saved and comes back."""
    before = bits(build(name))
    tuned, batch = attached(name, SMALL[variant])
    with tuned.disabled():
        bare = output(tuned.model, batch)
    train(tuned, batch)
    trained = output(tuned.model, batch)
    assert torch.isfinite(trained).all()
    assert not torch.equal(trained, bare)
    tuned.save(tmp_path)
    loaded = deltune.load(build(name), tmp_path)
    assert relative_error(output(loaded.model, batch), trained) < 1e-6
    tuned.detach()
    after = bits(tuned.model)
    assert all(torch.equal(after[key], value) for key, value in before.items())


# -- variants by name ----------------------------------------------------------------------------------------


def test_a_variant_is_known_by_name() -> None:
    assert parse("multi-head-parallel-adapter") == deltune.HeadAdapter()  # type: ignore[attr-defined]
    assert parse("multi-head-parallel-adapter(width=8)") == deltune.HeadAdapter(width=8)  # type: ignore[attr-defined]
    assert str(parse("parallel-attention-adapter + lora")).endswith(" + lora")
    with pytest.raises(MethodError, match=r"parallel-mam is parallel-adapter.* Write that"):
        parse("parallel-mam(width=8)")
    with pytest.raises(MethodError, match="Did you mean 'scaled-prefix'"):
        parse("scaled-prefx")
    with pytest.raises(MethodError, match="head-adapter has no option 'rank'"):
        parse("added-prefix(rank=8)")


def test_a_prefix_and_changes_of_heads_share_an_attention_function() -> None:
    """Both act at once, and routed rows take their own."""
    tuned, batch = filled("llama-gqa", f"{ROWS['prefix tuning']} + {ROWS['multi-head parallel adapter']}")
    both = output(tuned.model, batch)
    reference = build("llama-gqa", attn_implementation="eager")
    assert len(tuned._installation.taps) == 3
    tuned.attach(ROWS["multi-head parallel adapter"], name="heads")
    heads = output(tuned.model, batch)
    tuned.route(["default", "heads", None])
    routed = output(tuned.model, batch)
    for row, expected in enumerate((both, heads, output(reference, batch))):
        assert relative_error(routed[row], expected[row]) < 1e-5
    assert relative_error(both, heads) > 1e-3


def test_changes_of_heads_can_be_scaled_and_prefixes_cannot() -> None:
    tuned, batch = filled("bert", "head-adapter(width=3)")
    once = output(tuned.model, batch)
    tuned.activate("default", weights=(0.5,))
    half = output(tuned.model, batch)
    form = next(iter(tuned.attachments["default"].forms.values()))
    assert isinstance(form, HeadBottleneck)
    tuned.activate("default")
    for other in tuned.attachments["default"].forms.values():
        other.scale = 0.5  # type: ignore[assignment]
    assert relative_error(half, output(tuned.model, batch)) < 1e-6
    assert relative_error(half, once) > 1e-4
    tuned.attach("prefix-tuning(length=3, width=6)", name="prefix")
    with pytest.raises(StateError, match="cannot be scaled"):
        tuned.activate("prefix", weights=(0.5,))


def test_wrong_options_of_a_head_adapter() -> None:
    with pytest.raises(MethodError, match=r"there is no activation 'softmx'. Did you mean 'softmax'"):
        parse("head-adapter(activation=softmx)")
    with pytest.raises(MethodError, match="the word learned, not 'channel'"):
        parse("head-adapter(scale=channel)")
    with pytest.raises(TargetError, match="does not go through transformers' attention interface"):
        attached("deberta-v2", "head-adapter")
