"""Values on a device: exact, in order, never waited for, and accounted for to the last, with a device that obeys the test.

The fake device copies when it is told, out of order or never; everything else is the code that a GPU gets.
"""

import gc
import math
import os
import signal
import tempfile
import threading
import time
import warnings
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, NO_STEP, decode, scan_payload
from ddplog.errors import UsageError
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.worker import pending as queue
from ddplog.worker.device import Staging, StagingError
from ddplog.worker.identity import Identity
from ddplog.worker.run import Run, finish_at_exit

torch = pytest.importorskip("torch")

from worker.fake_device import FakeDevice, on_device  # noqa: E402 - it needs torch

JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip
WHO = Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="env")


def new_run(folder, strict=False, exit_wait_s=0.0, **options):
    options = {"segment_bytes": 64 * 1024, "spool_bytes": 1 << 30, "check": lambda: None} | options
    journal = JournalWriter(folder, b"i" * 16, {"rank": 0, "world_size": 1}, **options)
    return Run(journal, JOB, WHO, strict=strict, exit_wait_s=exit_wait_s, max_keys=20_000, device=FakeDevice())


@pytest.fixture
def make_run(tmp_path):
    runs = []

    def make(**options):
        runs.append(new_run(tmp_path / f"0.{len(runs)}", **options))
        return runs[-1]

    yield make
    for run in runs:
        run._journal.close(finished=False)


@pytest.fixture
def run(make_run):
    return make_run()


def device_of(run):
    return run._pending.staging.device


def read(run):
    """What the journal holds: ("log", step, weight, {name: value}) or ("message", step, message), and their times."""
    reader = JournalReader(run._journal.folder)
    schemas, found, times = {}, [], []
    while (chunk := reader.read(1 << 20)) is not None:
        for offset, _ in scan_payload(chunk.payload):
            record = decode(chunk.payload, offset)
            if record.kind == KIND_SCHEMA:
                schemas[record.message["id"]] = record.message["keys"]
                continue
            times.append(record.time_unix_ns)
            if record.kind == KIND_SCALARS:
                names = schemas[record.schema_id]
                found.append(("log", record.step, record.weight, dict(zip(names, record.values, strict=True))))
            else:
                assert record.kind == KIND_MESSAGE
                found.append(("message", record.step, record.message))
    reader.close()
    return found, times


def content(run):
    return read(run)[0]


def values(run):
    return [item[3] for item in content(run) if item[0] == "log"]


def shown_step(run):
    reader = JournalReader(run._journal.folder)
    step = reader.step
    reader.close()
    return step


def num_unarrived(run):
    """What the agent would count, were this rank dead now."""
    reader = JournalReader(run._journal.folder)
    while reader.read(1 << 20) is not None:
        pass
    num = reader.num_unarrived
    reader.close()
    return num


def warns(text):
    return pytest.warns(RuntimeWarning, match=text)


# -- values

EXACT = [
    (torch.float64, [0.1, -math.pi * 1e300, 5e-324, math.inf]), (torch.float32, [0.1, 16777217.0, 1e-45, -math.inf]),
    (torch.float16, [0.1, 65504.0, 6e-8]), (torch.bfloat16, [0.1, 3.3e38, 1.0078125]),
    (torch.int64, [2**53 - 1, -(2**53) + 1, 2**24 + 1]), (torch.int32, [2**31 - 1, -(2**31), 2**24 + 1]),
    (torch.int16, [-32768, 32767]), (torch.int8, [-128, 127]), (torch.uint8, [255]), (torch.bool, [True, False]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "numbers"), EXACT, ids=lambda value: str(value) if not isinstance(value, list) else ""
)
def test_every_type_arrives_as_it_was(run, dtype, numbers):
    """Stacked with others of another type, it would be rounded: 2**24 + 1 is no float32, 0.1 in float64 no bfloat16."""
    tensors = [torch.tensor(number, dtype=dtype) for number in numbers]
    expected = [float(tensor.item()) for tensor in tensors]
    run.log({f"k{i}": on_device(tensor) for i, tensor in enumerate(tensors)}, step=1)
    device_of(run).complete()
    run.set_step(2)

    (found,) = values(run)
    assert list(found.values()) == expected


