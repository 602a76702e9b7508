"""KronA_B and KronA_B_res, beside whole blocks. Numbers are those of the sheet's invariants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import deltune
from deltune.errors import StateError, TargetError
from deltune.methods.reparameterized.krona import Kronecker, KroneckerBlock
from tests.laws.cases import Case
from tests.methods.common import attached, build, output, relative_error, train
from tests.methods.sizes import BERT_BASE, LLAMA
from tests.methods.test_krona import by_entries, forms_of
from tests.zoo import ARCHITECTURES


def product_of(form: Kronecker) -> Tensor:
    """The matrix s (A kron B), by entries."""
    return form.scale * by_entries(form.A.detach(), form.B.detach())


class _Recorder:
    """The first input of a module and the first output of another, in one forward pass."""

    def __init__(self, model: nn.Module, reader: str, result: str) -> None:
        self.input: Tensor | None = None
        self.output: Tensor | None = None
        self.handles = [
            model.get_submodule(reader).register_forward_pre_hook(self.before),
            model.get_submodule(result).register_forward_hook(self.after),
        ]

    def before(self, module: nn.Module, args: Any) -> None:
        self.input = args[0] if self.input is None else self.input

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        value = output if isinstance(output, Tensor) else output[0]
        self.output = value.clone() if self.output is None else self.output


@pytest.mark.parametrize(("role", "matrix"), [("ffn", "ffn.up"), ("attention", "attention.query")])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_9_the_change_of_a_sublayer_is_the_product_of_its_input(name: str, role: str, matrix: str) -> None:
    """In every architecture: at the last layer of a stack, of which the input is that of the bare model."""
    case = Case("krona-b", ARCHITECTURES[name])
    bare, batch = case.build(), case.batch()
    anatomy = deltune.anatomy_of(bare)
    for stack in dict.fromkeys(part.stack for part in anatomy.of(role)):
        part, reader = anatomy.of(role, stack)[-1], anatomy.of(matrix, stack)[-1]
        model = case.build()
        torch.manual_seed(1)
        method = deltune.KronAB(scale=2, targets=f"{role} layers=-1 stacks={stack}")
        ((key, form),) = forms_of(deltune.attach(model, method, train_head=False)).items()
        assert key == part.key
        result = part.result or part.module
        frozen, changed = (_Recorder(one, reader.module, result) for one in (bare, model))
        before, after = case.output(bare, batch), case.output(model, batch)
        for handle in frozen.handles:
            handle.remove()
        assert frozen.input is not None
        assert frozen.output is not None
        assert changed.output is not None
        expected = frozen.output + frozen.input @ product_of(form).T
        assert relative_error(changed.output, expected) < 1e-5, key
        assert relative_error(after, before) > 1e-4, key


def wrapped(module: nn.Module, matrix: Tensor) -> None:
    """Let a block give its own result plus ``matrix`` times its own input."""
    own = module.forward
    module.forward = lambda x, *args, **kwargs: own(x, *args, **kwargs) + x @ matrix.T  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gpt2", "transformer.h.{}.mlp"),
        ("gpt_neox", "gpt_neox.layers.{}.mlp"),
        ("llama-gqa", "model.layers.{}.mlp"),
        ("t5", "decoder.block.{}.layer.2.DenseReluDense"),
        ("modernbert", "model.layers.{}.mlp"),
        ("bert", ""),
    ],
)
def test_9_equals_a_branch_around_the_whole_block(name: str, path: str) -> None:
    """The input is what the block receives; in BERT, which has no block, what its residual sum receives."""
    stack = " stacks=decoder" if name == "t5" else ""
    tuned, batch = attached(name, f"krona-b(scale=2, targets='ffn{stack}')")
    model = build(name)
    for key, form in forms_of(tuned).items():
        layer, matrix = int(key.split(".")[1]), product_of(form)
        if path:
            wrapped(model.get_submodule(path.format(layer)), matrix)
            continue
        block = model.bert.encoder.layer[layer].output

        def forward(hidden: Tensor, x: Tensor, block: Any = block, matrix: Tensor = matrix) -> Tensor:
            return block.LayerNorm(block.dense(hidden) + x @ matrix.T + x)

        block.forward = forward
    assert relative_error(output(tuned.model, batch), output(model, batch)) < 1e-5


def test_9_what_is_beside_a_block_is_not_merged() -> None:
    tuned, batch = attached("bert", "krona-b")
    before = output(tuned.model, batch)
    with pytest.raises(StateError, match="cannot be merged"):
        tuned.merge()
    assert torch.equal(output(tuned.model, batch), before)


def test_10_with_a_residual_of_zero_it_is_the_same_exactly() -> None:
    plain, batch = attached("llama-gqa", "krona-b(scale=3)")
    other, _ = attached("llama-gqa", "krona-b(scale=3, residual=true)")
    started = output(other.model, batch)
    for (key, mine), theirs in zip(forms_of(plain).items(), forms_of(other).values(), strict=True):
        assert isinstance(theirs, KroneckerBlock)
        assert theirs.residual is not None, key
        assert theirs.residual.shape == (), key
        assert theirs.residual == 1, key
        assert torch.equal(mine.A, theirs.A), key
        nn.init.zeros_(theirs.residual)
    assert relative_error(started, output(plain.model, batch)) > 1e-2
    assert torch.equal(output(other.model, batch), output(plain.model, batch))


def test_10_the_gradient_of_the_residual_is_the_product_of_input_and_gradient() -> None:
    torch.manual_seed(0)
    form = KroneckerBlock((2, 3), (3, 2), residual=True).double()
    x, g = torch.randn(4, 5, 6).double(), torch.randn(4, 5, 6).double()
    (form(x) * g).sum().backward()
    assert form.residual is not None
    assert form.residual.grad is not None
    assert torch.allclose(form.residual.grad, (g * x).sum(), atol=1e-10)
    expected = x @ product_of(form).T + x
    assert torch.allclose(form(x), expected, atol=1e-10)


def test_7_published_counts_beside_blocks() -> None:
    assert BERT_BASE.count("krona-b(columns=32)") == 18_432
    assert BERT_BASE.count("krona-b(columns=32, residual=true)") == 18_444
    assert LLAMA.count("krona-b") == 34_560
    assert LLAMA.count("krona-b(residual=true)") == 34_590


@pytest.mark.parametrize("zero", ["A", "B", "none"])
def test_beside_a_block_the_start_is_as_chosen(zero: str) -> None:
    model, batch = build("gpt2"), ARCHITECTURES["gpt2"].batch(head="language")
    bare = output(model, batch)
    tuned = deltune.attach(model, f"krona-b(zero={zero})")
    assert torch.equal(output(model, batch), bare) == (zero != "none")
    train(tuned, batch)
    assert relative_error(output(model, batch), bare) > 1e-3


def test_saved_with_its_residual_and_loaded(tmp_path: Path) -> None:
    tuned, batch = attached("t5", "krona-b(residual=true, rows=2, targets='attention,ffn')")
    assert {key.split(".")[0] for key in forms_of(tuned)} == {"encoder", "decoder", "cross"}
    train(tuned, batch)
    tuned.save(tmp_path)
    assert torch.equal(output(deltune.load(build("t5"), tmp_path).model, batch), output(tuned.model, batch))


class Pair(nn.Module):
    """A block without roles, called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.ModuleDict({"in": nn.Linear(6, 4), "norm": nn.LayerNorm(4), "out": nn.Linear(4, 6)})
        self.block.forward = lambda hidden: self.block["out"](self.block["norm"](self.block["in"](hidden)))  # type: ignore[method-assign]
        self.narrow = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.block(hidden=x)
        return result


