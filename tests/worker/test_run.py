"""The Run object against a real journal: what is taken, at which step, and what is counted instead of raised."""

import copy
import math
import os
import pickle
import signal
import warnings

import numpy as np
import pytest

from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, MAX_RECORD_BYTES, NO_STEP, decode, scan_payload
from ddplog.core.reduce import is_reduction
from ddplog.errors import UsageError
from ddplog.journal import segment as layout
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.worker import current
from ddplog.worker.absent import AbsentRun, NullRun
from ddplog.worker.identity import Identity
from ddplog.worker.run import Run, describe

JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip
WHO = Identity(rank=2, world_size=4, local_rank=0, local_world_size=1, node_rank=0, launcher="env")


class Scalars:
    """A record of scalars, with names."""

    def __init__(self, record, keys):
        self.step, self.weight, self.data = record.step, record.weight, dict(zip(keys, record.values, strict=True))

    def __repr__(self):
        return f"{self.data}@{self.step}x{self.weight}"


@pytest.fixture
def make_run(tmp_path):
    runs = []

    def make(strict=False, max_keys=10_000, exit_wait_s=0.0, **options):
        options = {"segment_bytes": 1 << 20, "spool_bytes": 1 << 30, "check": lambda: None} | options
        journal = JournalWriter(tmp_path / f"2.{len(runs)}", b"i" * 16, {"rank": 2, "world_size": 4}, **options)
        run = Run(journal, JOB, WHO, strict=strict, exit_wait_s=exit_wait_s, max_keys=max_keys)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run._journal.close(finished=False)


@pytest.fixture
def run(make_run):
    return make_run()


def records(run):
    reader = JournalReader(run._journal.folder)
    found = []
    while (chunk := reader.read(1 << 20)) is not None:
        found += [decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)]
    reader.close()
    assert [record.seq for record in found] == list(range(len(found)))
    return found


def scalars(run):
    schemas, found = {}, []
    for record in records(run):
        if record.kind == KIND_SCHEMA:
            schemas[record.message["id"]] = record.message["keys"]
        elif record.kind == KIND_SCALARS:
            found.append(Scalars(record, schemas[record.schema_id]))
    return found


def messages(run):
    return [(record.step, record.message) for record in records(run) if record.kind == KIND_MESSAGE]


def warns(reason_text):
    return pytest.warns(RuntimeWarning, match=reason_text)


def test_what_a_run_says_of_itself(run):
    assert (run.run_id, run.dir, run.rank, run.world_size, dict(run.drops)) == ("r1", "/runs/r1", 2, 4, {})
    assert "r1" in repr(run)
    assert "2/4" in repr(run)


# -- steps


def test_the_given_step_is_taken_whatever_its_type(run):
    for step in (5, np.int64(6), np.uint8(7), 8.0, np.float32(9.0), True, -3, 2**63 - 1):
        run.log({"x": 1.0}, step=step)

    assert [s.step for s in scalars(run)] == [5, 6, 7, 8, 9, 1, -3, 2**63 - 1]
    assert dict(run.drops) == {}


@pytest.mark.parametrize("step", [3.5, math.nan, math.inf, "3", 2**63, -(2**63), 1j, [3], np.array([1, 2])], ids=repr)
def test_a_step_that_is_no_whole_number_drops_the_call(run, step):
    """Under a made-up step the values would be reduced with other ranks' of another step."""
    with warns("must be a whole number"):
        run.log({"x": 1.0}, step=step)

    assert scalars(run) == []
    assert run.drops == {"bad_step": 1}


def test_the_ambient_step_is_used_where_none_is_given_and_shown_to_the_agent(run):
    run.log({"x": 0.0}, step=1)
    run.set_step(np.int64(41))
    run.log({"x": 1.0})
    run.log({"y": 1})
    run.log({"x": 2.0}, step=3)
    run.log({"x": 3.0})

    assert [s.step for s in scalars(run)] == [1, 41, 41, 3, 41]
    assert JournalReader(run._journal.folder).step == 41


@pytest.mark.parametrize("step", [1.5, "1", None, 2**64])
def test_an_ambient_step_that_is_no_whole_number_leaves_the_old_one(run, step):
    run.set_step(7)
    with warns("set_step"):
        run.set_step(step)
    run.log({"x": 1.0})

    assert [s.step for s in scalars(run)] == [7]
    assert run.drops == {"bad_step": 1}


