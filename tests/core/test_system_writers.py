"""Samplers' journals are stored and reduced like a rank's, in a lane of their own, and count for nothing else."""

from dataclasses import replace

import pytest
from core.test_pipeline import OPTIONS, Harness, Rank

from ddplog.core.effects import SYSTEM
from ddplog.core.pipeline import Pipeline

SECOND = 1_000_000_000


class Sampler(Rank):
    """What the node's sampler writes about one life of a rank."""

    def __init__(self, rank, life=0):
        super().__init__(rank.rank, rank.world, node=rank.node)
        self.incarnation = bytes([200, rank.rank, rank.life, life]) + bytes(12)
        self.of = rank

    def info(self, is_alive=True):
        info = super().info(is_alive)
        return replace(info, role=SYSTEM, belongs_to=self.of.incarnation, rank=0, world_size=1, started_unix_ns=99)

    def sample(self, second, **values):
        return self.log(second, **{f"sys/{name}": value for name, value in values.items()})


@pytest.fixture
def two():
    """Two ranks and their samples."""
    a, b = Rank(0, 2), Rank(1, 2)
    return a, b, Sampler(a), Sampler(b)


def test_samples_are_reduced_with_the_rank_they_name(two):
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    h.send(x.sample(5, util=10.0))
    h.send(y.sample(5, util=30.0))
    h.tick()
    effects = h.tick(100)

    assert h.points == {("sys/util", 5, 0): [(20.0, 2)]}
    ((_, emission),) = effects.emissions
    assert (emission.block.min_rank.item(), emission.block.max_rank.item()) == (0, 1)


def test_system_steps_never_move_the_ranks_watermark(two):
    """Seconds are no steps: a sample at second 500 would close every step of training below it."""
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    h.send(a.log(0, loss=1.0))
    for second in range(0, 500, 5):
        x.sample(second, util=1.0)
        y.sample(second, util=1.0)
    h.send(x)
    h.send(y)
    h.tick()
    h.tick(100)
    assert ("loss", 0, 0) not in h.points
    assert len(h.points) == 100

    h.send(b.log(0, loss=3.0))
    h.tick(100)
    h.tick(100)
    assert h.points["loss", 0, 0] == [(2.0, 2)]


def test_the_ranks_never_move_the_samples_watermark(two):
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    for rank in (a, b):
        for step in range(100):
            rank.log(step, loss=1.0)
        h.send(rank)
    h.send(x.sample(5, util=1.0))
    h.tick(200)
    assert not any(key == "sys/util" for key, _, _ in h.points)

    h.send(y.sample(5, util=2.0))
    h.tick()
    h.tick(100)
    assert h.points["sys/util", 5, 0] == [(1.5, 2)]


def test_a_rank_that_is_sampled_seldom_is_waited_for_all_the_same():
    """The grace is a time without a step; of a sampler, one comes every sample_s."""
    a, b = Rank(0, 2), Rank(1, 2)
    x, y = Sampler(a), Sampler(b)
    h = Harness(a, b, options=replace(OPTIONS, sample_ns=20_000))
    h.hello(x, y)
    h.send(x.sample(5, util=1.0))
    h.tick(40_000)
    assert h.points == {}
    h.send(y.sample(5, util=3.0))
    h.tick()
    h.tick(100)
    assert h.points == {("sys/util", 5, 0): [(2.0, 2)]}


def test_what_only_one_rank_samples_is_expected_of_it_alone_after_three_times(two):
    """The host's metrics are written by the node's lowest rank."""
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    expected = []
    for second in range(0, 50, 5):
        h.send(x.sample(second, cpu=1.0).sample(second, util=1.0))
        h.send(y.sample(second, util=1.0))
        h.tick()
        for _, emission in h.tick(100).emissions:
            names = [h.pipeline.keys.names[key_id] for key_id in emission.key_ids]
            expected += emission.expected[:, 0].tolist() if names == ["sys/cpu"] else []
    assert expected[-1] == 1


@pytest.mark.parametrize("life", [0, 1])
def test_a_system_writer_opens_no_attempt_and_holds_no_rank(two, life):
    a, b, x, _ = two
    h = Harness(a, b)
    h.hello(x)
    h.hello(Sampler(a, life=1))  # a killed sampler's successor
    h.tick()

    assert list(h.pipeline.attempts) == [0]
    assert {w.state for w in h.pipeline.writers.values()} == {"running"}
    assert [w.info.rank for w in h.pipeline.attempts[0].members] == [0, 1]
    assert "duplicate_rank" not in h.kinds()


def test_a_system_writer_that_comes_late_belongs_to_its_ranks_attempt(two):
    a, b, _, _ = two
    h = Harness(a, b)
    h.end(a)
    h.hello(again := Rank(0, 2, life=1))
    h.hello(x := Sampler(a), y := Sampler(again))
    h.send(x.sample(5, util=1.0))
    h.send(y.sample(5, util=2.0))
    h.end(x)
    h.end(y)
    h.end(b)
    h.end(again)
    h.tick(20_000)

    assert [h.pipeline.writers[w.incarnation].attempt for w in (x, y)] == [0, 1]
    assert {key for key in h.points if key[0] == "sys/util"} == {("sys/util", 5, 0), ("sys/util", 5, 1)}


