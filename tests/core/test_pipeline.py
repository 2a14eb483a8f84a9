"""Writers, attempts, how the run ends; and the whole of it against a naive model."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.core.attempt import Options
from ddplog.core.dedup import Accept, Duplicate, Gap
from ddplog.core.effects import WriterInfo
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import KIND_MESSAGE, KIND_SCHEMA, NO_STEP, encode_message, encode_scalars

OPTIONS = Options(grace_ns=10_000, late_ns=500, settle_ns=100, max_keys=100)


class Rank:
    """A writer's journal, as far as a pipeline can see it."""

    def __init__(self, rank, world, life=0, node="0"):
        self.incarnation = bytes([rank, life]) + bytes(14)
        self.rank, self.world, self.node, self.life = rank, world, node, life
        self.records = []
        self.schemas = {}

    def info(self, is_alive=True):
        return WriterInfo(
            incarnation=self.incarnation,
            rank=self.rank,
            world_size=self.world,
            local_rank=self.rank,
            node_rank=0,
            node_id=self.node,
            host="h",
            pid=100 + self.rank + 50 * self.life,
            boot_id="b",
            started_unix_ns=self.life,
            is_alive=is_alive,
        )

    def log(self, step, weight=1.0, **values):
        keys = tuple(values)
        if keys not in self.schemas:
            self.schemas[keys] = len(self.schemas) + 1
            message = {"id": self.schemas[keys], "keys": keys}
            self.records.append(encode_message(KIND_SCHEMA, len(self.records), NO_STEP, 1, message, 0))
        record = encode_scalars(
            self.schemas[keys], len(self.records), step, 10, weight, [float(v) for v in values.values()], 0
        )
        self.records.append(record)
        return self

    def say(self, **message):
        self.records.append(encode_message(KIND_MESSAGE, len(self.records), NO_STEP, 20, message, 0))
        return self


class Harness:
    def __init__(self, *ranks, options=OPTIONS):
        self.pipeline = Pipeline(options)
        self.now = 0
        self.points, self.events, self.statuses = {}, [], []
        self.log_entries = []
        self.hello(*ranks)

    def hello(self, *ranks, is_alive=True):
        return self.pipeline.hello([rank.info(is_alive) for rank in ranks], self.now, 1)

    def send(self, rank, first=None, last=None):
        writer = self.pipeline.writers[rank.incarnation]
        first = writer.next_seq if first is None else first
        last = len(rank.records) if last is None else last
        if first == last:
            return None
        payload = b"".join(rank.records[first:last])
        return self.pipeline.batch(rank.incarnation, first, last - first, payload, self.now, 1)

    def end(self, rank):
        self.send(rank)
        self.pipeline.bye(rank.incarnation, len(rank.records), self.now, 1)

    def tick(self, ns=0):
        self.now += ns
        self.pipeline.tick(self.now, 1)
        effects = self.pipeline.take()
        for stale in self.pipeline.take_stale(self.now, at_once=self.pipeline.is_closed):
            entries = [(e.writer_id, e.first_seq, e.payload) for e in (*self.log_entries, *effects.log)]
            emission = self.pipeline.derive(stale, entries)
            if emission is not None:
                effects.emissions.append((stale.attempt, emission))
        self.log_entries += effects.log
        self.events += effects.events
        self.statuses += [effects.status] if effects.status else []
        for attempt, emission in effects.emissions:
            for s, step in enumerate(emission.steps.tolist()):
                for k, key_id in enumerate(emission.key_ids):
                    if emission.block.n[s, k]:
                        key = (self.pipeline.keys.names[key_id], step, attempt)
                        point = (float(emission.value[s, k]), int(emission.block.n[s, k]))
                        self.points.setdefault(key, []).append(point)
        return effects

    def kinds(self):
        return [event.kind for event in self.events]


def test_ranks_become_one_point():
    a, b = Rank(0, 2).log(0, loss=1.0), Rank(1, 2).log(0, loss=5.0, weight=3.0)
    h = Harness(a, b)
    h.send(a)
    h.send(b)
    h.tick()
    h.tick(100)

    assert h.points == {("loss", 0, 0): [(4.0, 2)]}


