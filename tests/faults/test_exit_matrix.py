"""Every way a process may end: what it logged is stored, its end is told as it was, and nothing waits for ddplog.

The launcher is the oracle of the exit codes; a page in memory, which outlives its process, of the calls that returned.
"""

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
from system.jobs import DDPLOG, wait_until

from ddplog.agent.exit_status import Process

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

NUM_STEPS = 50
PATIENCE = {"DDPLOG_EXIT_WAIT_S": "30"}
"""So long that a warning about it means that something hung, however busy the machine is."""


@dataclass(frozen=True, kw_only=True)
class Ending:
    """What a script does after it has logged, and what must be told of it."""

    code: str
    """Of the script."""
    exit_code: int = 0
    """That it has without ddplog; below zero: minus the signal."""
    state: str = "finished"
    """Of the rank."""
    detail: str = ""
    sent: tuple[int, ...] = ()
    """Signals it gets once it has logged."""
    more: int = 0
    """Values that the code logs and that are taken."""
    dropped: int = 0
    """Values that come after finish()."""


def _tells_exit_status():
    """Whether this kernel tells others than its parent how a process ended: Linux 6.15 does."""
    child = subprocess.Popen(["true"])
    process = Process(lambda: child.pid)
    child.wait()
    return process.look() is not None


TOLD = _tells_exit_status()


def died(detail):
    return {"state": "died", "detail": detail if TOLD else "died, code unknown"}


def told_or(detail, unknown):
    return ("failed", f"rank 0: {detail}") if TOLD else unknown


UNKNOWN = "failed", "rank 0: died, code unknown"
FINISHED = "finished", ""
WAIT = "while True: time.sleep(0.01)"  # a longer one, or pause(), may begin just after the signal has come
ENDINGS = {
    "return": Ending(code="pass"),
    "exception": Ending(
        code="raise ValueError('loss is nan\\nmore')", exit_code=1, state="failed", detail="ValueError: loss is nan"
    ),
    "sys.exit(0)": Ending(code="sys.exit(0)"),
    "sys.exit(3)": Ending(
        code="sys.exit(3)", exit_code=3, **({"state": "failed", "detail": "exit code 3"} if TOLD else {})
    ),
    "SIGTERM": Ending(code=WAIT, sent=(signal.SIGTERM,), exit_code=-signal.SIGTERM, **died("signal 15 (SIGTERM)")),
    "SIGTERM, own handler that exits": Ending(
        code="own(lambda: (run.log({'a': 50.0}, step=50), sys.exit(4)))",
        sent=(signal.SIGTERM,),
        exit_code=4,
        more=1,
        **({"state": "failed", "detail": "exit code 4"} if TOLD else {}),
    ),
    "SIGTERM, own handler that finishes": Ending(
        code="own(lambda: (run.finish('preempted', 'by the scheduler'), os._exit(0)))",
        sent=(signal.SIGTERM,),
        state="preempted",
        detail="by the scheduler",
    ),
    "SIGTERM, own handler that goes on": Ending(
        code="own(lambda: run.log({'a': 50.0}, step=50)); run.log({'a': 51.0}, step=51)",
        sent=(signal.SIGTERM,),
        more=2,
    ),
    "SIGINT": Ending(
        code=WAIT, sent=(signal.SIGINT,), exit_code=-signal.SIGINT, state="killed", detail="KeyboardInterrupt"
    ),
    "os._exit(0)": Ending(code="os._exit(0)", **({} if TOLD else died(""))),
    "os._exit(5)": Ending(code="os._exit(5)", exit_code=5, **died("exit code 5")),
    "os.abort()": Ending(code="os.abort()", exit_code=-signal.SIGABRT, **died("signal 6 (SIGABRT)")),
    "kill -9": Ending(
        code="os.kill(os.getpid(), signal.SIGKILL)", exit_code=-signal.SIGKILL, **died("signal 9 (SIGKILL)")
    ),
    "finish twice": Ending(code="run.finish(); run.finish('failed', 'no')"),
    "log after finish": Ending(code="run.finish(); run.log({'a': 50.0}, step=50); ddplog.log({'a': 1})", dropped=2),
    "exception in another thread": Ending(code="thread = threading.Thread(target=lambda: 1 / 0); thread.start()"),
    "with run": Ending(code="with run: run.log({'a': 50.0}, step=50)", more=1),
    "with run, exception": Ending(
        code="with run: raise RuntimeError('inside')", exit_code=1, state="failed", detail="RuntimeError: inside"
    ),
    "with run, sys.exit()": Ending(code="with run: sys.exit()"),
    "with run, sys.exit(3)": Ending(code="with run: sys.exit(3)", exit_code=3, state="failed", detail="exit code 3"),
    "with run, Ctrl-C": Ending(
        code="with run: raise KeyboardInterrupt",
        exit_code=-signal.SIGINT,
        state="killed",
        detail="KeyboardInterrupt",
    ),
    "a thread logs on, and is waited for": Ending(
        code="threading.Thread(target=lambda: (time.sleep(0.05), log(50, 150))).start()", more=100
    ),
}

