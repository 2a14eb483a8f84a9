"""What ddplog is inside the training process: a file it writes, and nothing else."""

import json
import os
import signal

import pytest
from system.jobs import wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

INSPECT = """
import json, os, sys

def look():
    links = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink("/proc/self/fd/" + fd))
        except OSError:
            pass  # the listing's own
    return {
        "tasks": len(os.listdir("/proc/self/task")),
        "sockets": sum(link.startswith("socket:") for link in links),
        "files": sorted({os.path.basename(link) for link in links if link.startswith(os.environ["DDPLOG_SPOOL"])}),
        "caught": next(int(line.split()[1], 16) for line in open("/proc/self/status") if line.startswith("SigCgt")),
        "modules": sorted(sys.modules),
        "libraries": sorted({line.split()[-1] for line in open("/proc/self/maps") if ".so" in line}),
    }

seen = {"before": look()}
import ddplog
seen["imported"] = look()
run = ddplog.init(config={"lr": 0.1})
seen["initialised"] = look()
run.define_metric("loss", reduce="mean")
for step in range(1000):
    run.log({"loss": float(step), "nested": {"int": step, "bool": True}}, step=step)
run.log_text("note", "hello")
run.alert("hot", "very")
run.flush()
seen["logged"] = look()
run.finish()
seen["finished"] = look()
print(json.dumps(seen))
"""

FOREIGN = ("zmq", "grpc", "sqlite3", "google", "google.protobuf", "numpy", "torch", "psutil", "click", "rich", "pynvml")


def test_no_thread_no_socket_and_no_library_of_ours(job):
    """Threads break fork, sockets block, libraries clash with the user's own: none of it is there. What is: the journal's
    files, and the file that a signal makes the interpreter write its stacks into."""
    out, _ = job.run(*job.ranks(1, job.script(INSPECT)))
    seen = json.loads(out)
    for moment, state in seen.items():
        assert state["tasks"] == 1, moment
        assert state["sockets"] == 0, moment
        assert not set(FOREIGN) & set(state["modules"]), moment
        assert not [m for m in state["modules"] if m.split(".")[0] in FOREIGN or m == "ddplog.v1"], moment
        ours = [path for path in state["libraries"] if any(name in path for name in ("zmq", "grpc", "numpy", "upb"))]
        assert not ours, moment
        files = {"before": [], "imported": [], "finished": ["000001.seg", "head", "stacks.50"]}
        assert state["files"] == files.get(moment, ["000001.seg", "alive", "head", "stacks.50"]), moment
        new_signals = state["caught"] & ~seen["before"]["caught"]
        assert new_signals == (1 << 49 if state["files"] else 0), "the one of stack_signal, and no other"
    with job.open() as run:
        assert len(run.metric("loss")) == len(run.metric("nested/int")) == 1000


SIGNALS = """
import os, signal, time
import ddplog
run = ddplog.init()
handled = 0

def handler(signum, frame):
    global handled
    run.log({"handler": float(handled)}, step=handled)
    handled += 1
    if handled < 200:
        signal.setitimer(signal.ITIMER_REAL, 0.0005 + 0.00001 * (handled % 17))

signal.signal(signal.SIGALRM, handler)
signal.setitimer(signal.ITIMER_REAL, 0.001)
step = 0
while handled < 200:
    run.log({"loop": float(step), "of": {"kind": step % {slow_every}}}, step=step)
    step += 1
print(handled, step)
"""


def test_200_logs_from_a_signal_handler_lose_nothing(job):
    """The handler runs on the thread that may just be inside log(): no lock may wait, no record may be torn."""
    script = SIGNALS.replace("{slow_every}", "3")  # ints take the slow path
    out, _ = job.run(*job.ranks(1, job.script(script)))
    handled, steps = map(int, out.split())
    with job.open() as run:
        assert run.metric("handler").value.tolist() == list(map(float, range(handled)))
        assert run.metric("handler").step.tolist() == list(range(200))
        assert run.metric("loop").step.tolist() == list(range(steps))
        assert run.metric("loop").value.tolist() == list(map(float, range(steps)))
        assert run.drops() == ()


IN_THE_MIDDLE = """
import os, signal, sys
import ddplog
run = ddplog.init()
run.log({"loss": 0.0}, step=0)

def handler(signum, frame):
    run.log({"handler": 1.0}, step=1)
    run.alert("preempted soon")
    run.log_text("note", "from a handler")
    if sys.argv[1] != "go on":
        run.finish("preempted", "the scheduler said so")
    if sys.argv[1] == "exit":
        sys.exit(0)

signal.signal(signal.SIGTERM, handler)

class Data(dict):
    def look(self):
        os.kill(os.getpid(), signal.SIGTERM)  # handled right here, inside log()
        return {"loss": 1.0}
    def values(self):
        return self.look().values() if sys.argv[2] == "fast" else super().values()
    def items(self):
        return self.look().items() if sys.argv[2] == "slow" else super().items()

run.log(Data(loss=1.0 if sys.argv[2] == "fast" else 1), step=1)
run.log({"loss": 2.0}, step=2)
"""


