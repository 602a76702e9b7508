"""Parallel adapters, against their fact sheet. 10 is also law 2 and 3 (``tests/laws``)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deltune
from deltune.backbone import describe
from deltune.errors import MethodError, TargetError
from deltune.methods.additive.bottleneck import Bottleneck
from tests.laws.cases import Case
from tests.methods.common import attached, bits, build, loss_of, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.zoo import ARCHITECTURES

#: Normalised after the sum, and before the sublayer.
POST, PRE = ["bert", "bart"], ["gpt2", "llama-gqa", "t5"]
SMALL = "parallel-adapter(width=4, initialization=normal, standard_deviation=0.3, dropout=0{})"


def forms_of(tuned: deltune.Tuned) -> dict[str, Bottleneck]:
    return {key: form for key, _, form in tuned.attachments["default"].sites}  # type: ignore[misc]


def branch(form: Bottleneck, x: Tensor, scale: float = 4.0) -> Tensor:
    """s (W_up relu(W_down x + b_down) + b_up)."""
    narrow = (x @ form.down.weight.T + form.down.bias).clamp(min=0)
    return scale * (narrow @ form.up.weight.T + form.up.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", ["", ", targets='attention,ffn'", ", scale=learned, reads=stream"])
@pytest.mark.parametrize("name", POST + PRE)
def test_invariant_01_zero_weights_upwards_are_the_frozen_model(name: str, options: str, dtype: torch.dtype) -> None:
    tuned, batch = attached(name, f"parallel-adapter(width=4{options})", dtype=dtype)
    with tuned.disabled():
        before = output(tuned.model, batch)
    assert torch.equal(output(tuned.model, batch), before)
    assert not any(form.up.weight.any() or form.up.bias.any() for form in forms_of(tuned).values())
    train(tuned, batch)
    assert not torch.equal(output(tuned.model, batch), before)


def change_of_the_last(name: str, options: str) -> tuple[Tensor, Tensor]:
    """In the last layer: what is read in the bare model, and by what the sublayer's result is changed."""
    tuned, batch = attached(name, SMALL.format(f", targets='ffn layers=-1'{options}"), head="base", dtype=torch.float64)
    ((_, site, form),) = tuned.attachments["default"].sites
    read: list[Tensor] = []
    results: list[Tensor] = []
    form.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for live in (True, False):
        if not live:
            tuned.activate()
        handle = tuned.model.get_submodule(site.changed).register_forward_hook(  # type: ignore[union-attr]
            lambda module, args, output: results.append(output)
        )
        output(tuned.model, batch)
        handle.remove()
    return read[0], results[0] - results[1]


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama-gqa"])
def test_invariant_02_the_change_grows_with_the_scale(name: str) -> None:
    _, one = change_of_the_last(name, ", scale=1")
    _, four = change_of_the_last(name, "")
    assert (four - 4 * one).abs().max() < 1e-12
    assert one.abs().max() > 1e-2


def test_invariant_03_written_out_where_norms_follow_the_sum() -> None:
    """BERT: x is what the feed-forward sublayer reads; a = LN1(x + attn), y = LN2(a + FFN(a) + s A(a))."""
    tuned, batch = attached("bert", SMALL.format(""), head="base", dtype=torch.float64)
    train(tuned, batch)
    model, forms = tuned.model, forms_of(tuned)
    assert list(forms) == [f"encoder.{layer}.ffn" for layer in range(3)]
    with torch.no_grad():
        hidden = model(**batch, output_hidden_states=True).hidden_states
        for index, layer in enumerate(model.encoder.layer):
            x = hidden[index]
            a = layer.attention.output.LayerNorm(x + layer.attention.output.dense(layer.attention.self(x)[0]))
            # the matrices as functions, because hooks on the modules are part of what is tested
            inner = F.gelu(F.linear(a, *layer.intermediate.dense.parameters()))
            result = F.linear(inner, *layer.output.dense.parameters()) + branch(forms[f"encoder.{index}.ffn"], a)
            assert relative_error(hidden[index + 1], layer.output.LayerNorm(a + result)) < 1e-12


