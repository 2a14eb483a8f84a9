"""A run goes on: under its run_id, in one process or the next, and after everything was killed."""

import os
import signal

import pytest
from system.jobs import DDPLOG, wait_until

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

TWICE = """
import ddplog

for life in range(2):
    run = ddplog.init(run_id="r1", sinks="jsonl")
    for step in range(5):
        run.log({"a": float(10 * life + step)}, step=step)
    run.finish()
"""
ONCE = """
import ddplog

run = ddplog.init(run_id="r1", sinks="jsonl")
for step in range(5):
    run.log({"a": float(step)}, step=step)
"""
ENDLESS = """
import time
import ddplog

run = ddplog.init(run_id="r1", sinks="jsonl")
for step in range(20_000):
    run.log({"a": float(step)}, step=step)
print("logged", flush=True)
time.sleep(600)
"""


def check(job, attempts):
    with job.open() as run:
        assert run.status == "finished"
        assert len(run.attempts) == attempts
        for attempt in range(attempts):
            assert run.metric("a", attempt=attempt).step.tolist() == list(range(5))
        assert [writer.state for writer in run.writers()] == ["finished"] * attempts
    wait_until(lambda: len(job.jsonl()) == 5 * attempts)


def test_the_next_launch_of_a_run_id_is_its_next_attempt(job, python_script):
    for launch in range(3):
        job.run(*python_script(ONCE))
        check(job, launch + 1)


def test_a_run_may_go_on_in_the_same_process(job, python_script):
    job.run(*python_script(TWICE))

    check(job, 2)


def test_sync_completes_a_run_of_which_everything_was_killed(job, python_script):
    process = job.start(*python_script(ENDLESS))
    assert process.stdout.readline() == "logged\n"
    wait_until(job.aggregator_pid)
    for pid in (job.agent_pid(), job.aggregator_pid(), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()

    output, _ = job.run(*DDPLOG, "sync", "r1")

    assert "failed (rank 0: died, code unknown)" in output
    assert "jsonl: drained" in output
    with job.open() as run:
        assert run.metric("a").value.tolist() == [float(step) for step in range(20_000)]
    assert len(job.jsonl()) == 20_000


def kill_everything(job, process):
    assert process.stdout.readline() == "logged\n"
    wait_until(job.aggregator_pid)
    for pid in (job.agent_pid(), job.aggregator_pid(), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()


def test_the_next_launch_of_a_run_of_which_everything_was_killed_completes_it(job, python_script):
    """Its own agent ships what the killed job left: a run has one aggregator."""
    kill_everything(job, job.start(*python_script(ENDLESS)))

    job.run(*python_script(ONCE))

    with job.open() as run:
        assert run.status == "finished"
        assert run.metric("a", attempt=0).value.tolist() == [float(step) for step in range(20_000)]
        assert run.metric("a", attempt=1).step.tolist() == list(range(5))
        assert [writer.state for writer in run.writers()] == ["died", "finished"]
    wait_until(lambda: len(job.jsonl()) == 20_005)
    wait_until(lambda: all((folder / "done").exists() for folder in job.folders()))


def test_the_next_start_of_any_run_completes_one_of_which_everything_was_killed(job, python_script):
    """On the same node, without a word from anybody."""
    kill_everything(job, job.start(*python_script(ENDLESS)))

    job.run(*python_script(ONCE.replace('"r1"', '"r2"')))

    with job.open() as run:
        assert (run.status, run.detail) == ("failed", "rank 0: died, code unknown")
        assert run.metric("a").value.tolist() == [float(step) for step in range(20_000)]
    wait_until(lambda: len(job.jsonl()) == 20_000)


def test_an_agent_that_is_killed_after_its_ranks_is_started_again(job, python_script):
    """Nobody is left who logs, and would start it; the aggregator does, and the run comes to its end by itself."""
    process = job.start(*python_script(ENDLESS))
    assert process.stdout.readline() == "logged\n"
    wait_until(job.aggregator_pid)
    for pid in (job.agent_pid(), process.pid):
        os.kill(pid, signal.SIGKILL)
    process.wait()

    with job.open() as run:
        assert (run.status, run.detail) == ("failed", "rank 0: died, code unknown")
        assert run.metric("a").value.tolist() == [float(step) for step in range(20_000)]
    wait_until(lambda: len(job.jsonl()) == 20_000)


def test_sync_of_a_run_that_is_complete_says_so_and_changes_nothing(job, python_script):
    job.run(*python_script(ONCE))
    check(job, 1)

    output, _ = job.run(*DDPLOG, "sync", "r1")

    assert "r1: finished" in output
    check(job, 1)


@pytest.fixture
def python_script(job):
    import sys

    return lambda text: (sys.executable, job.script(text))