def test_without_any_step_each_set_of_names_counts_for_itself(run):
    """Training and validation are logged at different rates; neither may push the other's steps on."""
    for n in range(3):
        run.log({"loss": float(n), "acc": 0.5})
    run.log({"val": {"loss": 9.0}})
    run.log({"loss": 1.0})
    run.log({"loss": 3.0, "acc": 1})

    assert [(sorted(s.data), s.step) for s in scalars(run)] == [
        (["acc", "loss"], 0), (["acc", "loss"], 1), (["acc", "loss"], 2), (["val/loss"], 0), (["loss"], 0),
        (["acc", "loss"], 3),
    ]  # fmt: skip


def test_the_order_of_the_names_makes_no_other_set(run):
    run.log({"a": 1.0, "b": 2.0})
    run.log({"b": 3.0, "a": 4.0})

    assert [(s.step, s.data) for s in scalars(run)] == [(0, {"a": 1.0, "b": 2.0}), (1, {"a": 4.0, "b": 3.0})]


# -- values and weights


def test_one_call_is_one_record_of_all_its_numbers(run):
    for _ in range(2):  # the second one on the fast path where it can
        run.log({"loss": 0.5, "n": 3, "np": np.float32(0.25), "val": {"acc": np.array([1.0])}, "nan": math.nan}, step=1)
    run.log({}, step=1)

    first, second = scalars(run)
    assert first.data.keys() == {"loss", "n", "np", "val/acc", "nan"}
    assert [v for k, v in first.data.items() if k != "nan"] == [0.5, 3.0, 0.25, 1.0]
    assert math.isnan(first.data["nan"])
    assert repr(second) == repr(first)


@pytest.mark.parametrize(
    "value", ["text", None, 1j, [1.0], np.zeros(3), 10**400, object()], ids=lambda v: type(v).__name__
)
def test_a_bad_value_is_counted_and_the_others_of_the_call_are_kept(run, value):
    with warns("bad: "):
        run.log({"good": 1.0, "bad": value, "also": 2}, step=1)

    (found,) = scalars(run)
    assert found.data == {"good": 1.0, "also": 2.0}
    assert run.drops == {"bad_value": 1}


@pytest.mark.parametrize(
    "data", [None, 5, "loss", [("loss", 1.0)], {"loss"}, np.zeros(2)], ids=lambda v: type(v).__name__
)
def test_what_is_no_dict_is_counted(run, data):
    with warns("takes a dict"):
        run.log(data, step=1)

    assert run.drops == {"bad_value": 1}


def test_a_user_object_that_fails_in_float_harms_nobody(run):
    class Broken(float):
        def __float__(self):
            raise RuntimeError("boom")

    with warns("boom"):
        run.log({"x": Broken(), "y": 1.0}, step=0)

    assert [s.data for s in scalars(run)] == [{"y": 1.0}]
    assert run.drops == {"bad_value": 1}


@pytest.mark.parametrize(
    ("weight", "expected"),
    [(2, 2.0), (0, 0.0), (0.5, 0.5), (True, 1.0), (np.int64(32), 32.0), (np.float32(0.5), 0.5), (np.array([8]), 8.0)],
    ids=repr,
)
def test_a_weight_may_be_any_number_from_zero_up(run, weight, expected):
    for _ in range(2):
        run.log({"x": 1.0}, step=0, weight=weight)

    assert [s.weight for s in scalars(run)] == [expected] * 2
    assert dict(run.drops) == {}


@pytest.mark.parametrize(
    "weight", [math.nan, -1, -0.5, math.inf, "2", None, np.float64("nan"), np.zeros(2), 10**400], ids=repr
)
def test_a_bad_weight_is_counted_and_one_is_taken(run, weight):
    """The value is right; only what it counts for is not known. And NaN would spread to all ranks' mean."""
    run.log({"x": 1.0}, step=0)
    with warns("weight"):
        run.log({"x": 2.0}, step=1, weight=weight)

    assert [(s.data["x"], s.weight) for s in scalars(run)] == [(1.0, 1.0), (2.0, 1.0)]
    assert run.drops == {"bad_weight": 1}


def test_each_reason_is_warned_about_once_and_always_counted(run):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(5):
            run.log({"x": "a", 3: 1.0}, step=0)

    assert [warning.category for warning in seen] == [RuntimeWarning] * 2
    assert run.drops == {"bad_value": 5, "bad_key": 5}