@pytest.mark.parametrize("reads", ["stream", "sublayer"])
def test_invariant_03_written_out_where_norms_come_first(reads: str) -> None:
    """LLaMA: u = r + attn(n1(r)), y = u + FFN(n2(u)) + s A(u), or A(n2(u)) if it reads what the sublayer reads."""
    tuned, batch = attached("llama-gqa", SMALL.format(f", reads={reads}"), dtype=torch.float64)
    train(tuned, batch)
    model, forms = tuned.model, forms_of(tuned)
    layers: list[list[Tensor]] = []
    attention: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: layers.append([args[0], output]))
        layer.self_attn.register_forward_hook(lambda module, args, output: attention.append(output[0]))
    output(model, batch)

    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            r, y = layers[index]
            u = r + attention[index]
            normed = layer.post_attention_layernorm.forward(u)  # not as a call, which would come to the hook
            gate, up, down = (getattr(layer.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
            result = (F.silu(normed @ gate.T) * (normed @ up.T)) @ down.T
            x, other = (u, normed) if reads == "stream" else (normed, u)
            form = forms[f"decoder.{index}.ffn"]
            assert relative_error(y, u + result + branch(form, x)) < 1e-12
            assert relative_error(y, u + result + branch(form, other)) > 1e-3


class First:
    """A hook that keeps the first value that it sees; ALBERT's layers run several times."""

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def before(self, module: nn.Module, args: Any) -> None:
        self.value = args[0] if self.value is None else self.value

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.value = (output if isinstance(output, Tensor) else output[0]) if self.value is None else self.value


@pytest.mark.parametrize("role", ["attention", "ffn"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_invariant_03_the_stream_is_read_in_every_architecture(name: str, role: str) -> None:
    """In the last layer of each stack; ``test_krona_b`` tests the same of what sublayers read."""
    case = Case("parallel-adapter", ARCHITECTURES[name])
    anatomy = deltune.anatomy_of(case.build())
    for stack in dict.fromkeys(part.stack for part in anatomy.of(role)):
        part = anatomy.of(role, stack)[-1]
        matrix = {"ffn": "ffn.up"}.get(role, "attention.value" if stack in anatomy.stacks else "attention.query")
        reader = part.norm_before or anatomy.of(matrix, stack)[-1].module
        stream, bare, changed = First(), First(), First()
        model = case.build()
        model.get_submodule(reader).register_forward_pre_hook(stream.before)
        model.get_submodule(part.result or part.module).register_forward_hook(bare.after)
        case.output(model, case.batch())
        model = case.build()
        torch.manual_seed(1)
        options = f", reads=stream, attention_changes=result, targets='{role} layers=-1 stacks={stack}'"
        ((_, form),) = forms_of(deltune.attach(model, SMALL.format(options), train_head=False)).items()
        model.get_submodule(part.result or part.module).register_forward_hook(changed.after)
        case.output(model, case.batch())
        assert stream.value is not None
        assert bare.value is not None
        assert changed.value is not None
        expected = bare.value + branch(form, stream.value).detach()
        assert relative_error(changed.value, expected) < 1e-5, part.key
        assert relative_error(changed.value, bare.value) > 1e-3, part.key


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_invariant_04_it_differs_from_a_sequential_one_with_the_same_weights(name: str) -> None:
    tuned, batch = attached(name, SMALL.format(", scale=1, activation=relu"), head="base")
    parallel = output(tuned.model, batch)
    other, _ = attached(name, "sequential-adapter(width=4, activation=relu, train_norms=false, targets=ffn)", "base")
    for key, form in forms_of(other).items():
        form.load_state_dict(forms_of(tuned)[key].state_dict())
    assert relative_error(output(other.model, batch), parallel) > 1e-2


@pytest.mark.parametrize(
    ("name", "output_matrix"),
    [
        ("bert", "encoder.layer.2.attention.output.dense"),
        ("gpt2", "h.2.attn.c_proj"),
        ("llama-gqa", "layers.2.self_attn.o_proj"),
        ("qwen3", "layers.2.self_attn.o_proj"),
        ("bart", "decoder.layers.2.encoder_attn.out_proj"),
    ],
)
def test_invariant_05_attention_is_changed_before_its_output_matrix(name: str, output_matrix: str) -> None:
    """The change behind W_o is s A(x) W_o^T, without a bias; in Qwen3 the heads are wider than the stream."""
    stack = " stacks=cross" if name == "bart" else ""
    tuned, batch = attached(
        name, SMALL.format(f", scale=2, targets='attention layers=-1{stack}'"), head="base", dtype=torch.float64
    )
    ((_, site, form),) = tuned.attachments["default"].sites
    assert isinstance(form, Bottleneck)
    assert site.changed == output_matrix  # type: ignore[union-attr]
    matrix: Any = tuned.model.get_submodule(output_matrix)
    weight = matrix.weight if isinstance(matrix, nn.Linear) else matrix.weight.T
    assert form.up.weight.shape == (weight.shape[1], 4)
    read: list[Tensor] = []
    results: list[Tensor] = []
    form.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    matrix.register_forward_hook(lambda module, args, output: results.append(output))
    output(tuned.model, batch)
    tuned.activate()
    output(tuned.model, batch)
    changed, bare = results
    assert (changed - bare - branch(form, read[0], 2.0) @ weight.T).abs().max() < 1e-12
    assert (changed - bare).abs().max() > 1e-2


def test_invariant_05_or_behind_it() -> None:
    options = ", targets='attention layers=-1', attention_changes=result"
    tuned, _ = attached("bert", SMALL.format(options), head="base")
    ((_, site, _),) = tuned.attachments["default"].sites
    assert (site.changed, site.side) == ("encoder.layer.2.attention.output.dropout", "output")  # type: ignore[union-attr]


def test_invariant_06_published_counts() -> None:
    assert BERT_BASE.count("parallel-adapter") == 9_452_544
    assert BERT_BASE.count("parallel-adapter(width=d/2)") == 7_091_712
    assert BERT_BASE.count("parallel-adapter(targets=attention)") == 9_452_544
    assert BERT_BASE.count("parallel-adapter(scale=learned)") == 9_452_544 + 12
    assert BERT_BASE.count("parallel-adapter(scale=channel)") == 9_452_544 + 12 * 768
    assert BERT_BASE.count("parallel-adapter(layer_norm=true)") == 9_452_544 + 12 * 2 * 768
    assert LLAMA.count("parallel-adapter") == 17_727_360
    assert LLAMA.count("parallel-adapter(width=d/2)") == 9_979_200


@pytest.mark.parametrize("scale", ["learned", "channel"])
def test_invariant_07_a_trained_scale_starts_at_one_and_learns(scale: str) -> None:
    tuned, batch = attached("bert", f"parallel-adapter(width=4, scale={scale}, dropout=0)")
    scales = [form.scale for form in forms_of(tuned).values()]
    assert all(isinstance(value, nn.Parameter) and bool((value == 1).all()) for value in scales)
    loss_of(tuned.model, batch).backward()
    assert all(not value.grad.any() for value in scales)  # type: ignore[union-attr]
    train(tuned, batch, weight_decay=0.0)
    assert all(value.grad.any() for value in scales)  # type: ignore[union-attr]
    assert all(bool((value != 1).any()) for value in scales)  # type: ignore[union-attr]


def test_invariant_08_evaluation_is_deterministic_with_dropout() -> None:
    """That dropout is inside the bottleneck is tested in ``test_bottleneck``."""
    tuned, batch = attached("gpt2", SMALL.format("").replace("dropout=0", "dropout=0.5"))
    assert torch.equal(output(tuned.model, batch), output(tuned.model, batch))
    tuned.model.train()  # the model itself has no dropout
    assert not torch.equal(output(tuned.model, batch), output(tuned.model, batch))
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), output(tuned.model, batch))


@pytest.mark.parametrize("options", ["", ", layer_norm=true, reads=stream, scale=learned, targets='attention,ffn'"])
@pytest.mark.parametrize("name", POST + PRE)
def test_invariant_09_every_trained_value_has_a_gradient(name: str, options: str) -> None:
    tuned, batch = attached(name, SMALL.format(options))
    loss_of(tuned.model, batch).backward()
    for key, value in tuned.named_trainable_parameters():
        assert value.grad is not None, key
        assert value.grad.any(), key


@pytest.mark.parametrize("name", POST + PRE)
def test_invariant_10_the_frozen_model_stays_and_comes_back(name: str) -> None:
    tuned, batch = attached(name, SMALL.format(", targets='attention,ffn'"))
    with tuned.disabled():
        before, bare = bits(tuned.model), output(tuned.model, batch)
    train(tuned, batch)
    with tuned.disabled():
        assert torch.equal(output(tuned.model, batch), bare)
        assert all(torch.equal(value, before[key]) for key, value in tuned.model.state_dict().items())


def test_defaults_are_those_of_the_authors_but_for_what_is_read() -> None:
    method = deltune.ParallelAdapter()
    assert (method.width, method.scale, method.activation, method.dropout) == (512, 4.0, "relu", 0.1)
    assert (method.reads, method.attention_changes, str(method.targets)) == ("sublayer", "heads", "ffn")
    assert method.unchanged_at_start
    assert not method.layer_norm


def test_those_that_read_different_things_do_not_share_a_tap() -> None:
    """Two beside one sublayer: one reads the stream, one behind the norm; the change is the sum of both."""
    results = []
    model, batch = build("gpt2", "base"), ARCHITECTURES["gpt2"].batch()
    torch.manual_seed(1)
    tuned = deltune.attach(model, SMALL.format(", targets='ffn layers=-1', reads=stream"), "one")
    tuned.attach(SMALL.format(", targets='ffn layers=-1'"), "other")
    for names in ((), ("one",), ("other",), ("one", "other")):
        tuned.activate(*names)
        handle = model.h[-1].mlp.dropout.register_forward_hook(lambda module, args, output: results.append(output))
        output(model, batch)
        handle.remove()
    bare, one, other, both = results
    assert torch.allclose(both, one + other - bare, atol=1e-5)
    assert not torch.allclose(one, other, atol=1e-2)


def test_unknown_norms_are_refused_where_the_stream_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(describe, "FAMILIES", ())
    with pytest.raises(TargetError, match=r"residual stream in front of decoder\.0\.ffn .* reads=sublayer"):
        deltune.attach(build("llama-gqa"), "parallel-adapter(reads=stream)")
    tuned, batch = attached("llama-gqa", SMALL.format(", targets='attention,ffn'"))
    expected = output(tuned.model, batch)
    monkeypatch.undo()
    known, _ = attached("llama-gqa", SMALL.format(", targets='attention,ffn'"))
    assert torch.equal(output(known.model, batch), expected)


def test_wrong_words_are_refused() -> None:
    with pytest.raises(MethodError, match=r"reads cannot be 'streams'\. Did you mean 'stream'"):
        deltune.ParallelAdapter(reads="streams")
    with pytest.raises(MethodError, match=r"attention_changes cannot be 'head'\. Did you mean 'heads'"):
        deltune.ParallelAdapter(attention_changes="head")