def test_types_are_mixed_in_one_call(run):
    """One stack and copy for each type, one event for all of them."""
    data = {
        "a": on_device(0.1, torch.float64), "b": 1.5, "c": on_device(2**24 + 1, torch.int64), "d": np.float32(0.25),
        "e": {"f": on_device(3.0), "g": 7}, "h": torch.tensor(4.0), "i": on_device(5.0), "j": on_device(True, torch.bool),
    }  # fmt: skip
    for step in range(2):  # the second one finds its names known
        run.log(data, step=step, weight=3)
    assert [len(event.copies) for event in device_of(run).events] == [4, 4]
    device_of(run).complete()
    run.log({}, step=2)

    expected = {"a": 0.1, "b": 1.5, "c": 2.0**24 + 1, "d": 0.25, "e/f": 3.0, "e/g": 7.0, "h": 4.0, "i": 5.0, "j": 1.0}
    assert content(run) == [("log", step, 3.0, expected) for step in range(2)]
    assert dict(run.drops) == {}


def test_nan_stays_nan(run):
    run.log({"x": on_device(math.nan)}, step=0)
    device_of(run).complete()
    run.log({}, step=1)

    assert math.isnan(values(run)[0]["x"])


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad, torch.autograd.profiler.profile]
)
def test_tensors_of_every_mode_and_shape_are_taken(run, mode):
    """The buffer is made at the first of them, and must be of use to the others, whatever mode that was in."""
    for first in (True, False):
        with mode() if first else torch.enable_grad():
            leaf = torch.tensor(0.5, requires_grad=not torch.is_inference_mode_enabled())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                run.log(
                    {"leaf": on_device(leaf), "result": on_device(leaf * 2), "one": on_device(torch.ones(1, 1))}, step=1
                )
        device_of(run).complete()
    run.log({"parameter": on_device(torch.nn.Parameter(torch.tensor([2.0])))}, step=1)
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"leaf": 0.5, "result": 1.0, "one": 1.0}] * 2 + [{"parameter": 2.0}]
    assert dict(run.drops) == {}


def test_a_default_device_is_not_where_the_buffer_is(run):
    torch.set_default_device("meta")
    try:
        tensor = torch.tensor(2.0, device="cpu")
        run.log({"x": on_device(tensor)}, step=1)
    finally:
        torch.set_default_device(None)
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"x": 2.0}]


def test_what_becomes_of_a_tensor_after_the_call_does_not_matter(run):
    """A loop overwrites its loss in place, and frees what it has no use for; the queue keeps neither alive."""
    kept, freed = on_device(1.0), on_device(2.0)
    gone = weakref.ref(freed)
    run.log({"kept": kept, "freed": freed}, step=1)
    kept.fill_(99.0)
    del freed
    gc.collect()
    assert gone() is None
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"kept": 1.0, "freed": 2.0}]


def test_a_slot_is_not_used_again_before_it_was_read(make_run):
    """The ring wraps around many times, with a few calls under way at any moment."""
    run = make_run()
    run._pending.staging = Staging(device_of(run), ring_bytes=128)
    expected = []
    for step in range(200):
        data = {f"k{i}": on_device(float(step * 10 + i)) for i in range(step % 4 + 1)}
        expected.append({name: float(tensor) for name, tensor in data.items()})
        run.log(data, step=step)
        waiting = device_of(run).waiting
        if len(waiting) > 3:
            waiting[0].complete()
    device_of(run).complete()
    run.flush()

    assert values(run) == expected
    assert dict(run.drops) == {}
    assert device_of(run).num_allocations == 1


def test_a_weight_and_a_step_on_the_device_are_fetched_too(run):
    """Asking for them would wait, like for any value."""
    run.log({"x": 1.0, "y": on_device(2.0)}, step=on_device(7, torch.int64), weight=on_device(32, torch.int32))
    run.log({"x": 3.0}, step=on_device(8.0), weight=on_device(-1.0))
    run.log({"x": 4.0}, step=on_device(8.5))
    assert content(run) == []
    device_of(run).complete()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        run.log({}, step=1)

    assert content(run) == [("log", 7, 32.0, {"x": 1.0, "y": 2.0}), ("log", 8, 1.0, {"x": 3.0})]
    assert run.drops == {"bad_weight": 1, "bad_step": 1}
    assert len(seen) == 2


