"""The loop performs what delivery decides: order, cursor, dead letters, states and ends, on a clock of its own."""

import json
import shutil

import pytest
from emission_store import StoreMaker

from ddplog.core.delivery import Limits
from ddplog.errors import ConfigError, PermanentSinkError, RetryableSinkError, RunNotFoundError
from ddplog.forward import process
from ddplog.forward.ledger import Cursor, Ledger
from ddplog.forward.process import EXIT_OK, EXIT_UNUSABLE, forward
from ddplog.testing import MemorySink, read_jsonl


class FakeHost:
    """A clock that moves only while the loop waits."""

    def __init__(self, on_pause=None):
        self.now = 0
        self.orphan = False
        self.stopping = False
        self.pauses = []
        self.on_pause = on_pause or (lambda host: None)

    def now_ns(self):
        return self.now

    def time_unix_ns(self):
        return 1_700_000_000_000_000_000 + self.now

    def jitter(self):
        return 1.0

    def pause(self, seconds):
        self.now += int(seconds * 1e9)
        self.pauses.append(seconds)
        assert len(self.pauses) < 20_000, "the loop does not end"
        self.on_pause(self)
        return self.stopping

    def is_orphan(self):
        return self.orphan


@pytest.fixture
def store(tmp_path):
    return StoreMaker(tmp_path / "run-1")


@pytest.fixture
def use(monkeypatch):
    """Make every sink this one."""

    def use(sink):
        monkeypatch.setattr(process, "make_sink", lambda spec: sink)
        return sink

    return use


def loss(count, start=0):
    return [("loss", step, float(step)) for step in range(start, start + count)]


def folder(store):
    return store.run_dir / "sinks" / "memory"


def state(store):
    return json.loads((folder(store) / "state.json").read_text())


def cursor(store):
    return json.loads((folder(store) / "cursor.json").read_text())


def run(store, host=None, once=False):
    return forward(store.run_dir, "memory", host or FakeHost(), once=once)


def test_an_ended_run_is_delivered_and_drained(store, use):
    sink = use(MemorySink(limits=Limits(max_items=7)))
    store.add_points(loss(30))
    store.add_others()
    store.skip_ids(5)
    store.set_status("failed", "rank 1")
    assert run(store) == EXIT_OK
    assert [e.id for e in sink.stored] == list(range(1, 35))
    assert (sink.closed.status, sink.closed.detail) == ("failed", "rank 1")
    assert cursor(store) == {
        "format": 1, "cursor": 34, "position": {"num_items": 34}, "store_uuid": "aa" * 16, "num_delivered": 34,
        "num_dead": 0, "rewinds": [],
    }  # fmt: skip
    shown = state(store)
    assert (shown["name"], shown["state"], shown["cursor"], shown["lag"]) == ("memory", "drained", 34, 0)


def test_a_live_run_is_followed_until_its_status_says_ended(store, use):
    sink = use(MemorySink())
    seen = []

    def live(host):
        if len(host.pauses) == 10:
            store.add_points(loss(3))
        elif len(host.pauses) == 40:
            seen.append((state(store)["state"], state(store)["lag"], len(sink.stored)))
            store.add_points(loss(3, 3))
            store.set_status("finished")

    assert run(store, FakeHost(live)) == EXIT_OK
    assert seen == [("running", 0, 3)]
    assert [e.step for e in sink.stored] == [0, 1, 2, 3, 4, 5]


def test_a_later_start_goes_on_at_the_cursor(store, use):
    sink = use(MemorySink())
    store.add_points(loss(5))
    run(store, once=True)
    store.add_points(loss(5, 5))
    again = use(MemorySink(sink.stored))
    run(store, once=True)
    assert [e.step for e in again.stored] == list(range(10))
    assert [len(batch) for batch in again.batches] == [5]


def test_a_lost_cursor_is_made_up_for_by_the_position(store, use):
    """The process died between the sink's write and the cursor's."""
    sink = use(MemorySink(limits=Limits(max_items=2)))
    store.add_points(loss(4))
    run(store, once=True)
    Ledger(folder(store)).write_cursor(Cursor(cursor=2, position={"num_items": 2}, store_uuid="aa" * 16))
    again = use(MemorySink(sink.stored))
    run(store, once=True)
    assert [e.step for e in again.stored] == [0, 1, 2, 3]


def test_once_ends_while_the_run_goes_on_and_says_so(store, use):
    sink = use(MemorySink())
    store.add_points(loss(5))
    assert run(store, once=True) == EXIT_OK
    assert not sink.closed.is_ended
    assert (state(store)["state"], state(store)["detail"]) == ("running", "stopped; the run has not ended")


