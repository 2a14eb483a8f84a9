"""What each rank logged of a metric, from the rank log."""

import math
import shutil

import pytest
from store.store_jobs import TIME_NS, Feed, Rank, Sampler

from ddplog.store.columns import UnknownMetricError
from ddplog.store.reader import open_run
from ddplog.store.run_store import RunStore

RUN = {"run_id": "r1", "project": "p", "name": None, "tags": [], "config": {}, "created_unix_ns": TIME_NS, "sinks": []}


@pytest.fixture
def stored(tmp_path):
    """Store what ranks have logged; return the run."""
    runs = []

    def store(*writers):
        feed = Feed(*writers)
        store = RunStore(tmp_path / "r1", RUN)
        for writer in writers:
            feed.send(writer)
            store.commit(feed.effects(), lambda positions: None, TIME_NS)
        feed.end(*writers)
        store.commit(feed.effects(20_000), lambda positions: None, TIME_NS)
        store.close()
        runs.append(open_run(tmp_path / "r1"))
        return runs[-1]

    yield store
    for run in runs:
        run.close()


def rows(columns):
    return list(zip(columns.step.tolist(), columns.rank.tolist(), columns.value.tolist(), strict=True))


def test_every_ranks_value_of_every_step(stored):
    a, b = Rank(0, 2), Rank(1, 2)
    for step in range(3):
        a.log(step, loss=step, other=9.0)
        b.log(step, loss=step + 10)
    run = stored(a, b)
    found = run.rank_values("loss")

    assert rows(found) == [(0, 0, 0.0), (0, 1, 10.0), (1, 0, 1.0), (1, 1, 11.0), (2, 0, 2.0), (2, 1, 12.0)]
    assert found.time_unix_ns.tolist() == [TIME_NS + step for step in (0, 0, 1, 1, 2, 2)]
    assert rows(run.rank_values("loss", from_step=2)) == [(2, 0, 2.0), (2, 1, 12.0)]
    assert rows(run.rank_values("other")) == [(0, 0, 9.0), (1, 0, 9.0), (2, 0, 9.0)]


@pytest.mark.parametrize(
    ("reduce", "expected"), [("mean", 3.5), ("sum", 5.0), ("min", 1.0), ("max", 4.0), ("last", 4.0), ("none", 4.0)]
)
def test_repeated_values_of_a_step_fold_as_the_reduction_says(stored, reduce, expected):
    a = Rank(0).say(type="define", pattern="x", reduce=reduce, replicated=False)
    run = stored(a.log(0, x=1.0).log(0, weight=5.0, x=4.0).log(1, x=7.0))
    assert rows(run.rank_values("x")) == [(0, 0, expected), (1, 0, 7.0)]


def test_what_is_not_finite_counts_where_nothing_else_is(stored):
    a = Rank(0).log(0, x=math.nan).log(0, x=2.0).log(0, x=math.inf).log(1, x=math.nan)
    (first, last) = rows(stored(a).rank_values("x"))
    assert first == (0, 0, 2.0)
    assert math.isnan(last[2])


def test_the_highest_attempt_wins_and_each_can_be_asked_for(stored):
    a = Rank(0).log(0, x=1.0).log(1, x=1.0)
    a.say(type="finish", status="finished", detail="")
    run = stored(a)
    store = RunStore(run.path, RUN)
    feed = Feed(again := Rank(0, life=1), restored=store.restore())
    feed.end(again.log(1, x=2.0))
    store.commit(feed.effects(20_000), lambda positions: None, TIME_NS)
    store.close()

    assert rows(run.rank_values("x")) == [(0, 0, 1.0), (1, 0, 2.0)]
    assert rows(run.rank_values("x", attempt=0)) == [(0, 0, 1.0), (1, 0, 1.0)]


def test_a_samplers_values_are_its_ranks_and_never_mix_with_its_step_times(stored):
    a = Rank(0).log(0, x=1.0).log(1, x=1.0)
    run = stored(a, Sampler(a).log(500, **{"sys/a": 5.0}).log(505, **{"sys/a": 6.0}))
    assert rows(run.rank_values("sys/a")) == [(500, 0, 5.0), (505, 0, 6.0)]
    assert run.rank_step_times().steps.tolist() == [1]


def test_without_a_rank_log_there_is_none(stored):
    run = stored(Rank(0).log(0, x=1.0))
    shutil.rmtree(run.path / "ranks")
    assert len(run.rank_values("x")) == 0
    with pytest.raises(UnknownMetricError):
        run.rank_values("y")
