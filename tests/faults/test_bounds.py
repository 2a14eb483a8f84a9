"""However fast, much or strange a job logs, and whatever stands still meanwhile: bounded, counted, and training goes on.

Of every process the memory, descriptors and threads are measured against a bound that follows from the settings, and of
every rank's journal the disk it takes. Then the books must balance, with numbers that do not come from ddplog: what each
rank says it logged = stored + dropped by reason, in `show`, `--json`, `top` and the summary at the end; for each sink
emitted = delivered + refused + waiting, and the sink's own file has as many lines.
"""

import json
import os
import re
import signal
from contextlib import contextmanager

import pytest
from faults.bounds_watch import KINDS, MIB, Use, Watch
from system.jobs import DDPLOG, wait_until

from ddplog.agent.shipper import WINDOW_BYTES
from ddplog.core.pipeline import Options
from ddplog.store.reader import open_run
from ddplog.view.audit import rank_audits, sink_audits

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

OPTIONS = Options(grace_ns=0, late_ns=0, settle_ns=0, max_keys=0)
SEGMENT = 64 * 1024
CELL_BYTES = 20
POINT_BYTES = 600
FORWARDER_BYTES = 16 * MIB
CALLS = 20_000

RANK = """
import json, os, sys, time
from pathlib import Path
import ddplog

how, rank = sys.argv[1], int(os.environ["RANK"])
run = ddplog.init()
account = {"values": 0, "calls": 0, "raised": 0}
stop, hold = Path("stop"), Path("hold")

def show():
    Path(f"account.{rank}.new").write_text(json.dumps({**account, "drops": dict(run.drops)}))
    os.rename(f"account.{rank}.new", f"account.{rank}")

def log(values, **more):
    try:
        run.log(values, **more)
    except Exception:
        account["raised"] += 1
    account["values"] += len(values)
    account["calls"] += 1

def floats(step):
    return {f"m{i}": step * 0.5 + i for i in range(10)}

def tight():
    step = 0
    while not stop.exists():
        for step in range(step, step + 500):
            log(floats(step), step=step)
        step += 1
        show()

def paced():
    step = 0
    while not stop.exists():
        log(floats(step), step=step)
        step += 1
        show()
        time.sleep(0.005)

def names():
    for first in range(0, int(sys.argv[2]), 50):
        log({f"r{rank}/name{number}": float(number) for number in range(first, first + 50)}, step=0)

def giants():
    for step in range(400):
        run.log_text("note", "x" * (250_000 if step % 2 else 300_000), step=step)
        run.log_params({f"p{step}": "y" * 300_000})
        account["values"] += 2
        log({f"m{i}": float(step) for i in range(2000)}, step=step)
        show()
        if step == 20:
            while hold.exists():
                time.sleep(0.01)
        if step > 40:
            break

def ahead():
    steps = int(sys.argv[2])
    for step in range(steps if rank == 0 else 1):
        log({"m0": float(step)}, step=step)
    show()
    while hold.exists():
        time.sleep(0.01)
    for step in range(steps, steps + 10) if rank == 0 else range(1, steps + 10):
        log({"m0": float(step)}, step=step)

globals()[how]()
run.finish()
show()
"""


def account(job, rank):
    try:
        return json.loads((job.folder / f"account.{rank}").read_text())
    except FileNotFoundError:
        return {"values": 0, "calls": 0, "raised": 0, "drops": {}}


def wait_for_calls(job, ranks, num_calls, timeout_s=60):
    """Until every rank has made so many more calls: it is not blocked."""
    before = [account(job, rank)["calls"] for rank in range(ranks)]
    wait_until(lambda: all(account(job, rank)["calls"] >= before[rank] + num_calls for rank in range(ranks)), timeout_s)


