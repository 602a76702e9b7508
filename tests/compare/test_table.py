from __future__ import annotations

import csv
import io

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from deltune.compare import ComparisonTable, pareto_front, units
from deltune.compare.labels import Box, place_labels
from deltune.measure import Spread
from tests.compare.samples import failed, finished, usual_results


def test_rows_are_averaged_and_sorted():
    accuracies = [0.81, 0.84, 0.79]
    results = [finished("lora", seed, value, 500) for seed, value in enumerate(accuracies)]
    results += [finished("bitfit", 0, 0.9, 100), failed("full", 0, "too big"), finished("majority", 0, 0.5, 0)]
    table = ComparisonTable.of(results, "accuracy")
    assert [row.name for row in table.rows] == ["bitfit", "lora", "majority", "full"]
    lora = table.rows[1]
    assert lora.quality.mean == pytest.approx(numpy.mean(accuracies))
    assert lora.quality.deviation == pytest.approx(numpy.std(accuracies, ddof=1))
    assert lora.seeds == (0, 1, 2)
    assert ComparisonTable.of(results, "accuracy", greater_is_better=False).rows[0].name == "majority"


def test_peak_memory_is_the_highest_of_the_seeds():
    results = [finished("lora", seed, 0.8, 5) for seed in range(3)]
    results[1]["memory"] = {**results[1]["memory"], "peak": 900_000_000}
    assert ComparisonTable.of(results, "accuracy").rows[0].peak_memory == 900_000_000


def test_a_method_with_some_failures_keeps_its_results():
    row = next(row for row in ComparisonTable.of(usual_results(), "accuracy").rows if row.name == "prompt-tuning")
    assert (len(row.results), len(row.failures), row.error) == (2, 1, "the loss is not a number")


def test_csv_holds_plain_numbers():
    table = ComparisonTable.of(usual_results(), "accuracy")
    lines = list(csv.DictReader(io.StringIO(table.csv())))
    assert [line["method"] for line in lines] == [row.name for row in table.rows]
    best = lines[0]
    assert float(best["accuracy_mean"]) == table.rows[0].quality.mean
    assert int(best["trainable_parameters"]) == 22_000_000
    assert best["seeds"] == "0 1 2"
    assert lines[-1]["error"] == "too big"
    assert all(None not in line.values() for line in lines)


def test_markdown_escapes_bars():
    text = ComparisonTable.of([finished("a|b<i>", 0, 0.5, 1)], "accuracy").markdown()
    assert "a\\|b&lt;i>" in text
    assert len(text.strip().splitlines()) == 3


def test_the_terminal_shows_every_row_even_where_it_is_narrow():
    for width in (80, 140):
        console = Console(width=width, record=True, file=io.StringIO())
        console.print(ComparisonTable.of(usual_results(), "accuracy").rich())
        text = console.export_text()
        assert "85.0 ± 1.0 %" in text
        assert "failed" in text
        assert "…" not in text


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (units.count(770), "770"),
        (units.count(74_500), "74.5 K"),
        (units.count(999_900), "1 M"),
        (units.count(22_713_986), "22.7 M"),
        (units.size(303_456), "303 kB"),
        (units.size(90_000_000), "90 MB"),
        (units.size(12), "12 B"),
        (units.duration(0.04), "0.0 s"),
        (units.duration(59.7), "1 min 0 s"),
        (units.duration(3725), "1 h 2 min"),
        (units.share(0.0000339), "0.0034 %"),
        (units.share(0.0033), "0.33 %"),
        (units.share(1.0), "100 %"),
        (units.quality("accuracy", Spread.of([0.5])), "50.0 %"),
        (units.quality("pearson", Spread.of([0.5, 0.7])), "0.600 ± 0.141"),
    ],
)
def test_numbers_for_people(shown, expected):
    assert shown == expected


points = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=12)


@given(points, st.booleans())
def test_pareto_front_is_what_nothing_beats(found, greater_is_better):
    sign = 1 if greater_is_better else -1

    def beaten(point, other):
        return (
            other[0] <= point[0]
            and sign * other[1] >= sign * point[1]
            and (other[0] < point[0] or sign * other[1] > sign * point[1])
        )

    expected = {index for index, point in enumerate(found) if not any(beaten(point, other) for other in found)}
    front = pareto_front(found, greater_is_better=greater_is_better)
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [found[index][0] for index in front] == sorted(found[index][0] for index in front)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(40, 860), st.floats(20, 400)), min_size=1, max_size=8))
def test_labels_do_not_cover_each_other(found):
    bounds = Box(0, 0, 900, 420)
    boxes = place_labels(found, [(90.0, 15.0)] * len(found), bounds)
    for index, box in enumerate(boxes):
        assert box.overlap(bounds) == pytest.approx(90 * 15)
        assert all(box.overlap(other) < 1e-6 for other in boxes[index + 1 :])


def test_labels_leave_obstacles_alone():
    line = Box(0, 95, 400, 2)
    (box,) = place_labels([(200, 100)], [(80, 14)], Box(0, 0, 400, 200), [line])
    assert box.overlap(line) == 0
