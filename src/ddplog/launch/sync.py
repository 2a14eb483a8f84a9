"""Completes a run after the fact: what journals of this node still hold, then what its sinks have not got.

The same agent, aggregator and forwarders do the work as in a live run; this only starts them again and waits.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from ddplog.bootstrap import command
from ddplog.journal.election import ensure_agent, has_agent
from ddplog.journal.segment import is_held
from ddplog.journal.spool import DONE, read_job
from ddplog.store.sink_states import SinkState, read_sink_states

POLL_S: Final = 0.1


def unfinished_jobs(spool: Path, run_dir: Path) -> list[Path]:
    """Return the folders of this run, on this node, whose journals may hold records the store has not got."""
    return list(_unfinished(spool, run_dir.resolve()))


def _unfinished(spool: Path, run_dir: Path) -> Iterator[Path]:
    for path in sorted(spool.glob("*/job.json")):
        try:
            job = read_job(path.parent)
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if job.run_dir.resolve() == run_dir and not (path.parent / DONE).exists():
            yield path.parent


def is_live(folder: Path) -> bool:
    """Tell whether a rank of the job lives: then all that can be done is to wait for it."""
    return any(is_held(path) for path in folder.glob("*/alive"))


def finish_job(folder: Path, timeout_s: float) -> bool:
    """Let an agent ship what the folder's journals hold, and wait until it is done.

    Returns:
        Whether it is; False if it took longer than `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if (folder / DONE).exists() and not has_agent(folder):
            return True
        ensure_agent(folder)
        time.sleep(POLL_S)
    return False


def deliver(run_dir: Path, sinks: Sequence[str], timeout_s: float) -> tuple[SinkState, ...]:
    """Run a forwarder for each sink until it has delivered what the store holds, or asked to stop after `timeout_s`."""
    processes = [
        subprocess.Popen(command("ddplog.forward.__main__", "--run-dir", str(run_dir), "--sink", sink, "--once"))
        for sink in sinks
    ]
    deadline = time.monotonic() + timeout_s
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # it has stored how far it is
            process.wait()
    return read_sink_states(run_dir)