def check_books(job, ranks):
    """The run, once it has ended: every rank's and the sink's books balance."""
    with job.open(240) as run:
        audits = {row.rank: row for row in rank_audits(run.writers(), run.drops())}
        for rank in range(ranks):
            said = account(job, rank)
            assert said["raised"] == 0
            dropped = {reason: count for reason, count in audits[rank].dropped.items() if reason != "run_key_limit"}
            assert dropped == said["drops"], f"rank {rank}: what it counted itself"
            assert audits[rank].logged == said["values"], f"rank {rank}: logged = stored + dropped"
        (sink,) = sink_audits(run)
        assert (sink.missing, sink.waiting, sink.refused) == (0, 0, 0)
        assert run.events() == () or {event.level for event in run.events()} <= {"info", "warning"}
        in_points = sum(int(run.metric(key).n.sum()) for key in list(run.keys()))
        texts, params = len(run.texts()), len(run.params())
        stored = sum(row.stored for row in audits.values())
        assert in_points + texts + params == stored, "values in points, each rank's counted"
    lines = (run.path / "sinks" / "jsonl" / "r1.jsonl").read_bytes().count(b"\n")
    assert lines >= sink.delivered  # and a line for the run's begin, and its end
    return audits


def check_shown(job, reasons, summary):
    """Every reason stands with its count in what people and programs read."""
    show, _ = job.run(*DDPLOG, "show", "r1")
    found = json.loads(job.run(*DDPLOG, "show", "r1", "--json")[0])
    top, _ = job.run(*DDPLOG, "top", "r1", "--once")
    for reason, count in reasons.items():
        said = f"{count:,}"
        assert reason in show
        assert re.search(rf"^{reason} +{said} ", top, re.MULTILINE), top
        assert sum(row["dropped"].get(reason, 0) for row in found["audit"]["ranks"]) == count
        assert reason in summary
    total = sum(reasons.values())
    stored = sum(row["stored"] for row in found["audit"]["ranks"])
    line = f"{stored + total:,} values logged = {stored:,} stored + {total:,} dropped"
    assert line in show
    assert line in summary


def start(job, ranks, *words, spool_bytes=1 << 30, **environ):
    """Start the ranks below `ddplog run`, which prints the summary at the end."""
    return job.start(
        *DDPLOG, "run", "--", *job.ranks(ranks, job.script(RANK), *words), DDPLOG_SINKS="jsonl",
        DDPLOG_SEGMENT_BYTES=str(SEGMENT), DDPLOG_SPOOL_BYTES=str(spool_bytes), DDPLOG_HANG_S="0", **environ,
    )  # fmt: skip


def limits(ranks, num_keys):
    """What each process may use: what the interpreter and its libraries take, and what the settings let it hold."""
    windows = min(OPTIONS.max_open * ranks * num_keys, OPTIONS.max_cells) * CELL_BYTES
    return {
        # its newest segment, and one that is being made
        "rank": Use(32 * MIB + 2 * SEGMENT, 16, 1),
        # what is under way, and the copy that is in the socket; a segment of each rank; a file or three of each rank
        "agent": Use(64 * MIB + 2 * WINDOW_BYTES + ranks * SEGMENT, 32 + 8 * ranks, 4),
        # open windows, twice as many slots as are in use; a window of batches; a commit of points, and of the end
        "aggregator": Use(128 * MIB + 2 * windows + 2 * WINDOW_BYTES + 2 * OPTIONS.max_points * POINT_BYTES, 64, 32),
        "forwarder": Use(64 * MIB + FORWARDER_BYTES, 24, 2),
    }


def wait_for_helpers(job, ranks, watch, key):
    """Until every process of the job works."""
    wait_until(lambda: job.peek(key) and len(watch.pids(*KINDS)) >= ranks + 3)


@contextmanager
def stopped(job, watch):
    """The aggregator and the forwarder stand still."""
    held = watch.pids("aggregator", "forwarder")
    for pid in held:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in held:
        os.kill(pid, signal.SIGCONT)


def end(job, process):
    (job.folder / "stop").touch()
    return job.end(process, timeout_s=240)[1]


def stop_under_paced_ranks(job, num_calls):
    process = start(job, 2, "paced")
    with Watch(job) as watch:
        wait_for_helpers(job, 2, watch, "m0")
        with stopped(job, watch):
            wait_for_calls(job, 2, num_calls, 240)
        summary = end(job, process)
        check_books(job, 2)
    watch.check(**limits(2, 10))
    check_shown(job, {}, summary)


def test_the_aggregator_and_a_sink_stand_still_and_nothing_is_lost(job):
    """Reliability case 22, and what a stopped process is to the others: training and its journals go on."""
    stop_under_paced_ranks(job, 1000)  # 5 s of a step each 5 ms


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_the_aggregator_and_a_sink_stand_still_for_a_minute_and_nothing_is_lost(job):
    stop_under_paced_ranks(job, 60 * 200)


