"""What the control plane says of a live run: each number against the pipeline and the store it comes from."""

import json
import time

import pytest
from store.store_jobs import Feed, Rank

from ddplog.aggregator.forwarders import Forwarders
from ddplog.aggregator.snapshot import Snapshots
from ddplog.core.effects import Effects
from ddplog.journal.spool import JobInfo
from ddplog.store.run_store import RunStore

SECOND = 1_000_000_000


class Live:
    """A run with a store and a pipeline, and no process."""

    def __init__(self, folder, *ranks):
        self.job = JobInfo(
            run_id="r1", project="p", name=None, dir=str(folder), sinks=(), tags=(), config={}, created_unix_ns=42,
            launcher_pid=0, launcher="python", node_rank=0, settings={},
        )  # fmt: skip
        self.store = RunStore(self.job.run_dir, {"run_id": "r1"})
        self.feed = Feed(*ranks)
        self.snapshots = Snapshots(self.job, self.feed.pipeline, self.store)
        self.forwarders = Forwarders(self.job.run_dir, ())

    def commit(self, effects=None, ns=200):
        effects = effects or self.feed.effects(ns, self.store)
        self.store.commit(effects, lambda positions: None, 7)
        self.snapshots.note(effects)
        return effects

    def status(self, now_ns=None):
        self.snapshots.refresh(self.feed.now if now_ns is None else now_ns, self.forwarders, at_once=True)
        return self.snapshots.current()

    def last(self):
        return {value.key: (value.step, value.value) for value in self.status().last_values}


@pytest.fixture
def live(tmp_path):
    made = []

    def make(*ranks):
        made.append(Live(tmp_path, *ranks))
        return made[-1]

    yield make
    for run in made:
        run.store.close()


def test_before_anything_has_come_the_run_is_known(live):
    run = live()
    reply = run.snapshots.current()
    assert (reply.run_id, reply.project, reply.status) == ("r1", "p", "running")
    reply = run.status()

    assert (reply.world_size, reply.num_points, reply.started_unix_ns, list(reply.ranks)) == (0, 0, 42, [])
    assert not reply.HasField("watermark")
    assert not reply.is_drained
    assert abs(reply.time_unix_ns - time.time_ns()) < 60 * SECOND


def test_the_numbers_of_a_live_run(live):
    a, b = Rank(0, 2), Rank(1, 2)
    run = live(a, b)
    for step in range(4):
        a.log(step, loss=step, acc=0.5)
    b.log(0, loss=2.0, acc=0.5).log(1, loss=3.0, acc=0.5)
    run.feed.pipeline.progress(b.incarnation, None, 0, {"bad_value": 2, "key_limit": 1}, 99, 0)
    run.feed.send(a, b)
    run.commit()
    reply = run.status()

    assert (reply.world_size, reply.attempt, reply.watermark, reply.num_values) == (2, 0, 0, 12)
    assert reply.num_points == run.store.num_points > 0
    ranks = [(r.rank, r.host, r.pid, r.state, r.step, r.next_seq, r.num_drops, r.backlog_bytes) for r in reply.ranks]
    assert ranks == [(0, "h", 100, "running", 3, 5, 0, 0), (1, "h", 101, "running", 1, 3, 3, 99)]


def test_a_rank_without_a_step_has_none(live):
    run = live(Rank(0))
    (rank,) = run.status().ranks

    assert not rank.HasField("step")
    assert rank.steps_per_s == 0


def test_the_rate_is_that_of_the_last_seconds(live):
    """A rank that hangs shows 0 soon, not the mean of the hours before."""
    a = Rank(0)
    run = live(a)
    rates = []
    for second in range(12):
        if second < 6:
            a.log(second * 10, x=1.0)
            run.feed.send(a)
            run.commit()
        (rank,) = run.status(second * SECOND).ranks
        rates.append(rank.steps_per_s)

    assert rates[0] == 0
    assert rates[1:6] == [10.0] * 5
    assert rates[6] == pytest.approx(8.0)
    assert rates[11] == 0
    assert run.status(20 * SECOND).ranks[0].idle_s >= 14