def test_a_step_that_would_have_to_be_waited_for_is_not_set(run):
    with warns("that the host knows"):
        run.set_step(on_device(7, torch.int64))

    assert run.drops == {"bad_step": 1}
    assert shown_step(run) is None


# -- what has no value


def test_a_tensor_of_several_values_is_refused_without_waiting_for_it(run):
    """Its repr in a message would wait for the device: a meta tensor, which has no value, would show that."""
    with warns("shape"):
        run.log({"x": on_device(torch.zeros(2)), "y": on_device(1.0)}, step=0)
    with warns("weight=<a tensor of shape"):
        run.log({"x": 1.0}, step=0, weight=torch.zeros(2, device="meta"))
    with warns("step=<a tensor of shape"):
        run.log({"x": 1.0}, step=torch.zeros(2, device="meta"))
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"y": 1.0}, {"x": 1.0}]
    assert run.drops == {"bad_value": 1, "bad_weight": 1, "bad_step": 1}


def test_meta_and_fake_tensors_have_no_value(run):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.tensor(1.0)
    with warns("meta device has no value"):
        run.log({"meta": torch.tensor(1.0, device="meta"), "fake": fake, "x": 1.0}, step=0)

    assert values(run) == [{"x": 1.0}]
    assert run.drops == {"bad_value": 2}


def test_inside_a_fake_tensor_mode_nothing_is_broken_for_later(run):
    """What is made in it is fake, the pinned buffer too."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = on_device(2.0)
    with warns("cannot be fetched"), FakeTensorMode(allow_non_fake_inputs=True):
        run.log({"x": real}, step=0)
    device, plain = device_of(run), device_of(run).allocate
    device.allocate = lambda num_bytes: on_device(plain(num_bytes))  # what else is not plain memory
    run.log({"x": on_device(2.5)}, step=1)
    device.allocate = plain
    run.log({"x": on_device(3.0)}, step=2)
    device.complete()
    run.flush()

    assert values(run) == [{"x": 3.0}]
    assert run.drops == {"device_error": 2}


def test_what_cannot_be_stacked_is_counted_and_the_rest_is_kept(run):
    device_of(run).error = RuntimeError("CUDA error: out of memory")
    with warns("out of memory"):
        run.log({"x": on_device(1.0), "y": 2.0}, step=0)
    device_of(run).error = None
    run.log({"x": on_device(3.0)}, step=1)
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"y": 2.0}, {"x": 3.0}]
    assert run.drops == {"device_error": 1}


class Elsewhere(torch.Tensor):
    """A tensor of a device that has no events here, such as Apple's."""

    is_cpu = False


