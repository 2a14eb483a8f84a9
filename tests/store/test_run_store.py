"""The run store: what a restart finds, what a failed commit leaves, and how a late value becomes a revision."""

import json
import math
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from store.store_jobs import TIME_NS, Feed, Rank

from ddplog.core.effects import Effects, ParamRow
from ddplog.core.pipeline import Pipeline
from ddplog.errors import ConfigError
from ddplog.store.rank_log import Position
from ddplog.store.run_store import RunStore

RUN = {"run_id": "r1", "project": "p", "name": None, "tags": [], "config": {}, "created_unix_ns": 1, "sinks": []}
TABLES = ("points", "superseded", "rank_points", "params", "texts", "events")
ROOT = Path(__file__).parents[2]
ENVIRON = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{ROOT / 'tests'}"}


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "r1"


@pytest.fixture
def store(run_dir):
    store = RunStore(run_dir, RUN)
    yield store
    store.close()


def from_the_end(positions):
    return None


def commit(store, effects):
    store.commit(effects, from_the_end, TIME_NS)


def rows(run_dir, sql, *values):
    with closing(sqlite3.connect(run_dir / "run.db")) as db:
        return db.execute(sql, values).fetchall()


def dump(run_dir):
    with closing(sqlite3.connect(run_dir / "run.db")) as db:
        return [line for line in db.iterdump() if "store_uuid" not in line]


def points(run_dir, key="x", table="points"):
    return rows(
        run_dir,
        f"SELECT step, value, n, revision FROM {table} JOIN keys USING (key_id) WHERE name = ? ORDER BY step, id",
        key,
    )


def small_run():
    """Two ranks that say one thing of every kind; one ends well, one dies."""
    a, b = Rank(0, 2), Rank(1, 2)
    a.say(type="define", pattern="sum*", reduce="sum", replicated=False)
    a.say(type="define", pattern="each", reduce="none", replicated=False)
    a.say(type="params", values={"lr": 0.1, "name": "x"})
    for step in range(3):
        a.log(step, loss=step, sum_x=1.0, each=10.0)
        b.log(step, weight=3.0, loss=step + 4.0, sum_x=2.0, each=20.0)
    b.say(type="text", key="note", text="hällo\x00 \U0001f600", step=1)
    b.say(type="alert", title="hot", text="95", level="error")
    a.say(type="finish", status="preempted", detail="SIGTERM")
    feed = Feed(a, b)
    feed.pipeline.progress(b.incarnation, 2, 0, {"bad_value": 3}, 77, 0)
    feed.end(a, b)
    return feed


# -- commit and restore


def test_a_new_store_has_nothing_to_restore(store, run_dir):
    assert store.restore() is None
    assert store.status == {"status": "running", "detail": "", "ended_unix_ns": None}
    assert store.last_id == 0
    assert len(store.uuid) == 16
    assert (run_dir / "run.db").stat().st_mode & 0o777 == 0o600


def test_a_restart_finds_what_was_committed(run_dir):
    feed = small_run()
    before = feed.pipeline
    store = RunStore(run_dir, RUN)
    commit(store, feed.effects())
    end, uuid, last_id = store.rank_log.end, store.uuid, store.last_id
    store.close()
    store = RunStore(run_dir, {**RUN, "project": "another"})
    after = Pipeline(before.options, store.restore(), 0)

    assert (store.rank_log.end, store.uuid, store.last_id) == (end, uuid, last_id)
    assert after.keys.rows == before.keys.rows
    assert after.keys.names == before.keys.names
    assert after.keys.definitions == before.keys.definitions
    assert {name: value for name, (value, _) in after.params.items()} == {
        name: value for name, (value, _) in before.params.items()
    }
    assert {n: (a.watermark.world_size, a.opened_unix_ns) for n, a in after.attempts.items()} == {
        n: (a.watermark.world_size, a.opened_unix_ns) for n, a in before.attempts.items()
    }
    assert after.writers.keys() == before.writers.keys()
    for incarnation, old in before.writers.items():
        new = after.writers[incarnation]
        of_this_life = {"last_seen_ns": 0, "last_moved_ns": 0, "backlog_bytes": 0, "pending_step": None}
        of_this_life |= {"watched_ns": 0, "first_step": 0, "longest_pause_ns": 0, "num_rises": 0}
        alive = {"info": replace(old.info, is_alive=False)}
        assert replace(new, **of_this_life) == replace(old, **of_this_life, **alive)
    store.close()
    assert json.loads(rows(run_dir, "SELECT value FROM meta WHERE key = 'run'")[0][0])["project"] == "p"


