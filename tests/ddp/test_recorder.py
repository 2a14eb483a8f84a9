"""What a step is, and what of it counts as what, from the moments alone."""

import pytest

from ddplog.ddp.clock import HostClock
from ddplog.ddp.recorder import Recorder


class Loop:
    """A training loop whose parts take as long as the test says."""

    def __init__(self, *, has_loader=False):
        self.now_s, self.steps = 0.0, []
        clock = HostClock()
        clock.mark = lambda: self.now_s
        self.recorder = Recorder(clock, self.steps.append, has_loader=has_loader, now_s=lambda: self.now_s)

    def forward(self, took_s, wait_s=0.0, samples=4):
        self.recorder.forward_starts(samples)
        self.now_s += wait_s
        self.recorder.module_starts()
        self.now_s += took_s
        self.recorder.forward_ends()

    def backward(self, took_s, exposed_s=0.0, bucket_at=None, *, is_synced=True):
        self.recorder.backward_starts()
        if bucket_at is not None:
            self.now_s += bucket_at
            self.recorder.bucket_ready()
        self.now_s += took_s - (bucket_at or 0.0)
        self.recorder.backward_computed()
        self.now_s += exposed_s
        self.recorder.backward_ends(is_synced=is_synced)

    def optimize(self, took_s, number):
        self.recorder.optimizer_starts()
        self.now_s += took_s
        self.recorder.optimizer_ends()
        self.recorder.step_ends(number)


@pytest.fixture
def loop():
    return Loop()


def test_the_parts_of_a_step(loop):
    for number in range(2):
        loop.now_s += 0.5  # data
        loop.forward(1.0, wait_s=0.25)
        loop.backward(2.0, exposed_s=0.125, bucket_at=1.5)
        loop.optimize(4.0, number)

    first, second = loop.steps
    expected = {
        "perf/forward_s": 1.0, "perf/backward_s": 2.0, "perf/comm_s": 0.625, "perf/comm_exposed_s": 0.125,
        "perf/wait_s": 0.375, "perf/optimizer_s": 4.0,
    }  # fmt: skip
    assert first.sums == {**expected, "perf/step_s": 7.375}
    assert second.sums == {**expected, "perf/step_s": 7.875, "perf/data_s": 0.5}
    assert (second.number, second.num_samples) == (1, 4)
    assert second.values == {"perf/samples_per_s": 4 / 7.875}


def test_accumulation_is_one_step(loop):
    """Under no_sync() nothing is communicated, whatever the end of backward took."""
    loop.forward(1.0)
    loop.backward(2.0, exposed_s=0.5, is_synced=False)
    loop.now_s += 0.25
    loop.forward(1.0)
    loop.backward(2.0, exposed_s=0.5)
    loop.optimize(0.0, 0)

    (step,) = loop.steps
    assert step.sums["perf/forward_s"] == 2.0
    assert step.sums["perf/backward_s"] == 4.0
    assert step.sums["perf/comm_exposed_s"] == 0.5
    assert step.sums["perf/data_s"] == 0.25
    assert step.num_samples == 8


def test_several_forwards_of_a_step_are_no_gap(loop):
    loop.forward(1.0)
    loop.now_s += 3.0
    loop.forward(1.0)
    loop.backward(2.0)
    loop.optimize(0.0, 0)
    assert "perf/data_s" not in loop.steps[0].sums
    assert loop.steps[0].sums["perf/forward_s"] == 2.0


def test_an_evaluation_is_not_waiting_for_data(loop):
    for number in range(2):
        loop.now_s += 1.0
        if number:
            loop.recorder.evaluated()
        loop.forward(1.0)
        loop.backward(1.0)
        loop.optimize(1.0, number)
    assert "perf/data_s" not in loop.steps[1].sums


def test_with_a_loader_only_its_own_time_is_data():
    loop = Loop(has_loader=True)
    for number in range(2):
        loop.recorder.loaded(0.25)
        loop.now_s += 9.0
        loop.forward(1.0)
        loop.backward(1.0)
        loop.optimize(0.0, number)
    assert [step.sums["perf/data_s"] for step in loop.steps] == [0.25, 0.25]


def test_what_raised_leaves_nothing_behind(loop):
    """A forward or a backward that raises has no end; the next one begins anew."""
    loop.recorder.forward_starts(4)
    loop.now_s += 100.0
    loop.forward(1.0, samples=0)
    loop.recorder.backward_starts()
    loop.recorder.bucket_ready()
    loop.now_s += 100.0
    loop.forward(1.0, samples=0)
    assert not loop.recorder.is_in_backward
    loop.backward(2.0)
    loop.optimize(0.5, 0)
    sums = loop.steps[0].sums
    assert (sums["perf/forward_s"], sums["perf/backward_s"], sums["perf/optimizer_s"]) == (2.0, 2.0, 0.5)
    assert "perf/comm_s" not in sums


def test_a_module_that_is_called_by_itself_is_no_forward(loop):
    loop.recorder.module_starts()
    loop.recorder.forward_ends()
    loop.recorder.step_ends(0)
    assert loop.steps[0].sums == {}
    assert loop.steps[0].values == {}