def test_a_device_without_events_is_waited_for_with_one_warning(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(3):
            run.log({"x": torch.tensor(2.5).as_subclass(Elsewhere), "y": 1.0}, step=step)

    assert values(run) == [{"x": 2.5, "y": 1.0}] * 3
    assert ["waits for values on" in str(warning.message) for warning in seen] == [True]
    assert dict(run.drops) == {}


# -- order


def test_nothing_overtakes_what_waits(run):
    """Floats on the hot path, messages and progress queue behind the device's values, and come in the order of the calls."""
    run.log({"x": 0.0}, step=0)
    run.set_step(1)
    run.log({"x": on_device(1.0)})
    run.log({"x": 1.5})
    run.set_step(2)
    run.log({"x": on_device(2.0), "y": 2})
    run.log_text("note", "two")
    run.log_params({"lr": 0.1})
    run.set_step(3)
    run.log({"x": 3.0})
    first, second = device_of(run).events
    assert (len(content(run)), shown_step(run), num_unarrived(run)) == (1, 1, 7)
    second.complete()
    run.set_step(4)
    assert (len(content(run)), shown_step(run), num_unarrived(run)) == (1, 1, 7)
    first.complete()
    run.log({"x": 4.0})

    assert content(run) == [
        ("log", 0, 1.0, {"x": 0.0}), ("log", 1, 1.0, {"x": 1.0}), ("log", 1, 1.0, {"x": 1.5}),
        ("log", 2, 1.0, {"x": 2.0, "y": 2.0}), ("message", 2, {"type": "text", "key": "note", "text": "two"}),
        ("message", NO_STEP, {"type": "params", "values": {"lr": 0.1}}), ("log", 3, 1.0, {"x": 3.0}),
        ("log", 4, 1.0, {"x": 4.0}),
    ]  # fmt: skip
    assert (shown_step(run), num_unarrived(run), len(run._pending.queue)) == (4, 0, 0)


def test_progress_never_passes_what_waits(run):
    """The agent reads the step, then the records: whatever was logged before the step was set must be among them."""
    for step in range(20):
        run.set_step(step)
        run.log({"x": on_device(float(step))})
        waiting = device_of(run).waiting
        if step % 3 == 2:
            for event in waiting[:-1]:
                event.complete()
        in_journal = len(values(run))
        shown = shown_step(run)
        assert shown is None or shown <= in_journal


def test_a_record_has_the_time_of_its_call(run):
    """Step times are taken from it: the time of arrival says when somebody next logged."""
    before = time.time_ns()
    run.log({"x": on_device(1.0)}, step=0)
    run.log({"x": 2.0}, step=1)
    run.log_text("a", "b")
    after = time.time_ns()
    device_of(run).complete()
    while time.time_ns() <= after:
        pass
    run.flush()

    _, times = read(run)
    assert before <= times[0] <= times[1] <= times[2] <= after


def test_without_a_step_the_call_counts_not_the_arrival(run):
    for number in range(3):
        run.log({"x": on_device(float(number))})
    run.log({"x": 3.0})
    device_of(run).complete()
    run.log({"x": 4.0})

    assert [item[1] for item in content(run)] == [0, 1, 2, 3, 4]


def test_the_hot_path_is_open_unless_something_waits(run):
    run.log({"x": 0.0}, step=0)
    assert run._fast({"x": 1.0}, 1, 1.0)
    run.log({"x": on_device(2.0)}, step=2)
    assert not run._fast({"x": 3.0}, 3, 1.0)
    device_of(run).complete()
    run.set_step(4)
    assert run._fast({"x": 4.0}, 4, 1.0)


def test_a_new_segment_in_between_opens_nothing(make_run):
    """What waits is written into several segments, each of which declares its keys again."""
    run = make_run(segment_bytes=16 * 1024)
    for step in range(500):
        run.log({"x": on_device(float(step)), "y": 1.0}, step=step)
        if step % 2:
            device_of(run).events[-2].complete()
    device_of(run).complete()
    run.flush()

    assert [item[1] for item in content(run)] == list(range(500))
    assert run._journal._number > 1


def test_a_call_of_very_many_values_arrives_whole(run):
    data = {f"k{i}": on_device(float(i)) for i in range(1300)}
    run.log(data, step=3)
    assert num_unarrived(run) == 1300
    device_of(run).complete()
    run.flush()

    found = values(run)
    assert [len(part) for part in found] == [512, 512, 276]
    assert {name: value for part in found for name, value in part.items()} == {f"k{i}": float(i) for i in range(1300)}


# -- bounds


def test_beyond_the_bound_it_is_dropped_and_nothing_waits(run, monkeypatch):
    monkeypatch.setattr(queue, "MAX_CALLS", 5)
    run.log({"x": on_device(0.0)}, step=0)
    with warns("too far behind"):
        for step in range(1, 10):
            run.log({"x": on_device(float(step)), "y": 1.0}, step=step)
        run.log_text("a", "b")
        run.log({"z": 1.0}, step=10)
        for step in range(100):
            run.set_step(step)
    assert (len(run._pending.queue), num_unarrived(run)) == (6, 9)
    device_of(run).complete()
    run.flush()

    assert sum(map(len, values(run))) == 9
    assert run.drops == {"device_backlog": 2 * 5 + 1 + 1}
    assert shown_step(run) == 99
    run.log({"x": on_device(1.0)}, step=11)
    device_of(run).complete()
    run.flush()
    assert len(values(run)) == 6


def test_the_memory_of_what_waits_is_bounded(run):
    run.log({"x": on_device(0.0)}, step=0)
    with warns("too far behind"):
        for _ in range(100):
            run.log_text("a", "x" * 200_000)
    kept = len(run._pending.queue) - 1

    assert 0 < kept * 200_000 <= queue.MAX_BYTES
    assert run.drops == {"device_backlog": 100 - kept}


def test_a_text_that_is_too_large_is_said_at_its_call(make_run):
    run = make_run(strict=True)
    run.log({"x": on_device(0.0)}, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError, match="text is dropped"):
            run.log_text("a", "x" * 300_000)

    assert run.drops == {"record_too_large": 1}


def test_a_full_buffer_is_counted(run):
    run._pending.staging = Staging(device_of(run), ring_bytes=64)
    run.log({"x": on_device(0.0)}, step=0)
    with warns("too far behind"):
        run.log({**{f"k{i}": on_device(1.0) for i in range(20)}, "host": 1.0}, step=1)
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"x": 0.0}, {"host": 1.0}]
    assert run.drops == {"device_backlog": 20}