def test_a_module_by_name() -> None:
    torch.manual_seed(0)
    model, x = Pair(), torch.randn(2, 6)
    bare = model(x).detach()
    tuned = deltune.attach(model, "krona-b(targets=block)")
    (form,) = forms_of(tuned).values()
    assert torch.allclose(model(x), bare + x @ product_of(form).T, atol=1e-6)
    with pytest.raises(TargetError, match="not as wide"):
        tuned.attach("krona-b(targets=narrow)", "other")


def test_a_result_without_its_input_is_an_error() -> None:
    tuned, batch = attached("bert", "krona-b")
    module = tuned.model.bert.encoder.layer[0].output.dropout
    output(tuned.model, batch)
    with pytest.raises(StateError, match=r"ran without bert\.encoder\.layer\.0\.intermediate\.dense"):
        module(torch.zeros(1, 1, 32))


def test_two_beside_one_block_with_weights() -> None:
    """Both read the same input; at the last layer the change of the result is the weighted sum."""
    model, batch = build("gpt2", "base"), ARCHITECTURES["gpt2"].batch()
    tuned = deltune.attach(model, "krona-b(targets='ffn layers=-1')", "one")
    tuned.attach("krona-b(residual=true, targets='ffn layers=-1')", "other")
    seen: list[Tensor] = []
    tuned.activate()
    for names, weights in (((), ()), (("one",), (1,)), (("other",), (1,)), (("one", "other"), (0.5, -2))):
        tuned.activate(*names, weights=weights)
        handle = model.h[-1].mlp.dropout.register_forward_hook(lambda module, args, output: seen.append(output))
        output(model, batch)
        handle.remove()
    bare, one, other, both = seen
    assert torch.allclose(both, bare + 0.5 * (one - bare) - 2 * (other - bare), atol=1e-5)
