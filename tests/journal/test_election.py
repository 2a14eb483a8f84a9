"""Who starts the node's agent: one for many callers, and another one only when it has gone. With real agents."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from system.jobs import _holder, wait_until

from ddplog.journal.election import ensure_agent, has_agent
from ddplog.journal.spool import JobInfo, declare_job

pytestmark = [pytest.mark.system, pytest.mark.timeout(60)]

SOURCE = str(Path(__file__).parents[2] / "src")
CALLER = """
import sys
from pathlib import Path
from ddplog.journal.election import ensure_agent
sys.stdin.readline()
for _ in range(5):
    ensure_agent(Path(sys.argv[1]))
"""


def agents(folder):
    """The processes that are this job's agent, or a shell about to be."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if str(folder) in words and any("ddplog.agent.process" in word for word in words):
            found.append(process)
    return found


@pytest.fixture
def folder(tmp_path):
    """A job whose launcher is this test: its agent stays, although there is no rank."""
    folder = tmp_path / "s" / "job-1"
    (tmp_path / "s").mkdir(mode=0o700)
    settings = {"grace_s": 1.0, "late_s": 1.0, "settle_s": 0.1, "max_keys": 10, "rank_log_bytes": 1 << 30,
                "spool_bytes": 1 << 30, "host": "127.0.0.1", "port": 0}  # fmt: skip
    info = JobInfo(
        run_id="r1", project="p", name=None, dir=str(tmp_path / "runs"), sinks=(), tags=(), config={},
        created_unix_ns=0, launcher_pid=os.getpid(), launcher="python", node_rank=0, settings=settings,
    )  # fmt: skip
    declare_job(folder, info)
    yield folder
    ours = agents(folder)
    for process in ours:
        process.kill()
    psutil.wait_procs(ours, timeout=10)


def agent_pid(folder):
    return wait_until(lambda: _holder(folder / "agent.lock"))


def test_ranks_that_start_at_once_get_one_agent(folder):
    assert not has_agent(folder)
    callers = [
        subprocess.Popen(
            [sys.executable, "-c", CALLER, str(folder)], stdin=subprocess.PIPE, env=os.environ | {"PYTHONPATH": SOURCE}
        )
        for _ in range(4)
    ]
    for caller in callers:
        caller.stdin.write(b"go\n")
        caller.stdin.flush()
    for caller in callers:
        caller.communicate(timeout=30)
        assert caller.returncode == 0

    assert len(agents(folder)) == 1
    pid = agent_pid(folder)
    ensure_agent(folder)
    assert has_agent(folder)
    assert [process.pid for process in agents(folder)] == [pid]


def test_a_dead_agent_is_replaced_at_once(folder):
    """No patience with one that had started: the records of a whole node wait for it."""
    ensure_agent(folder)
    first = agent_pid(folder)
    wait_until(lambda: "agent of run" in (folder / "logs" / "agent.log").read_text())
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: not has_agent(folder))
    ensure_agent(folder)

    assert agent_pid(folder) != first


def test_an_agent_that_was_just_started_is_given_time(folder):
    """It takes a second to import what it needs; every rank would start one meanwhile."""
    now = time.clock_gettime(time.CLOCK_BOOTTIME) - 0.1
    (folder / "spawn.lock").write_text(f"{now:<32.3f}")
    ensure_agent(folder)
    assert agents(folder) == []

    (folder / "spawn.lock").write_text(f"{now - 6:<32.3f}")
    ensure_agent(folder)
    assert len(agents(folder)) == 1


def test_a_start_noted_before_the_reboot_does_not_count(folder):
    """The clock began anew: what was noted lies in the future."""
    (folder / "spawn.lock").write_text(f"{time.clock_gettime(time.CLOCK_BOOTTIME) + 1000:<32.3f}")
    ensure_agent(folder)

    assert len(agents(folder)) == 1


def test_the_agent_is_nobodys_child_and_has_no_stream_of_the_job(folder):
    """`wait` in a script, and `torchrun ... | tee`, must end when training ends."""
    inherited, own = os.pipe()
    os.set_inheritable(own, True)
    try:
        ensure_agent(folder)
        pid = agent_pid(folder)
        wait_until(lambda: os.path.exists(f"/proc/{pid}") and not os.path.exists(f"/proc/{pid}/fd/{own}"))
        streams = [os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)]
    finally:
        os.close(inherited)
        os.close(own)

    assert streams == ["/dev/null", *[str(folder / "logs" / "agent.log")] * 2]
    assert pid not in [child.pid for child in psutil.Process().children(recursive=True)]
    assert os.getsid(pid) != os.getsid(0)
