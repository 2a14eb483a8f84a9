"""A backlog of records that are slow to take is committed and acknowledged as it is taken, not once all of it is."""

import os
import signal
import time

import pytest
from faults.grid_job import Grid
from system.jobs import wait_until

from ddplog.errors import DdplogError
from ddplog.store.reader import open_run

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

STEPS = 60_000


def count_stored(job):
    try:
        with open_run(job.run_dir) as run:
            return sum(writer.next_seq for writer in run.writers())
    except DdplogError:
        return 0


def test_a_backlog_of_changing_keys_is_acknowledged_in_portions(job, suite_table):
    """Two sets of keys in turn are taken one by one, 0.1 ms each: 60,000 of them would be 6 s without an answer, and what
    the agent gets no answer to for 5 s it sends again.
    """
    grid = Grid(job, ranks=1, steps=STEPS, families=[[10], [20, 21]], pause_s=0)
    grid.allow(100)
    process = grid.start()
    wait_until(lambda: count_stored(job) >= 100, 60)
    aggregator = job.aggregator_pid()
    os.kill(aggregator, signal.SIGSTOP)
    try:
        grid.allow(STEPS)
        job.end(process, timeout_s=120)  # it has waited 5 s in vain, and says so
        before = count_stored(job)
    finally:
        os.kill(aggregator, signal.SIGCONT)
    seen = set()
    while job.aggregator_pid() == aggregator:
        seen.add(count_stored(job))
        time.sleep(0.02)
    assert before < STEPS / 2, "there was no backlog"
    between = [count for count in seen if before < count < STEPS]
    print(f"{len(between)} portions")
    assert len(between) >= 3
    grid.check_store(60)
    suite_table("aggregator stopped under a backlog", records=STEPS, lost=0, doubled=0, wrong=0)