def test_the_points_are_what_the_pipeline_said(store, run_dir):
    commit(store, small_run().effects())

    assert points(run_dir, "loss") == [(0, 3.0, 2, 0), (1, 4.0, 2, 0), (2, 5.0, 2, 0)]
    assert points(run_dir, "sum_x") == [(step, 3.0, 2, 0) for step in range(3)]
    stats = rows(
        run_dir,
        "SELECT min, min_rank, max, max_rank, mean, expected, nan_count, inf_count, bad_rank, time_unix_ns FROM points "
        "JOIN keys USING (key_id) WHERE name = 'loss' AND step = 2",
    )
    assert stats == [(2.0, 0, 6.0, 1, 5.0, 2, 0, 0, None, TIME_NS + 2)]
    assert rows(run_dir, "SELECT step, rank, value FROM rank_points ORDER BY step, rank") == [
        (step, rank, 10.0 * (rank + 1)) for step in range(3) for rank in range(2)
    ]
    assert rows(run_dir, "SELECT key, text FROM texts") == [("note", "hällo\x00 \U0001f600")]
    assert rows(run_dir, "SELECT name, value FROM params ORDER BY name") == [("lr", "0.1"), ("name", '"x"')]
    assert ("alert", "error", "hot: 95") in rows(run_dir, "SELECT kind, level, message FROM events")
    assert rows(run_dir, "SELECT writer_id, reason, count FROM drops") == [(2, "bad_value", 3)]
    assert store.num_points >= 9


def test_ids_rise_over_all_tables_and_none_is_used_twice(store, run_dir):
    """One integer is a sink's cursor: an id that came again, or came late, would be skipped by every sink."""
    feed = small_run()
    commit(store, feed.effects())
    first = store.last_id
    late = Rank(0, 2, life=1)
    late.log(0, loss=1.0).say(type="text", key="a", text="b").say(type="params", values={"new": 1})
    feed.declare(late)
    feed.end(late)
    commit(store, feed.effects())
    ids = [row for table in TABLES for row in rows(run_dir, f"SELECT id FROM {table}")]

    assert len(ids) == len(set(ids))
    assert max(ids) == (store.last_id,)
    assert json.loads(rows(run_dir, "SELECT value FROM meta WHERE key = 'next_id'")[0][0]) == store.last_id + 1
    assert len([i for (i,) in ids if i <= first]) == first
    assert store.last_id > first


def test_the_rank_log_holds_every_record_and_is_found_again(run_dir):
    feed = small_run()
    effects = feed.effects()
    store = RunStore(run_dir, RUN)
    seen = []

    def locate(positions):
        seen.extend(positions)
        return positions[1]

    store.commit(effects, locate, TIME_NS)
    assert [p for p, *_ in store.entries()] == seen
    assert [(w, s, data) for _, w, s, data in store.entries()] == [
        (e.writer_id, e.first_seq, e.payload) for e in effects.log
    ]
    assert [p for p, *_ in store.entries(seen[1])] == seen[1:]
    store.close()
    store = RunStore(run_dir, RUN)
    assert store.replay_from == seen[1]
    store.commit(Effects(status=("finished", "")), from_the_end, TIME_NS)
    store.close()
    store = RunStore(run_dir, RUN)
    assert store.replay_from == store.rank_log.end > seen[1]
    store.close()


