"""Plain torchrun, and a script that does nothing but ddplog.init(): nobody of ours is there before the first rank."""

import socket
import subprocess
import time

import pytest
from system.jobs import TORCHRUN, wait_until

from ddplog.store.reader import list_runs, open_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

TRAIN = """
import sys, time
import ddplog
run = ddplog.init()
for step in range(200):
    run.log({"loss": step + run.rank / 2}, step=step)
print("trained", time.time(), flush=True)
"""


def _may_unshare(*options):
    try:
        return subprocess.run(["unshare", *options, "true"], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        return False


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


needs_pid_namespace = pytest.mark.skipif(
    not _may_unshare("-pf", "--kill-child"), reason="this machine permits no new PID namespace (unshare -pf)"
)


@needs_pid_namespace
@pytest.mark.parametrize("launcher", ["torchrun", "python", "python with its own /proc"])
def test_as_pid_1_the_last_record_of_a_normal_exit_is_in_the_store(job, launcher):
    """A container ends with its first process: every helper is killed the moment training has ended."""
    script = job.script(TRAIN)
    words = job.torchrun(2, script) if launcher == "torchrun" else job.ranks(2, script)
    own = ("--mount-proc",) if "/proc" in launcher else ()
    job.run("unshare", "-pf", "--kill-child", *own, *words)
    with open_run(job.run_dir) as run:
        points = run.metric("loss")
        assert points.step.tolist() == list(range(200))
        assert points.value.tolist() == [step + 0.25 for step in range(200)]
        assert set(points.n.tolist()) == {2}
        assert run.status in ("finished", "unknown")


def test_a_pipe_behind_torchrun_ends_when_training_ends(job):
    """`torchrun ... | tee log` hangs for as long as any process holds the pipe: no helper may."""
    process = job.start("/bin/sh", "-c", '"$@" | cat', "sh", *job.torchrun(1, job.script(TRAIN)))
    out, _ = job.end(process)
    late_s = time.time() - float(out.split()[-1])
    assert late_s < 2 + 5, "2 s + exit_wait_s"
    assert len(job.open().metric("loss")) == 200


def test_two_default_torchruns_in_a_row_are_two_runs(job):
    """RUN_ID is "none" and the port the same in both: only the launching process tells them apart."""
    script = job.script(TRAIN)
    port = _free_port()
    for _ in range(2):
        job.run(*TORCHRUN, "--master-port", str(port), "--nproc-per-node", "1", script, DDPLOG_RUN_ID=None)
    wait_until(lambda: [run.status for run in list_runs(job.runs)] == ["finished", "finished"])
    for summary in list_runs(job.runs):
        with open_run(summary.path) as run:
            assert run.metric("loss").step.tolist() == list(range(200))
            assert len(run.attempts) == 1


RESTARTED = """
import os, sys
import ddplog
run = ddplog.init()
life = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
for step in range(100 * life, 100 * life + 200):
    run.log({"loss": step + run.rank / 2}, step=step)
if life == 0:
    run.flush()
    sys.exit(run.rank)
"""


def test_a_group_that_torchrun_restarts_is_a_second_attempt(job):
    """--max-restarts: the same launcher, new processes; values of the two lives never mix."""
    words = (*TORCHRUN, "--standalone", "--max-restarts", "1", "--nproc-per-node", "2", job.script(RESTARTED))
    job.run(*words)
    with job.open() as run:
        assert [attempt.attempt for attempt in run.attempts] == [0, 1]
        assert run.metric("loss", attempt=0).step.tolist() == list(range(200))
        assert run.metric("loss", attempt=1).step.tolist() == list(range(100, 300))
        assert run.metric("loss").step.tolist() == list(range(300))
        assert set(run.metric("loss").n.tolist()) == {2}
        assert run.status == "finished"
