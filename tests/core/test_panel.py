"""When windows close, what is expected, what a late value does."""

import numpy as np
import pytest

from ddplog.core.batches import Rows
from ddplog.core.panel import Panel, RankStates
from ddplog.core.watermark import Watermark

SETTLE, LATE = 100, 5000


class Harness:
    """A panel with the watermark of its ranks; time is `now`."""

    def __init__(self, world=3, reductions=("mean",), keep_closed=256, replicated=None, grace=10_000):
        self.now = 0
        self.mark = Watermark(world, grace, 0)
        self.panel = Panel(
            range(1, len(reductions) + 1),
            reductions,
            replicated or [False] * len(reductions),
            world_size=world,
            settle_ns=SETTLE,
            late_ns=LATE,
            keep_closed=keep_closed,
        )
        self.points = {}

    def log(self, rank, step, *values, weight=1.0, columns=None, count=1):
        rows = Rows(
            schema_id=1,
            steps=np.repeat(np.atleast_1d(step), count),
            times=np.full(np.size(step) * count, 1000 + self.now),
            weights=np.full(np.size(step) * count, weight),
            values=np.tile(np.asarray([values], float), (np.size(step) * count, 1)),
        )
        own = int(self.mark.progress[rank])
        self.panel.add(
            rank, rows, columns, max(self.mark.value(self.now), own - 1 if own > -1 << 63 else own), self.now
        )
        self.mark.advance(rank, int(np.max(step)), self.now)
        return self

    def pass_time(self, ns):
        self.now += ns
        return self

    def close(self, **how):
        states = RankStates(
            progress=self.mark.progress,
            ended=self.mark.ended,
            finished=self.mark.finished,
            silent=self.mark.silent(self.now),
        )
        emission = self.panel.close_ready(self.mark.value(self.now), states, self.now, **how)
        closed = []
        if emission is not None:
            for s, step in enumerate(emission.steps.tolist()):
                for k in range(len(emission.key_ids)):
                    if emission.block.n[s, k]:
                        point = (emission.value[s, k], emission.block.n[s, k], emission.expected[s, k])
                        self.points.setdefault((step, k), []).append(tuple(map(float, point)))
                        closed.append(step)
        self.last = emission
        return closed


def test_a_step_is_emitted_when_every_rank_has_passed_it():
    """Reliability case 7: the declared ranks are expected, not those seen; else step 0 of 2 of 3 would look complete."""
    h = Harness()
    h.log(0, 0, 1.0).log(1, 0, 2.0)
    assert h.close() == []
    h.log(2, 0, 6.0)
    assert h.close() == []  # complete, but not settled
    for rank in range(3):
        h.log(rank, 1, 0.0)
    assert h.close() == [0]
    assert h.points[0, 0] == [(3.0, 3, 3)]


def test_a_complete_step_is_emitted_after_it_has_settled_without_waiting_for_the_next():
    h = Harness(world=2).log(0, 0, 1.0).log(1, 0, 3.0)
    assert h.pass_time(SETTLE - 1).close() == []
    assert h.pass_time(1).close() == [0]
    assert h.points[0, 0] == [(2.0, 2, 2)]


def test_keys_seen_repeated_in_a_step_wait_for_the_watermark():
    """With gradient accumulation every step would else be emitted after its first micro-batch."""
    h = Harness(world=1).log(0, 0, 1.0).log(0, 0, 3.0)
    assert h.pass_time(10 * SETTLE).close() == []
    h.log(0, 1, 5.0)
    assert h.close() == [0]
    assert h.points[0, 0] == [(2.0, 1, 1)]


def test_steps_of_a_panel_are_emitted_in_order():
    h = Harness(world=2).log(0, 0, 1.0).log(0, 1, 1.0).log(1, 1, 1.0)
    h.mark.progress[1] = 0  # as if it could still send step 0
    assert h.pass_time(SETTLE).close() == []
    h.log(1, 0, 1.0)
    assert h.pass_time(SETTLE).close() == [0, 1]


def test_a_rank_leaves_after_passing_three_steps_without_the_key():
    h = Harness(world=2)
    for step in range(6):
        h.log(0, step, 1.0)
        h.mark.advance(1, step, h.now)
    h.close()
    h.mark.end(0)
    h.mark.end(1)
    h.close()
    assert [h.points[step, 0][0][1:] for step in range(6)] == [(1, 2), (1, 2), (1, 2), (1, 1), (1, 1), (1, 1)]