def test_warnings_as_errors_do_not_stop_training(run):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run.log({"x": "a", "y": 1.0}, step=0)

    assert [s.data for s in scalars(run)] == [{"y": 1.0}]


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda run: run.log({"x": "a"}), "bad_value"),
        (lambda run: run.log({1: 1.0}), "bad_key"),
        (lambda run: run.log({"x": 1.0}, step=1.5), "bad_step"),
        (lambda run: run.log({"x": 1.0}, weight=-1), "bad_weight"),
        (lambda run: run.set_step(1.5), "bad_step"),
        (lambda run: run.log_text("t", "x" * MAX_RECORD_BYTES), "record_too_large"),
    ],
)
def test_strict_raises_after_it_has_counted(make_run, call, reason):
    run = make_run(strict=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UsageError):
            call(run)

    assert run.drops == {reason: 1}
    run.log({"x": 1.0}, step=9)
    assert scalars(run)[-1].step == 9  # the journal was given back


def test_what_a_framework_cannot_hand_on_is_counted_and_named_once_each(run):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for method in ("add_image()", "add_image()", "add_mesh()"):
            run.skip(method, "left out")

    assert [str(warning.message).split(": ")[1] for warning in caught] == ["add_image()", "add_mesh()"]
    assert run.drops == {"unsupported": 3}


def test_names_beyond_the_limit_are_dropped_and_known_ones_are_not(make_run):
    """A name with an id in it must not fill every tracker; those that were there first go on."""
    run = make_run(max_keys=3)
    with warns("max_keys"):
        for n in range(5):
            run.log({"loss": 1.0, f"id{n}": 2.0}, step=n)

    assert run.drops == {"key_limit": 3}
    assert [sorted(s.data) for s in scalars(run)] == [["id0", "loss"], ["id1", "loss"], ["loss"], ["loss"], ["loss"]]


def test_a_call_of_very_many_names_is_split_into_records_that_fit(make_run):
    """A record that declares all 20,000 would be beyond the size that one call may put on the wire."""
    run = make_run(max_keys=30_000)
    data = {f"{n:05d}" + "é" * 120 for n in range(20_000)}
    run.log(dict.fromkeys(data, 1.0), step=3)

    found = scalars(run)
    assert dict(run.drops) == {}
    assert max(len(s.data) for s in found) <= 512
    assert {s.step for s in found} == {3}
    assert sum(len(s.data) for s in found) == 20_000
    assert set().union(*(s.data for s in found)) == data


# -- messages


def test_a_text_of_ten_megabytes_is_dropped_with_a_reason(run):
    with warns("text is dropped"):
        run.log_text("note", "x" * 10_000_000)
    run.log_text("note", "short", step=4)

    assert run.drops == {"record_too_large": 1}
    assert messages(run) == [(4, {"type": "text", "key": "note", "text": "short"})]


def test_a_text_without_a_step_has_the_ambient_one(run):
    run.log_text("a", "1")
    run.set_step(5)
    run.log_text("a", "2")

    assert [step for step, _ in messages(run)] == [NO_STEP, 5]


def test_params_are_flattened_and_what_is_no_json_becomes_text(run):
    run.log_params(
        {"lr": 0.1, "opt": {"name": "sgd", "nesterov": True, "none": None}, "shape": (1, 2), "np": np.int64(3)}
    )
    run.log_params({})

    ((_, message),) = messages(run)
    assert message["type"] == "params"
    assert message["values"] == {
        "lr": 0.1, "opt/name": "sgd", "opt/nesterov": True, "opt/none": None, "shape": "(1, 2)", "np": "3",
    }  # fmt: skip


@pytest.mark.parametrize(
    "reduce", ["mean", "sum", "min", "max", "last", "std", "median", "rss", "none", "p0", "p90", "p99.9", "p100"]
)
def test_every_reduction_can_be_declared(run, reduce):
    run.define_metric("grad/*", reduce=reduce, replicated=True)

    assert messages(run) == [(NO_STEP, {"type": "define", "pattern": "grad/*", "reduce": reduce, "replicated": True})]


@pytest.mark.parametrize("reduce", ["avg", "", "p", "p101", "p-1", "p1.2.3", "pi", "p²", "MEAN", None, 5])
def test_an_unknown_reduction_is_a_usage_error(run, reduce):
    """Even when not strict: it is a mistake in the program, and stands at its start."""
    with pytest.raises(UsageError, match="reduce="):
        run.define_metric("x", reduce=reduce)

    assert messages(run) == []
    assert not is_reduction(str(reduce))