def test_a_batch_that_comes_again_is_acknowledged_and_not_taken():
    a = Rank(0, 1).log(0, x=1.0).log(1, x=2.0)
    h = Harness(a)

    assert h.send(a) == Accept(skip=0)
    assert h.send(a, first=0) == Duplicate()
    a.log(2, x=3.0)
    assert h.send(a, first=1) == Accept(skip=2)
    h.end(a)
    h.pipeline.node("0", True, 0)
    h.tick()
    assert [h.points["x", s, 0] for s in range(3)] == [[(1.0, 1)], [(2.0, 1)], [(3.0, 1)]]
    assert [(e.first_seq, e.num_records) for e in h.log_entries] == [(0, 3), (3, 1)]


def test_a_gap_is_refused_and_an_unknown_writer_too():
    a = Rank(0, 1).log(0, x=1.0).log(1, x=2.0)
    h = Harness(a)

    assert h.send(a, first=1) == Gap(next_seq=0)
    assert h.pipeline.batch(b"?" * 16, 0, 1, a.records[0], 0, 0) is None


def test_a_gap_that_no_journal_can_fill_is_a_loss_with_its_range():
    """Without it the writer would be asked for the lost records for ever."""
    a = Rank(0, 1).log(0, x=1.0).log(1, x=2.0)
    h = Harness()
    info = a.info()
    h.pipeline.hello([replace(info, oldest_seq=7)], 0, 1)
    writer = h.pipeline.writers[a.incarnation]
    h.pipeline.progress(a.incarnation, None, 0, {"bad_value": 1}, 0, 0)
    h.tick()

    assert writer.next_seq == 7
    assert writer.drops == {"bad_value": 1, "lost_records": 7}
    assert [event.message for event in h.events] == [
        "rank 0: 7 records, seq 0 to 6, are lost: its journal was trimmed, and the store is new"
    ]


def test_what_a_journal_has_lost_is_counted_once_and_not_waited_for():
    """Reliability case 17: the records behind the hole would never be taken, and asked for again for ever."""
    a = Rank(0, 1)
    for step in range(9):
        a.log(step, x=step)
    h = Harness(a)
    assert h.pipeline.loss(a.incarnation, 2, 4, 0, 1) == Gap(next_seq=0)
    h.send(a, last=2)
    assert h.send(a, first=6) == Gap(next_seq=2)
    assert h.pipeline.loss(a.incarnation, 0, 2, 0, 1) == Duplicate()
    assert h.pipeline.loss(a.incarnation, 2, 4, 0, 1) == Accept(skip=0)
    assert h.pipeline.loss(a.incarnation, 2, 4, 0, 1) == Duplicate()
    assert h.pipeline.loss(a.incarnation, 3, 6, 0, 1) == Accept(skip=1)
    assert h.pipeline.loss(b"?" * 16, 2, 4, 0, 1) is None
    assert h.send(a, first=6) == Accept(skip=0)
    h.end(a)
    h.tick()

    writer = h.pipeline.writers[a.incarnation]
    assert writer.drops == {"lost_records": 4}
    assert [event.message.partition(":")[2] for event in h.events if event.kind == "loss"] == [
        " 2 records, seq 2 to 3, are lost: they were not on its node's disk when that went down",
        " 2 records, seq 4 to 5, are lost: they were not on its node's disk when that went down",
    ]
    assert {step for _, step, _ in h.points} == {0, 5, 6, 7, 8}


def test_a_writer_whose_last_records_are_lost_ends():
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness(a)
    h.send(a)
    h.pipeline.bye(a.incarnation, 5, 0, 1)
    assert not h.pipeline.is_drained
    h.pipeline.loss(a.incarnation, 2, 5, 0, 1)

    assert h.pipeline.is_drained