def test_an_outage_is_waited_out_with_growing_pauses(store, use):
    failures = [None, *[RetryableSinkError("503")] * 9]
    sink = use(MemorySink(failures=failures))
    store.add_points(loss(3))
    store.set_status("finished")
    host = FakeHost()
    states = set()
    host.on_pause = lambda host: states.add((state(store)["state"], state(store)["detail"]))
    assert run(store, host) == EXIT_OK
    assert len(sink.batches) == 10
    assert len({tuple(e.id for e in batch) for batch in sink.batches}) == 1
    assert sum(host.pauses) == pytest.approx(1 + 2 + 4 + 8 + 16 + 32 + 60 * 3)
    assert max(host.pauses) <= 1.0
    assert ("retrying", "503") in states
    assert state(store)["state"] == "drained"


def test_the_trackers_wish_is_waited_for(store, use):
    use(MemorySink(failures=[None, RetryableSinkError("429", retry_after_s=300)]))
    store.add_points(loss(3))
    store.set_status("finished")
    host = FakeHost()
    run(store, host)
    assert sum(host.pauses) == pytest.approx(300)


@pytest.mark.parametrize("failures", [[RetryableSinkError("no route")] * 3, [None, None, RetryableSinkError("later")]])
def test_open_and_close_are_tried_again_too(store, use, failures):
    sink = use(MemorySink(failures=failures))
    store.add_points(loss(3))
    store.set_status("finished")
    assert run(store) == EXIT_OK
    assert len(sink.stored) == 3
    assert sink.closed.status == "finished"


def test_the_poisoned_go_to_the_dead_letters_and_the_rest_arrives(store, use):
    sink = use(MemorySink(poisoned=frozenset({2, 9})))
    store.add_points(loss(10))
    store.set_status("finished")
    assert run(store) == EXIT_OK
    assert [e.id for e in sink.stored] == [1, 3, 4, 5, 6, 7, 8, 10]
    dead = read_jsonl(folder(store) / "dead.jsonl")
    assert [(line["type"], line["id"], line["step"], line["reason"]) for line in dead] == [
        ("point", 2, 1, "poisoned"),
        ("point", 9, 8, "poisoned"),
    ]
    for said in (cursor(store), state(store)):
        assert (said["cursor"], said["num_delivered"], said["num_dead"]) == (10, 8, 2)
    assert "2 refused" in state(store)["detail"]


def test_the_counts_go_on_over_restarts_and_count_nothing_twice(store, use):
    """delivered + dead + what is behind the cursor = emitted: the delivery audit of a sink."""
    sink = use(MemorySink(limits=Limits(max_items=4), poisoned=frozenset({3, 25})))
    for first in range(0, 30, 10):
        store.add_points(loss(10, first))
        run(store, once=True)
    said = cursor(store)
    assert (said["cursor"], said["num_delivered"], said["num_dead"]) == (30, 28, 2)
    assert len(sink.stored) == 28


def test_a_dead_letter_is_kept_once_whatever_crashes(store, use):
    """It is durable before the cursor, so a crash in between brings it again; half a line is cut."""
    use(MemorySink(poisoned=frozenset({2})))
    store.add_points(loss(3))
    run(store, once=True)
    (folder(store) / "cursor.json").unlink()
    with (folder(store) / "dead.jsonl").open("ab") as file:
        file.write(b'{"type":"point","id":3,"ke')
    use(MemorySink(poisoned=frozenset({2, 3})))
    run(store, once=True)
    assert [line["id"] for line in read_jsonl(folder(store) / "dead.jsonl")] == [2, 3]


def test_asked_to_stop_it_keeps_what_it_has_delivered(store, use):
    sink = use(MemorySink(limits=Limits(max_items=10)))
    store.add_points(loss(100))

    def stop(host):
        host.stopping = len(sink.stored) >= 30

    assert run(store, FakeHost(stop)) == EXIT_OK
    assert len(sink.stored) == 30
    assert cursor(store)["cursor"] == 30
    assert not sink.closed.is_ended
    shown = state(store)
    assert (shown["state"], shown["detail"], shown["lag"]) == ("running", "stopped", 70)


def test_asked_to_stop_during_an_outage_it_stops(store, use):
    use(MemorySink(failures=[None, *[RetryableSinkError("503")] * 99]))
    store.add_points(loss(10))

    def stop(host):
        host.stopping = host.now > 5e9

    assert run(store, FakeHost(stop)) == EXIT_OK


def test_an_orphan_delivers_what_there_is_and_ends_after_30_idle_seconds(store, use):
    sink = use(MemorySink())

    def orphan(host):
        host.orphan = True
        if len(host.pauses) == 200:
            store.add_points(loss(3))

    host = FakeHost(orphan)
    assert run(store, host) == EXIT_OK
    assert len(sink.stored) == 3
    assert host.now == pytest.approx(40e9, rel=0.02)