@pytest.mark.parametrize("reduce", ["p007", "p100.0", "p99.", "p1e1", "p 9", "p09", "p0.5", "p100", "mean ", "none"])
def test_the_rank_takes_the_reductions_that_the_aggregator_takes(run, reduce):
    """What the aggregator refuses it can only say in an event, when the job has long been running."""
    try:
        run.define_metric("x", reduce=reduce)
        is_taken = True
    except UsageError:
        is_taken = False

    assert is_taken == is_reduction(reduce)


def test_an_alert_has_a_level(run):
    run.alert("hot", "95 C", level="error")
    with pytest.raises(UsageError, match="level="):
        run.alert("hot", level="critical")

    assert [m for _, m in messages(run)] == [{"type": "alert", "title": "hot", "text": "95 C", "level": "error"}]


# -- re-entrancy


class Interrupted(float):
    """A number during whose conversion something else happens, on the same thread."""

    def __new__(cls, value, action):
        self = super().__new__(cls, value)
        self.action = action
        return self

    def __float__(self):
        self.action()
        return float.__add__(self, 0.0)


@pytest.fixture
def on_signal():
    old = signal.getsignal(signal.SIGUSR1)

    def install(action):
        signal.signal(signal.SIGUSR1, lambda signum, frame: action())
        return lambda: signal.raise_signal(signal.SIGUSR1)

    yield install
    signal.signal(signal.SIGUSR1, old)


def test_a_signal_handlers_log_is_written_by_the_call_it_interrupted(run, on_signal):
    """The handler runs on the thread that is inside log(): waiting would be a deadlock, refusing a loss."""
    strike = on_signal(lambda: run.log({"handler": 1.0}, step=7))
    run.log({"outer": Interrupted(5.0, strike)}, step=1)

    assert [(s.data, s.step) for s in scalars(run)] == [({"outer": 5.0}, 1), ({"handler": 1.0}, 7)]
    assert dict(run.drops) == {}


def test_everything_else_a_handler_says_is_kept_too(run, on_signal):
    def handler():
        run.log_text("why", "preempted")
        run.alert("SIGUSR1")

    run.log({"outer": Interrupted(5.0, on_signal(handler))}, step=1)

    assert [m["type"] for _, m in messages(run)] == ["text", "alert"]
    assert len(scalars(run)) == 1


def test_a_handler_may_finish_the_run(run, on_signal):
    """SIGTERM with a warning: the record being written goes first, then the end."""
    run.log({"outer": Interrupted(5.0, on_signal(lambda: run.finish("preempted", "SIGTERM")))}, step=1)

    assert [s.data for s in scalars(run)] == [{"outer": 5.0}]
    assert [m for _, m in messages(run)] == [{"type": "finish", "status": "preempted", "detail": "SIGTERM"}]
    assert not run._journal.is_open


def test_a_bad_value_of_a_handler_is_counted_like_any(run, on_signal):
    with warns("handler: "):
        run.log({"outer": Interrupted(5.0, on_signal(lambda: run.log({"handler": "text"})))}, step=1)

    assert run.drops == {"bad_value": 1}


def test_a_handler_that_logs_without_end_is_bounded(run, on_signal):
    def flood():
        for n in range(10_050):
            run.log({"handler": float(n)}, step=n)

    run.log({"outer": Interrupted(5.0, on_signal(flood))}, step=1)

    assert run.drops == {"reentrant_overflow": 50}
    assert [s.step for s in scalars(run)][1:] == list(range(10_000))


# -- the end


def test_after_finish_calls_are_counted_and_harmless(run):
    run.log({"x": 1.0}, step=0)
    run.finish()
    with warns("after finish"):
        run.log({"x": 1.0, "y": 2.0}, step=1)
        run.log({"x": 1.0}, step=1)
    run.set_step(3)
    run.flush()
    run.log_text("t", "x")

    assert len(scalars(run)) == 1
    assert run.drops["after_finish"] >= 3
    assert run.drops.keys() == {"after_finish"}


def test_finish_is_said_once(run):
    run.finish("failed", "first")
    run.finish("finished", "second")

    assert [m for _, m in messages(run)] == [{"type": "finish", "status": "failed", "detail": "first"}]
    assert JournalReader(run._journal.folder).has_finished