def fill_the_spool(job, num_calls):
    spool_bytes = 1 * MIB
    process = start(job, 2, "tight", spool_bytes=spool_bytes)
    with Watch(job) as watch:
        wait_for_helpers(job, 2, watch, "m0")
        with stopped(job, watch):
            wait_until(lambda: all(account(job, rank)["drops"].get("spool_full") for rank in range(2)))
            wait_for_calls(job, 2, num_calls, 240)
            waiting, _ = job.run(*DDPLOG, "show", "r1")  # nobody answers, and the store can be read all the same
            assert "running" in waiting
        stored = len(job.peek("m0"))
        wait_until(lambda: len(job.peek("m0")) > stored)  # it goes on where there is room again
        summary = end(job, process)
        audits = check_books(job, 2)
    watch.check(**limits(2, 10))
    assert 0 < max(watch.spool_bytes.values()) <= spool_bytes
    reasons = {"spool_full": sum(row.dropped["spool_full"] for row in audits.values())}
    check_shown(job, reasons, summary)


def test_a_full_spool_drops_what_comes_and_says_so(job):
    """Reliability case 15: ranks in a tight loop, 1 MiB of spool each, and nobody who takes it."""
    fill_the_spool(job, CALLS)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_spool_that_is_full_for_long_drops_what_comes_and_says_so(job):
    fill_the_spool(job, 200 * CALLS)


def test_more_names_than_a_rank_and_than_the_run_may_have(job):
    """Reliability case 20: 10,500 names of each of two ranks. Each may have 10,000, and so may the run."""
    process = start(job, 2, "names", "10500")
    with Watch(job) as watch:
        summary = job.end(process, timeout_s=100)[1]
        audits = check_books(job, 2)
    watch.check(**limits(2, 10_000))
    assert [audits[rank].dropped["key_limit"] for rank in range(2)] == [500, 500]
    assert sum(row.dropped.get("run_key_limit", 0) for row in audits.values()) == 10_000
    check_shown(job, {"key_limit": 1000, "run_key_limit": 10_000}, summary)
    with open_run(job.run_dir) as run:
        (event,) = [event for event in run.events() if event.kind == "key_limit"]
        assert "max_keys" in event.message


def test_giant_records_are_refused_and_large_ones_keep_to_the_spool(job):
    """Reliability case 21: four times a segment, and texts and params beyond the limit of a record."""
    spool_bytes = 4 * MIB
    (job.folder / "hold").touch()
    process = start(job, 2, "giants", spool_bytes=spool_bytes)
    with Watch(job) as watch:
        wait_for_helpers(job, 2, watch, "m0")
        with stopped(job, watch):
            (job.folder / "hold").unlink()
            wait_until(lambda: all(account(job, rank)["drops"].get("spool_full") for rank in range(2)))
        summary = end(job, process)
        audits = check_books(job, 2)
    watch.check(**limits(2, 2000))
    assert 0 < max(watch.spool_bytes.values()) <= spool_bytes
    reasons = {
        reason: sum(row.dropped[reason] for row in audits.values()) for reason in ("record_too_large", "spool_full")
    }
    check_shown(job, reasons, summary)


def go_far_ahead(job, steps):
    (job.folder / "hold").touch()
    process = start(job, 2, "ahead", str(steps), DDPLOG_GRACE_S="3600")
    with Watch(job) as watch:
        wait_until(lambda: account(job, 0)["calls"] == steps and account(job, 1)["calls"] == 1, 200)
        wait_until(lambda: len(job.peek("m0")) >= steps - OPTIONS.max_open, 200)  # the oldest closed incomplete
        (job.folder / "hold").unlink()
        summary = end(job, process)
        check_books(job, 2)
    watch.check(**limits(2, 1))
    check_shown(job, {}, summary)
    with open_run(job.run_dir) as run:
        metric = run.metric("m0")
        assert metric.step.tolist() == list(range(steps + 10))
        assert metric.n.tolist() == [2] * (steps + 10)


def test_a_rank_far_ahead_of_another_fills_no_memory_and_its_points_become_complete(job):
    """Reliability case 9: 70,000 steps, more than may be open; the other rank then comes with all of them."""
    go_far_ahead(job, 70_000)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_a_rank_300_000_steps_ahead_fills_no_memory_and_its_points_become_complete(job):
    go_far_ahead(job, 300_000)