def test_a_rank_joins_with_its_first_value():
    """Reliability case 7: one that comes late counts from then on."""
    h = Harness(world=2)
    for step in range(6):
        h.log(0, step, 1.0)
        h.mark.advance(1, step, h.now)
        h.close()
    h.log(1, 6, 3.0).log(0, 6, 1.0).log(0, 7, 1.0)
    h.mark.advance(1, 7, h.now)
    h.close()
    assert h.points[6, 0] == [(2.0, 2, 2)]


def test_a_script_that_logs_on_rank_0_only_reads_1_of_1():
    """Reliability case 7: one that never comes is waited for until its grace is over."""
    h = Harness(world=4).log(0, 0, 1.0)
    assert h.pass_time(9_000).close() == []
    assert h.pass_time(2_000).log(0, 1, 2.0).close() == [0]
    assert h.pass_time(SETTLE).close() == [1]
    assert (h.points[0, 0], h.points[1, 0]) == ([(1.0, 1, 1)], [(2.0, 1, 1)])


def test_nothing_is_expected_of_an_ended_rank_beyond_its_progress_but_up_to_it():
    h = Harness(world=2).log(0, 0, 1.0).log(1, 0, 3.0).log(0, 1, 1.0)
    h.mark.advance(1, 1, 0)
    h.mark.end(1)
    h.log(0, 2, 1.0)
    h.mark.end(0)
    h.close()
    assert [h.points[step, 0][0][1:] for step in range(3)] == [(2, 2), (1, 2), (1, 1)]


def test_a_rank_that_died_is_missed_but_not_waited_for():
    h = Harness(world=2).log(0, 0, 1.0).log(1, 0, 3.0)
    h.mark.end(1, finished=False)
    for step in range(1, 9):
        h.log(0, step, 1.0)
    h.close()
    assert [h.points[step, 0][0][1:] for step in range(8)] == [(2, 2)] + [(1, 2)] * 7


def test_a_hung_rank_is_still_expected():
    h = Harness(world=2).log(0, 0, 1.0).log(1, 0, 1.0).log(0, 1, 1.0)
    h.pass_time(20_000).log(0, 2, 1.0).close()
    assert h.points[1, 0] == [(1.0, 1, 2)]


def test_a_value_below_the_own_progress_waits_for_the_others_or_its_deadline():
    """Epoch-wise validation beside step-wise training: one point, never one per arrival."""
    h = Harness(world=2, reductions=("mean", "mean"))
    for step in range(10):
        h.log(0, step, 1.0, columns=[0]).log(1, step, 1.0, columns=[0])
    h.close()
    h.log(0, 3, 5.0, columns=[1])
    h.close()
    assert (3, 1) not in h.points
    h.log(1, 3, 7.0, columns=[1])
    h.pass_time(LATE).close()
    assert h.points[3, 1] == [(6.0, 2, 2)]


def test_a_late_value_for_a_closed_step_is_emitted_again_with_everything():
    """Reliability case 7: an arrival within the lateness is an update, with a higher revision."""
    h = Harness(world=2).log(0, 0, 1.0).log(1, 0, 3.0).log(0, 5, 0.0).log(1, 5, 0.0)
    h.close()
    h.log(1, 0, 5.0)
    h.pass_time(SETTLE).close()
    assert h.points[0, 0] == [(2.0, 2, 2), (3.0, 2, 2)]


def test_a_late_value_for_a_step_that_is_gone_makes_it_stale():
    h = Harness(world=1, keep_closed=2)
    for step in range(6):
        h.log(0, step, 1.0)
    h.close()
    h.log(0, 0, 9.0)

    assert h.panel.stale_steps == {0}
    assert h.panel.num_open == 1
    assert h.panel.stale_since_ns == 0


def test_windows_beyond_the_limit_close_incomplete():
    h = Harness(world=2).log(0, np.arange(100), 1.0)
    assert h.close(max_open=60) == list(range(40))
    assert h.points[0, 0] == [(1.0, 1, 2)]


def test_at_the_end_everything_closes():
    h = Harness(world=2).log(0, 0, 1.0).log(0, 3, 1.0)
    assert h.close(at_once=True) == [0, 3]
    assert h.close(at_once=True) == []


