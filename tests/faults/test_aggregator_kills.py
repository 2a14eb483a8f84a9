"""kill -9 of the aggregator, hundreds of times, at any moment of its life: the store and the sink have everything once.

Four ranks log whole numbers f(rank, step, key) through the real agent, CURVE and all, and notice nothing. Some kills
hit the aggregator after it has said that it lives, some while it starts: imports, replay, the attack on itself.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress

import psutil
import pytest
from faults.grid_job import Grid
from system.jobs import wait_until

pytestmark = pytest.mark.system

KILLS, STEPS = 200, 10_000
NIGHTLY_KILLS, NIGHTLY_STEPS = 500, 50_000
NUM_RANKS, NUM_KEYS = 4, 100
IN_START = 0.4
"""How many of the kills aim at an aggregator as soon as it is there, not when it has said that it lives."""
LONGEST_S = 0.25
"""The longest wait before a kill: a start takes about 0.4 s here, the first acknowledgement 0.1 s more."""


class Killer:
    """Kills one aggregator after the other, each at a random moment."""

    def __init__(self, job, chance):
        self._job, self._chance = job, chance
        self._last = 0
        self.seen = Counter()

    def kill_one(self):
        find = self._started if self._chance.random() < IN_START else self._announced
        pid = wait_until(find, 60)
        time.sleep(self._chance.random() * LONGEST_S)  # the random moment
        was_announced = self._job.aggregator_pid() == pid
        os.kill(pid, signal.SIGKILL)
        self._last = pid
        self.seen["kills"] += 1
        self.seen["kills in its start"] += not was_announced

    def _started(self):
        """Return the agent's child, as soon as there is another one."""
        agent = self._job.agent_pid()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(agent).children() if agent else ():  # Process(None) would be this one
                if child.pid != self._last and child.status() != psutil.STATUS_ZOMBIE:
                    return child.pid
        return None

    def _announced(self):
        pid = self._job.aggregator_pid()
        return pid if pid != self._last else None


def kill_aggregators(job, kills, steps):
    chance = random.Random()
    seed = chance.getrandbits(32)
    chance.seed(seed)
    print("seed", seed)
    grid = Grid(job, ranks=NUM_RANKS, steps=steps, keys=NUM_KEYS)
    process = grid.start(DDPLOG_SINKS="jsonl", DDPLOG_SEGMENT_BYTES=str(1 << 20))
    killer = Killer(job, chance)
    try:
        for kill in range(1, kills + 1):
            grid.allow(0.99 * kill / kills)  # not all of it: the run may not end before its last kill
            killer.kill_one()
        grid.allow(1)
        job.end(process, timeout_s=300)
    except BaseException:
        print(killer.seen, job.logs())
        raise
    grid.check_store(300)
    grid.check_jsonl()
    seen = killer.seen
    assert seen["kills"] == kills
    assert 0 < seen["kills in its start"] < kills
    counts = {**seen, "values": grid.values, "points": grid.points}
    print(counts, "lost 0, doubled 0, wrong 0")
    return counts


@pytest.mark.timeout(600)
def test_200_kills_of_the_aggregator_under_4_ranks_lose_and_double_nothing(job, suite_table):
    """It answers only for what it has committed, and its next life goes on from there."""
    counts = kill_aggregators(job, KILLS, STEPS)
    suite_table("kill -9 of the aggregator", **counts, lost=0, doubled=0, wrong=0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_500_kills_of_the_aggregator_under_20_million_values_lose_and_double_nothing(job, suite_table):
    counts = kill_aggregators(job, NIGHTLY_KILLS, NIGHTLY_STEPS)
    suite_table("kill -9 of the aggregator", **counts, lost=0, doubled=0, wrong=0)
