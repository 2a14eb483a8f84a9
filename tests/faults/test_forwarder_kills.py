"""kill -9 of forwarders that deliver to a tracker which times out after it has committed, answers 500, and 429.

Two projects of one tracker, each with a forwarder of its own: one with a key, which has everything once; one that only
appends, where a batch is doubled if the tracker has it and the forwarder cannot know: each such batch is explained.
"""

import json
import os
import random
import signal
import time
from contextlib import suppress
from itertools import pairwise

import numpy as np
import psutil
import pytest
from faults.grid_job import CELLS, Grid
from faults.http_tracker import Project, Tracker, install_plugin
from system.jobs import SOURCE

from ddplog.sinks import parse_spec

pytestmark = pytest.mark.system

KILLS, STEPS = 100, 6_000
NIGHTLY_KILLS, NIGHTLY_STEPS = 1000, 60_000
NUM_RANKS, NUM_KEYS = 2, 20
PLAN = ((0.10, "timeout"), (0.10, "500"), (0.05, "429"))
IN_START = 0.1
LONGEST_S = 0.15
TIMEOUT_S = 0.3
BATCH_ITEMS = 1000
KILLS_AHEAD = 6
"""The ranks are ahead by so many kills' share of the steps, so that a life has more than one batch to deliver."""


class Killer:
    """Kills the forwarders of one sink, one after the other, each at a random moment."""

    def __init__(self, job, project, spec, chance):
        self._job, self._project, self._chance, self._spec = job, project, chance, spec
        self._cursor_path = job.run_dir / "sinks" / parse_spec(spec).folder_name / "cursor.json"
        self._cursor = 0
        self._due = 0.0
        self._pid = 0
        self.killed = []
        self.in_start = 0
        self._aim()

    def look(self):
        """Kill if the moment has come; return whether it has."""
        if not self._pid:
            self._pid = self._find()
            limit_s = LONGEST_S if self._pid else 0.0
            self._due = time.monotonic() + self._chance.random() * limit_s
        if not self._pid or time.monotonic() < self._due:
            return False
        os.kill(self._pid, signal.SIGKILL)
        self.in_start += self._project.last_pid != self._pid
        self.killed.append(self._pid)
        self._cursor, self._pid = self._read_cursor(), 0
        self._aim()
        return True

    def _aim(self):
        """A death without any delivery is answered with a longer pause: only some of them are to be such."""
        self._is_in_start = self._chance.random() < IN_START

    def _find(self):
        """Return a forwarder that has not been killed, and, unless its start is aimed at, has delivered something."""
        if not self._is_in_start and self._read_cursor() <= self._cursor:
            return 0
        aggregator = self._job.aggregator_pid()
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(aggregator).children() if aggregator else ():  # Process(None) would be this one
                if self._spec in child.cmdline() and child.pid not in self.killed[-1:]:
                    return child.pid
        return 0

    def _read_cursor(self):
        try:
            return json.loads(self._cursor_path.read_text())["cursor"]
        except FileNotFoundError:
            return 0


def check_rows(grid, rows):
    """Every point of the job is there once, with its value."""
    ids, keys, steps, values, counts, _ = zip(*rows, strict=True)
    assert len(set(ids)) == len(ids), "doubled"
    cells = np.asarray(steps) * CELLS + np.asarray([int(key[4:]) for key in keys])
    grid.check_cells(cells, np.asarray(counts), np.asarray(values))


def check_lives(project):
    """Each life of the forwarder delivers in the order of ids, and nothing again to which it had an answer."""
    lives = {}
    for post in project.posts:
        lives.setdefault(post.pid, []).append(post)
    for posts in lives.values():
        for before, post in pairwise(posts):
            if post.is_retry:
                assert post.rows == before.rows, "after a time-out another batch than before"
            else:
                assert post.rows[0][0] > before.rows[-1][0], "sent again after an answer, or out of order"
    assert all([row[0] for row in post.rows] == sorted({row[0] for row in post.rows}) for post in project.posts)
    return lives


