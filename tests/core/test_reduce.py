"""The values: against brute force, and bit-identical however the inputs are grouped."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.core.reduce import fold, is_reduction, ordered_sum, reduce_block

FINITE = st.floats(allow_nan=False, allow_infinity=False, width=64, min_value=-1e100, max_value=1e100)


def block_of(values, weights=None, present=None, times=None, reductions=("mean",)):
    values = np.asarray(values, float)
    num_ranks, num_steps, _ = values.shape
    return reduce_block(
        values,
        np.ones_like(values) if weights is None else np.asarray(weights, float),
        np.ones(values.shape, bool) if present is None else np.asarray(present, bool),
        np.tile(np.arange(num_ranks)[:, None], (1, num_steps)) if times is None else np.asarray(times),
        np.arange(num_ranks),
        list(reductions),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mean", 4.0),
        ("sum", 12.0),
        ("min", 1.0),
        ("max", 9.0),
        ("last", 9.0),
        ("std", math.sqrt(38 / 3)),
        ("median", 2.0),
        ("p0", 1.0),
        ("p50", 2.0),
        ("p100", 9.0),
        ("rss", math.sqrt(86)),
        ("none", 4.0),
    ],
)
def test_each_reduction_of_three_ranks(name, expected):
    block = block_of([[[2.0]], [[1.0]], [[9.0]]], reductions=(name,))

    assert block.value[0, 0] == pytest.approx(expected, rel=1e-15)
    assert (block.min[0, 0], block.min_rank[0, 0], block.max[0, 0], block.max_rank[0, 0]) == (1.0, 1, 9.0, 2)
    assert block.mean[0, 0] == 4.0
    assert block.n[0, 0] == 3


def test_the_mean_counts_each_rank_by_its_weight():
    block = block_of([[[1.0]], [[10.0]]], weights=[[[9.0]], [[1.0]]])

    assert block.value[0, 0] == 1.9
    assert block.std[0, 0] == pytest.approx(2.7)


def test_a_rank_of_weight_zero_counts_for_nothing_but_is_there():
    block = block_of([[[1.0]], [[10.0]]], weights=[[[0.0]], [[1.0]]])

    assert (block.value[0, 0], block.n[0, 0], block.min[0, 0]) == (10.0, 2, 1.0)


def test_values_that_are_not_finite_leave_the_statistics_of_the_others():
    block = block_of([[[np.nan]], [[2.0]], [[np.inf]], [[4.0]]], reductions=("mean",))

    assert (block.value[0, 0], block.min[0, 0], block.max[0, 0], block.num_finite[0, 0]) == (3.0, 2.0, 4.0, 2)
    assert block.n[0, 0] == 4


@pytest.mark.parametrize("name", ["mean", "sum", "min", "max", "last", "std", "median", "p90", "rss"])
def test_without_a_finite_value_every_reduction_is_nan_and_no_rank_is_named(name):
    block = block_of([[[np.nan]], [[np.nan]]], reductions=(name,))

    assert math.isnan(block.value[0, 0])
    assert (block.min_rank[0, 0], block.max_rank[0, 0]) == (-1, -1)


def test_last_is_the_latest_record_and_of_equal_times_the_highest_rank():
    values = [[[1.0, 1.0]], [[2.0, 2.0]], [[3.0, np.nan]]]

    block = block_of(values, times=[[30], [30], [10]], reductions=("last", "last"))

    assert block.value.tolist() == [[2.0, 2.0]]


def test_rss_does_not_overflow():
    assert block_of([[[3e200]], [[4e200]]], reductions=("rss",)).value[0, 0] == pytest.approx(5e200)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(FINITE, min_size=6, max_size=6), min_size=1, max_size=40), st.data())
def test_a_point_is_bit_identical_alone_and_in_a_block(columns, data):
    """Else the same records would give other bits when they arrive in other batches."""
    values = np.asarray(columns).reshape(len(columns), 3, 2)
    weights = np.asarray(data.draw(st.lists(st.floats(0.1, 100), min_size=values.size, max_size=values.size))).reshape(
        values.shape
    )
    for name in ("mean", "sum", "std", "rss", "median"):
        whole = block_of(values, weights, reductions=(name, name))
        for s in range(3):
            for k in range(2):
                alone = block_of(values[:, s : s + 1, k : k + 1], weights[:, s : s + 1, k : k + 1], reductions=(name,))
                assert struct.pack("d", whole.value[s, k]) == struct.pack("d", alone.value[0, 0])
                assert struct.pack("d", whole.std[s, k]) == struct.pack("d", alone.std[0, 0])


@given(st.lists(FINITE, min_size=1, max_size=100))
def test_sums_run_over_the_ranks_in_order(column):
    total = 0.0
    for value in column:
        total += value

    single = ordered_sum(np.asarray(column)[:, None])
    double = ordered_sum(np.stack([column, column], axis=1))

    assert single.tolist() == [total]
    assert double.tolist() == [total, total]


@pytest.mark.parametrize(
    ("name", "value", "weight"),
    [
        ("sum", 5.0, 4.0),
        ("min", 2.0, 4.0),
        ("max", 3.0, 4.0),
        ("last", 3.0, 3.0),
        ("none", 3.0, 3.0),
        ("rss", math.hypot(2, 3), 4.0),
        ("mean", 2.75, 4.0),
        ("std", 2.75, 4.0),
        ("p90", 2.75, 4.0),
    ],
)
def test_a_repeated_value_folds_with_the_same_reduction(name, value, weight):
    folded, total = fold(name, *(np.asarray([x]) for x in (2.0, 1.0, 3.0, 3.0)))

    assert (folded[0], total[0]) == (value, weight)


def test_values_of_weight_zero_fold_to_their_middle():
    folded, total = fold("mean", *(np.asarray([x]) for x in (2.0, 0.0, 4.0, 0.0)))

    assert (folded[0], total[0]) == (3.0, 0.0)


@pytest.mark.parametrize("name", ["mean", "p0", "p9", "p99.9", "p100", "rss"])
def test_reductions_there_are(name):
    assert is_reduction(name)


@pytest.mark.parametrize("name", ["average", "p", "p101", "p-1", "P50", "", "p1000"])
def test_reductions_there_are_not(name):
    assert not is_reduction(name)
