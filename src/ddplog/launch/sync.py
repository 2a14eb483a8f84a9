"""Completes a run after the fact: what journals of this node still hold, then what its sinks have not got.

The same agent, aggregator and forwarders do the work as in a live run; this only starts them again and waits.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddplog.bootstrap import command
from ddplog.journal.election import ensure_agent, has_agent
from ddplog.journal.spool import DONE, read_job

POLL_S: Final = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """What became of one sink."""

    sink: str
    state: str
    detail: str


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


def deliver(run_dir: Path, sinks: Sequence[str]) -> list[Delivery]:
    """Run a forwarder for each sink until it has delivered what the store holds."""
    processes = [
        subprocess.Popen(command("ddplog.forward.__main__", "--run-dir", str(run_dir), "--sink", sink, "--once"))
        for sink in sinks
    ]
    for process in processes:
        process.wait()
    return list(_deliveries(run_dir))


def _deliveries(run_dir: Path) -> Iterator[Delivery]:
    for path in sorted(run_dir.glob("sinks/*/state.json")):
        state = json.loads(path.read_text())
        yield Delivery(sink=str(state["name"]), state=str(state["state"]), detail=str(state.get("detail") or ""))