@pytest.mark.parametrize("path", ["fast", "slow"])
@pytest.mark.parametrize(
    ("how", "status", "steps"),
    [("go on", "finished", [0, 1, 2]), ("exit", "preempted", [0]), ("", "preempted", [0, 1])],
)
def test_a_handler_inside_log_may_call_everything(job, how, status, steps, path):
    """SIGTERM handlers that say why the run ends and exit are common; they may meet a log() in its middle."""
    job.run(*job.ranks(1, job.script(IN_THE_MIDDLE), how, path))
    with job.open() as run:
        assert run.status == status
        assert run.metric("loss").step.tolist() == steps
        assert run.metric("handler").value.tolist() == [1.0]
        assert [text.text for text in run.texts()] == ["from a handler"]
        assert [event.message for event in run.events() if event.kind == "alert"] == ["preempted soon"]


THREADS = """
import threading
import ddplog
run = ddplog.init()

def work(number):
    for step in range(2000):
        run.log({f"thread_{number}": float(step)}, step=step)

threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
"""


def test_threads_of_the_user_take_turns(job):
    job.run(*job.ranks(1, job.script(THREADS)))
    with job.open() as run:
        for number in range(4):
            assert run.metric(f"thread_{number}").value.tolist() == list(map(float, range(2000)))


FORK = """
import os, sys, warnings
import ddplog
run = ddplog.init()
for step in range(100):
    run.log({"loss": float(step)}, step=step)
children = []
for how in ("_exit", "exit", "raise"):
    pid = os.fork()
    if pid == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(5000):
                run.log({"loss": -1.0, how: 1.0}, step=step)
            run.set_step(99999)
            run.log_text("child", how)
            run.flush()
            run.finish("failed")
        os.write(1, f"{how} {[str(w.message) for w in caught]}\\n".encode())
        if how == "_exit":
            os._exit(0)
        if how == "exit":
            sys.exit(0)
        raise SystemExit(0)
    children.append(pid)
    for step in range(100 * len(children), 100 * len(children) + 100):
        run.log({"loss": float(step)}, step=step)
for pid in children:
    os.waitpid(pid, 0)
for step in range(400, 500):
    run.log({"loss": float(step)}, step=step)
print(dict(run.drops))
"""


def test_a_forked_child_that_logs_is_ignored_with_a_warning(job):
    """DataLoader workers are forks: they hold the same mapping, and must not write a byte into it."""
    out, _ = job.run(*job.ranks(1, job.script(FORK)))
    for how in ("_exit", "exit", "raise"):
        (line,) = [line for line in out.splitlines() if line.startswith(how + " ")]
        assert line.count("in a forked process is ignored") == 1
    assert out.splitlines()[-1] == "{}"
    with job.open() as run:
        assert run.metric("loss").value.tolist() == list(map(float, range(500)))
        assert run.keys() == ("loss",)
        assert run.texts() == ()
        assert (run.status, [writer.state for writer in run.writers()]) == ("finished", ["finished"])


FORK_THAT_LIVES_ON = """
import os, signal, sys
import ddplog
run = ddplog.init()
run.log({"loss": 1.0}, step=0)
if os.fork() == 0:
    os.close(1), os.close(2)
    open("child.pid.new", "w").write(str(os.getpid()))
    os.rename("child.pid.new", "child.pid")
    signal.pause()
while not os.path.exists("child.pid"):
    pass
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_forked_child_that_lives_on_does_not_keep_its_dead_parent_alive(job):
    """Locks of the whole-file kind live on in forked children; the rank would look alive for ever."""
    job.run(*job.ranks(1, job.script(FORK_THAT_LIVES_ON)), code=128 + signal.SIGKILL)
    child = int((job.folder / "child.pid").read_text())
    try:
        with job.open() as run:
            assert run.status == "failed"
            assert [writer.state for writer in run.writers()] == ["died"]
            assert len(run.metric("loss")) == 1
        os.kill(child, 0)  # it still lived
    finally:
        os.kill(child, signal.SIGKILL)


ENDS = """
import sys
import ddplog
run = ddplog.init()
run.log({"loss": 1.0}, step=0)
how = sys.argv[1]
if how == "raise":
    raise ValueError("loss is nan\\nsecond line")
if how == "interrupt":
    raise KeyboardInterrupt
if how == "with":
    with run:
        raise RuntimeError("inside")
if how == "exit":
    sys.exit(3)
if how == "finish":
    run.finish("preempted", "the scheduler said so")
    run.log({"loss": 2.0}, step=1)
"""


@pytest.mark.parametrize(
    ("how", "code", "status", "detail"),
    [
        ("end", 0, "finished", ""),
        ("raise", 1, "failed", "rank 0: ValueError: loss is nan"),
        ("with", 1, "failed", "rank 0: RuntimeError: inside"),
        ("interrupt", 130, "killed", ""),
        ("finish", 0, "preempted", ""),
    ],
)
def test_the_status_is_what_the_process_said(job, how, code, status, detail):
    job.run(*job.ranks(1, job.script(ENDS), how), code=code)
    with job.open() as run:
        assert (run.status, run.detail) == (status, detail)
        assert len(run.metric("loss")) == 1
        assert [(drop.reason, drop.count) for drop in run.drops()] == ([("after_finish", 1)] if how == "finish" else [])


def test_nothing_of_the_job_is_left_running(job):
    """The helpers end by themselves once all is stored: a login node must not collect them."""
    job.run(*job.ranks(2, job.script(ENDS), "end"), DDPLOG_SINKS="jsonl")
    job.open().close()
    wait_until(lambda: job.agent_pid() is None and job.aggregator_pid() is None)
