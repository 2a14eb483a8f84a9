"""Several runs, jobs, threads and holders of one rank at once; pids that come again, and clocks that jump."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter

import pytest
from system.jobs import DDPLOG, wait_until

from ddplog.agent.process import _pidfd
from ddplog.journal.segment import holder
from ddplog.journal.spool import start_ticks
from ddplog.store.reader import open_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

ALL_AT_ONCE = """
import gc, itertools, json, signal, sys, threading
import ddplog

runs = [ddplog.init(run_id=f"{sys.argv[1]}{number}") for number in range(3)]
counts = {"handler": itertools.count(), "finalizer": itertools.count()}

def handler(number, frame):
    count = next(counts["handler"])  # at once: the next signal may meet this handler
    runs[count % 3].log({"handler": float(count)}, step=count)

class Garbage:
    def __init__(self):
        self.me = self
    def __del__(self):
        next(counts["finalizer"])
        runs[0].log({"finalizer": 1.0}, step=0)

def work(number):
    for step in range(300):
        for run in runs:
            run.log({f"thread_{number}": float(step)}, step=step)
            run.log({"sum": 1, "of": {"all": 0.5}}, step=step)
        ddplog.log({"last": float(number)}, step=step)  # the run of the last init()
        if step % 10 == 0:
            Garbage()

for run in runs:
    run.define_metric("sum", reduce="sum")
    run.define_metric("of/*", reduce="sum")
runs[0].define_metric("finalizer", reduce="sum")
runs[2].define_metric("last", reduce="sum")
gc.set_threshold(50)  # often, in the midst of anything
signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
for thread in threads: thread.start()
for thread in threads: thread.join()
signal.setitimer(signal.ITIMER_REAL, 0)
gc.collect()
print(json.dumps({name: next(count) for name, count in counts.items()}))
"""


def test_two_jobs_of_three_runs_each_with_threads_a_handler_and_finalizers_keep_exact_totals(job, suite_table):
    """Two processes on one node and one spool, three runs in each, eight threads on all of them: nothing is mixed."""
    script = job.script(ALL_AT_ONCE)
    processes = [job.start(sys.executable, script, name, DDPLOG_RUN_ID=None) for name in "ab"]
    totals = [json.loads(job.end(process)[0]) for process in processes]
    assert len(job.folders()) == 6
    values = 0
    for name, counts in zip("ab", totals, strict=True):
        assert counts["handler"] > 10
        assert counts["finalizer"] == 8 * 30
        handled = []
        for number in range(3):
            job.run_dir = job.runs / f"{name}{number}"
            with job.open() as run:
                steps = list(range(300))
                for thread in range(8):
                    assert run.metric(f"thread_{thread}").step.tolist() == steps
                    assert run.metric(f"thread_{thread}").value.tolist() == list(map(float, steps))
                assert run.metric("sum").value.tolist() == [8.0] * 300
                assert run.metric("of/all").value.tolist() == [4.0] * 300
                if number == 0:
                    assert run.metric("finalizer").value.tolist() == [float(counts["finalizer"])]
                if number == 2:
                    assert run.metric("last").value.tolist() == [float(sum(range(8)))] * 300
                assert ("finalizer" in run.keys(), "last" in run.keys()) == (number == 0, number == 2)  # noqa: SIM118
                handled += run.metric("handler").value.tolist()
                assert run.drops() == ()
                assert (run.status, [writer.state for writer in run.writers()]) == ("finished", ["finished"])
                values += run.writers()[0].num_values
        assert sorted(handled) == list(map(float, range(counts["handler"])))
    suite_table("several runs at once", runs=6, threads=16, values=values, lost=0, doubled=0, wrong=0)


TWINS = """
import os, sys, time
from pathlib import Path
import ddplog

me, others = sys.argv[1], sys.argv[2:]
run = ddplog.init()
for step in range(20):
    run.log({"loss": float(len(me) * 100 + step)}, step=step)
while run._journal.acked_seq < run._journal.next_seq:
    time.sleep(0.005)
Path(f"ready.{me}.{run.rank}").touch()
while not Path("stop").exists():
    time.sleep(0.005)
