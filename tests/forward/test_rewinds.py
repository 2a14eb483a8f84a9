"""Reliability case 6: what becomes of the steps that a restart from a checkpoint repeats is said where people look."""

import json

import pytest
from emission_store import StoreMaker

from ddplog.forward import process
from ddplog.forward.rewinds import Rewind, Rewinds
from ddplog.sinks import make_sink, parse_spec
from ddplog.store.emissions import EmissionReader
from ddplog.testing import MemorySink, make_point


class Host:
    """A process that nobody stops, and whose clock stands still."""

    def now_ns(self):
        return 0

    def time_unix_ns(self):
        return 0

    def jitter(self):
        return 0.0

    def pause(self, seconds):
        return False

    def is_orphan(self):
        return False


def points(attempt, steps, key="loss", first_id=1, revision=0):
    return [
        make_point(first_id + n, key, step, 1.0, attempt=attempt, revision=revision) for n, step in enumerate(steps)
    ]


def test_the_first_repeated_step_of_each_attempt_is_noted():
    asked = []

    def last_step(key, below):
        asked.append((key, below))
        return {1: 61, 2: 79}.get(below) if key == "loss" else None

    rewinds = Rewinds([], last_step)
    rewinds.note(points(0, range(62)))
    assert asked == [], "the first attempt repeats nothing"
    rewinds.note(points(1, [40], key="only in this one"))
    rewinds.note(points(1, [40, 41]))
    rewinds.note(points(1, range(42, 80)))
    rewinds.note(points(2, [80, 81]))
    assert rewinds.known == [Rewind(1, 40, "loss")]
    rewinds.note(points(2, [60], revision=1))
    assert rewinds.known == [Rewind(1, 40, "loss")], "a late change is no repetition"
    assert asked == [("only in this one", 1), ("loss", 1), ("loss", 2)], "once for each key of an attempt"


def test_an_attempt_that_goes_on_after_the_last_one_repeats_nothing():
    rewinds = Rewinds([], lambda key, below: 61)
    rewinds.note(points(1, range(62, 100)))
    assert rewinds.known == []
    assert rewinds.describe("whatever") == ""


def test_what_was_done_is_one_line():
    rewinds = Rewinds([Rewind(1, 40, "loss")], lambda key, below: None)
    assert rewinds.describe("sent again") == "steps that came again: attempt 1 from 40 on (loss); sent again"
    rewinds.known += [Rewind(n, 10 * n, "loss") for n in range(2, 6)]
    assert rewinds.describe("x").startswith("steps that came again: 2 attempts before, attempt 3 from 30 on (loss), ")


@pytest.fixture
def store(tmp_path):
    return StoreMaker(tmp_path / "run-1")


def forward(store, sink, monkeypatch):
    monkeypatch.setattr(process, "make_sink", lambda spec: sink)
    assert process.forward(store.run_dir, "memory", Host(), once=True) == process.EXIT_OK
    folder = store.run_dir / "sinks" / "memory"
    return json.loads((folder / "state.json").read_text())["detail"], json.loads((folder / "cursor.json").read_text())


def test_a_forwarder_says_it_and_the_next_one_still_does(store, monkeypatch):
    sink = MemorySink()
    store.add_points([("loss", step, 1.0) for step in range(62)])
    assert "again" not in forward(store, sink, monkeypatch)[0]
    store.add_points([("loss", step, 2.0) for step in range(40, 50)], attempt=1)
    expected = "steps that came again: attempt 1 from 40 on (loss); they are sent again"
    detail, cursor = forward(store, MemorySink(sink.stored), monkeypatch)
    assert expected in detail
    assert cursor["rewinds"] == [[1, 40, "loss"]]
    store.add_points([("loss", step, 2.0) for step in range(50, 80)], attempt=1)
    detail, cursor = forward(store, MemorySink(sink.stored), monkeypatch)
    assert expected in detail
    assert cursor["rewinds"] == [[1, 40, "loss"]]


def test_the_store_knows_a_metrics_last_step_in_the_attempts_before(store):
    store.add_points([("loss", step, 1.0) for step in (5, 3, 9)])
    store.add_points([("loss", 20, 1.0), ("other", 99, 1.0)], attempt=1)
    reader = EmissionReader(store.run_dir)
    assert reader.last_step("loss", 0) is None
    assert reader.last_step("loss", 1) == 9
    assert reader.last_step("loss", 2) == 20
    assert reader.last_step("none", 2) is None
    reader.close()


@pytest.mark.parametrize(("name", "policy"), [("jsonl", "further lines"), ("tensorboard", "TensorBoard drops")])
def test_every_sink_of_ours_declares_what_it_does(name, policy):
    assert make_sink(parse_spec(name)).capabilities.on_rewind.startswith(policy)
