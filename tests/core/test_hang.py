"""Which attempts are taken for hung, and which are only slow, idle, or cannot be seen."""

import json

import pytest
from core.test_pipeline import OPTIONS, Harness, Rank

from ddplog.core.attempt import Options
from ddplog.core.effects import AttemptRow, Restored
from ddplog.core.hang import MAX_STACKS, UNSEEN_NS, Hang, _ranks, restore_hang
from ddplog.core.pipeline import Pipeline

S = 1_000_000_000
HANG = Options(grace_ns=10 * S, late_ns=5 * S, settle_ns=S // 10, max_keys=100, hang_ns=20 * S)


class World:
    """Ranks of one attempt that log a step each second, until a test says otherwise."""

    def __init__(self, world=4, options=HANG):
        self.ranks = [Rank(rank, world) for rank in range(world)]
        self.h = Harness(*self.ranks, options=options)
        self.steps = dict.fromkeys(range(world), -1)
        self.wanted = []
        self.silent_nodes = False

    def log(self, *ranks, step=None, **values):
        for rank in ranks:
            if step is None:
                self.steps[rank] += 1
            self.h.send(self.ranks[rank].log(self.steps[rank] if step is None else step, **(values or {"loss": 1.0})))
        return self

    def wait(self, seconds=1.0):
        """Let time pass, in which agents send heartbeats."""
        for _ in range(int(seconds * 4)):
            self.h.now += S // 4
            if not self.silent_nodes:
                for rank in self.ranks:
                    writer = self.h.pipeline.writers[rank.incarnation]
                    self.h.pipeline.progress(rank.incarnation, None, writer.next_seq, {}, 0, self.h.now)
            self.wanted += self.h.tick().stacks
        return self

    def train(self, *ranks, seconds=5):
        for _ in range(seconds):
            self.log(*ranks).wait()
        return self

    def end(self, *ranks, status="finished"):
        for rank in ranks:
            if status == "finished":
                self.ranks[rank].say(type="finish", status="finished")
            self.h.end(self.ranks[rank])
        return self

    def found(self, *kinds):
        wanted = kinds or ("hang", "hang_over")
        return [event for event in self.h.events if event.kind in wanted]

    def only(self, kind="hang"):
        (event,) = self.found(kind)
        return event

    def standing(self):
        pipeline = self.h.pipeline
        return [pipeline.standing(pipeline.writers[rank.incarnation], self.h.now) for rank in self.ranks]


def test_one_rank_stands_while_the_others_wait_in_a_collective():
    """Reliability case 8: what holds the watermark has a name, and says since when."""
    w = World().train(0, 1, 2, 3)
    w.log(0, 2, 3).wait(19)
    assert w.found() == []
    w.wait(3)
    event = w.only()
    assert (event.rank, event.step, event.level) == (1, 4, "warning")
    assert event.message.startswith("rank 1 has not moved for ")
    assert "last step 4; the other 3 have reached step 5" in event.message
    data = json.loads(event.data)
    assert (data["ranks"], data["steps"], data["reached"]) == ([1], [4], 5)
    assert w.standing() == ["waiting", "hung", "waiting", "waiting"]
    w.wait(60)
    assert len(w.found()) == 1, "said once"


def test_one_rank_stands_while_the_others_go_on():
    w = World().train(0, 1, 2, 3).train(0, 1, 3, seconds=22)
    event = w.only()
    assert (event.rank, event.step) == (2, 4)
    assert json.loads(event.data)["is_everybody"] is False
    assert w.standing() == ["running", "running", "hung", "running"]
    assert w.wanted == [w.ranks[2].incarnation], "those that move are left alone"


def test_everybody_stands_at_the_same_step():
    w = World().train(0, 1, 2, 3).wait(25)
    event = w.only()
    assert (event.rank, event.step) == (None, 4)
    assert event.message.startswith("no rank has moved for 2")
    assert w.standing() == ["hung"] * 4
    assert w.wanted == [rank.incarnation for rank in w.ranks]


def test_the_stacks_of_those_behind_and_of_some_that_wait_are_wanted():
    w = World(40).train(*range(40))
    w.log(*range(20, 40)).wait(25)
    assert w.wanted == [w.ranks[i].incarnation for i in (*range(MAX_STACKS), *range(20, 20 + MAX_STACKS))]


def test_it_is_over_when_the_rank_moves_again():
    w = World().train(0, 1, 2, 3).log(0, 2, 3).wait(25).log(1).wait()
    over = w.only("hang_over")
    assert (over.rank, over.step, over.level) == (1, 5, "info")
    assert over.message.startswith("it moved again after 2")
    assert w.standing() == ["running" if rank == 1 else "idle" for rank in range(4)]
    assert w.h.pipeline.hang_words(w.h.now) == ""


def test_a_pause_it_has_come_back_from_is_not_a_hang_the_next_time():
    """A validation of 25 s between epochs is taken for a hang once."""
    w = World().train(0, 1, 2, 3)
    for _ in range(3):
        w.wait(25).train(0, 1, 2, 3)
    assert [event.kind for event in w.found()] == ["hang", "hang_over"]
    w.wait(60)
    assert [event.kind for event in w.found()] == ["hang", "hang_over", "hang"], "twice as long is"


def test_a_rank_that_dies_ends_its_hang_and_is_named_in_the_next():
    """Reliability case 5's neighbour: the others wait for a dead rank."""
    w = World().train(0, 1, 2, 3).log(0, 2, 3).wait(25).end(1, status="died").wait(2)
    assert [event.kind for event in w.found()] == ["hang", "hang_over", "hang"]
    assert "rank 1: died" in w.only("hang_over").message
    assert w.found()[-1].message.endswith("; rank 1 died")
    assert w.standing()[1] == "died"


def test_a_job_whose_ranks_have_ended_does_not_hang():
    w = World().train(0, 1, 2, 3).end(0, 1, 2, 3).wait(100)
    assert w.found() == []
    assert w.standing() == ["finished"] * 4


def test_a_hang_does_not_outlive_its_ranks():
    w = World().train(0, 1, 2, 3).wait(25).end(0, 1, 2, 3).wait(30)
    assert [event.kind for event in w.found()] == ["hang", "hang_over"]


def test_the_last_rank_to_end_is_watched():
    w = World().train(0, 1, 2, 3).log(0, 2, 3).end(0, 2, 3).wait(25)
    assert w.only().message.endswith("last step 4; others before them have reached step 5")


@pytest.mark.parametrize("world", [2, 4])
def test_validation_on_rank_0_is_no_hang(world):
    """Reliability case 8: the others wait for it, and it moves."""
    w = World(world).train(*range(world))
    for _ in range(60):
        w.log(0, step=4, val=1.0).wait()
    assert w.found() == []
    assert w.standing() == ["running", *["idle"] * (world - 1)]


def test_validation_that_counts_its_own_steps_is_no_hang():
    """The others then look as if they were behind, all of them."""
    w = World(4).train(*range(4))
    for step in range(60):
        w.log(0, step=step, val=1.0).wait()
    assert w.found() == []


def test_a_script_that_logs_on_rank_0_only_has_no_rank_behind():
    w = World().train(0, seconds=60)
    assert w.found() == []
    w.wait(25)
    assert json.loads(w.only().data)["ranks"] == [0]


def test_a_rank_that_logged_a_summary_and_no_more_is_not_behind():
    w = World().log(0, 1, 2, 3, step=0, params=1.0).wait().train(0, 2, 3, seconds=60)
    assert w.found() == []


def test_before_the_first_step_nothing_hangs():
    """Loading a checkpoint and compiling may take longer than any setting."""
    w = World().wait(100)
    assert w.found() == []
    w.train(0, 1, 2, 3).wait(25)
    assert len(w.found("hang")) == 1, "and the start-up is forgotten with the second step"


def test_a_job_that_logs_once_an_hour_does_not_hang():
    w = World(2)
    for _ in range(3):
        w.wait(200).log(0, 1)
    assert w.found() == []


def test_what_could_not_be_seen_is_no_hang():
    """This process may have been stopped, or the agent, or the network cut: the ranks may have gone on."""
    w = World().train(0, 1, 2, 3)
    w.silent_nodes = True
    w.wait(100)
    assert w.found() == []
    assert w.standing() == ["unseen"] * 4
    w.silent_nodes = False
    w.wait(19)
    assert w.found() == []
    w.wait(3)
    assert len(w.found("hang")) == 1


def test_a_stop_of_the_aggregator_is_no_hang():
    """Its clock jumps, and the first thing it does may be a tick."""
    w = World().train(0, 1, 2, 3)
    w.h.now += 60 * S
    w.h.tick()
    assert w.found() == []
    w.train(0, 1, 2, 3)
    assert w.found() == []


def test_a_step_that_is_shown_and_not_stored_yet_is_a_move():
    """A full store takes nothing; the ranks go on all the same."""
    w = World(2).train(0, 1)
    for _ in range(100):
        w.h.now += S // 4
        for rank in w.ranks:
            w.h.pipeline.progress(rank.incarnation, 9, 10**6, {}, 0, w.h.now)
        w.h.tick()
    assert w.found() == []


def test_set_step_alone_is_progress():
    w = World(2)
    for step in range(30):
        for rank in w.ranks:
            w.h.pipeline.progress(rank.incarnation, step, 0, {}, 0, w.h.now)
        w.wait()
    assert w.found() == []
    w.wait(25)
    assert w.only().step == 29


def test_it_can_be_switched_off():
    w = World(2, options=OPTIONS).train(0, 1).wait(1000)
    assert w.found() == []


def test_a_rank_far_behind_that_moves_is_a_straggler_and_a_second_holder_a_duplicate():
    """Reliability cases 5 and 8."""
    w = World().train(0, 1, 2, 3, seconds=2).train(0, 1, 2, seconds=9).log(3).wait()
    assert w.standing() == ["running", "running", "running", "straggler"]
    twin = Rank(1, 4, life=1)
    w.h.hello(twin)
    assert w.h.pipeline.standing(w.h.pipeline.writers[twin.incarnation], w.h.now) == "duplicate"


def test_a_hang_is_known_after_a_restart():
    """The next aggregator says when it is over, and does not begin it anew."""
    w = World(2).train(0, 1).log(0).wait(25)
    before = w.h.pipeline
    restored = Restored(
        writers=list(before.writers.values()), attempts=[AttemptRow(0, 2, 0, "start")], keys=list(before.keys.rows.values()), params={},
        emitted_to={}, definitions=[], verdict=None, is_closed=False, unsettled=[], hangs={0: w.only().data},
    )  # fmt: skip
    w.h.pipeline = Pipeline(HANG, restored, w.h.now)
    w.h.pipeline.end_replay()
    w.wait(60)
    assert len(w.found()) == 1
    w.log(1).wait()
    assert [event.kind for event in w.found()] == ["hang", "hang_over"]


def test_the_words_of_a_hang():
    one = Hang(ranks=(3,), steps=(7,), reached=9, is_everybody=True, num_living=2, since_ns=0)
    assert one.message(5 * S) == (
        "rank 3 has not moved for 5.0 s: last step 7; the other one has reached step 9 and does not move either"
    )
    many = Hang(ranks=(0, 1, 2, 5), steps=(7, 7, 8, 7), reached=9, is_everybody=False, num_living=6, since_ns=0)
    assert many.message(S) == (
        "ranks 0-2, 5 have not moved for 1.0 s: last steps 7 to 8; the other 2 have reached step 9"
    )
    assert _ranks(range(0, 100, 2)).endswith(", 30 and 34 more")
    assert restore_hang(many.data(17), 0) == (many, 17)


def test_the_gap_that_hides_a_rank_is_longer_than_many_heartbeats():
    assert UNSEEN_NS >= 10 * 250_000_000