def test_numbers_whose_names_are_lost_are_lost_with_them():
    """The record that declares keys may lie in a hole, and those that use them behind it."""
    a = Rank(0, 1).log(0, x=1.0).log(1, y=2.0).log(2, y=3.0).log(3, x=4.0)
    h = Harness(a)
    h.send(a, last=2)
    h.pipeline.loss(a.incarnation, 2, 3, 0, 1)
    assert h.send(a, first=3) == Accept(skip=0)
    h.end(a)
    h.tick()

    writer = h.pipeline.writers[a.incarnation]
    assert writer.next_seq == len(a.records)
    assert writer.drops == {"lost_records": 3}
    assert writer.num_values == 2
    assert [event.message for event in h.events if event.kind == "loss"][1:] == [
        "rank 0: 2 records, seq 3 to 4, are lost: the record of their keys is"
    ]
    assert {step for _, step, _ in h.points} == {0, 3}


def test_a_malformed_batch_changes_nothing():
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness(a)
    payload = b"".join(a.records)
    wide = [a.records[0], encode_scalars(1, 1, 0, 0, 1.0, [1.0, 2.0], 0)]

    with pytest.raises(ValueError, match="records in a batch"):
        h.pipeline.batch(a.incarnation, 0, 3, payload, 0, 0)
    with pytest.raises(ValueError, match="is not that of these records"):
        h.pipeline.batch(a.incarnation, 0, 2, b"".join(wide), 0, 0)
    assert h.pipeline.writers[a.incarnation].next_seq == 0
    assert h.send(a) == Accept(skip=0)


def test_a_rank_that_ends_without_a_word_has_died():
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness(a)
    h.end(a)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert h.kinds() == ["death"]
    assert h.statuses == [("failed", "rank 0: died, code unknown")]


def test_ranks_that_say_finish_make_the_run_finished_once_their_node_is_over():
    a, b = Rank(0, 2).log(0, x=1.0).say(type="finish", status="finished"), Rank(1, 2)
    b.say(type="finish", status="finished")
    h = Harness(a, b)
    h.send(a)
    h.send(b)
    h.tick()
    assert h.statuses == []
    h.pipeline.node("0", True, 0)
    h.tick()
    assert h.statuses == [("finished", "")]


def test_an_exception_in_a_rank_is_the_cause():
    a = Rank(0, 1).say(type="finish", status="failed", detail="ValueError: no")
    h = Harness(a)
    h.send(a)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert h.statuses == [("failed", "rank 0: ValueError: no")]


@pytest.mark.parametrize(("signal", "cause"), [(9, "rank 1: signal 9 (SIGKILL)"), (15, "rank 0: RuntimeError: gone")])
def test_a_killed_rank_is_the_cause_of_its_peers_exception_and_a_stopped_one_its_consequence(signal, cause):
    """Plain torchrun: rank 0's collective fails because rank 1 was killed; torchrun then stops the others by SIGTERM."""
    a = Rank(0, 2).say(type="finish", status="failed", detail="RuntimeError: gone")
    b = Rank(1, 2).log(0, x=1.0)
    h = Harness(a, b)
    for time_unix_ns, rank in enumerate((b, a) if signal == 9 else (a, b), 1):
        h.send(rank)
        h.pipeline.bye(rank.incarnation, len(rank.records), h.now, time_unix_ns)
    h.pipeline.exited(b.incarnation, signal, 9)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert h.statuses == [("failed", cause)]


def test_the_launchers_verdict_waits_for_the_last_record():
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness(a)
    h.pipeline.rank_exit(0, 100, None, 9, "signal 9 (SIGKILL)", 1)
    h.pipeline.finish("failed", "rank 0: signal 9 (SIGKILL)", 0)
    h.tick()
    assert h.statuses == []
    h.end(a)
    h.tick()
    assert h.statuses == [("failed", "rank 0: signal 9 (SIGKILL)")]
    assert h.pipeline.writers[a.incarnation].detail == "signal 9 (SIGKILL)"
    assert h.points["x", 0, 0] == [(1.0, 1)]


def test_the_launchers_verdict_does_not_wait_for_ever():
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness(a)
    h.pipeline.finish("killed", "", 0)
    h.tick(29_000_000_000)
    assert h.statuses == []
    h.tick(2_000_000_000)
    assert h.statuses == [("killed", "")]