def test_a_full_disk_is_counted_when_the_value_arrives(make_run):
    run = make_run(spool_bytes=64 * 1024)
    text = "x" * 50_000
    run.log_text("fill", text)
    run.log({"x": on_device(0.0)}, step=0)
    for number in range(3):
        run.log({f"k{number}-{i}": on_device(1.0) for i in range(300)}, step=1)
    run.log_text("fill", text)
    device_of(run).complete()
    with warns("full"):
        run.flush()

    assert sum(map(len, values(run))) + run.drops["spool_full"] == 1 + 900 + 1
    assert num_unarrived(run) == 0


# -- the end


def test_flush_waits_for_what_arrives(make_run):
    run = make_run(exit_wait_s=60.0)
    run.log({"x": on_device(1.0)}, step=0)
    helper = threading.Timer(0.05, device_of(run).complete)
    helper.start()
    run.flush()
    helper.join()

    assert values(run) == [{"x": 1.0}]


def test_flush_gives_up_waiting_but_not_the_values(run):
    run.log({"x": on_device(1.0)}, step=0)
    with warns("are not here yet"):
        run.flush()
    device_of(run).complete()
    run.set_step(1)

    assert values(run) == [{"x": 1.0}]
    assert dict(run.drops) == {}


@pytest.mark.parametrize("how", ["finish", "exit", "with"])
def test_the_end_waits_no_longer_than_it_may_and_counts(run, how):
    """A hung device must not hang the exit. What the host has of it, and what queued behind, is stored."""
    run.log({"x": on_device(1.0), "y": 2.0}, step=1, weight=on_device(4.0))
    run.set_step(2)
    run.log({"z": 3.0})
    run.log({"x": on_device(1.0)}, step=on_device(3, torch.int64))
    run.log_text("a", "b")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        if how == "finish":
            run.finish()
        elif how == "exit":
            finish_at_exit([run], "finished", "")
        else:
            with run:
                pass

    assert len([w for w in seen if "have not arrived at the end" in str(w.message)]) == 1
    found = content(run)
    assert [item[:2] for item in found] == [("log", 1), ("log", 2), ("message", 2), ("message", NO_STEP)]
    assert values(run) == [{"y": 2.0}, {"z": 3.0}]
    assert found[-1][2]["type"] == "finish"
    assert run.drops == {"device_pending": 2, "bad_weight": 1}
    assert (shown_step(run), num_unarrived(run)) == (2, 0)


def test_the_end_takes_what_arrives_while_it_waits(make_run):
    run = make_run(exit_wait_s=60.0)
    JournalReader(run._journal.folder).set_acked(1 << 40)
    run.log({"x": on_device(1.0)}, step=0)
    helper = threading.Timer(0.05, device_of(run).complete)
    helper.start()
    run.finish()
    helper.join()

    assert values(run) == [{"x": 1.0}]
    assert dict(run.drops) == {}


def test_a_device_that_fails_costs_its_values_and_nothing_else(run):
    """An illegal access shows at the next question; every later one says it again."""
    run.log({"x": on_device(1.0), "y": 2.0}, step=0)
    run.log({"x": 5.0}, step=1)
    device_of(run).events[0].error = RuntimeError("CUDA error: an illegal memory access was encountered")
    with warns("illegal memory access"):
        run.log({"x": 6.0}, step=2)

    assert values(run) == [{"y": 2.0}, {"x": 5.0}, {"x": 6.0}]
    assert run.drops == {"device_error": 1}
    assert num_unarrived(run) == 0


