"""Watches the processes of a job: resident memory, descriptors and threads of each, by role and life.

A slope is the median of those between any two samples of one life, of all lives of a role at once, the farther apart
the heavier (Theil and Sen): what grows with the records, whatever a life began with. A backlog that comes and goes moves
a line of least squares by ten MB per million, and this one hardly. The start of every life is left out, since a process
that catches up fills its buffers once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from statistics import median

import numpy as np
import psutil
from system.jobs import Job

ROLES = {
    "ddplog.aggregator.process": "aggregator",
    "ddplog.agent.process": "agent",
    "ddplog.forward.__main__": "forwarder",
    "train.py": "rank",
}
_MOST_SAMPLES = 400
"""Of one life, between any two of which a slope is taken."""
_GROWN_UP_S = 0.3
"""A process that is younger may still have the command line of the one that forked it; and if that one was stopped in
the midst of it, so may one that is older: the command line is looked at again every time."""
_SETTLED_S = 10.0
"""Who is somebody else's at this age is no more looked at."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at one process."""

    age_s: float
    num_records: int
    """In the store when it was looked: a rank's own, as far as all ranks are alike, for the others the job's."""
    rss_mb: float
    num_fds: int
    num_threads: int


@dataclass(slots=True)
class Life:
    """One process."""

    role: str
    process: psutil.Process
    words: list[str]
    began: float
    samples: list[Sample] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Trend:
    """What became of a role over its lives, after warm-up."""

    lives: int
    samples: int
    records: int
    """Seen by the lives together, after warm-up."""
    mb_per_million: float
    """NaN: too little was seen."""
    between: tuple[float, float]
    """Where four of five of the slopes between two samples lie."""
    first_mb: float
    """Mean of the lives' first samples after warm-up."""
    last_mb: float
    most_mb: float
    fds: tuple[float, float]
    """Median in the first and in the second half, of the life where it rose most."""
    threads: tuple[float, float]

    def __str__(self) -> str:
        return (
            f"{self.lives:4} lives {self.samples:6} samples {self.records:11,} records  {self.mb_per_million:+8.3f} "
            f"({self.between[0]:+.1f} to {self.between[1]:+.1f}) MB per million  rss {self.first_mb:.1f} -> {self.last_mb:.1f}, at most {self.most_mb:.1f} MB  "
            f"fds {self.fds[0]:.0f} -> {self.fds[1]:.0f}  threads {self.threads[0]:.0f} -> {self.threads[1]:.0f}"
        )


class Watch:
    """The job's processes, found by their command lines, which name the job's folder.

    Args:
        job: Whose.
        ranks: How many there are.
    """

    def __init__(self, job: Job, ranks: int) -> None:
        self._folder, self._ranks = str(job.folder), ranks
        self._lives: dict[tuple[int, float], Life] = {}
        self._strangers: set[tuple[int, float]] = set()

    def alive(self, role: str) -> list[psutil.Process]:
        """Return the processes that have this role and live."""
        return [life.process for life in self._lives.values() if life.role == role and _lives(life.process)]

    def look(self, num_records: int) -> None:
        """Take a sample of every process."""
        self._find()
        now = time.time()
        for key, life in list(self._lives.items()):
            if not _lives(life.process):
                continue
            try:
                words = life.process.cmdline()
                if not words:  # it is ending just now; its samples count
                    continue
                if words != life.words:
                    del self._lives[key]
                    continue
                with life.process.oneshot():
                    rss = life.process.memory_info().rss / 1e6
                    counts = life.process.num_fds(), life.process.num_threads()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
                continue
            its_own = num_records // self._ranks if life.role == "rank" else num_records
            life.samples.append(Sample(now - life.began, its_own, rss, *counts))

    def _find(self) -> None:
        for pid in psutil.pids():  # process_iter() would give the old process of a pid that came again
            try:
                process = psutil.Process(pid)
                key = process.pid, process.create_time()
                if key in self._lives or key in self._strangers or time.time() - key[1] < _GROWN_UP_S:
                    continue
                words = process.cmdline()
            except psutil.Error:
                continue
            role = next((role for name, role in ROLES.items() if any(name in word for word in words)), None)
            is_ours = any(self._folder in word for word in words) and not words[1].endswith("launcher.py")
            if role is not None and is_ours:
                self._lives[key] = Life(role, process, words, key[1])
            elif time.time() - key[1] > _SETTLED_S:
                self._strangers.add(key)

    def trends(self, warm_up_s: float, warm_up_records: Mapping[str, int]) -> dict[str, Trend]:
        """Return each role's, from the samples that are so old, and so many records into their life, by role."""
        found = defaultdict(list)
        for life in self._lives.values():
            if not life.samples:
                continue
            least = life.samples[0].num_records + warm_up_records[life.role]
            warm = [sample for sample in life.samples if sample.age_s >= warm_up_s and sample.num_records >= least]
            if len(warm) >= 4:
                found[life.role].append(warm)
        return {role: _trend(lives) for role, lives in sorted(found.items())}

    def rows(self) -> Iterator[tuple[str, int, Sample]]:
        """Give every sample, for whoever wants to draw it."""
        for (pid, _), life in self._lives.items():
            yield from ((life.role, pid, sample) for sample in life.samples)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def _trend(lives: list[list[Sample]]) -> Trend:
    low, middle, high = _slopes(lives)
    return Trend(
        lives=len(lives),
        samples=sum(map(len, lives)),
        records=sum(life[-1].num_records - life[0].num_records for life in lives),
        mb_per_million=middle,
        between=(low, high),
        first_mb=float(np.mean([life[0].rss_mb for life in lives])),
        last_mb=float(np.mean([life[-1].rss_mb for life in lives])),
        most_mb=max(sample.rss_mb for life in lives for sample in life),
        fds=_halves([[s.num_fds for s in life] for life in lives]),
        threads=_halves([[s.num_threads for s in life] for life in lives]),
    )


def _slopes(lives: list[list[Sample]]) -> tuple[float, float, float]:
    """Return the 10, 50 and 90 % of the slopes between two samples of a life, weighted by the records between them."""
    slopes, weights = [], []
    for life in lives:
        some = life[:: max(1, len(life) // _MOST_SAMPLES)]
        records = np.asarray([sample.num_records for sample in some]) / 1e6
        rss = np.asarray([sample.rss_mb for sample in some])
        first, second = np.triu_indices(len(some), 1)
        apart = records[second] - records[first]
        moved = apart > 0
        slopes.append((rss[second] - rss[first])[moved] / apart[moved])
        weights.append(apart[moved])
    slope, weight = np.concatenate(slopes), np.concatenate(weights)
    if not len(slope):
        return (float("nan"),) * 3
    order = np.argsort(slope)
    share = np.cumsum(weight[order]) / weight.sum()
    low, middle, high = (float(slope[order][np.searchsorted(share, part)]) for part in (0.1, 0.5, 0.9))
    return low, middle, high


def _halves(lives: list[list[int]]) -> tuple[float, float]:
    """Return the medians of the halves, where they differ most: a process that starts another has more for a moment."""
    halves = [(median(life[: len(life) // 2]), median(life[len(life) // 2 :])) for life in lives]
    return max(halves, key=lambda half: half[1] - half[0])