def test_a_new_world_size_opens_an_attempt_and_so_does_a_restarted_rank():
    a, b = Rank(0, 2), Rank(1, 2)
    h = Harness(a, b)
    h.end(a)
    h.end(b)
    again = [Rank(0, 2, life=1), Rank(1, 2, life=1)]
    assert [w.attempt for w in h.hello(*again)] == [1, 1]
    assert [w.attempt for w in h.hello(Rank(0, 3, life=2))] == [2]
    h.tick()
    assert [e.message for e in h.events if e.kind == "restart"] == [
        "attempt 1: rank 0 restarted",
        "attempt 2: world size 2 -> 3",
    ]


def test_an_exit_that_is_told_before_the_rank_is_declared_is_kept_for_it():
    """On a loaded machine the launcher's word may come before the agent's first Hello."""
    a = Rank(0, 1).log(0, x=1.0)
    h = Harness()
    h.pipeline.rank_exit(0, 999, None, 15, "another process's", 1)
    h.pipeline.rank_exit(0, a.info().pid, None, 9, "signal 9 (SIGKILL)", 1)
    h.pipeline.finish("failed", "rank 0: signal 9 (SIGKILL)", 0)
    h.hello(a)
    h.end(a)
    h.tick()

    (writer,) = h.pipeline.writers.values()
    assert (writer.state, writer.signal, writer.detail) == ("died", 9, "signal 9 (SIGKILL)")


def test_attempts_are_never_mixed():
    a, b = Rank(0, 2).log(0, x=1.0).log(1, x=1.0), Rank(1, 2).log(0, x=3.0)
    h = Harness(a, b)
    h.end(a)
    h.end(b)
    c, d = Rank(0, 2, life=1).log(1, x=10.0), Rank(1, 2, life=1).log(1, x=20.0)
    h.hello(c, d)
    h.end(c)
    h.end(d)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert h.points == {("x", 0, 0): [(2.0, 2)], ("x", 1, 0): [(1.0, 1)], ("x", 1, 1): [(15.0, 2)]}


def test_a_second_living_holder_of_a_rank_is_stored_and_not_reduced():
    a, twin = Rank(0, 1).log(0, x=1.0), Rank(0, 1, life=1).log(0, x=100.0)
    h = Harness(a)
    (writer,) = h.hello(twin)
    h.end(a)
    h.end(twin)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert not writer.is_reduced
    assert h.points == {("x", 0, 0): [(1.0, 1)]}
    assert "duplicate_rank" in h.kinds()
    assert sum(e.num_records for e in h.log_entries) == 4


def test_a_dead_ranks_journal_found_late_belongs_to_the_attempt_before():
    a, b = Rank(0, 2), Rank(1, 2)
    h = Harness(a)
    h.end(a)
    h.hello(Rank(0, 2, life=1), Rank(1, 2, life=1))
    (writer,) = h.hello(b, is_alive=False)

    assert writer.attempt == 0


def test_progress_counts_once_what_precedes_it_is_here():
    a, b = Rank(0, 2).log(0, x=1.0), Rank(1, 2).log(0, x=1.0)
    h = Harness(a, b)
    h.send(a)
    h.send(b)
    h.pipeline.progress(a.incarnation, 5, 3, {}, 0, 0)
    h.pipeline.progress(b.incarnation, 5, 2, {"bad_value": 2}, 7, 0)
    h.tick()
    assert h.points == {}
    h.send(a.log(1, x=2.0))
    h.tick()
    assert list(h.points) == [("x", 0, 0), ("x", 1, 0)]
    assert h.pipeline.writers[b.incarnation].drops == {"bad_value": 2}


def test_params_are_kept_once_and_disagreement_is_an_event():
    a, b = (Rank(r, 2).say(type="params", values={"lr": 0.1, "seed": r}) for r in range(2))
    h = Harness(a, b)
    h.send(a)
    h.send(b)
    effects = h.tick()

    assert [(p.name, p.value, p.rank) for p in effects.params] == [("lr", "0.1", 0), ("seed", "0", 0)]
    assert [e.message for e in h.events] == ["param seed: rank 1 has 1, rank 0 had 0"]