@pytest.mark.parametrize("status", ["finished", "failed", "killed", "preempted"])
def test_a_run_ends_in_one_of_four_ways(run, status):
    with pytest.raises(UsageError, match="status="):
        run.finish("done")
    run.finish(status)

    assert messages(run)[-1][1]["status"] == status


def test_a_very_long_detail_is_cut(run):
    run.finish("failed", "x" * 1_000_000)

    assert len(messages(run)[-1][1]["detail"]) == 2000


def test_finish_returns_as_soon_as_the_store_holds_everything(make_run):
    """The wait covers cgroups that kill the helpers with the job; it must not cost those that are done."""
    run = make_run(exit_wait_s=3600.0)
    JournalReader(run._journal.folder).set_acked(1 << 40)
    run.finish()

    assert not run._journal.is_open


def test_finish_waits_no_longer_than_it_may(make_run, caplog):
    run = make_run(exit_wait_s=0.01)
    run.finish()

    assert "safe in" in caplog.text


def test_a_context_manager_finishes(run):
    with run as same:
        assert same is run
        run.log({"x": 1.0}, step=0)

    assert messages(run)[-1][1] == {"type": "finish", "status": "finished", "detail": ""}


def test_a_context_manager_says_what_went_wrong_and_lets_it_pass(run):
    with pytest.raises(ValueError, match="loss"), run:
        raise ValueError("loss is nan\nsecond line")

    assert messages(run)[-1][1] == {"type": "finish", "status": "failed", "detail": "ValueError: loss is nan"}


def test_an_exception_is_one_line():
    assert describe(ValueError, ValueError("a\nb")) == "ValueError: a"
    assert describe(KeyboardInterrupt, KeyboardInterrupt()) == "KeyboardInterrupt"
    assert len(describe(ValueError, ValueError("x" * 10_000))) < 600


# -- other processes


def test_a_run_that_is_sent_to_another_process_takes_nothing_there(run):
    """DataLoader workers get what they reference pickled: an error would end the training, for logging's sake."""
    arrived = pickle.loads(pickle.dumps(run))

    assert isinstance(arrived, AbsentRun)
    assert (arrived.run_id, arrived.dir, arrived.rank, arrived.world_size) == ("r1", "/runs/r1", 2, 4)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        arrived.log({"x": 1.0}, step=1)
        arrived.log({"x": 1.0}, step=1)
        arrived.define_metric("x", reduce="sum")
        arrived.log_params({"a": 1})
        arrived.log_text("a", "b")
        arrived.alert("a")
        arrived.set_step(1)
        arrived.flush()
        arrived.finish()
    assert ["ignored: log in the rank's own process" in str(warning.message) for warning in seen] == [True]
    assert arrived.drops == {}
    again = pickle.loads(pickle.dumps(arrived))
    assert (again.run_id, again.rank) == ("r1", 2)
    assert records(run) == []


def test_a_run_that_is_copied_in_its_own_process_is_itself(run, monkeypatch):
    """A trainer that holds it is copied whole, for an average of its weights, say."""
    monkeypatch.setattr(current, "runs", [run])

    assert copy.copy(run) is run
    assert copy.deepcopy({"trainer": run})["trainer"] is run
    assert pickle.loads(pickle.dumps(run)) is run
    assert isinstance(copy.deepcopy(NullRun()), NullRun)


