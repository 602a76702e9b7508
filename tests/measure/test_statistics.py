from __future__ import annotations

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltune.measure import Spread, proportion_interval

finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=2, max_size=20))
def test_spread_agrees_with_numpy(values: list[float]):
    spread = Spread.of(values)
    assert spread.mean == pytest.approx(numpy.mean(values), rel=1e-9, abs=1e-6)
    assert spread.deviation == pytest.approx(numpy.std(values, ddof=1), rel=1e-6, abs=1e-6)
    assert (spread.lowest, spread.highest, spread.count) == (min(values), max(values), len(values))


def test_a_single_value_has_no_deviation():
    assert Spread.of([0.5]).deviation is None


def test_no_value_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


def test_interval_agrees_with_published_values():
    # Newcombe 1998, Statistics in Medicine 17, table I, method 3 (score): 81 of 263, 15 of 148, 0 of 20, 1 of 29
    for right, count, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        assert proportion_interval(right / count, count) == pytest.approx((low, high), abs=5e-5)


@given(st.floats(0, 1), st.integers(1, 10_000))
def test_interval_holds_the_share(share: float, count: int):
    low, high = proportion_interval(share, count)
    assert 0 <= low <= share + 1e-12
    assert share - 1e-12 <= high <= 1


def test_interval_refuses_nonsense():
    with pytest.raises(ValueError, match="share"):
        proportion_interval(1.2, 10)
