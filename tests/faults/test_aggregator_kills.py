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

from ddplog.journal.segment import ACKED_OFFSET, U64

pytestmark = pytest.mark.system

KILLS, STEPS = 200, 10_000
NIGHTLY_KILLS, NIGHTLY_STEPS = 500, 50_000
NUM_RANKS, NUM_KEYS = 4, 100
IN_START = 0.6
"""How many of the kills aim at an aggregator as soon as it is there: the others wait until it has acknowledged something,
so that the run goes on, and the next one has open windows to find again."""
LONGEST_START_S = 0.5
"""Imports, replay, the announcement, the agent's Hello, the first commit: they take about that long here."""
LONGEST_LIFE_S = 0.15
"""After the first acknowledgement: some commits, and a point is emitted 0.1 s after its last value came."""


class Killer:
    """Kills one aggregator after the other, each at a random moment."""

    def __init__(self, job, chance):
        self._job, self._chance = job, chance
        self._last = 0
        self._acked = 0
        self.seen = Counter()

    def kill_one(self):
        aims_at_start = self._chance.random() < IN_START
        pid = wait_until(self._started if aims_at_start else self._acknowledging, 60)
        time.sleep(self._chance.random() * (LONGEST_START_S if aims_at_start else LONGEST_LIFE_S))  # the random moment
        was_announced = self._job.aggregator_pid() == pid
        os.kill(pid, signal.SIGKILL)
        self._last = pid
        self.seen["kills"] += 1
        self.seen["in a start"] += not was_announced
        self.seen["after an ack"] += self._count_acked() > self._acked
        self._acked = self._count_acked()

    def _started(self):
        """Return the agent's child, as soon as there is another one."""
        agent = self._job.agent_pid()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(agent).children() if agent else ():  # Process(None) would be this one
                if child.pid != self._last and child.status() != psutil.STATUS_ZOMBIE:
                    return child.pid
        return None

    def _acknowledging(self):
        return self._started() if self._count_acked() > self._acked else None

    def _count_acked(self):
        """Return how many records the ranks know to be stored: the agent notes it in their journals' head pages."""
        total = 0
        for path in (path for folder in self._job.folders() for path in folder.glob("*/head")):
            with path.open("rb") as file:
                total += U64.unpack(os.pread(file.fileno(), 8, ACKED_OFFSET))[0]
        return total


def kill_aggregators(job, kills, steps):
    chance = random.Random()
    seed = chance.getrandbits(32)
    chance.seed(seed)
    print("seed", seed)
    grid = Grid(job, ranks=NUM_RANKS, steps=steps, families=[list(range(NUM_KEYS))])
    process = grid.start(DDPLOG_SINKS="jsonl", DDPLOG_SEGMENT_BYTES=str(1 << 20))
    killer = Killer(job, chance)
    try:
        for kill in range(1, kills + 1):
            grid.allow(0.99 * steps * kill / kills)  # not all of it: the run may not end before its last kill
            killer.kill_one()
        grid.allow(steps)
        job.end(process, timeout_s=300)
    except BaseException:
        print(killer.seen, job.logs())
        raise
    grid.check_store(300)
    grid.check_jsonl()
    seen = killer.seen
    assert seen["kills"] == kills
    assert seen["in a start"] > kills * 0.1
    assert seen["after an ack"] > kills * 0.2
    counts = {
        "kills": kills,
        "in a start": seen["in a start"],
        "after an ack": seen["after an ack"],
        "values": grid.values,
        "points": grid.points,
    }
    print(counts, "lost 0, doubled 0, wrong 0")
    return counts


@pytest.mark.timeout(600)
def test_200_kills_of_the_aggregator_under_4_ranks_lose_and_double_nothing(job, suite_table):
    """Reliability cases 11 and 25: it answers only for what it has committed, and its next life goes on from there."""
    counts = kill_aggregators(job, KILLS, STEPS)
    suite_table("kill -9 of the aggregator", **counts, lost=0, doubled=0, wrong=0)


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_500_kills_of_the_aggregator_under_20_million_values_lose_and_double_nothing(job, suite_table):
    counts = kill_aggregators(job, NIGHTLY_KILLS, NIGHTLY_STEPS)
    suite_table("kill -9 of the aggregator", **counts, lost=0, doubled=0, wrong=0)