def test_a_system_writer_whose_rank_nobody_declared_is_not_welcome_yet():
    a = Rank(0, 1)
    h = Harness()
    x = Sampler(a)
    assert h.hello(x) == []
    assert h.pipeline.attempts == {}
    assert [w.info.role for w in h.hello(x, a)] == ["rank", "system"], "whatever order they are named in"


def test_a_system_writer_of_another_nodes_rank_is_not_welcome():
    a = Rank(0, 1, node="0")
    h = Harness(a)
    x = Sampler(a)
    x.node = "1"
    assert h.hello(x) == []


def test_samplers_do_not_hang_and_do_not_keep_a_hang_from_being_seen(two):
    a, b, x, y = two
    h = Harness(a, b, options=replace(OPTIONS, hang_ns=60 * SECOND))
    h.hello(x, y)
    for rank in (a, b):
        h.send(rank.log(0, loss=1.0).log(1, loss=1.0))
    h.tick()
    for second in range(0, 200, 5):
        h.send(x.sample(second, util=1.0))
        h.send(y.sample(second, util=1.0))
        for rank in (a, b):
            h.pipeline.progress(rank.incarnation, 1, 0, {}, 0, h.now)
        h.tick(5 * SECOND)
    assert [event.kind for event in h.events if event.kind == "hang"] == ["hang"]

    h = Harness(a, b, options=replace(OPTIONS, hang_ns=60 * SECOND))
    h.hello(Sampler(a), Sampler(b))
    for step in range(40):
        for rank in (a, b):
            h.send(rank.log(step + 2, loss=1.0))
        h.tick(5 * SECOND)
    assert "hang" not in h.kinds(), "a sampler that stands still holds nobody up"


def finish_status(*writers):
    for writer in writers:
        writer.say(type="finish", status="finished", detail="")


def test_a_run_is_over_only_once_the_samples_are_stored_too(two):
    """Nothing is lost: not what the sampler wrote in the job's last second either."""
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    finish_status(a, b)
    h.end(a)
    h.end(b)
    h.pipeline.finish("finished", "", h.now)
    h.pipeline.node("0", True, h.now)
    h.tick(20_000)
    assert not h.pipeline.is_drained
    assert h.statuses == []

    h.end(x.sample(5, util=1.0))
    h.end(y)
    h.tick()
    assert h.statuses == [("finished", "")]
    assert h.points["sys/util", 5, 0] == [(1.0, 1)]


@pytest.mark.parametrize("how", ["finished", "killed"])
def test_how_a_sampler_ended_is_nothing_to_the_run(two, how):
    a, b, x, _ = two
    h = Harness(a, b)
    h.hello(x)
    finish_status(a, b, *([x] if how == "finished" else []))
    for writer in (a, b, x):
        h.end(writer)
    h.pipeline.exited(x.incarnation, 9, 1)
    h.pipeline.node("0", True, h.now)
    h.tick(20_000)

    assert h.statuses == [("finished", "")]
    assert h.events == []


def test_the_launchers_word_about_a_rank_never_meets_its_sampler(two):
    a, b, x, _ = two
    h = Harness(a, b)
    h.hello(x)
    h.end(a)
    h.pipeline.rank_exit(0, 0, None, 9, "", 1)
    writers = h.pipeline.writers
    assert (writers[a.incarnation].signal, writers[x.incarnation].signal) == (9, None)


def test_a_sampler_that_is_declared_after_the_end_does_not_undo_the_launchers_verdict(two):
    """Its journal may be a moment younger than the last rank's end; the run goes on for its records and ends again."""
    a, b, x, _ = two
    h = Harness(a, b)
    h.end(a)
    h.end(b)
    h.pipeline.finish("killed", "signal 15", h.now)
    h.tick(20_000)
    h.hello(x)
    h.tick()
    h.end(x.sample(5, util=1.0))
    h.tick()

    assert h.statuses == [("killed", "signal 15"), ("running", ""), ("killed", "signal 15")]
    assert h.points["sys/util", 5, 0] == [(1.0, 1)]


def test_a_late_sample_is_derived_again_in_its_own_lane(two):
    """The window is gone: the point is made again from the rank log, with the expectations of the samplers' lane."""
    a, b, x, y = two
    h = Harness(a, b)
    h.hello(x, y)
    for second in range(0, 5 * 400, 5):
        x.sample(second, util=1.0)
        if second != 10:
            y.sample(second, util=3.0)
    h.send(x)
    h.send(y)
    h.tick()
    h.tick(20_000)
    assert h.points["sys/util", 10, 0] == [(1.0, 1)]

    h.send(y.sample(10, util=3.0))
    h.tick()
    h.tick(1000)
    assert h.points["sys/util", 10, 0][-1] == (2.0, 2)


def test_every_ranks_samples_are_kept_if_the_user_says_so(two):
    a, b, x, y = two
    a.say(type="define", pattern="sys/*", reduce="none", replicated=False)
    h = Harness(a, b)
    h.hello(x, y)
    h.send(a)
    h.send(x.sample(5, util=1.0))
    h.send(y.sample(5, util=3.0))
    h.tick()
    ((_, emission),) = h.tick(100).emissions
    assert [(rank, value) for _, _, rank, value, _ in emission.rank_values] == [(0, 1.0), (1, 3.0)]


def test_a_pipeline_without_samplers_has_empty_lanes():
    pipeline = Pipeline(OPTIONS)
    pipeline.hello([Rank(0, 1).info()], 0, 1)
    assert [lane.panels for lane in pipeline.system.values()] == [[]]