def test_texts_alerts_and_unknown_messages():
    a = Rank(0, 1).say(type="text", key="k", text="t").say(type="alert", title="a", text="b", level="error")
    a.say(type="hologram")
    h = Harness(a)
    h.send(a)
    effects = h.tick()

    assert [(t.key, t.text, t.step) for t in effects.texts] == [("k", "t", None)]
    assert [(e.kind, e.level, e.message) for e in h.events] == [
        ("alert", "error", "a: b"),
        ("unknown_message", "warning", "a record of unknown type 'hologram'"),
    ]


def test_a_definition_matches_by_pattern_and_the_first_stands():
    a = Rank(0, 1).say(type="define", pattern="n/*", reduce="sum", replicated=False)
    a.say(type="define", pattern="n/*", reduce="max", replicated=False)
    a.say(type="define", pattern="z", reduce="nonsense", replicated=False)
    a.log(0, **{"n/a": 1.0, "m": 1.0})
    h = Harness(a)
    h.send(a)
    h.tick()

    assert (h.pipeline.keys.rows["n/a"].reduce, h.pipeline.keys.rows["m"].reduce) == ("sum", "mean")
    assert h.kinds() == ["define", "disagreement", "disagreement"]


def test_a_definition_that_comes_late_counts_from_the_first_point():
    """Else the same records in another order would give other values."""
    a, b = Rank(0, 2).log(0, x=1.0).log(1, x=1.0), Rank(1, 2).log(0, x=2.0).log(1, x=2.0)
    h = Harness(a, b)
    h.send(a)
    h.send(b)
    h.tick()
    assert h.points["x", 0, 0] == [(1.5, 2)]
    h.send(a.say(type="define", pattern="x", reduce="sum", replicated=False))
    h.tick()
    h.end(a)
    h.end(b)
    h.pipeline.node("0", True, 0)
    h.tick()
    assert h.points["x", 0, 0][-1] == (3.0, 2)
    assert h.points["x", 1, 0][-1] == (3.0, 2)


def test_more_names_than_allowed_are_counted_not_kept():
    a = Rank(0, 1).log(0, a=1, b=2, c=3)
    h = Harness(a, options=Options(grace_ns=1, late_ns=1, settle_ns=0, max_keys=2))
    h.end(a)
    h.pipeline.node("0", True, 0)
    h.tick()

    assert list(h.points) == [("a", 0, 0), ("b", 0, 0)]
    writer = h.pipeline.writers[a.incarnation]
    assert (writer.num_values, writer.drops) == (2, {"run_key_limit": 1})


def test_names_beyond_the_limit_are_dropped_whoever_logs_them_and_the_sum_is_right():
    """Reliability case 20: each rank may log max_keys names, and so may the run; logged = stored + dropped."""
    a, b = Rank(0, 2), Rank(1, 2)
    h = Harness(a, b, options=Options(grace_ns=1, late_ns=1, settle_ns=0, max_keys=3))
    h.send(a.log(0, x=1, y=2).log(1, x=1, y=2, z=3))
    h.send(b.log(0, y=2, u=4, v=5).log(1, y=2, u=4, v=5).log(1, w=9))
    h.send(b.log(2, w=9))  # a batch of one record
    h.pipeline.progress(b.incarnation, None, 0, {"bad_value": 2}, 0, 0)
    h.tick(10)

    assert sorted({key for key, _, _ in h.points}) == ["x", "y", "z"]
    of_a, of_b = (h.pipeline.writers[rank.incarnation] for rank in (a, b))
    assert (of_a.num_values, of_a.drops) == (5, {})
    assert (of_b.num_values, of_b.drops) == (2, {"bad_value": 2, "run_key_limit": 6})
    assert h.pipeline.num_values == 7
    (event,) = [event for event in h.events if event.kind == "key_limit"]
    assert event.message.endswith("first of rank 1")