def test_what_the_log_holds_beyond_the_last_commit_is_cut_off(run_dir):
    """A crash between the log and the transaction: nothing of it was acknowledged, it comes again."""
    store = RunStore(run_dir, RUN)
    a = Rank(0).log(0, x=1.0)
    feed = Feed(a)
    feed.send(a)
    commit(store, feed.effects())
    end = store.rank_log.end
    a.log(1, x=2.0)
    feed.send(a)
    store.rank_log.extend(feed.effects().log)
    store.close()
    store = RunStore(run_dir, RUN)

    assert store.rank_log.end == end
    assert len(list(store.entries())) == 1
    store.close()


# -- status


@pytest.mark.parametrize("status", ["finished", "failed", "killed", "preempted"])
def test_the_status_comes_back_with_its_time(run_dir, status):
    store = RunStore(run_dir, RUN)
    commit(store, Feed(Rank(0)).effects())
    store.commit(Effects(status=(status, "why")), from_the_end, 123)
    store.close()
    store = RunStore(run_dir, RUN)

    assert store.status == {"status": status, "detail": "why", "ended_unix_ns": 123}
    assert store.restore().is_closed
    store.commit(Effects(status=("running", "")), from_the_end, 456)
    assert store.status == {"status": "running", "detail": "", "ended_unix_ns": None}
    assert not store.restore().is_closed
    store.close()


def test_the_launchers_verdict_is_remembered_before_it_is_the_status(run_dir):
    """The aggregator may die between the launcher's word, which is said once, and the last record."""
    store = RunStore(run_dir, RUN)
    feed = Feed(Rank(0))
    feed.pipeline.finish("failed", "rank 0: exit code 1", 0)
    commit(store, feed.effects())
    assert store.status["status"] == "running"
    assert store.restore().verdict == ("failed", "rank 0: exit code 1")
    commit(store, Effects(verdict=("", "")))

    assert store.restore().verdict is None
    store.close()


def test_the_watermarks_are_there_for_readers(store, run_dir):
    store.put_watermarks({0: 17, 1: 3})

    assert json.loads(rows(run_dir, "SELECT value FROM meta WHERE key = 'watermark'")[0][0]) == {"0": 17, "1": 3}


# -- NaN, revisions


def test_nan_is_null_and_infinity_is_itself(store, run_dir):
    a = Rank(0).log(0, x=math.nan).log(1, x=math.inf).log(2, x=-math.inf).log(3, x=1e308)
    feed = Feed(a)
    feed.end(a)
    commit(store, feed.effects())

    assert [value for _, value, *_ in points(run_dir)] == [None, math.inf, -math.inf, 1e308]
    assert rows(run_dir, "SELECT nan_count, inf_count, bad_rank FROM points ORDER BY step") == [
        (1, 0, 0), (0, 1, 0), (0, 1, 0), (0, 0, None),
    ]  # fmt: skip


def late_rank(store):
    """Rank 0 logs three steps and they are emitted; then rank 1 says what it had for step 1."""
    a, b = Rank(0, 2), Rank(1, 2)
    feed = Feed(a, b)
    for step in range(3):
        a.log(step, x=step)
    feed.end(a)
    commit(store, feed.effects(20_000))
    return feed, b


def test_a_late_value_is_a_revision_and_the_old_point_is_kept(store, run_dir):
    feed, b = late_rank(store)
    assert points(run_dir) == [(0, 0.0, 1, 0), (1, 1.0, 1, 0), (2, 2.0, 1, 0)]
    old_ids = dict(rows(run_dir, "SELECT step, id FROM points"))
    last_id = store.last_id
    b.log(1, x=5.0)
    feed.send(b)
    commit(store, feed.effects(1000, store))

    assert points(run_dir) == [(0, 0.0, 1, 0), (1, 3.0, 2, 1), (2, 2.0, 1, 0)]
    assert points(run_dir, table="superseded") == [(1, 1.0, 1, 0)]
    assert rows(run_dir, "SELECT step, id FROM superseded") == [(1, old_ids[1])]
    new_ids = dict(rows(run_dir, "SELECT step, id FROM points"))
    assert (new_ids[0], new_ids[2]) == (old_ids[0], old_ids[2])
    assert new_ids[1] > last_id