def test_a_run_folder_that_vanishes_ends_it(store, use, capsys):
    use(MemorySink())
    store.add_points(loss(3))

    def vanish(host):
        if len(host.pauses) == 10:
            shutil.rmtree(store.run_dir)

    assert run(store, FakeHost(vanish)) == EXIT_OK
    assert "gone" in capsys.readouterr().err
    assert not store.run_dir.exists()


def test_a_run_folder_that_vanishes_during_an_outage_ends_it(store, use):
    use(MemorySink(failures=[None, *[RetryableSinkError("503")] * 99]))
    store.add_points(loss(3))

    def vanish(host):
        if len(host.pauses) == 10:
            shutil.rmtree(store.run_dir)

    assert run(store, FakeHost(vanish)) == EXIT_OK


def test_a_store_that_comes_later_is_waited_for(tmp_path, use):
    sink = use(MemorySink())
    run_dir = tmp_path / "run-2"
    run_dir.mkdir()

    def appear(host):
        if len(host.pauses) == 20:
            store = StoreMaker(run_dir)
            store.add_points(loss(2))
            store.set_status("finished")

    assert forward(run_dir, "memory", FakeHost(appear), once=False) == EXIT_OK
    assert len(sink.stored) == 2


def test_a_store_that_never_comes_is_an_error(tmp_path, use):
    use(MemorySink())
    (tmp_path / "run-3").mkdir()
    with pytest.raises(RunNotFoundError):
        forward(tmp_path / "run-3", "memory", FakeHost(), once=False)
    with pytest.raises(ConfigError):
        forward(tmp_path / "nowhere", "memory", FakeHost(), once=False)


def test_a_sink_that_can_never_work_fails_with_its_reason(store, use):
    use(MemorySink(failures=[PermanentSinkError("wrong key")]))
    store.add_points(loss(3))
    assert run(store) == EXIT_UNUSABLE
    assert (state(store)["state"], state(store)["detail"]) == ("failed", "wrong key")


def test_an_unknown_sink_fails_with_its_reason(store, capsys):
    assert forward(store.run_dir, "comte", FakeHost(), once=False) == EXIT_UNUSABLE
    shown = json.loads((store.run_dir / "sinks" / "comte" / "state.json").read_text())
    assert shown["state"] == "failed"
    assert "jsonl" in shown["detail"]
    assert "comte" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', '{"format": 2, "cursor": 1, "position": null}'])
def test_a_cursor_that_cannot_be_read_is_not_guessed(store, use, content):
    """Starting over would double everything at a tracker."""
    use(MemorySink())
    folder(store).mkdir(parents=True)
    (folder(store) / "cursor.json").write_text(content)
    assert run(store) == EXIT_UNUSABLE
    assert "cursor.json" in state(store)["detail"]


def test_another_store_is_delivered_from_its_start(store, use):
    """A lost store that was refilled counts its ids anew."""
    use(MemorySink())
    store.add_points(loss(5))
    run(store, once=True)
    for path in store.run_dir.glob("run.db*"):
        path.unlink()
    new = StoreMaker(store.run_dir, uuid="bb" * 16)
    new.add_points(loss(2))
    sink = use(MemorySink())
    run(new, once=True)
    assert [e.step for e in sink.stored] == [0, 1]
    assert cursor(store)["store_uuid"] == "bb" * 16


def test_a_bug_in_a_sink_is_shown_and_raised(store, use):
    use(MemorySink(failures=[None, ZeroDivisionError("oops")]))
    store.add_points(loss(3))
    with pytest.raises(ZeroDivisionError):
        run(store)
    assert state(store)["state"] == "failed"
    assert "oops" in state(store)["detail"]


def test_the_rate_is_kept(store, use):
    use(MemorySink(limits=Limits(max_items=10, rate_per_s=5.0)))
    store.add_points(loss(100))
    store.set_status("finished")
    host = FakeHost()
    run(store, host)
    assert host.now / 1e9 == pytest.approx(18)


def test_state_is_written_at_most_twice_a_second_while_nothing_changes(store, use, monkeypatch):
    use(MemorySink())
    written = []
    monkeypatch.setattr(Ledger, "write_state", lambda self, state: written.append(state.state))

    def stop(host):
        host.stopping = host.now >= 10e9

    run(store, FakeHost(stop))
    assert written[0] == "starting"
    assert written.count("running") <= 22


def test_what_a_killed_forwarder_left_half_written_is_removed(store, use):
    use(MemorySink())
    folder(store).mkdir(parents=True)
    (folder(store) / ".cursor.json.1234.abcd").write_text("half")
    run(store, once=True)
    assert sorted(path.name for path in folder(store).iterdir()) == ["lock", "state.json"]
