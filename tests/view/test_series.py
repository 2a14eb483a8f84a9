"""What a chart may leave out, and how columns travel."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from view.run_maker import RunMaker

from ddplog.store.reader import open_run
from ddplog.view.series import MAX_POINTS, Extremes, keep_extremes, pack, points_per_series


@given(
    st.integers(1, 5000), st.sampled_from([50, 200, 2000]), st.booleans(), st.integers(0, 2**32 - 1), st.integers(1, 3)
)
def test_no_extreme_disappears_and_the_bound_holds(num, max_points, has_gaps, seed, num_rows):
    rng = np.random.default_rng(seed)
    rows = [rng.standard_normal(num) for _ in range(num_rows)]
    if has_gaps:
        rows[0][rng.integers(0, num, 1 + num // 10)] = np.nan
    kept = keep_extremes(rows, max_points)
    assert len(kept) <= max(max_points, 0)
    assert (np.diff(kept) > 0).all()
    assert {0, num - 1} <= set(kept.tolist())
    for row in rows:
        if np.isfinite(row).any():
            assert np.nanmin(row[kept]) == np.nanmin(row)
            assert np.nanmax(row[kept]) == np.nanmax(row)
    assert np.isnan(rows[0][kept]).any() == np.isnan(rows[0]).any()


def test_few_points_are_all_kept():
    assert keep_extremes([np.arange(2000.0)], 2000).tolist() == list(range(2000))


def test_many_metrics_share_the_page():
    assert points_per_series(1) == points_per_series(200) == MAX_POINTS
    assert points_per_series(500) == 800
    assert points_per_series(100_000) == 200


def unpack(column, num):
    if "c" in column:
        return np.array([np.nan if column["c"] is None else column["c"]] * num)
    return np.frombuffer(base64.b64decode(column["b"]), dtype=f"<{column['t']}")


@pytest.mark.parametrize(
    "values",
    [
        [1, 2, 3],
        [0, 40_000],
        [0, 1 << 40],
        [5, 5, 5],
        [-1, -1],
        [1.5, np.nan],
        [np.nan, np.nan],
        [1e300, 1.0],
        [np.inf, 1.0],
    ],
)
def test_a_column_comes_back(values):
    values = np.array(values)
    np.testing.assert_allclose(unpack(pack(values), len(values)), values, rtol=1e-6)


def test_small_changes_of_a_large_value_stay():
    values = 1e9 + np.arange(10.0)
    assert unpack(pack(values), 10).tolist() == values.tolist()


def columns(tmp_path, pairs, n=4):
    maker = RunMaker(tmp_path / "r")
    for step, (low_rank, high_rank) in enumerate(pairs):
        is_apart = low_rank != high_rank
        maker.point(
            "x", step, 1.0, n=n, expected=n, min=0.0 if is_apart else 1.0, min_rank=low_rank, max_rank=high_rank
        )
    with open_run(maker.finish()) as run:
        return run.metric("x")


def test_the_extreme_rank_is_found(tmp_path):
    found = Extremes("x", columns(tmp_path, [(0, 3)] * 90 + [(1, 2)] * 10))
    assert (found.min_rank, found.max_rank, found.max_share, found.num_points) == (0, 3, 0.9, 100)
    assert found.is_notable
    assert "max rank 3 90%" in repr(found)


def test_chance_is_not_notable(tmp_path):
    rng = np.random.default_rng(1)
    pairs = [tuple(rng.choice(4, 2, replace=False)) for _ in range(400)]
    assert not Extremes("x", columns(tmp_path, [(int(a), int(b)) for a, b in pairs])).is_notable


def test_where_all_ranks_agree_none_is_extreme(tmp_path):
    """A tie is won by rank 0 every time, which says nothing about rank 0."""
    found = Extremes("x", columns(tmp_path, [(0, 0)] * 50))
    assert (found.num_points, found.min_rank) == (0, -1)
    assert not found.is_notable
