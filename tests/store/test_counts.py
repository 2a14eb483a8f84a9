"""What the delivery audit is counted with: emissions up to an id, values that replaced others, hangs that go on."""

from contextlib import closing
from dataclasses import replace

from store.store_jobs import TIME_NS, Feed, Rank
from store.test_run_store import RUN, commit, rows, run_dir, small_run, store  # noqa: F401 - two are fixtures

from ddplog.core.effects import Effects, EventRow
from ddplog.store.reader import open_run
from ddplog.store.run_store import RunStore


def event(kind, attempt=0, data="{}"):
    return EventRow(attempt, None, None, kind, "info", kind, data, TIME_NS)


def test_emissions_are_counted_up_to_an_id_and_above_a_cursor(store, run_dir):  # noqa: F811 - fixtures
    commit(store, small_run().effects())
    with open_run(run_dir) as run:
        ids = sorted(
            i for table in ("points", "superseded", "rank_points", "params", "texts", "events")
            for (i,) in rows(run_dir, f"SELECT id FROM {table}")
        )  # fmt: skip
        assert run.last_id == ids[-1]
        assert run.num_emissions(0, run.last_id) == len(ids)
        for cursor in ids:
            below = run.num_emissions(0, cursor)
            assert below == ids.index(cursor) + 1
            assert run.num_emissions(cursor, run.last_id) == len(ids) - below


def test_a_value_of_a_rank_that_changes_is_one_emission_more_and_one_row_less(run_dir):  # noqa: F811
    """Its id moves: what a sink had under the old one is in no table any more, and is still accounted for."""
    a = Rank(0).say(type="define", pattern="each", reduce="none", replicated=False).log(0, each=1.0).log(1, each=2.0)
    feed = Feed(a)
    feed.send(a)
    feed.now += 10**6
    store = RunStore(run_dir, RUN)  # noqa: F811
    commit(store, feed.effects())
    before = store.last_id
    feed.send(a.log(0, each=5.0).log(1, each=2.0))  # the last one counts: 1.0 is replaced, 2.0 stays
    feed.now += 10**6
    commit(store, feed.effects())
    assert rows(run_dir, "SELECT step, value FROM rank_points ORDER BY step") == [(0, 5.0), (1, 2.0)]
    assert rows(run_dir, "SELECT count(*) FROM rank_points WHERE id > ?", before) == [(1,)]
    with open_run(run_dir) as run:
        assert run.num_replaced == 1
    store.close()
    with closing(RunStore(run_dir, RUN)) as again:
        commit(again, replace(Effects(), events=[event("alert")]))
    with open_run(run_dir) as run:
        assert run.num_replaced == 1


def test_a_restart_knows_the_hangs_that_go_on(store, run_dir):  # noqa: F811
    feed = Feed(Rank(0))
    effects = feed.effects()
    effects.events += [event("hang", 0, '{"a": 1}'), event("hang_over", 0), event("hang", 0, '{"a": 2}')]
    effects.events += [event("hang", 1), event("hang_over", 1), event("hang", 2, '{"a": 3}')]
    commit(store, effects)
    assert store.restore().hangs == {0: '{"a": 2}', 2: '{"a": 3}'}
    commit(store, replace(Effects(), events=[event("hang_over", 2)]))
    assert store.restore().hangs == {0: '{"a": 2}'}
