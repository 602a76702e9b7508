from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from deltune.errors import DataError
from deltune.tasks import LengthBucketSampler, padding_share

lengths_lists = st.lists(st.integers(1, 400), min_size=1, max_size=300)


@settings(deadline=None, max_examples=60)
@given(lengths_lists, st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 5), st.integers(1, 9))
def test_every_row_occurs_exactly_once_in_every_epoch(lengths, batch_size, seed, epoch, pool_batches):
    sampler = LengthBucketSampler(lengths, batch_size, seed, pool_batches=pool_batches)
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert sorted(row for batch in batches for row in batch) == list(range(len(lengths)))
    assert len(batches) == len(sampler)
    assert all(len(batch) == batch_size for batch in batches[:-1])


@settings(deadline=None, max_examples=30)
@given(lengths_lists, st.integers(1, 20))
def test_drop_last_leaves_only_complete_batches(lengths, batch_size):
    if batch_size > len(lengths):
        with pytest.raises(DataError, match="Lower batch_size or keep the last batch"):
            LengthBucketSampler(lengths, batch_size, drop_last=True)
        return
    sampler = LengthBucketSampler(lengths, batch_size, drop_last=True)
    batches = list(sampler)
    assert (
        [len(batch) for batch in batches] == [batch_size] * (len(lengths) // batch_size) == [batch_size] * len(sampler)
    )


@settings(deadline=None, max_examples=30)
@given(lengths_lists, st.integers(1, 8), st.integers(0, 99), st.integers(0, 3), st.data())
def test_a_resumed_epoch_gives_the_same_remainder(lengths, batch_size, seed, epoch, data):
    first = LengthBucketSampler(lengths, batch_size, seed)
    for earlier in range(epoch):
        first.set_epoch(earlier)
        list(first)
    first.set_epoch(epoch)
    done = data.draw(st.integers(0, len(first)))
    resumed = LengthBucketSampler(lengths, batch_size, seed)
    resumed.set_epoch(epoch)
    assert list(first)[done:] == list(resumed)[done:]


def test_epochs_and_seeds_differ():
    lengths = [(7 * row) % 50 + 1 for row in range(200)]
    sampler = LengthBucketSampler(lengths, 8, seed=1)
    orders = {str(sampler.batches(epoch)) for epoch in range(4)}
    orders |= {str(LengthBucketSampler(lengths, 8, seed=seed).batches(0)) for seed in (2, 3)}
    assert len(orders) == 6


def test_other_rows_meet_in_another_epoch():
    sampler = LengthBucketSampler(list(range(1, 201)), 8, pool_batches=5)
    first, second = ({frozenset(batch) for batch in sampler.batches(epoch)} for epoch in (0, 1))
    assert not first & second


def test_order_is_the_same_in_another_process():
    code = (
        "from deltune.tasks import LengthBucketSampler;"
        "print(LengthBucketSampler([(7*r)%50+1 for r in range(100)], 8, seed=5).batches(2))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    here = LengthBucketSampler([(7 * row) % 50 + 1 for row in range(100)], 8, seed=5).batches(2)
    assert printed.strip() == str(here)


def test_rows_of_a_batch_are_alike_in_length():
    lengths = [(37 * row) % 97 + 1 for row in range(960)]
    bucketed = padding_share(lengths, LengthBucketSampler(lengths, 16, pool_batches=30))
    shuffled = padding_share(lengths, LengthBucketSampler(lengths, 16, pool_batches=1))
    assert bucketed < 0.1 < 0.3 < shuffled


def test_batches_of_a_pool_come_in_random_order():
    lengths = list(range(1, 401))
    longest = [max(lengths[row] for row in batch) for batch in LengthBucketSampler(lengths, 10, pool_batches=40)]
    assert longest not in (sorted(longest), sorted(longest, reverse=True))


def test_padding_share_counts_padding():
    assert padding_share([2, 4, 4], [[0, 1], [2]]) == pytest.approx(2 / 12)
    assert padding_share([3, 3], [[0, 1]]) == 0
    with pytest.raises(DataError, match="at least one batch"):
        padding_share([1], [])


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"batch_size": True}, {"batch_size": 2, "pool_batches": 0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(DataError, match="whole number of at least 1"):
        LengthBucketSampler([1, 2, 3], **options)


def test_no_rows_are_refused():
    with pytest.raises(DataError, match="at least one length"):
        LengthBucketSampler([], 2)


def test_accelerate_sets_the_epoch_and_resumes():
    accelerate = pytest.importorskip("accelerate")
    lengths = [(7 * row) % 50 + 1 for row in range(60)]

    def loader():
        sampler = LengthBucketSampler(lengths, 8, seed=3)
        data = torch.utils.data.DataLoader(range(60), batch_sampler=sampler)
        return accelerate.Accelerator(cpu=True).prepare(data)

    expected = LengthBucketSampler(lengths, 8, seed=3)
    whole = loader()
    for epoch in range(3):
        whole.set_epoch(epoch)
        assert [batch.tolist() for batch in whole] == expected.batches(epoch)
    resumed = loader()
    resumed.set_epoch(2)
    rest = accelerate.skip_first_batches(resumed, 3)
    assert [batch.tolist() for batch in rest] == expected.batches(2)[3:]
