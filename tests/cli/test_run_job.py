"""`ddplog run` with jobs that really log: the run's status is the truth, and the exit code is the job's."""

import os
import signal
import subprocess
import sys

import pytest

from ddplog.store.reader import open_run

pytestmark = pytest.mark.system

SCRIPT = """
import os, sys, time
import ddplog
run = ddplog.init()
rank = int(os.environ.get("RANK", "0"))
for step in range(50):
    run.log({"loss": rank + step}, step=step)
if rank == int(sys.argv[1]):
    how = sys.argv[2]
    if how == "exit":
        sys.exit(7)
    if how == "kill":
        os.kill(os.getpid(), 9)
    if how == "wait":
        os.write(1, b"up\\n")
        time.sleep(60)
elif sys.argv[2] != "end":
    time.sleep(60)
"""


@pytest.fixture
def job(tmp_path):
    """Start `ddplog run` in a folder of its own."""
    (tmp_path / "train.py").write_text(SCRIPT)
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("DDPLOG_", "SLURM_", "KUBERNETES_"))}

    def start(*words):
        return subprocess.Popen(
            [sys.executable, "-m", "ddplog.cli.main", "run", "--run-id", "r1", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **clean,
                "DDPLOG_SPOOL": str(tmp_path / "s"),
                "DDPLOG_SAMPLE_S": "0",
                "OMP_NUM_THREADS": "1",
                "COLUMNS": "200",
            },
        )

    return start


def read(tmp_path):
    with open_run(tmp_path / "runs" / "r1") as run:
        return run.status, run.detail, len(run.metric("loss"))


def test_a_job_that_ends_well_ends_in_a_summary_and_a_report(job, tmp_path):
    process = job("--nproc-per-node", "2", "train.py", "0", "end")
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (0, ""), err
    assert read(tmp_path) == ("finished", "", 50)
    report = tmp_path / "runs" / "r1" / "report.html"
    assert report.stat().st_size > 1000
    assert f"report: {report}" in err
    assert "loss" in err


@pytest.mark.parametrize(("how", "detail"), [("exit", "rank 1: exit code 7"), ("kill", "rank 1: signal 9 (SIGKILL)")])
def test_a_failed_rank_is_named(job, tmp_path, how, detail):
    process = job("--nproc-per-node", "2", "--quiet", "train.py", "1", how)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 1, err
    assert read(tmp_path) == ("failed", detail, 50)


def test_a_command_that_fails_is_a_failed_run(job, tmp_path):
    process = job("--no-summary", "--", sys.executable, "train.py", "0", "exit")
    _, err = process.communicate(timeout=100)
    assert (process.returncode, err) == (7, "")
    assert read(tmp_path) == ("failed", "exit code 7", 50)
    assert not (tmp_path / "runs" / "r1" / "report.html").exists()


def test_sigterm_ends_a_command_and_its_run(job, tmp_path):
    process = job("--", sys.executable, "train.py", "0", "wait")
    with process:
        assert process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=100)
    assert process.returncode == -signal.SIGTERM
    assert read(tmp_path) == ("killed", "signal 15 (SIGTERM)", 50)
