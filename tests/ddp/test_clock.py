"""The CUDA clock through the code that runs on a GPU, with events that are done when the test says so."""

import pytest

from ddplog.ddp.clock import EventClock, HostClock


class Device:
    """Events of one device: recorded at `now_ms`, done once the device has got there. elapsed_time() of one that is not raises."""

    def __init__(self):
        self.now_ms, self.done_until_ms = 0.0, -1.0
        self.num_made = 0
        self.streams = []

    def new_event(self):
        self.num_made += 1
        return FakeEvent(self)

    def clock(self):
        return EventClock(self.new_event, lambda: "stream 7")

    def finish(self):
        self.done_until_ms = self.now_ms


class FakeEvent:
    def __init__(self, device):
        self.device, self.at_ms = device, None

    def record(self, stream):
        self.device.streams.append(stream)
        self.at_ms = self.device.now_ms

    def query(self):
        return self.at_ms <= self.device.done_until_ms

    def elapsed_time(self, end):
        if not (self.query() and end.query()):
            raise RuntimeError("device not ready")
        return end.at_ms - self.at_ms


def span(clock, device, sums, key, took_ms):
    start = clock.mark()
    device.now_ms += took_ms
    clock.span(sums, key, start, clock.mark())


def test_a_span_counts_when_its_events_are_done_and_not_before():
    device = Device()
    clock, sums = device.clock(), {}
    span(clock, device, sums, "a", 5.0)
    clock.sweep()
    assert sums == {}
    device.finish()
    clock.sweep()
    assert sums == {"a": pytest.approx(0.005)}


def test_steps_come_out_in_order_each_once_its_own_times_are_known():
    device, done = Device(), []
    clock = device.clock()
    first, second = {}, {}
    span(clock, device, first, "a", 5.0)
    clock.then(lambda: done.append(dict(first)))
    device.finish()
    span(clock, device, second, "a", 7.0)
    span(clock, device, second, "a", 1.0)
    clock.then(lambda: done.append(dict(second)))
    assert done == [{"a": pytest.approx(0.005)}]
    device.finish()
    clock.sweep()
    assert done[1:] == [{"a": pytest.approx(0.008)}]


def test_events_are_used_again_also_where_two_spans_share_one():
    device = Device()
    clock = device.clock()
    for _ in range(100):
        sums = {}
        marks = [clock.mark() for _ in range(3)]
        clock.span(sums, "a", marks[0], marks[1])
        clock.span(sums, "b", marks[1], marks[2])
        clock.span(sums, "c", marks[1], marks[2])
        clock.then(lambda: None)
        device.finish()
        clock.sweep()
    assert device.num_made == 3
    assert "0 waiting, 3 of 3 events free" in repr(clock)
    assert set(device.streams) == {"stream 7"}


def test_an_event_in_use_is_not_recorded_again():
    """A device far behind: every step has events of its own until it has caught up."""
    device, done = Device(), []
    clock = device.clock()
    for number in range(20):
        sums = {}
        span(clock, device, sums, "a", float(number))
        clock.then(lambda sums=sums: done.append(sums["a"]))
    assert device.num_made == 40
    device.finish()
    clock.sweep()
    assert done == pytest.approx([number / 1e3 for number in range(20)])


def test_close_waits_for_nothing_and_leaves_no_step_out():
    device, done = Device(), []
    clock = device.clock()
    for number in range(3):
        sums = {"data": float(number)}
        span(clock, device, sums, "a", 5.0)
        clock.then(lambda sums=sums: done.append(sums))
        if number == 0:
            device.finish()
    clock.close()
    assert done == [{"data": 0.0, "a": pytest.approx(0.005)}, {"data": 1.0}, {"data": 2.0}]
    clock.close()
    assert len(done) == 3


def test_the_host_knows_at_once():
    clock, sums, done = HostClock(), {}, []
    clock.span(sums, "a", 1.0, 3.5)
    clock.span(sums, "a", 4.0, 4.5)
    clock.then(lambda: done.append(dict(sums)))
    clock.sweep()
    clock.close()
    assert done == [{"a": 3.0}]
    assert clock.mark() <= clock.mark()