def test_revisions_count_on(store, run_dir):
    feed, b = late_rank(store)
    for value in (5.0, 7.0, 9.0):
        b.log(1, x=value)
        feed.send(b)
        commit(store, feed.effects(1000, store))

    assert [revision for *_, revision in points(run_dir, table="superseded")] == [0, 1, 2]
    assert [revision for step, *_, revision in points(run_dir) if step == 1] == [3]


@pytest.mark.parametrize("value", [1.0, math.nan, math.inf])
def test_a_point_that_says_the_same_is_not_emitted_again(store, run_dir, value):
    """A restart derives open windows again; every sink would otherwise get what it has."""
    a = Rank(0).log(0, x=value, y=2.0)
    feed = Feed(a)
    feed.end(a)
    effects = feed.effects()
    commit(store, effects)
    before = [row for table in TABLES for row in rows(run_dir, f"SELECT * FROM {table}")]
    commit(store, Effects(emissions=effects.emissions))

    assert [row for table in TABLES for row in rows(run_dir, f"SELECT * FROM {table}")] == before


def test_a_derived_point_never_forgets_ranks_that_were_counted(store, run_dir):
    """The oldest files of the rank log may be gone: what is derived from the rest knows less."""
    a, b = Rank(0, 2).log(0, x=1.0), Rank(1, 2).log(0, x=3.0)
    feed = Feed(a, b)
    feed.end(a, b)
    commit(store, feed.effects())
    alone = Feed(a, b)
    alone.end(a)
    alone.pipeline.bye(b.incarnation, 0, 0, TIME_NS)
    commit(store, Effects(emissions=alone.effects().emissions))

    assert points(run_dir) == [(0, 2.0, 2, 0)]


def test_attempts_do_not_meet(store, run_dir):
    """A restart from a checkpoint logs the same steps again: another attempt, no revision."""
    a, again = Rank(0).log(0, x=1.0), Rank(0, life=1).log(0, x=2.0)
    feed = Feed(a)
    feed.end(a)
    commit(store, feed.effects())
    feed.declare(again)
    feed.end(again)
    commit(store, feed.effects())

    assert rows(run_dir, "SELECT attempt, value, revision FROM points ORDER BY attempt") == [(0, 1.0, 0), (1, 2.0, 0)]
    assert rows(run_dir, "SELECT COUNT(*) FROM superseded") == [(0,)]


# -- who may write


