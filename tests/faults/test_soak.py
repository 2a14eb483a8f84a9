"""The soak: millions of records with a fault every few seconds, and what becomes of each process's memory meanwhile.

Faults: kill -9 of the aggregator, the agent or a forwarder, and an aggregator that stands still for two seconds.
"""

import os
import random
import signal
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from faults.grid_job import Grid
from faults.soak_watch import ROLES, Watch

from ddplog.errors import DdplogError
from ddplog.store.reader import open_run

pytestmark = pytest.mark.system

FAULTS = {"kill aggregator": 2, "kill agent": 1, "kill forwarder": 2, "stop aggregator": 5}
"""What happens, and how often of ten times."""
LAST_KILL = 0.25
"""The part of the records after which the aggregator is stopped where it would have been killed: its memory goes up and
down by 10 MB with what is under way, and only a life of ten million records tells that from a growth of 1 MB per million."""
FAMILIES = [[family * 10 + place for place in range(family)] for family in range(1, 6)]
"""Records of one to five keys, in turn."""
LOOK_S = 0.25
AHEAD = 40_000
"""Steps that the ranks may be ahead of the store: enough that they go on while it stands still."""
WARM_UP = {"aggregator": 3_000_000, "agent": 300_000, "forwarder": 300_000, "rank": 100_000}
"""Records after which a life counts: the aggregator has met its largest backlog by then."""
MOST_MB_PER_MILLION = 1.0
MOST_FDS, MOST_THREADS, MOST_MB = 100, 20, 400


class Faults:
    """Does harm every few seconds.

    Args:
        watch: Knows the processes.
        chance: Of what and when.
        every_s: The mean time between two.
        stop_s: How long it stands still.
    """

    def __init__(self, watch, chance, every_s, stop_s):
        self._watch, self._chance, self._every_s, self._stop_s = watch, chance, every_s, stop_s
        self.seen = Counter()
        self._deck = []
        self._stopped = None
        self._next = time.monotonic() + every_s

    def go_on(self, part):
        """Do what is due; `part`: of the records that are stored."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._stopped is not None:
            with suppress(psutil.NoSuchProcess):
                self._stopped.send_signal(signal.SIGCONT)
            self._stopped = None
        else:
            if not self._deck:
                self._deck = [what for what, times in FAULTS.items() for _ in range(times)]
                self._chance.shuffle(self._deck)
            what = self._deck.pop()
            self._do("stop aggregator" if what == "kill aggregator" and part > LAST_KILL else what)
        wait_s = self._stop_s if self._stopped is not None else self._every_s * self._chance.uniform(0.3, 1.7)
        self._next = now + wait_s

    def _do(self, what):
        verb, role = what.split()
        alive = self._watch.alive(role)
        if not alive:
            return
        process = self._chance.choice(alive)
        with suppress(psutil.NoSuchProcess):
            if verb == "kill":
                process.kill()
            else:
                process.suspend()
                self._stopped = process
            self.seen[what] += 1

    def end(self):
        if self._stopped is not None:
            with suppress(psutil.NoSuchProcess):
                self._stopped.resume()


def stored(run_dir, ranks):
    """Return (records in the store, steps that every rank has there)."""
    try:
        with open_run(run_dir) as run:
            counts = [writer.next_seq for writer in run.writers()]
    except DdplogError:
        return 0, 0
    return sum(counts), min(counts) if len(counts) == ranks else 0


def soak(job, *, ranks, steps, block, least, every_s, stop_s, timeout_s, warm_up_s, warm_up_records):
    """Run it; `least`: so many faults happen before it ends."""
    seed = random.SystemRandom().getrandbits(32)
    print("seed", seed)
    grid = Grid(job, ranks=ranks, steps=steps, families=FAMILIES, block=block, pause_s=0, patience_s=0.1)
    watch = Watch(job, ranks)
    faults = Faults(watch, random.Random(seed), every_s, stop_s)
    process = grid.start(DDPLOG_SINKS="jsonl", DDPLOG_SPOOL_BYTES=str(64 << 20), DDPLOG_SEGMENT_BYTES=str(1 << 20))
    began, shown = time.monotonic(), 0.0
    try:
        while process.poll() is None:
            assert time.monotonic() < began + timeout_s, "it does not end"
            num_records, common = stored(job.run_dir, ranks)
            grid.allow(min(common + AHEAD, steps if faults.seen.total() >= least else 0.95 * steps))
            watch.look(num_records)
            faults.go_on(num_records / grid.records)
            if time.monotonic() > shown + 30:
                shown = time.monotonic()
                print(f"{shown - began:6.0f} s {num_records:12,} records", dict(faults.seen), flush=True)
            time.sleep(LOOK_S)
        faults.end()
        job.end(process)
        job.open(timeout_s).close()
    except BaseException:
        faults.end()
        print(faults.seen, job.logs())
        raise
    took_s = time.monotonic() - began
    trends = watch.trends(warm_up_s, warm_up_records)
    for role, trend in trends.items():
        print(f"{role:10} {trend}")
    print(f"{grid.records:,} records in {took_s:.0f} s; {dict(faults.seen)}", flush=True)
    keep_rows(watch)
    grid.check_store(60)
    grid.check_jsonl()
    print("lost 0, doubled 0, wrong 0")
    counts = {"records": grid.records, "points": grid.points, "faults": faults.seen.total()}
    return trends, counts


def keep_rows(watch):
    """Keep every sample where whoever runs it by hand says."""
    path = os.environ.get("SOAK_SAMPLES")
    if path:
        rows = [
            f"{role},{pid},{s.age_s:.2f},{s.num_records},{s.rss_mb:.3f},{s.num_fds},{s.num_threads}"
            for role, pid, s in watch.rows()
        ]
        Path(path).write_text("\n".join(rows))


@pytest.mark.timeout(300)
def test_a_short_soak_loses_and_doubles_nothing(job, suite_table):
    """The same code as at night; too short to say that anything is flat."""
    trends, counts = soak(
        job,
        ranks=4,
        steps=25_000,
        block=1,
        least=6,
        every_s=1,
        stop_s=0.5,
        timeout_s=200,
        warm_up_s=0.5,
        warm_up_records=dict.fromkeys(WARM_UP, 0),
    )
    assert trends["rank"].lives == 4
    for role, trend in trends.items():
        assert max(trend.fds) < MOST_FDS, f"{role}: {trend}"
        assert max(trend.threads) < MOST_THREADS, f"{role}: {trend}"
        assert trend.most_mb < MOST_MB, f"{role}: {trend}"
    suite_table("soak", **counts, lost=0, doubled=0, wrong=0, stuck=0)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_20_million_records_under_faults_leave_memory_descriptors_and_threads_flat(job, suite_table):
    """Reliability's I9: after warm-up resident memory grows by less than 1 MB per million records in every process."""
    steps = int(os.environ.get("SOAK_STEPS", "2500000"))
    trends, counts = soak(
        job,
        ranks=8,
        steps=steps,
        block=50,
        least=20,
        every_s=4,
        stop_s=2,
        timeout_s=6000,
        warm_up_s=5,
        warm_up_records=WARM_UP,
    )
    assert set(trends) == set(ROLES.values())
    assert trends["rank"].lives == 8
    for role, trend in trends.items():
        assert trend.mb_per_million < MOST_MB_PER_MILLION, f"{role}: {trend}"
        assert trend.fds[1] <= trend.fds[0] + 1, f"{role}: descriptors: {trend}"
        assert trend.threads[1] <= trend.threads[0], f"{role}: threads: {trend}"
    suite_table("soak", **counts, lost=0, doubled=0, wrong=0, stuck=0)
