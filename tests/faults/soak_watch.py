"""Watches the processes of a job: resident memory, descriptors and threads of each, by role and life.

A slope is that of a line through the samples of all lives of a role at once, each life with a level of its own: what
grows with the records that the job has taken, whatever a life began with. The start of every life is left out, since
a process that catches up fills its buffers once.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import psutil
from system.jobs import Job

ROLES = {
    "ddplog.aggregator.process": "aggregator",
    "ddplog.agent.process": "agent",
    "ddplog.forward.__main__": "forwarder",
    "train.py": "rank",
}
_GROWN_UP_S = 0.3
"""A process that is younger may still have the command line of the one that forked it."""


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
    """NaN: too little was seen for a line."""
    error: float
    """Of the slope: one standard error. Samples follow each other, so it is too small rather than too large."""
    first_mb: float
    """Mean of the lives' first samples after warm-up."""
    last_mb: float
    most_mb: float
    fds: tuple[int, int]
    """Largest number in the first and in the second half of any life."""
    threads: tuple[int, int]

    def __str__(self) -> str:
        return (
            f"{self.lives:4} lives {self.samples:6} samples {self.records:11,} records  {self.mb_per_million:+8.3f} "
            f"+- {self.error:.3f} MB per million  rss {self.first_mb:.1f} -> {self.last_mb:.1f}, at most {self.most_mb:.1f} MB  "
            f"fds {self.fds[0]} -> {self.fds[1]}  threads {self.threads[0]} -> {self.threads[1]}"
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
        for life in self._lives.values():
            if not _lives(life.process):
                continue
            try:
                with life.process.oneshot():
                    rss = life.process.memory_info().rss / 1e6
                    counts = life.process.num_fds(), life.process.num_threads()
            except (psutil.NoSuchProcess, psutil.AccessDenied):  # it has ended meanwhile
                continue
            its_own = num_records // self._ranks if life.role == "rank" else num_records
            life.samples.append(Sample(now - life.began, its_own, rss, *counts))

    def _find(self) -> None:
        for process in psutil.process_iter():
            try:
                key = process.pid, process.create_time()
                if key in self._lives or key in self._strangers or time.time() - key[1] < _GROWN_UP_S:
                    continue
                words = process.cmdline()
            except psutil.Error:
                continue
            role = next((role for name, role in ROLES.items() if any(name in word for word in words)), None)
            is_ours = any(self._folder in word for word in words) and not words[1].endswith("launcher.py")
            if role is not None and is_ours:
                self._lives[key] = Life(role, process, key[1])
            else:
                self._strangers.add(key)

    def trends(self, warm_up_s: float, warm_up_records: int) -> dict[str, Trend]:
        """Return each role's, from the samples that are both so old and so many records into their life."""
        found = defaultdict(list)
        for life in self._lives.values():
            warm = [
                sample
                for sample in life.samples
                if sample.age_s >= warm_up_s and sample.num_records >= life.samples[0].num_records + warm_up_records
            ]
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
    x = np.concatenate([_centred([s.num_records / 1e6 for s in life]) for life in lives])
    y = np.concatenate([_centred([s.rss_mb for s in life]) for life in lives])
    spread = float(x @ x)
    slope = float(x @ y) / spread if spread > 0 else float("nan")
    rest = y - slope * x
    error = float(np.sqrt(rest @ rest / max(1, len(x) - len(lives) - 1) / spread)) if spread > 0 else float("nan")
    return Trend(
        lives=len(lives),
        samples=len(x),
        records=sum(life[-1].num_records - life[0].num_records for life in lives),
        mb_per_million=slope,
        error=error,
        first_mb=float(np.mean([life[0].rss_mb for life in lives])),
        last_mb=float(np.mean([life[-1].rss_mb for life in lives])),
        most_mb=max(sample.rss_mb for life in lives for sample in life),
        fds=_halves([[s.num_fds for s in life] for life in lives]),
        threads=_halves([[s.num_threads for s in life] for life in lives]),
    )


def _centred(values: list[float]) -> np.ndarray:
    column = np.asarray(values)
    return column - column.mean()


def _halves(lives: list[list[int]]) -> tuple[int, int]:
    return max(max(life[: len(life) // 2]) for life in lives), max(max(life[len(life) // 2 :]) for life in lives)