def count_doubled(project, lives, killed):
    """Return how many batches are there again, after a look at why: no answer, or the last one of a killed life."""
    last = {pid: posts[-1] for pid, posts in lives.items() if pid in killed}
    there, doubled = {}, 0
    for post in project.posts:
        first = {there[row[0]].pid: there[row[0]] for row in post.rows if row[0] in there}
        doubled += bool(first)
        for before in first.values():
            is_last_of_killed = last.get(before.pid) is before or last.get(post.pid) is post
            assert (post.is_retry and before.pid == post.pid) or is_last_of_killed, "doubled without a reason"
        for row in post.rows:
            there.setdefault(row[0], post)
    return doubled


def kill_forwarders(job, kills, steps):
    seed = random.SystemRandom().getrandbits(32)
    chance = random.Random(seed)
    print("seed", seed)
    keyed, appended = Project(is_keyed=True, plan=PLAN, seed=seed), Project(is_keyed=False, plan=PLAN, seed=seed + 1)
    with Tracker({"keyed": keyed, "append": appended}).serving() as address:
        specs = [f"tracker://{address}/keyed", f"tracker://{address}/append"]
        grid = Grid(job, ranks=NUM_RANKS, steps=steps, families=[list(range(NUM_KEYS))])
        job.environ |= {
            "PYTHONPATH": f"{SOURCE}:{install_plugin(job.folder)}",
            "TRACKER_TIMEOUT_S": str(TIMEOUT_S),
            "TRACKER_ITEMS": str(BATCH_ITEMS),
        }
        process = grid.start(DDPLOG_SINKS=",".join(specs))
        killers = [Killer(job, project, spec, chance) for project, spec in zip((keyed, appended), specs, strict=True)]
        done, deadline = 0, time.monotonic() + 60 + 10 * kills
        try:
            while done < kills:
                assert time.monotonic() < deadline, "the forwarders do not come back"
                # Every kill lets them go on, so that there is something to deliver, and none lets the run end.
                grid.allow(0.95 * steps * (done + KILLS_AHEAD) / (kills + KILLS_AHEAD))
                done += sum(killer.look() for killer in killers)
                time.sleep(0.005)
            grid.allow(steps)
            job.end(process, timeout_s=300)
            job.open(300).close()
        except BaseException:
            print(keyed.seen, appended.seen, [len(killer.killed) for killer in killers], job.logs())
            raise
    return grid, (keyed, appended), killers


def check_delivery(grid, projects, killers):
    keyed, appended = projects
    check_rows(grid, keyed.table.values())
    assert keyed.seen["wrong"] == 0, "a row came again with another content"
    check_rows(grid, {row for post in appended.posts for row in post.rows})
    counts = {"kills": 0, "kills in a start": 0, "points": 2 * grid.points, "doubled_with_a_reason": 0}
    for project, killer in zip(projects, killers, strict=True):
        doubled = count_doubled(project, check_lives(project), set(killer.killed))
        assert doubled <= len(killer.killed) + sum(post.is_retry for post in project.posts)
        assert project.seen["too early after 429"] == 0
        counts["kills"] += len(killer.killed)
        counts["kills in a start"] += killer.in_start
        counts["doubled_with_a_reason"] += doubled
        print(project.seen, f"doubled with a reason: {doubled}")
    assert all(keyed.seen[what] + appended.seen[what] for _, what in PLAN), "a fault that never happened"
    assert not list(grid.job.run_dir.glob("sinks/*/dead.jsonl"))
    print(counts)
    return counts


def report(suite_table, counts):
    doubled = counts.pop("doubled_with_a_reason")
    suite_table("kill -9 of a forwarder", **counts, **{"batches again, each explained": doubled}, lost=0, wrong=0)


@pytest.mark.timeout(600)
def test_100_kills_of_forwarders_lose_nothing_and_double_only_what_nobody_could_know(job, suite_table):
    """Reliability cases 11 and 14: no answer is no failure, so the same batch is sent again; 429 is waited out."""
    report(suite_table, check_delivery(*kill_forwarders(job, KILLS, STEPS)))


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_1000_kills_of_forwarders_lose_nothing_and_double_only_what_nobody_could_know(job, suite_table):
    report(suite_table, check_delivery(*kill_forwarders(job, NIGHTLY_KILLS, NIGHTLY_STEPS)))