def test_repeated_values_fold_in_order_within_one_batch():
    h = Harness(world=1, reductions=("sum", "last"))
    rows = Rows(
        schema_id=1,
        steps=np.asarray([0, 0, 1, 0, 1]),
        times=np.arange(5),
        weights=np.ones(5),
        values=np.asarray([[1, 1], [2, 2], [10, 10], [4, 4], [20, 20]], float),
    )
    h.panel.add(0, rows, None, -1, 0)
    h.close(at_once=True)
    assert h.points == {(0, 0): [(7, 1, 1)], (0, 1): [(4, 1, 1)], (1, 0): [(30, 1, 1)], (1, 1): [(20, 1, 1)]}


def test_nan_and_inf_are_counted_with_the_lowest_rank_that_had_one():
    """Reliability case 19: one NaN neither spoils the statistics nor is it hidden."""
    h = Harness(world=3)
    h.log(0, 0, 1.0).log(2, 0, float("nan")).log(1, 0, float("inf"))
    h.close(at_once=True)
    assert h.points[0, 0] == [(1.0, 3, 3)]
    assert (h.last.nan_count[0, 0], h.last.inf_count[0, 0], h.last.bad_rank[0, 0]) == (1, 1, 1)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((np.inf, np.inf), np.inf),
        ((-np.inf, -np.inf), -np.inf),
        ((np.inf, -np.inf), np.nan),
        ((np.inf, np.nan), np.nan),
    ],
)
def test_without_a_finite_value_the_point_is_the_infinity_all_agree_on_or_nan(values, expected):
    h = Harness(world=2)
    for rank, value in enumerate(values):
        h.log(rank, 0, value)
    h.close(at_once=True)
    np.testing.assert_equal(h.last.value[0, 0], expected)


def test_replicated_keys_whose_ranks_differ_are_named():
    h = Harness(world=2, reductions=("mean", "mean"), replicated=[True, False])
    for step in range(2):
        h.log(0, step, 1.0, 1.0).log(1, step, 1.0 + step, 2.0)
    h.close(at_once=True)
    assert h.last.disagreements == [(1, 1)]


def test_reduce_none_keeps_every_rank():
    h = Harness(world=2, reductions=("none",))
    h.log(0, 0, 1.0).log(1, 0, 2.0)
    h.close(at_once=True)
    assert h.last.rank_values == [(1, 0, 0, 1.0, 1000), (1, 0, 1, 2.0, 1000)]


def test_the_oldest_log_entry_still_needed_is_that_of_the_oldest_open_window():
    h = Harness(world=1)
    for ordinal, step in ((4, 0), (5, 1), (6, 2)):
        rows = Rows(
            schema_id=1,
            steps=np.asarray([step]),
            times=np.asarray([1]),
            weights=np.ones(1),
            values=np.ones((1, 1)),
        )
        h.panel.add(0, rows, None, -1, 0, ordinal)
        h.mark.advance(0, step, 0)
    assert h.panel.oldest_open == 4
    h.close()
    assert h.panel.oldest_open == 6
    h.close(at_once=True)
    assert h.panel.oldest_open is None
    assert repr(h.panel) == "<Panel keys=1 ranks=1 open=0 closed=3 stale=0>"


def test_order_of_arrival_does_not_change_a_bit():
    """The mean of 8 ranks, 50 arrival orders, weights and folds: one result."""
    rng = np.random.default_rng(3)
    values, weights = rng.normal(size=(8, 5, 2)) * 1e3, rng.random((8, 5)) * 10
    results = set()
    for _ in range(50):
        h = Harness(world=8, reductions=("mean", "rss"))
        pending = [[(rank, step) for step in range(5)] for rank in range(8)]
        while any(pending):
            rank = int(rng.choice([r for r in range(8) if pending[r]]))
            take = int(rng.integers(1, len(pending[rank]) + 1))
            part, pending[rank] = pending[rank][:take], pending[rank][take:]
            steps = np.asarray([step for _, step in part])
            rows = Rows(
                schema_id=1,
                steps=steps,
                times=steps,
                weights=weights[rank, steps],
                values=values[rank, steps],
            )
            h.panel.add(rank, rows, None, -1, 0)
            h.mark.advance(rank, int(steps[-1]), 0)
            h.close()
        h.close(at_once=True)
        assert all(len(points) == 1 for points in h.points.values())
        results.add(tuple(sorted((key, points[0][0].hex()) for key, points in h.points.items())))

    assert len(results) == 1