def test_a_second_writer_of_a_run_is_refused(store, run_dir):
    code = """
import sys
from pathlib import Path
from ddplog.errors import ConfigError
from ddplog.store.run_store import RunStore
try:
    RunStore(Path(sys.argv[1]), {})
except ConfigError as exc:
    print(exc.setting, exc.value)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(run_dir)], env=ENVIRON, capture_output=True, text=True, check=True, timeout=60
    )

    assert done.stdout == "run_id r1\n"


def test_a_store_of_another_format_is_refused_and_let_go(run_dir):
    RunStore(run_dir, RUN).close()
    with closing(sqlite3.connect(run_dir / "run.db", isolation_level=None)) as db:
        db.execute("UPDATE meta SET value = '99' WHERE key = 'format'")
    open_files = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match="99") as caught:
        RunStore(run_dir, RUN)

    assert caught.value.value == "r1"
    assert len(os.listdir("/proc/self/fd")) == open_files


# -- a full disk


def test_what_sqlite_cannot_hold_leaves_everything_as_it_was(store, run_dir):
    """A lone surrogate, say: whatever commit() raises, the next one begins anew."""
    feed = small_run()
    effects = feed.effects()
    before, end, last_id, num_points = dump(run_dir), store.rank_log.end, store.last_id, store.num_points
    with pytest.raises(UnicodeEncodeError):
        commit(store, replace(effects, params=[ParamRow(0, 0, "name", "\ud800", TIME_NS)]))

    assert (dump(run_dir), store.rank_log.end, store.last_id, store.num_points) == (before, end, last_id, num_points)
    commit(store, effects)
    assert len(points(run_dir, "loss")) == 3


FULL = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from store.test_run_store import TIME_NS, RUN, commit, dump, small_run, RunStore
from store.store_jobs import Feed, Rank
from ddplog.store.run_store import StoreError

run_dir, which = Path(sys.argv[1]), sys.argv[3]

def effects():
    a = Rank(0)
    for step in range(300):
        a.log(step, x=step, y=1.0)
    a.say(type="text", key="t", text="z" * 20_000)
    feed = Feed(a)
    feed.end(a)
    return feed.effects()

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

work = effects()
num_log_bytes = sum(56 + len(entry.payload) for entry in work.log)
store = RunStore(run_dir, RUN)
before = dump(run_dir), store.rank_log.end, store.last_id, store.num_points, repr(store.status)
log_before = b"".join(p.read_bytes() for p in sorted((run_dir / "ranks").iterdir()))
if which == "log":
    limit(num_log_bytes - 1000)
else:  # the log fits, the transaction does not
    limit(max(num_log_bytes, (run_dir / "run.db-wal").stat().st_size + int(which)))
for attempt in range(3):
    try:
        commit(store, work)
    except StoreError as exc:
        pass
    else:
        sys.exit("it fitted")
    assert (store.rank_log.end, store.last_id, store.num_points, repr(store.status)) == before[1:]
    assert b"".join(p.read_bytes() for p in sorted((run_dir / "ranks").iterdir())) == log_before
limit(resource.RLIM_INFINITY)
assert dump(run_dir) == before[0]
commit(store, work)

other = RunStore(run_dir.with_name("undisturbed"), RUN)
commit(other, effects())
assert dump(run_dir) == dump(run_dir.with_name("undisturbed"))
assert store.num_points == other.num_points
assert store.rank_log.end == other.rank_log.end
assert list(store.entries()) == list(other.entries())
assert store.restore() == other.restore()
other.close()
store.close()
"""


@pytest.mark.system
@pytest.mark.parametrize("which", ["log", "0", "4096", "20000"])
def test_a_commit_that_fails_leaves_everything_as_it_was_and_can_be_repeated(run_dir, which):
    """The kernel's limit on the size of a file stands for a full disk: in the log, or at three places of the WAL."""
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(run_dir), str(ROOT / "tests"), which],
        env=ENVIRON, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr


def test_positions_are_the_logs_own(store):
    assert store.replay_from == Position(1, 0)
    assert "next_id=1" in repr(store)


def test_a_restart_knows_how_far_each_key_went_in_each_attempt(run_dir):
    """What is at or below it is stored; an attempt that was rewound has a mark of its own."""
    store, rank = RunStore(run_dir, RUN), Rank(0)
    for step in range(9):
        rank.log(step, x=1.0)
    rank.log(3, y=1.0)
    feed = Feed(rank)
    feed.end(rank)
    commit(store, feed.effects())
    store.close()
    store = RunStore(run_dir, RUN)
    assert store.restore().emitted_to == {(0, 1): 8, (0, 2): 3}
    again = Rank(0, life=1).log(2, x=1.0)
    feed = Feed(restored=store.restore())
    feed.declare(again)
    feed.end(again)
    commit(store, feed.effects())
    store.close()
    store = RunStore(run_dir, RUN)
    assert store.restore().emitted_to == {(0, 1): 8, (0, 2): 3, (1, 1): 2}
    store.close()