SCRIPT = """
import ctypes, os, resource, signal, sys, threading, time
import ddplog

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
run = ddplog.init()
assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before

def log(first, last):
    for step in range(first, last):
        run.log({"a": float(step)}, step=step)

def own(act):
    handled = []
    signal.signal(signal.SIGTERM, lambda number, frame: (handled.append(number), print("handled", flush=True), act()))
    ready()
    while not handled:
        time.sleep(0.01)

def ready():
    print("ready", flush=True)

log(0, 50)
while run._journal.acked_seq < run._journal.next_seq:  # the agent has seen this process alive
    time.sleep(0.002)
code = sys.argv[1]
if not code.startswith("own("):
    ready()
exec(code)
"""

LAUNCH = """
import json, os, subprocess, sys
ranks, told = [], []
endings = json.load(open("endings.json"))
for rank, (code, sent) in enumerate(endings):
    identity = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(endings))}
    words = [sys.executable, "train.py", code]
    ranks.append(subprocess.Popen(
        words, env={**os.environ, **identity}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ))
for rank, (code, sent) in zip(ranks, endings):
    assert rank.stdout.readline() == "ready\\n", rank.stderr.read()
    for number in sent:
        rank.send_signal(number)
for rank in ranks:
    out, err = rank.communicate(timeout=50)  # to the end of both streams: no helper holds them
    told.append((rank.returncode, out, err))
print(json.dumps(told))
"""


def test_every_ending_is_stored_and_told(job, suite_table):
    """Reliability cases 23 and 24: nothing depends on atexit, a handler or a thread; the user's handlers stay his."""
    (job.folder / "endings.json").write_text(json.dumps([(e.code, e.sent) for e in ENDINGS.values()]))
    job.script(SCRIPT)
    out, _ = job.run(sys.executable, job.script(LAUNCH, "launch.py"), **PATIENCE)
    told = json.loads(out)
    with job.open() as run:
        writers = {writer.rank: writer for writer in run.writers()}
        dropped = {drop.rank: (drop.reason, drop.count) for drop in run.drops()}
        n = dict(zip(run.metric("a").step.tolist(), run.metric("a").n.tolist(), strict=True))
        status = run.status
    wrong = []
    for rank, ((name, ending), (exit_code, out, err)) in enumerate(zip(ENDINGS.items(), told, strict=True)):
        writer = writers[rank]
        found = exit_code, writer.state, writer.detail, writer.num_values, dropped.get(rank)
        wanted = (
            ending.exit_code,
            ending.state,
            ending.detail,
            NUM_STEPS + ending.more,
            ("after_finish", ending.dropped) if ending.dropped else None,
        )
        print(f"{name:40} {found}")
        if found != wanted:
            wrong.append((name, found, wanted))
        assert ("handled" in out) == ("own handler" in name), name
        assert "the store does not hold" not in err, (name, err)
    assert not wrong
    assert status == "failed"
    more = [ending.more for ending in ENDINGS.values()]
    assert n == {step: sum(NUM_STEPS + count > step for count in more) for step in range(NUM_STEPS + max(more))}
    suite_table("endings of a process", endings=len(ENDINGS), lost=0, doubled=0, wrong=0, stuck=0)