def test_after_finish_values_on_a_device_are_refused_like_any(run):
    run.finish()
    with warns("after finish"):
        run.log({"x": on_device(1.0), "y": 1.0}, step=0)

    assert run.drops == {"after_finish": 2}
    assert device_of(run).events == []


# -- graphs


def test_during_a_capture_values_are_refused_and_the_device_is_left_alone(run):
    """A copy would become part of the graph, and be made at each replay into a slot that others use by then; and asking
    for an event ends the capture with an error.
    """
    run.log({"x": on_device(1.0)}, step=0)
    (event,) = device_of(run).events
    num_queries = event.num_queries
    device_of(run).has_graph = True
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for step in range(1, 4):
            run.log({"x": on_device(2.0), "y": on_device(2.0), "host": 3.0}, step=step)
            run.log({"host": 4.0}, step=step)
        run.flush()
    assert (event.num_queries, len(device_of(run).events)) == (num_queries, 1)
    assert len([w for w in seen if "CUDA graph" in str(w.message)]) == 1
    device_of(run).has_graph = False
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"x": 1.0}, *[{"host": 3.0}, {"host": 4.0}] * 3]
    assert run.drops == {"graph_capture": 6}


# -- other threads, processes and handlers


@pytest.fixture
def on_signal():
    old = signal.getsignal(signal.SIGUSR1)

    def install(action):
        signal.signal(signal.SIGUSR1, lambda signum, frame: action())
        return lambda: signal.raise_signal(signal.SIGUSR1)

    yield install
    signal.signal(signal.SIGUSR1, old)


def test_a_handler_in_the_midst_of_a_call_comes_behind_it(run, on_signal):
    """It strikes while the outer call's values are put on the stream."""
    device = device_of(run)

    def handler():
        run.set_step(9)
        run.log({"handler": on_device(2.0)}, step=7)
        run.log_text("why", "SIGUSR1")
        run.flush()

    strike, plain = on_signal(handler), device.copy

    def copy(to, stacked):
        device.copy = plain
        strike()
        plain(to, stacked)

    device.copy = copy
    run.log({"outer": on_device(1.0)}, step=1)
    assert shown_step(run) is None
    device.complete()
    run.flush()

    assert [item[:2] for item in content(run)] == [("log", 1), ("log", 7), ("message", 9)]
    assert values(run) == [{"outer": 1.0}, {"handler": 2.0}]
    assert shown_step(run) == 9


def test_threads_take_turns(run):
    device = device_of(run)
    done = threading.Event()

    def log(thread):
        for step in range(100):
            run.log({f"t{thread}": on_device(float(step))}, step=step)
            run.log({f"h{thread}": float(step)}, step=step)

    def complete():
        while not done.is_set():
            for event in list(device.waiting):
                event.complete()

    threads = [threading.Thread(target=log, args=(number,)) for number in range(4)]
    helper = threading.Thread(target=complete)
    helper.start()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    helper.join()
    device.complete()
    run.flush()

    found = values(run)
    assert len(found) == 800
    for name in (f"{kind}{number}" for kind in "th" for number in range(4)):
        assert [item[name] for item in found if name in item] == [float(step) for step in range(100)]
    assert num_unarrived(run) == 0


def test_a_forked_child_leaves_the_device_alone(run):
    """CUDA does not work in it: any call would raise, or hang."""
    run.log({"x": on_device(1.0)}, step=0)
    (event,) = device_of(run).events
    num_queries = event.num_queries
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run._journal.abandon()  # what the hook of init() does
            event.has_happened = True
            warnings.simplefilter("ignore")
            run.log({"x": on_device(2.0)}, step=1)
            run.set_step(2)
            run.log_text("a", "b")
            run.flush()
            run.finish()
            finish_at_exit([run], "finished", "")
            code = 0 if (event.num_queries, len(device_of(run).events)) == (num_queries, 1) else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    device_of(run).complete()
    run.flush()

    assert values(run) == [{"x": 1.0}]
    assert num_unarrived(run) == 0