def test_a_snapshot_is_made_anew_at_its_interval_and_the_old_one_stays_as_it_was(live):
    """gRPC's threads hold the one they took while the loop goes on."""
    a = Rank(0).log(0, x=1.0)
    run = live(a)
    run.snapshots.refresh(SECOND, run.forwarders)
    first = run.snapshots.current()
    run.feed.send(a)
    run.commit()
    run.snapshots.refresh(SECOND + 199_999_999, run.forwarders)
    assert run.snapshots.current() is first
    run.snapshots.refresh(SECOND + 200_000_000, run.forwarders)

    assert run.snapshots.current() is not first
    assert first.num_values == 0


def test_the_newest_value_of_each_key_is_shown(live):
    a = Rank(0)
    run = live(a)
    a.log(0, loss=1.0, lr=0.5).log(1, loss=2.0, lr=0.25).log(1, val=9.0)
    run.feed.send(a)
    run.feed.end(a)
    run.commit()

    assert run.last() == {"loss": (1, 2.0), "lr": (1, 0.25), "val": (1, 9.0)}


def test_a_late_value_of_an_old_step_is_not_the_newest(live):
    a, b = Rank(0, 2), Rank(1, 2)
    run = live(a, b)
    for step in range(5):
        a.log(step, loss=step)
    run.feed.end(a)
    run.commit(ns=20_000)
    assert run.last()["loss"] == (4, 4.0)
    b.log(1, loss=100.0)
    run.feed.send(b)
    effects = run.commit(ns=1000)

    assert [emission.steps.tolist() for _, emission in effects.emissions] == [[1]]
    assert run.last()["loss"] == (4, 4.0)


def test_a_restart_from_a_checkpoint_is_newer_than_what_it_repeats(live):
    a, again = Rank(0), Rank(0, life=1).log(2, loss=7.0)
    for step in range(5):
        a.log(step, loss=step)
    run = live(a)
    run.feed.end(a)
    run.commit()
    run.feed.declare(again)
    run.feed.end(again)
    run.commit()

    assert run.last()["loss"] == (2, 7.0)
    assert run.status().attempt == 1


def test_a_key_that_is_missing_at_the_last_step_still_shows_its_newest(live):
    a, b = Rank(0, 2), Rank(1, 2)
    run = live(a, b)
    a.log(0, loss=1.0, acc=0.5).log(1, loss=2.0)
    b.log(0, loss=1.0, acc=0.5).log(1, loss=2.0)
    run.feed.end(a, b)
    run.commit()

    assert run.last() == {"loss": (1, 2.0), "acc": (0, 0.5)}


def test_the_end_is_shown_with_its_detail_and_trouble_before_that(live):
    a = Rank(0).log(0, x=1.0)
    run = live(a)
    run.feed.end(a)
    run.snapshots.trouble = "no space left"
    assert run.status().status_detail == "no space left"
    run.snapshots.trouble = ""
    run.feed.pipeline.finish("failed", "rank 0: exit code 1", 0)
    run.commit()
    reply = run.status()

    assert (reply.status, reply.status_detail, reply.is_drained) == ("failed", "rank 0: exit code 1", True)
    assert reply.ranks[0].state == "died"
    assert not reply.HasField("watermark")


def test_the_sinks_are_what_their_forwarders_say(live):
    run = live()
    folder = run.job.run_dir / "sinks" / "comet"
    folder.mkdir(parents=True)
    state = {"name": "comet", "state": "retrying", "cursor": 7, "lag": 3, "detail": "429", "time_unix_ns": 1}
    (folder / "state.json").write_text(json.dumps(state))
    (sink,) = run.status().sinks

    assert (sink.name, sink.state, sink.cursor, sink.lag, sink.detail) == ("comet", "retrying", 7, 3, "429")


def test_nothing_noted_changes_nothing(live):
    run = live()
    run.snapshots.note(Effects())

    assert run.last() == {}
