"""What autograd keeps, against counts by hand."""

from __future__ import annotations

import torch

from deltune.measure import SavedTensors


def test_a_product_keeps_what_its_gradient_needs() -> None:
    x, weight = torch.randn(10, 20), torch.randn(20, 5, requires_grad=True)
    with SavedTensors(besides=[weight]) as saved:
        x @ weight
    assert saved.bytes == 10 * 20 * 4
    assert saved.holds(x)
    x.requires_grad_(True)
    with SavedTensors() as saved:
        y = x @ weight
    assert saved.bytes == (10 * 20 + 20 * 5) * 4
    assert not saved.holds(y)


def test_nothing_is_kept_where_nothing_trains() -> None:
    x, weight = torch.randn(10, 20), torch.randn(20, 5)
    with SavedTensors() as saved:
        torch.tanh(x @ weight)
    assert saved.bytes == 0
    assert saved.tensors == []


def test_views_of_one_storage_count_once_and_whole() -> None:
    x = torch.randn(10, 20)
    weight = torch.randn(4, 5, requires_grad=True)
    with SavedTensors(besides=[weight]) as saved:
        for start in (0, 4, 8):
            x[:, start : start + 4] @ weight
    assert len(saved.tensors) == 3
    assert saved.bytes == 10 * 20 * 4


def test_gradients_are_as_without_it_and_counting_ends_with_the_block() -> None:
    x, weight = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True)
    with SavedTensors() as saved:
        torch.tanh(x @ weight).sum().backward()
    counted = len(saved.tensors)
    assert weight.grad is not None
    found, weight.grad = weight.grad, None
    torch.tanh(x @ weight).sum().backward()
    assert torch.equal(found, weight.grad)
    assert len(saved.tensors) == counted == 2  # x and the hyperbolic tangent's output
