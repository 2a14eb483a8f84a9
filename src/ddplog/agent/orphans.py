"""Finds what killed jobs left in this node's spool, so that the next job that starts here completes them.

An orphan is a job's folder with journals, none of whose ranks lives, that has no agent and is not done. One of the same
run is shipped by the new job's own agent, since a run has one aggregator. One of another run gets an agent of its own
again, which does what it would have done, and ends the run; so does one of the same run whose launcher was another node of
it, since a writer belongs to its node: that agent finds the run's aggregator as it did before.
"""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from ddplog.journal.election import ensure_agent, has_agent
from ddplog.journal.segment import is_held
from ddplog.journal.spool import DONE, JobInfo, read_job

_logger = logging.getLogger("ddplog.agent")

MOST_AT_ONCE: Final = 4
"""Runs of others that one start takes up, the newest first: each is three processes. `ddplog sync` takes up any."""


def take_up(spool: Path, own: Path, job: JobInfo) -> list[Path]:
    """Start an agent for orphans of other runs.

    Returns:
        The folders of `job`'s own run, locked by this process until it ends: its agent is theirs now.
    """
    adopted, others = [], []
    for folder in _orphans(spool, own):
        with suppress(OSError, ValueError, KeyError, TypeError):  # not a job of this version, or gone by now
            orphan = read_job(folder)
            is_ours = orphan.run_dir.resolve() == job.run_dir.resolve()
            if is_ours and orphan.node_rank == job.node_rank:
                if _try_lock(folder):
                    adopted.append(folder)
            elif orphan.run_dir.exists():  # else somebody has deleted it
                others.append(folder)
    for folder in others[:MOST_AT_ONCE]:
        with suppress(OSError):
            ensure_agent(folder)
            _logger.info("started an agent for %s, whose job was killed", folder.name)
    return adopted


def _orphans(spool: Path, own: Path) -> Iterator[Path]:
    paths = [path.parent for path in spool.glob("*/job.json") if path.parent != own]
    for folder in sorted(paths, key=_age, reverse=True):
        if not (folder / DONE).exists() and _is_dead(folder) and not has_agent(folder):
            yield folder


def _age(folder: Path) -> float:
    try:
        return (folder / "job.json").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _is_dead(folder: Path) -> bool:
    """Whether it has journals, and nobody writes one of them."""
    journals = [path.parent for path in folder.glob("*.*/head")]
    return bool(journals) and not any(is_held(journal / "alive") for journal in journals)


def _try_lock(folder: Path) -> bool:
    descriptor = os.open(folder / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return False
    return True