def test_ctrl_c_while_values_arrive_counts_what_it_took(run, on_signal):
    """The record may be in or not: it must not be in twice, nor missing from both."""

    def interrupt():
        raise KeyboardInterrupt

    strike = on_signal(interrupt)
    run.log({"x": on_device(1.0), "y": 1.0}, step=0)
    run.log({"x": 2.0}, step=1)
    device_of(run).complete()
    plain = run._journal.append_scalars

    def append(*arguments):
        run._journal.append_scalars = plain
        strike()

    run._journal.append_scalars = append
    with pytest.raises(KeyboardInterrupt):
        run.log({"x": 3.0}, step=2)
    run.log({"x": 4.0}, step=3)

    assert values(run) == [{"x": 2.0}, {"x": 4.0}]
    assert run.drops == {"io_error": 2}
    assert num_unarrived(run) == 0


# -- what a death leaves


def test_a_kill_between_a_record_and_its_count_counts_it_once(run):
    """The head page says how many waited, and as of which record: what came after it is not counted twice."""
    run.log({"x": on_device(1.0), "y": on_device(2.0)}, step=0)
    run.log({"x": 3.0}, step=1)
    run.log_text("a", "b")
    device_of(run).complete()
    left = []
    run._journal.show_pending = left.append  # the kill comes instead
    before = run._journal.next_seq
    with run._journal._lock:
        run._pending._pop()
    assert (run._journal.next_seq, left) == (before + 2, [2])

    assert num_unarrived(run) == 2


@pytest.mark.parametrize("num_seen", [0, 3, 100])
def test_an_agent_that_comes_later_counts_the_same(run, num_seen):
    """It seeks to what is acknowledged, and may have nothing more to read."""
    for step in range(10):
        run.log({"x": float(step), "y": 1.0}, step=step)
    run.log({"x": on_device(1.0), "y": on_device(2.0)}, step=0)
    reader = JournalReader(run._journal.folder)
    reader.seek(num_seen)
    while reader.read(1) is not None:
        pass

    assert reader.num_unarrived == 2
    reader.close()


# -- against a model

VALUES = st.floats(width=32, allow_nan=False)
CALLS = st.one_of(
    st.tuples(
        st.just("log"),
        st.dictionaries(st.sampled_from("abc"), st.tuples(st.booleans(), VALUES), min_size=1),
        st.none() | st.integers(0, 5),
    ),
    st.tuples(st.just("step"), st.integers(0, 9)),
    st.tuples(st.just("text"), st.text(max_size=3)),
    st.tuples(st.just("complete"), st.integers(0, 5)),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(CALLS, max_size=25))
def test_the_journal_is_that_of_immediate_calls(calls):
    """Whatever the order of completions, it is at any time the beginning of what it would be had nothing waited."""
    with tempfile.TemporaryDirectory(prefix="ddplog-pending-") as name:
        run, model = new_run(Path(name) / "0.1"), new_run(Path(name) / "0.2")
        for call, *words in calls:
            if call == "log":
                data, step = words
                run.log({k: on_device(v) if is_held else v for k, (is_held, v) in data.items()}, step=step)
                model.log({k: v for k, (_, v) in data.items()}, step=step)
            elif call == "step":
                run.set_step(*words)
                model.set_step(*words)
            elif call == "text":
                run.log_text("t", *words)
                model.log_text("t", *words)
            elif device_of(run).waiting:
                waiting = device_of(run).waiting
                waiting[words[0] % len(waiting)].complete()
            found, expected = content(run), content(model)
            assert found == expected[: len(found)]
            held = sum(len(item[3]) if item[0] == "log" else 1 for item in expected[len(found) :])
            assert num_unarrived(run) == held == run._pending.num_values
            if not held:
                assert shown_step(run) == shown_step(model)
        device_of(run).complete()
        run.finish()
        model.finish()

        assert content(run) == content(model)
        assert (shown_step(run), run.drops) == (shown_step(model), {})


def test_a_send_that_fails_for_want_of_room_takes_none():
    staging = Staging(FakeDevice(), ring_bytes=64)
    with pytest.raises(StagingError, match="too far behind"):
        staging.send([torch.tensor(1.0)] * 20)
    assert repr(staging) == "<Staging 0 of 64 bytes>"
    for _ in range(10):
        flight = staging.send([torch.tensor(1.0)] * 10)
        staging.give_back(flight)
    assert repr(staging) == "<Staging 0 of 64 bytes>"