def test_a_writer_after_the_end_opens_the_run_again():
    a = Rank(0, 1).say(type="finish", status="finished")
    h = Harness(a)
    h.send(a)
    h.pipeline.node("0", True, 0)
    h.tick()
    h.hello(Rank(0, 1, life=1))
    h.tick()

    assert h.statuses == [("finished", ""), ("running", "")]
    assert not h.pipeline.is_closed


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_delivery_gives_what_brute_force_gives(data):
    """Random records of 3 ranks, delivered in random batches, doubled, in any order between ranks."""
    names = ["a", "b", "c"]
    draw = data.draw
    ranks, expected = [Rank(r, 3) for r in range(3)], {}
    for rank in ranks:
        for step in sorted(draw(st.lists(st.integers(0, 6), max_size=8))):
            chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            weight = draw(st.sampled_from([1.0, 2.0, 0.5]))
            values = {name: draw(st.floats(-1e6, 1e6)) for name in chosen}
            rank.log(step, weight, **values)
            for name, value in values.items():
                expected.setdefault((name, step, 0), {}).setdefault(rank.rank, []).append((value, weight))
    h = Harness(*ranks)
    while any(h.pipeline.writers[r.incarnation].next_seq < len(r.records) for r in ranks):
        rank = draw(st.sampled_from(ranks))
        known = h.pipeline.writers[rank.incarnation].next_seq
        first = draw(st.integers(0, known))
        h.send(rank, first, draw(st.integers(first, len(rank.records))))
        h.tick(draw(st.sampled_from([0, 50, 200])))
    for rank in ranks:
        h.end(rank)
    h.pipeline.node("0", True, h.now)
    h.tick()

    assert set(h.points) == set(expected)
    for key, by_rank in expected.items():
        entries = [entry for values in by_rank.values() for entry in values]
        mean = sum(v * w for v, w in entries) / sum(w for _, w in entries)
        value, n = h.points[key][-1]
        assert n == len(by_rank)
        np.testing.assert_allclose(value, mean, rtol=1e-9, atol=1e-6)


def test_its_repr_says_where_it_stands():
    h = Harness(Rank(0, 1))
    assert repr(h.pipeline) == "<Pipeline attempt=0 writers=1 ended=0 keys=0 values=0 verdict=None>"
    assert json.dumps(list(h.pipeline.attempts)) == "[0]"


def far_ahead(h, ranks, steps, keys=4):
    """All ranks but the last log many steps, which the last one holds open."""
    values = {f"k{i}": 1.0 for i in range(keys)}
    for rank in ranks:
        h.send(rank.log(0, **values))
    for first in range(1, steps, 500):
        for rank in ranks[:-1]:
            for step in range(first, first + 500):
                rank.log(step, **values)
            h.send(rank)
        h.tick(1)


def cells(h):
    return [panel._value.size for attempt in h.pipeline.attempts.values() for panel in attempt.panels]


def test_a_rank_far_ahead_does_not_fill_the_memory():
    """Windows are bounded by what they hold, not by their number: the oldest close incomplete, and lose nothing."""
    ranks = [Rank(rank, 3) for rank in range(3)]
    limit = 3 * 4 * 1000
    options = Options(grace_ns=10**9, late_ns=100, settle_ns=10, max_keys=100, max_cells=limit)
    h = Harness(*ranks, options=options)
    far_ahead(h, ranks, 20_000)
    assert sum(cells(h)) <= 4 * limit  # open, closed, and the room they grew into
    assert h.points["k0", 100, 0] == [(1.0, 2)]

    for step in range(1, 20_001):
        ranks[2].log(step, k0=4.0)
    h.send(ranks[2])
    for _ in range(30):
        h.tick(200)
    assert sum(cells(h)) <= 4 * limit
    assert {len(h.points["k0", step, 0]) for step in range(1, 15_000)} == {2}, "derived again, once each"
    assert all(h.points["k0", step, 0][-1] == (2.0, 3) for step in range(1, 19_000))


def test_what_is_kept_for_late_values_is_bounded_too():
    a = Rank(0, 1)
    h = Harness(a, options=Options(grace_ns=1, late_ns=100, settle_ns=0, max_keys=99, max_cells=100))
    values = {f"k{i}": 1.0 for i in range(10)}
    for step in range(100):
        h.send(a.log(step, **values))
        h.tick(2)
    assert sum(cells(h)) <= 4 * 100
    assert h.pipeline.attempts[0].panels[0].keep_closed == 10


