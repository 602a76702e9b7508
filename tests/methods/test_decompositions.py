"""Decompositions against naive sums over their entries, and against each other.

Numbers are those of the sheet's invariants; those of models are in test_fact.py and test_lorta.py.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from deltune.methods.reparameterized.decompositions import (
    CP,
    SVD,
    UV,
    Decomposition,
    SharedSlice,
    TensorTrain,
    Tucker,
    truncated_svd,
)
from deltune.methods.reparameterized.low_rank import PrincipalLowRank
from tests.methods.common import matrix_site, singular_values

SHAPE, RANK = (6, 10, 4), 3
KINDS = {
    "cp": lambda: CP(SHAPE, RANK, dtype=torch.float64),
    "cp-scaled": lambda: CP(SHAPE, RANK, scaled=True, dtype=torch.float64),
    "tucker": lambda: Tucker(SHAPE, RANK, dtype=torch.float64),
    "tensor-train": lambda: TensorTrain(SHAPE, RANK, dtype=torch.float64),
}


def filled(kind: str) -> Decomposition:
    """With no factor at zero."""
    torch.manual_seed(0)
    made = KINDS[kind]()
    for value in made.parameters():
        nn.init.normal_(value)
    return made


@cache
def by_entries(kind: str) -> Tensor:
    """The slices (N, d_out, d_in) of :func:`filled`, entry by entry from the formulas."""
    width, height, count = SHAPE
    f = {name: value.tolist() for name, value in filled(kind).named_parameters()}

    def core(n: int, b: int, a: int) -> float:
        if kind == "tensor-train":
            return f["S"][n][b][a]  # type: ignore[no-any-return]
        if kind == "tucker":
            return sum(f["C"][a][b][c] * f["P"][n][c] for c in range(RANK))
        return f["P"][n][a] * f.get("scales", [1.0] * RANK)[a] if a == b else 0.0

    result = torch.zeros(count, height, width, dtype=torch.float64)
    for n, j, i in itertools.product(range(count), range(height), range(width)):
        result[n, j, i] = sum(
            f["U"][i][a] * f["V"][j][b] * core(n, b, a) for a, b in itertools.product(range(RANK), repeat=2)
        )
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_is_its_formula_without_the_dense_tensor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, x = filled(kind), torch.randn(2, 5, 6, dtype=torch.float64)
    expected = by_entries(kind)
    for n in range(SHAPE[2]):
        form = SharedSlice(made, n, scale=0.5)
        assert torch.allclose(form.weight_delta(), 0.5 * expected[n])
        assert not list(form.parameters())
        with monkeypatch.context() as patch:
            patch.setattr(Decomposition, "dense", None)
            assert torch.allclose(form(x), 0.5 * x @ expected[n].T)


@pytest.mark.parametrize("along_input", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_5_blocks_side_by_side_are_the_matrix(kind: str, transposed: bool, along_input: bool) -> None:
    made = filled(kind)
    blocks = by_entries(kind)[1:4]
    blocks = blocks.mT if transposed else blocks
    expected = torch.cat(list(blocks), dim=1 if along_input else 0)
    form = SharedSlice(made, slice(1, 4), along_input=along_input, transposed=transposed)
    assert torch.allclose(form.weight_delta(), expected)
    x = torch.randn(2, expected.shape[1], dtype=torch.float64)
    assert torch.allclose(form(x), x @ expected.T)


def test_1_truncated_svd_is_the_best_approximation() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(12, 9)
    values = singular_values(matrix)
    for rank in (1, 4, 8):
        left, kept, right = truncated_svd(matrix, rank)
        error = float((matrix - left * kept @ right).double().norm())
        best = float(values[rank:].square().sum().sqrt())
        assert abs(error - best) < 1e-5 * best
        # alternating least squares, each half of it exact, from a random start
        factor = torch.randn(rank, 9, dtype=torch.float64)
        for _ in range(200):
            other = torch.linalg.lstsq(factor.T, matrix.double().T).solution.T
            factor = torch.linalg.lstsq(other, matrix.double()).solution
        assert float((matrix.double() - other @ factor).norm()) >= best * (1 - 1e-9)


def test_1_pissa_starts_from_it() -> None:
    matrix = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    form = PrincipalLowRank(matrix_site(6, 8), matrix, 2, 0.5)
    left, values, right = truncated_svd(matrix, 2)
    assert torch.allclose(0.5 * form.B @ form.A, left * values @ right, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_2_the_rank_of_a_slice(kind: str) -> None:
    for dense in filled(kind).dense(slice(None)):
        values = singular_values(dense)
        assert values[RANK - 1] > 1e-6
        assert values[RANK] < 1e-9 * values[0]


def test_3_cp_is_tucker_with_a_super_diagonal_core() -> None:
    cp, tucker = filled("cp-scaled"), filled("tucker")
    assert isinstance(cp, CP)
    assert isinstance(tucker, Tucker)
    with torch.no_grad():
        for name in ("U", "V", "P"):
            tucker.get_parameter(name).copy_(cp.get_parameter(name))
        tucker.C.zero_()
        for r in range(RANK):
            tucker.C[r, r, r] = cp.scales[r]  # type: ignore[index]
    assert torch.allclose(cp.dense(slice(None)), tucker.dense(slice(None)), atol=1e-6)


def test_4_tucker_with_its_cores_put_in_is_a_tensor_train() -> None:
    tucker, train = filled("tucker"), filled("tensor-train")
    with torch.no_grad():
        for name in ("U", "V"):
            train.get_parameter(name).copy_(tucker.get_parameter(name))
        train.get_parameter("S").copy_(tucker.cores(slice(None)))
    x = torch.randn(3, 6, dtype=torch.float64)
    for n in range(SHAPE[2]):
        assert torch.allclose(SharedSlice(tucker, n)(x), SharedSlice(train, n)(x), atol=1e-6)


@pytest.mark.parametrize("kind", [*KINDS, "uv", "svd"])
def test_7_the_start_is_zero_and_one_factor_alone_has_a_gradient(kind: str) -> None:
    torch.manual_seed(0)
    made = {"uv": UV, "svd": SVD}[kind]((6, 10), RANK) if kind in ("uv", "svd") else KINDS[kind]().float()
    form = SharedSlice(made, () if kind in ("uv", "svd") else 1)
    change = form(torch.randn(4, 6))
    assert not change.any()
    (change * torch.randn(4, 10)).sum().backward()
    moved = {name for name, value in made.named_parameters() if value.grad is not None and value.grad.any()}
    assert moved == {"scales" if kind == "svd" else "V"}


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (UV((6, 10), 3), 3 * 16),
        (SVD((6, 10), 3), 3 * 17),
        (CP(SHAPE, 3), 3 * 20),
        (CP(SHAPE, 3, scaled=True), 3 * 21),
        (CP((6, 2, 5, 7, 4), 3, rows=2), 3 * 24),
        (CP((768, 768, 108), 64, scaled=True, device=torch.device("meta")), 105_280),
        (Tucker(SHAPE, (2, 3, 5)), 30 + 12 + 30 + 20),
        (TensorTrain(SHAPE, 3), 3 * 16 + 4 * 9),
    ],
)
def test_8_counts_are_the_formulas(made: Decomposition, count: int) -> None:
    assert sum(value.numel() for value in made.parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
def test_9_the_gradient_of_a_shared_factor_is_the_sum_over_slices(kind: str) -> None:
    made, inputs = filled(kind), torch.randn(4, 5, 6, dtype=torch.float64)
    forms = [SharedSlice(made, n) for n in range(4)]
    together = torch.autograd.grad(sum(form(x).sin().sum() for form, x in zip(forms, inputs, strict=True)), made.U)
    alone = [torch.autograd.grad(form(x).sin().sum(), made.U)[0] for form, x in zip(forms, inputs, strict=True)]
    assert torch.allclose(together[0], sum(alone), rtol=1e-5)  # type: ignore[arg-type]


def test_10_order_of_components_and_place_of_a_scalar_do_not_matter() -> None:
    made = filled("cp")
    before = made.dense(slice(None)).detach()
    with torch.no_grad():
        for value in made.parameters():
            value.copy_(value[:, torch.tensor([2, 0, 1])])
        made.U.mul_(-4)
        made.get_parameter("P").mul_(-0.25)
    assert torch.allclose(made.dense(slice(None)), before, atol=1e-6)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_11_copies_keep_the_sharing(copied: object) -> None:
    made = filled("tucker")
    twin, *forms = copied([made, SharedSlice(made, 0), SharedSlice(made, 1)])  # type: ignore[operator]
    assert twin is not made
    assert all(form.decomposition is twin for form in forms)


def test_the_five_way_form_is_its_formula() -> None:
    torch.manual_seed(0)
    made = CP((6, 2, 5, 3, 4), 3, rows=2, dtype=torch.float64)
    for value in made.parameters():
        nn.init.normal_(value)
    U, V1, V2, P1, P2 = (value.detach() for value in made.parameters())
    tensor = torch.einsum("ir,hr,kr,lr,mr->lmhki", U, V1, V2, P1, P2).flatten(2, 3)
    for layer, kind in itertools.product(range(3), range(4)):
        form = SharedSlice(made, (layer, kind))
        assert torch.allclose(form.weight_delta(), tensor[layer, kind])
        x = torch.randn(7, 6, dtype=torch.float64)
        assert torch.allclose(form(x), x @ tensor[layer, kind].T)
    assert torch.allclose(made.dense((slice(1, 2), 3))[0], tensor[1, 3])


def test_tucker_and_fact_initial_values() -> None:
    torch.manual_seed(0)
    made = Tucker((400, 300, 50), 16)
    for value, bound in ((made.U, 0.05), (made.P, (6 / 66) ** 0.5), (made.C, (6 / 512) ** 0.5)):
        assert 0.9 * bound < value.abs().max() <= bound
    reference = nn.init.xavier_uniform_(torch.empty(16, 16, 16)).std()
    assert abs(float(made.C.detach().std() / reference) - 1) < 0.05
    assert 0.24 < TensorTrain((4, 4, 100), 16).S.abs().max() <= 0.25


def test_dropout_is_of_the_thin_vector_while_training() -> None:
    made = filled("tensor-train").float()
    form = SharedSlice(made, 0, dropout=0.5)
    x = torch.ones(1, 6)
    thin = x @ made.U @ made.S[0].T
    possible = [
        2 * (thin * torch.tensor(kept, dtype=torch.float32)) @ made.V.T for kept in itertools.product((0, 1), repeat=3)
    ]
    for _ in range(20):
        found = form(x)
        assert any(torch.allclose(found, one, atol=1e-5) for one in possible)
    assert torch.equal(form.eval()(x), form(x))