def test_a_forked_child_writes_nothing(run):
    """Both would write the same seq into the same mapping. The child goes on, and the parent does not notice."""
    run.log({"x": 1.0}, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of the test runner's threads
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            run._journal.abandon()  # what the hook of init() does
            with warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                run.log({"x": 2.0}, step=1)
                run.log({"x": 2.0}, step=1)
                run.log_text("t", "x")
                run.flush()
                run.set_step(9)
                run.finish()
            code = 0 if ["fork" in str(w.message) for w in seen] == [True] else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    run.log({"x": 3.0}, step=2)

    assert os.waitstatus_to_exitcode(status) == 0
    assert [s.step for s in scalars(run)] == [0, 2]
    assert dict(run.drops) == {}
    assert messages(run) == []
    assert JournalReader(run._journal.folder).step is None


# -- full disks


def test_a_full_spool_is_counted_value_by_value(make_run):
    run = make_run(segment_bytes=64 * 1024, spool_bytes=64 * 1024)
    with warns("full"):
        for n in range(2000):
            run.log({"a": 1.0, "b": 2.0}, step=n)

    kept = len(scalars(run))
    assert 0 < kept < 2000
    assert run.drops == {"spool_full": 2 * (2000 - kept)}


def test_a_check_of_the_agent_that_fails_does_not_reach_the_loop(make_run):
    def check():
        raise OSError("no more processes")

    run = make_run(check=check)
    with warns("no more processes"):
        run.log({"x": 1.0}, step=0)
    assert run.drops.keys() <= set(layout.DROP_REASONS)
    run.log({"x": 1.0}, step=1)

    assert [s.step for s in scalars(run)] == [1]


# -- mode=off


def test_a_run_that_is_off_takes_everything_and_does_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with NullRun() as run:
        run.log({"x": "anything"}, step="y", weight=None)
        run.set_step("z")
        run.define_metric("x", reduce="sum")
        run.log_params({"a": object()})
        run.log_text("a", "b")
        run.alert("c")
        run.flush()
        run.finish()

    assert (run.run_id, run.dir, run.rank, run.world_size, dict(run.drops)) == ("off", "", 0, 1, {})
    assert repr(run) == "<ddplog.Run off>"
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_off_has_every_method_of_one_that_is_on():
    public = {name for name in vars(Run) if not name.startswith("_")}
    inert = {name for name in public if name not in vars(NullRun)}

    assert inert <= {"define_metric", "log_params"}  # both end in _message(), which does nothing


class Sparse(dict):
    """A user's mapping that cannot be looked through twice."""

    def values(self):
        raise RuntimeError("once is enough")


@pytest.mark.parametrize(
    ("call", "stored", "drops"),
    [
        (lambda run: run.log({"a": 1.0, "b": 2.0, "c": 3.0}, step="x"), 0, {"bad_step": 3}),
        (lambda run: run.log({"a": 1.0, "b": "no", "c": {"d": None, "e": 2}}, step=0), 2, {"bad_value": 2}),
        (lambda run: run.log({"a/b": 1.0, "a": {"b": 2.0, "c": 3.0}}, step=0), 2, {"bad_key": 1}),
        (lambda run: run.log({"a": 1.0, "b": 2.0}, step=0, weight=-1), 2, {"bad_weight": 1}),
        (lambda run: run.log({f"k{i}": 1.0 for i in range(25)}, step=0), 20, {"key_limit": 5}),
        (lambda run: run.log([1.0, 2.0]), 0, {"bad_value": 1}),
        (lambda run: run.log_text("a", "x" * (1 << 20)), 0, {"record_too_large": 1}),
        (lambda run: [run.finish(), run.log({"a": {"b": 1, "c": 2}, "d": 3.0}), run.log_text("a", "b")], 1,
         {"after_finish": 4}),
        (lambda run: [run.finish(), run.log(Sparse(a=1.0))], 1, {"after_finish": 1}),
    ],
)  # fmt: skip
def test_every_value_is_stored_or_dropped_once(make_run, call, stored, drops):
    """The delivery audit: logged = stored + dropped. A bad weight costs no value, and so is no drop in that sum."""
    run = make_run(max_keys=20)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(run)
    assert run.drops == drops
    found = [record for record in records(run) if record.kind != KIND_SCHEMA]
    assert sum(len(record.values) if record.kind == KIND_SCALARS else 1 for record in found) == stored


def test_a_record_that_fits_in_part_drops_the_rest_only(make_run):
    """A call of 1000 values is two records; the disk may be full for the second one."""
    run = make_run(max_keys=8000, segment_bytes=64 * 1024, spool_bytes=64 * 1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(20):
            run.log({f"{number}/{i}": 1.0 for i in range(1000)}, step=0)
    num_stored = sum(len(record.values) for record in records(run) if record.kind == KIND_SCALARS)
    assert num_stored % 1000 == 512
    assert num_stored + run.drops["spool_full"] + run.drops["key_limit"] == 20 * 1000


def test_sets_of_names_without_a_step_are_bounded(make_run):
    """Each is remembered for its count: a script that never logs the same set twice would fill the memory."""
    run = make_run(max_keys=8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1, 256):
            run.log({f"k{i}": 1.0 for i in range(8) if number >> i & 1})
    assert len(run._calls) == 8
    stored = sum(len(record.values) for record in records(run) if record.kind == KIND_SCALARS)
    assert stored + run.drops["key_limit"] == 8 * 128