def test_sets_of_names_that_never_come_back_are_forgotten(monkeypatch):
    monkeypatch.setattr("ddplog.core.attempt._MAX_LAYOUTS", 10)
    a = Rank(0, 1)
    h = Harness(a)
    for step in range(100):
        names = [f"k{i}" for i in range(7) if (step + 1) >> i & 1]
        h.send(a.log(step, **dict.fromkeys(names, 1.0)))
        assert len(h.pipeline.attempts[0].layouts) <= 10
    h.tick(100)
    assert len(h.points) == sum((step + 1).bit_count() for step in range(100))


def test_what_is_derived_at_once_is_bounded_too():
    a = Rank(0, 1)
    h = Harness(a, options=Options(grace_ns=1, late_ns=100, settle_ns=0, max_keys=9, max_cells=100))
    for step in range(1000):
        h.send(a.log(step, x=1.0))
        h.tick(2)
    for step in range(500):
        a.log(step, x=3.0)
    h.send(a)
    h.now += 200
    (first,) = h.pipeline.take_stale(h.now)
    assert len(first.steps) == 100
    assert {step for part in h.pipeline.unsettled for step in part.steps}.isdisjoint(first.steps)
    (second,) = h.pipeline.take_stale(h.now)
    rest = h.pipeline.take_stale(h.now, at_once=True)
    assert len(rest) >= 2
    assert max(len(part.steps) for part in rest) <= 100
    every = [step for part in (first, second, *rest) for step in part.steps]
    assert len(every) == len(set(every)) >= 400
    assert h.pipeline.take_stale(h.now + 200, at_once=True) == []


def test_an_attempt_that_is_over_gives_its_memory_back():
    """A job that is restarted a hundred times must not keep a hundred attempts' windows."""
    ranks = [Rank(rank, 2) for rank in range(2)]
    h = Harness(*ranks)
    for step in range(300):
        for rank in ranks:
            rank.log(step, x=float(step))
    for rank in ranks:
        h.send(rank)
    h.tick(10_000)
    before = sum(cells(h))
    for rank in ranks:
        h.end(rank)
    h.hello(*[Rank(rank, 2, life=1) for rank in range(2)])
    h.tick(10_000)
    assert sum(cells(h)) < before / 8
    assert h.points["x", 299, 0][-1] == (299.0, 2)


def test_a_set_of_names_is_kept_once_however_often_it_is_declared():
    """Every segment of a journal declares its sets of names under new ids."""
    a = Rank(0, 1)
    h = Harness(a)
    for step in range(50):
        a.schemas = {("another", str(i)): i for i in range(1, step + 1)}  # so that the next declaration has a new id
        h.send(a.log(step, x=1.0, y=2.0))
    schemas = h.pipeline.writers[a.incarnation].schemas
    assert len(schemas) == 50
    assert len({id(keys) for keys in schemas.values()}) == 1


def test_no_commit_has_more_points_than_it_may_and_the_run_ends_after_the_last():
    """A rank that ends sets all free that waited for it; one commit of millions of points would fill the memory."""
    ranks = [Rank(rank, 2) for rank in range(2)]
    options = Options(grace_ns=10**9, late_ns=100, settle_ns=10, max_keys=100, max_points=200)
    h = Harness(*ranks, options=options)
    far_ahead(h, ranks, 2001)
    for rank in ranks:
        h.end(rank)
    h.pipeline.node("0", True, h.now)
    sizes = []
    while not h.pipeline.is_closed:
        assert h.statuses == []
        effects = h.tick(1)
        sizes.append(sum(emission.num_points for _, emission in effects.emissions))
    assert max(sizes) <= 2 * 200  # what is due, and what is closed since nothing more comes
    assert len(sizes) >= 2001 * 4 / 400
    assert len(h.points) == 2001 * 4
    assert h.statuses == [("failed", "rank 0: died, code unknown")]


def test_no_panel_waits_for_ever_behind_one_that_always_has_points():
    a = Rank(0, 1)
    h = Harness(a, options=Options(grace_ns=1, late_ns=100, settle_ns=0, max_keys=100, max_points=1))
    for step in range(20):
        h.send(a.log(step, x=1.0).log(step, y=1.0).log(step, z=1.0))
    for _ in range(30):
        h.tick(10)
    assert {key for key, _, _ in h.points} == {"x", "y", "z"}
