"""The Kronecker product of KronA and its form, without a model. Numbers are those of the sheet's invariants."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deltune.methods.reparameterized.krona import KroneckerWeight, kronecker_product
from tests.methods.common import relative_error, singular_values
from tests.methods.test_krona import by_entries

#: (a1, a2) and (b1, b2): square, tall, wide, a vector, no factor at all.
SHAPES = [((4, 4), (8, 8)), ((2, 6), (5, 3)), ((6, 2), (3, 5)), ((1, 7), (9, 1)), ((1, 1), (4, 6)), ((4, 6), (1, 1))]


def filled(shape: tuple[int, int], other: tuple[int, int], scale: float = 1.0) -> KroneckerWeight:
    torch.manual_seed(0)
    form = KroneckerWeight(shape, other, scale)
    for factor in (form.A, form.B):
        nn.init.normal_(factor)
    return form


@pytest.mark.parametrize(("shape", "other"), SHAPES)
def test_1_the_factored_forward_equals_the_explicit_matrix(shape: tuple[int, int], other: tuple[int, int]) -> None:
    form = filled(shape, other, 1.5)
    x = torch.randn(2, 3, shape[1] * other[1])
    expected = 1.5 * x @ by_entries(form.A.detach(), form.B.detach()).T
    assert relative_error(form(x).detach(), expected) < 1e-5
    assert relative_error(form(x.transpose(0, 1)).detach(), expected.transpose(0, 1)) < 1e-5
    assert torch.allclose(form(x[0, 0]), form(x)[0, 0], atol=1e-5)


@pytest.mark.parametrize(("shape", "other"), SHAPES)
def test_1_gradients_are_those_of_the_explicit_matrix(shape: tuple[int, int], other: tuple[int, int]) -> None:
    """By blocks: dL/dA_ij = s <G_ij, B> and dL/dB = s sum_ij a_ij G_ij."""
    form = filled(shape, other, 1.5).double()
    x = torch.randn(5, shape[1] * other[1]).double().requires_grad_()
    g = torch.randn(5, shape[0] * other[0]).double()
    (form(x) * g).sum().backward()
    blocks = (g.T @ x.detach()).view(shape[0], other[0], shape[1], other[1])
    A, B = form.A.detach(), form.B.detach()
    assert torch.allclose(form.A.grad, 1.5 * torch.einsum("ipjq,pq->ij", blocks, B), atol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(form.B.grad, 1.5 * torch.einsum("ipjq,ij->pq", blocks, A), atol=1e-10)  # type: ignore[arg-type]
    assert torch.allclose(x.grad, 1.5 * g @ by_entries(A, B), atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize(("shape", "other"), SHAPES)
def test_2_entries_of_the_product(shape: tuple[int, int], other: tuple[int, int]) -> None:
    form = filled(shape, other)
    with torch.no_grad():
        for factor in (form.A, form.B):
            factor.copy_(torch.randint(-9, 10, factor.shape))
    A, B = form.A.detach(), form.B.detach()
    assert torch.equal(form.weight_delta(), by_entries(A, B))
    assert torch.equal(form.weight_delta(), torch.kron(A, B))
    # whole numbers: the factored forward is exact, too; its columns are the products with unit vectors
    assert torch.equal(kronecker_product(torch.eye(A.shape[1] * B.shape[1]), A, B).T, torch.kron(A, B))


def test_3_the_order_of_the_factors_counts() -> None:
    form = filled((2, 3), (4, 5))
    assert form.weight_delta().shape == (8, 15)
    A, B = form.A.detach(), form.B.detach()
    swapped = filled((4, 5), (2, 3))
    swapped.load_state_dict({"A": B, "B": A})
    assert (form.weight_delta() - swapped.weight_delta()).abs().max() > 0.1
    x = torch.randn(6, 15)
    assert (form(x) - swapped(x)).abs().max() > 0.1


@pytest.mark.parametrize(
    ("shape", "other", "rank"),
    [((24, 24), (32, 32), 768), ((24, 32), (32, 24), 576), ((2, 6), (5, 3), 6), ((1, 7), (9, 1), 1)],
)
def test_4_the_rank_is_the_product_of_the_ranks(shape: tuple[int, int], other: tuple[int, int], rank: int) -> None:
    form = filled(shape, other).double()
    values = singular_values(form.weight_delta().detach())
    assert int((values > 1e-9 * values[0]).sum()) == rank
    with torch.no_grad():  # a factor of rank 1
        form.A.copy_(torch.outer(torch.randn(shape[0]).double(), torch.randn(shape[1]).double()))
    values = singular_values(form.weight_delta().detach())
    assert int((values > 1e-9 * values[0]).sum()) == min(other)


def test_8_one_factor_can_be_scaled_against_the_other() -> None:
    form = filled((4, 6), (8, 3))
    x = torch.randn(7, 18)
    before = form(x).detach()
    with torch.no_grad():
        form.A.mul_(3.7)
        form.B.div_(3.7)
    assert relative_error(form(x).detach(), before) < 1e-6


class _Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = (value.numel() for value in tree_leaves(result) if isinstance(value, Tensor))
        self.size = max(self.size, *sizes, 0)
        return result


@contextmanager
def largest() -> Iterator[_Largest]:
    with _Largest() as mode:
        yield mode


@pytest.mark.parametrize(("shape", "other"), [((16, 16), (16, 16)), ((8, 32), (32, 8)), ((32, 8), (8, 32))])
def test_11_the_forward_and_backward_pass_never_hold_the_product(
    shape: tuple[int, int], other: tuple[int, int]
) -> None:
    form = filled(shape, other)
    x = torch.randn(2, 3, 256, requires_grad=True)
    y = torch.randn(2, 3, 256)
    with largest() as seen:
        form.add_to(y, x, 0.5).square().sum().backward()
    assert 0 < seen.size <= 6 * 1024  # 1024: the larger of the products in between has so many values for each token
    with largest() as seen:
        form.weight_delta()
    assert seen.size >= 256 * 256


def test_11_in_a_model_nor_does_an_embedding() -> None:
    form = filled((10, 4), (20, 8))  # 200 rows, 32 words
    ids = torch.tensor([[0, 7, 8], [31, 30, 15]])
    with largest() as seen:
        found = form.look_up(ids)
    assert seen.size < 200 * 32
    assert torch.allclose(found, F.embedding(ids, by_entries(form.A, form.B).T), atol=1e-6)


def test_initial_values_are_uniform_by_the_width_of_the_factor() -> None:
    """Not by the width of the matrix, which would be another scale."""
    torch.manual_seed(0)
    for zero in ("A", "B", "none"):
        form = KroneckerWeight((50, 40), (60, 90), zero=zero)
        for name, factor, width in (("A", form.A.detach(), 40), ("B", form.B.detach(), 90)):
            if name == zero:
                assert not factor.any()
                continue
            assert factor.abs().max() <= 1 / math.sqrt(width)
            assert factor.abs().max() > 0.98 / math.sqrt(width)
            assert abs(float(factor.std()) - 1 / math.sqrt(3 * width)) < 5e-3