"""


def _start_in_turn(job, *commands):
    """Start each once the ranks of the one before are known to the store; then let all of them end."""
    processes = []
    for (words, ready), environ in commands:
        processes.append(job.start(*words, **environ))
        wait_until(lambda ready=ready: all((job.folder / name).exists() for name in ready))
    (job.folder / "stop").touch()
    for process in processes:
        job.end(process)


def _check_twins(job, num_twins, num_ranks):
    """The first holder of each rank counts; the others are stored, marked, and an event says who they are."""
    with job.open() as run:
        assert run.metric("loss").value.tolist() == [100.0 + step for step in range(20)]
        assert set(run.metric("loss").n.tolist()) == {num_ranks}
        writers = Counter((writer.rank, writer.num_values) for writer in run.writers())
        assert writers == {(rank, 20): 1 + num_twins for rank in range(num_ranks)}
        events = [event for event in run.events() if event.kind == "duplicate_rank"]
        assert sorted(event.rank for event in events) == sorted(list(range(num_ranks)) * num_twins)
        assert {event.level for event in events} == {"error"}
        assert len(run.attempts) == 1
        assert run.drops() == ()
    out, _ = job.run(*DDPLOG, "show", "r1")
    assert "says it is rank 0; it is stored, not reduced" in out


LAUNCH_TWINS = """
import os, subprocess, sys, time
from pathlib import Path
environ = {**os.environ, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
ranks = []
for name in ("x", "xx", "xxx"):
    ranks.append(subprocess.Popen([sys.executable, "train.py", name], env=environ))
    while not Path(f"ready.{name}.0").exists():
        time.sleep(0.005)
Path("stop").touch()
sys.exit(any([rank.wait() for rank in ranks]))
"""


def test_of_three_live_holders_of_one_rank_the_first_counts_and_the_others_are_told_loudly(job, suite_table):
    """Reliability case 5: RANK set by hand to 0 everywhere, under one launcher."""
    job.script(TWINS)
    job.run(sys.executable, job.script(LAUNCH_TWINS, "launch.py"))
    _check_twins(job, num_twins=2, num_ranks=1)
    suite_table("several runs at once", duplicate_ranks=2, lost=0, doubled=0, wrong=0)


def test_of_two_jobs_with_one_run_id_at_once_the_first_counts_and_the_other_is_told_loudly(job, suite_table):
    """Reliability case 5: two launchers on one machine, each with its agent; the run has one aggregator and one store."""
    script = job.script(TWINS)
    names = ["x", "xx"]
    _start_in_turn(job, *(((job.ranks(2, script, n), [f"ready.{n}.0", f"ready.{n}.1"]), {}) for n in names))
    assert len(job.folders()) == 2
    _check_twins(job, num_twins=1, num_ranks=2)
    wait_until(lambda: job.agent_pid() is None and job.aggregator_pid() is None)
    suite_table("several runs at once", duplicate_ranks=2, lost=0, doubled=0, wrong=0)


ONE_RANK = """
import os, subprocess, sys
name, rank = sys.argv[1:]
identity = {"DDPLOG_JOB": name, "RANK": rank, "LOCAL_RANK": "0", "WORLD_SIZE": "2", "GROUP_RANK": rank}
sys.exit(subprocess.call([sys.executable, "train.py", "x"], env={**os.environ, **identity}))
"""


@pytest.mark.parametrize("names", [("a", "b"), ("b", "a")], ids=["rank 0's first", "rank 0's last"])
def test_sync_completes_a_run_of_two_launchers_of_which_everything_was_killed(job, names, suite_table):
    """One aggregator for both, whose ranks' journals lie in two folders: one of them has no rank 0 that would start it."""
    job.script(TWINS)
    script = job.script(ONE_RANK, "launch.py")
    launchers = [job.start(sys.executable, script, name, str(rank)) for rank, name in enumerate(names)]
    wait_until(lambda: all((job.folder / f"ready.x.{rank}").exists() for rank in range(2)))
    with open_run(job.run_dir) as run:
        ranks = [writer.pid for writer in run.writers()]
    agents = []
    for folder in job.folders():  # those of both launchers
        descriptor = os.open(folder / "agent.lock", os.O_RDWR)
        agents.append(holder(descriptor))
        os.close(descriptor)
    assert len({*ranks, *agents}) == 4
    for pid in (*agents, job.aggregator_pid(), *ranks):
        os.kill(pid, signal.SIGKILL)
    for launcher in launchers:
        launcher.wait()
    job.run(*DDPLOG, "sync", "r1")
    with job.open() as run:
        assert run.metric("loss").value.tolist() == [100.0 + step for step in range(20)]
        assert set(run.metric("loss").n.tolist()) == {2}
        assert [writer.state for writer in run.writers()] == ["died", "died"]
        assert run.status == "failed"
    assert all((folder / "done").exists() for folder in job.folders())
    suite_table("several runs at once", kills=5, lost=0, doubled=0, stuck=0)


ONE_OF_TWO = """
import ddplog, sys
run = ddplog.init()
run.log({"a": float(sys.argv[1])}, step=int(sys.argv[1]))
"""


def test_the_job_of_ddplog_run_lasts_as_long_as_ddplog_run(job):
    """A shell around a rank is not the job: after it more may come, and the run must not have ended meanwhile."""
    script = job.script(ONE_OF_TWO)
    command = f"sh -c '{sys.executable} {script} 0; true'; while [ ! -e go ]; do sleep 0.05; done; {sys.executable} {script} 1"
    process = job.start(*DDPLOG, "run", "--quiet", "--no-summary", "--", "sh", "-c", command)
    wait_until(lambda: job.peek("a"))
    (folder,) = job.folders()
    assert json.loads((folder / "job.json").read_text())["launcher_pid"] == process.pid
    first = job.aggregator_pid()
    (job.folder / "go").touch()
    job.end(process)
    with job.open() as run:
        assert run.metric("a").step.tolist() == [0, 1]
        assert [event.kind for event in run.events()] == ["restart"]
        assert run.status == "finished"
    starts = (folder / "logs" / "aggregator.log").read_text().count("INFO aggregator of run")
    assert (starts, first is not None) == (1, True)


def _may_unshare():
    words = ["unshare", "-pf", "--mount-proc", "sh", "-c", "echo 100 > /proc/sys/kernel/ns_last_pid"]
    try:
        return subprocess.run(words, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


REUSED = """
import fcntl, json, os, signal, struct, subprocess, sys, time
from pathlib import Path
from ddplog.journal.segment import holder

def until(look):
    while not (found := look()):
        while os.waitpid(-1, os.WNOHANG)[0]:  # we are the first process of this PID namespace: init
            pass
        time.sleep(0.01)
    return found

def agent():
    for path in Path("s").glob("*/agent.lock"):
        descriptor = os.open(path, os.O_RDWR)
        pid = holder(descriptor)
        os.close(descriptor)
        return pid

def aggregator():
    for path in Path("s").glob("*/aggregator.json"):
        return json.loads(path.read_text())["pid"]

def points():
    return int(Path("acked").read_text() or 0) if Path("acked").exists() else 0

def reuse(pid):
    os.kill(pid, signal.SIGKILL)
    until(lambda: not os.path.exists(f"/proc/{pid}"))
    Path("/proc/sys/kernel/ns_last_pid").write_text(str(pid - 1))
    other = subprocess.Popen(["sleep", "1000"])
    assert other.pid == pid, (other.pid, pid)

rank = subprocess.Popen([sys.executable, "train.py"])
until(points)
first_agent, first_aggregator = until(agent), until(aggregator)
os.kill(first_agent, signal.SIGKILL)  # the next agent is not the aggregator's parent
until(lambda: agent() not in (None, 0, first_agent))
reuse(first_aggregator)
until(lambda: aggregator() != first_aggregator)
before = points()
until(lambda: points() > before)
Path("stop").touch()
until(lambda: not list(Path("runs").glob("*/control.json")) and not list(Path("s").glob("*/aggregator.json")))
print("done")
"""
STEADY = """
import os, time
from pathlib import Path
import ddplog
run = ddplog.init()
step = 0
while not Path("stop").exists():
    run.log({"a": float(step)}, step=step)
    step += 1
    Path("acked.new").write_text(str(run._journal.acked_seq))
    os.replace("acked.new", "acked")
    time.sleep(0.005)
Path("steps").write_text(str(step))
"""


@pytest.mark.skipif(not _may_unshare(), reason="this machine permits no new PID namespace, or no choice of pids in it")
def test_a_pid_that_comes_again_is_not_taken_for_the_process_that_had_it(job, suite_table):
    """Reliability case 3: the dead aggregator's pid belongs to a `sleep`; the agent, not its parent, starts another."""
    job.script(STEADY)
    words = ("unshare", "-pf", "--mount-proc", "--kill-child", sys.executable, job.script(REUSED, "reuse.py"))
    out, _ = job.run(*words)
    assert out == "done\n"
    steps = int((job.folder / "steps").read_text())
    with job.open() as run:
        assert run.metric("a").value.tolist() == [float(step) for step in range(steps)]
        assert (run.status, len(run.writers()), run.drops()) == ("finished", 1, ())
    suite_table("pids that come again", pids=1, lost=0, doubled=0, stuck=0)


def test_a_launcher_whose_pid_comes_again_has_gone():
    """Reliability case 3: an agent that is started again watches the process that launched the ranks, or none."""
    descriptor = _pidfd(os.getpid(), start_ticks(os.getpid()))
    assert descriptor is not None
    os.close(descriptor)
    assert _pidfd(os.getpid(), start_ticks(os.getpid()) + 1) is None
    assert _pidfd(0, 0) is None


CLOCK = """
import os, time
real_ns = time.time_ns

def offset_s():
    try:
        return int(open(os.environ["CLOCK"]).read())
    except (OSError, ValueError):
        return 0

# Not time.time(): gRPC makes deadlines of it, and its C core has a clock of its own. ddplog uses it for files' ages only.
time.time_ns = lambda: real_ns() + offset_s() * 10**9
"""
UNDER_CLOCKS = """
import os, time
from pathlib import Path
import ddplog
rank, stop = int(os.environ["RANK"]), Path("stop")
run = ddplog.init(sinks="jsonl")
run.define_metric("count", reduce="sum")
step = 0
while not stop.exists() if rank == 0 else not Path("steps.0").exists() or step < int(Path("steps.0").read_text()):
    run.log({"loss": step + rank / 2.0, "count": 1.0}, step=step)  # plain floats: only the fast path
    step += 1
    time.sleep(0.005)
Path(f"new.{rank}").write_text(str(step))
os.replace(f"new.{rank}", f"steps.{rank}")
"""
YEAR_S = 365 * 86400


def test_no_clock_that_jumps_by_a_year_changes_anything_but_the_times_shown(job, suite_table):
    """Reliability case 4: back and forth while agent and aggregator are killed; wall time decides nothing."""
    (job.folder / "clock").mkdir()
    (job.folder / "clock" / "sitecustomize.py").write_text(CLOCK)
    clock = job.folder / "offset"
    path = os.pathsep.join([str(job.folder / "clock"), job.environ["PYTHONPATH"]])
    process = job.start(*job.ranks(2, job.script(UNDER_CLOCKS)), PYTHONPATH=path, CLOCK=str(clock))

    def moves():
        points = len(job.peek("loss"))
        wait_until(lambda: len(job.peek("loss")) > points + 20)

    wait_until(lambda: job.peek("loss"))
    # Each jump, and who dies after it. Of both at once only log() can know, once a second by whatever clock.
    deaths = {
        -YEAR_S: [job.agent_pid],
        YEAR_S: [job.aggregator_pid],
        -YEAR_S // 2: [job.agent_pid, job.aggregator_pid],
    }
    for jump_s, finds in deaths.items():
        clock.write_text(str(jump_s))
        moves()
        pids = [wait_until(find) for find in finds]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda finds=finds, pids=pids: not {find() for find in finds} & {None, *pids})
        moves()
    (job.folder / "stop").touch()
    job.end(process)
    clock.write_text("0")
    steps = [int((job.folder / f"steps.{rank}").read_text()) for rank in range(2)]
    with job.open() as run:
        assert len(run.attempts) == 1
        for key, value in (("loss", lambda step: step + 0.25), ("count", lambda step: 2.0)):
            both = run.metric(key)
            assert both.step.tolist() == list(range(max(steps)))
            assert both.value.tolist()[: min(steps)] == [value(step) for step in range(min(steps))]
            assert set(both.n.tolist()[: min(steps)]) == {2}
        assert run.drops() == ()
        assert (run.status, [writer.state for writer in run.writers()]) == ("finished", ["finished"] * 2)
        values = sum(writer.num_values for writer in run.writers())
    wait_until(lambda: len(job.jsonl()) == 2 * max(steps))
    suite_table("clocks that jump by a year", jumps=3, kills=4, values=values, lost=0, doubled=0, wrong=0, stuck=0)