THREADS = """
import mmap, os, signal, sys, threading, time
import ddplog

run = ddplog.init()
name = f"calls.{run.rank}"
with open(name, "wb") as file:
    file.truncate(4096)
with open(name, "r+b") as file:
    calls = mmap.mmap(file.fileno(), 4096)  # outlives the process, and an interpreter that is going down

def work():
    count = 0
    while True:
        run.log({f"a{run.rank}": float(count)}, step=count)
        count += 1
        calls[:8] = count.to_bytes(8, "little")

threading.Thread(target=work, daemon=True).start()
while int.from_bytes(calls[:8], "little") < 1000:
    time.sleep(0.001)
print("ready", flush=True)
exec(sys.argv[1])
"""
GOING_DOWN = {"pass": 0, "sys.exit(3)": 3, "os._exit(5)": 5, "os.kill(os.getpid(), signal.SIGKILL)": -9}


def test_threads_that_log_while_the_interpreter_goes_down_are_accounted_for(job, suite_table):
    """Reliability case 24: every call that returned is stored, or counted as one that came after the end."""
    (job.folder / "endings.json").write_text(json.dumps([(code, ()) for code in GOING_DOWN]))
    job.script(THREADS)
    out, _ = job.run(sys.executable, job.script(LAUNCH, "launch.py"), **PATIENCE)
    assert [code for code, _, _ in json.loads(out)] == list(GOING_DOWN.values())
    with job.open() as run:
        writers = {writer.rank: writer for writer in run.writers()}
        drops = run.drops()
        stored = [run.metric(f"a{rank}").step.tolist() for rank in range(len(GOING_DOWN))]
    assert {drop.reason for drop in drops} <= {"after_finish"}
    for rank, (code, steps) in enumerate(zip(GOING_DOWN, stored, strict=True)):
        calls = int.from_bytes((job.folder / f"calls.{rank}").read_bytes()[:8], "little")
        num_dropped = sum(drop.count for drop in drops if drop.rank == rank)
        print(f"{code:40} {calls} calls returned, {len(steps)} stored, {num_dropped} dropped")
        assert steps == list(range(len(steps)))
        assert calls <= len(steps) + num_dropped <= calls + 1  # one call may have been cut off
        assert writers[rank].num_values == len(steps)
    suite_table("endings of a process", endings=len(GOING_DOWN), lost=0, doubled=0, wrong=0, stuck=0)


TWO_INTERRUPTS = """
import os, signal, threading, time
import ddplog

run = ddplog.init()
for step in range(50):
    run.log({"a": float(step)}, step=step)

def again():
    while "after_finish" not in run.drops:  # once the run is finished, and waits for the store
        run.log({"b": 1.0}, step=0)
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)

print("ready", flush=True)
try:
    while True:
        time.sleep(0.01)
finally:
    threading.Thread(target=again, daemon=True).start()
"""


def test_a_second_ctrl_c_ends_the_wait_for_the_store(job, suite_table):
    """Reliability case 23: with the agent stopped the store gets nothing; the exit code and the data are as with one."""
    process = job.start(sys.executable, job.script(TWO_INTERRUPTS), DDPLOG_EXIT_WAIT_S="600")
    assert process.stdout.readline() == "ready\n"
    agent = wait_until(job.agent_pid)
    os.kill(agent, signal.SIGSTOP)
    try:
        process.send_signal(signal.SIGINT)
        _, err = job.end(process, code=-signal.SIGINT, timeout_s=60)
    finally:
        os.kill(agent, signal.SIGCONT)
    assert err.count("KeyboardInterrupt") == 1, err
    assert "Exception ignored" not in err
    with job.open() as run:
        assert run.metric("a").step.tolist() == list(range(NUM_STEPS))
        assert (run.status, [writer.state for writer in run.writers()]) == ("killed", ["killed"])
    suite_table("endings of a process", endings=1, lost=0, doubled=0, wrong=0, stuck=0)


NOTEBOOK = """
import time
import ddplog

for cell in range(3):  # the same cell, run three times, without finish()
    run = ddplog.init(run_id="r1")
    for step in range(10):
        ddplog.log({"a": float(10 * cell + step)}, step=step)
    while run._journal.acked_seq < run._journal.next_seq:  # the user thinks
        time.sleep(0.01)
other = ddplog.init(run_id="r2")
other.log({"b": 1.0}, step=0)
run.log({"a": 30.0}, step=10)
"""


def test_a_notebook_cell_that_runs_again_goes_on_with_its_run(job, suite_table):
    """The earlier handle ends where the next begins: it would hold the rank, and the new one be its duplicate."""
    job.run(sys.executable, job.script(NOTEBOOK), DDPLOG_RUN_ID=None, **PATIENCE)
    with job.open() as run:
        for attempt in range(3):
            values = [10.0 * attempt + step for step in range(11 if attempt == 2 else 10)]
            assert run.metric("a", attempt=attempt).value.tolist() == values
        assert [(writer.attempt, writer.state) for writer in run.writers()] == [(n, "finished") for n in range(3)]
        assert (run.status, run.drops()) == ("finished", ())
        assert [event.kind for event in run.events() if event.level == "error"] == []
    job.run_dir = job.runs / "r2"
    with job.open() as run:
        assert run.metric("b").value.tolist() == [1.0]
    suite_table("endings of a process", endings=1, lost=0, doubled=0, wrong=0, stuck=0)


# What the run says: without a launcher, and under `ddplog run -- COMMAND`, which may get the signal itself.
RUNS = {
    "return": (*FINISHED, *FINISHED),
    "exception": ("failed", "rank 0: ValueError: loss is nan", "failed", "exit code 1"),
    "sys.exit(3)": (*told_or("exit code 3", FINISHED), "failed", "exit code 3"),
    "SIGTERM": (*told_or("signal 15 (SIGTERM)", UNKNOWN), "killed", "signal 15 (SIGTERM)"),
    "SIGTERM, own handler that finishes": ("preempted", "", "killed", "signal 15 (SIGTERM)"),
    "SIGINT": ("killed", "", "killed", "signal 2 (SIGINT)"),
    "os._exit(0)": (*(FINISHED if TOLD else UNKNOWN), *FINISHED),
    "os._exit(5)": (*told_or("exit code 5", UNKNOWN), "failed", "exit code 5"),
    "os.abort()": (*told_or("signal 6 (SIGABRT)", UNKNOWN), "failed", "signal 6 (SIGABRT)"),
    "kill -9": (*told_or("signal 9 (SIGKILL)", UNKNOWN), "failed", "signal 9 (SIGKILL)"),
}


@pytest.mark.parametrize("is_launched", [False, True], ids=["plain", "ddplog run"])
def test_the_run_tells_how_it_ended_and_the_exit_code_is_the_jobs_own(job, is_launched, suite_table):
    """Reliability cases 23 and 24: the job's code passes through; the run's status is what could be known, and true."""
    script = job.script(SCRIPT)
    launcher = (*DDPLOG, "run", "--quiet", "--no-summary", "--") if is_launched else ()

    def end(number_and_name):
        number, name = number_and_name
        ending = ENDINGS[name]
        process = job.start(*launcher, sys.executable, script, ending.code, DDPLOG_RUN_ID=f"run-{number}", **PATIENCE)
        assert process.stdout.readline() == "ready\n", process.communicate()
        for signum in ending.sent:
            process.send_signal(signum)
        _, err = process.communicate(timeout=60)
        assert "the store does not hold" not in err, (name, err)
        return process.returncode

    with ThreadPoolExecutor(3) as pool:
        codes = list(pool.map(end, enumerate(RUNS)))
    wrong = []
    for number, (name, told) in enumerate(RUNS.items()):
        job.run_dir = job.runs / f"run-{number}"
        with job.open() as run:
            found = codes[number], run.status, run.detail
            assert run.metric("a").step.tolist() == list(range(NUM_STEPS)), name
        wanted = ENDINGS[name].exit_code, *(told[2:] if is_launched else told[:2])
        print(f"{name:40} {found}")
        if found != wanted:
            wrong.append((name, found, wanted))
    assert not wrong
    suite_table("endings of a process", endings=len(RUNS), lost=0, doubled=0, wrong=0, stuck=0)
