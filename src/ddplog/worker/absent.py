"""Owns what a run is where nothing can be logged: with mode=off, and in a process that is none of the job's ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ddplog.core.records import NO_STEP
from ddplog.worker import current
from ddplog.worker.run import Run


class NullRun(Run):
    """A run that takes nothing: mode=off."""

    def __init__(self) -> None:
        pass

    run_id = "off"
    dir = ""
    rank = 0
    world_size = 1
    step = None
    drops: Mapping[str, int] = {}

    def log(self, data: Mapping[str, Any], step: int | None = None, weight: float = 1.0) -> None:  # noqa: ARG002
        """Take nothing."""
        self._refuse("log")

    def set_step(self, step: int) -> None:
        """Do nothing."""

    def skip(self, what: str, why: str) -> None:
        """Do nothing."""

    def flush(self) -> None:
        """Do nothing."""

    def finish(self, status: str = "finished", detail: str = "") -> None:
        """Do nothing."""

    def log_text(self, key: str, text: str, step: int | None = None) -> None:  # noqa: ARG002
        """Take nothing."""
        self._refuse("log_text")

    def alert(self, title: str, text: str = "", level: str = "warning") -> None:  # noqa: ARG002
        """Take nothing."""
        self._refuse("alert")

    def _message(self, message: Mapping[str, Any], step: int = NO_STEP, *, is_last: bool = False) -> None:  # noqa: ARG002
        self._refuse(str(message["type"]))

    def _refuse(self, call: str) -> None:
        """What every call comes to."""

    def __reduce__(self) -> Any:
        return NullRun, ()

    def __repr__(self) -> str:
        return "<ddplog.Run off>"


class AbsentRun(NullRun):
    """A run in a process that is none of its ranks, such as a DataLoader worker: takes nothing, and says so once."""

    def __init__(self, run_id: str = "absent", folder: str = "", rank: int = 0, world_size: int = 1) -> None:
        self.run_id, self.dir, self.rank, self.world_size = run_id, folder, rank, world_size
        self._warned = set()

    def _refuse(self, call: str) -> None:
        self._warn("absent", f"{call}() in a worker process is ignored: log in the rank's own process")

    def __reduce__(self) -> Any:
        return AbsentRun, (self.run_id, self.dir, self.rank, self.world_size)

    def __repr__(self) -> str:
        return f"<ddplog.Run {self.run_id} in a worker process>"


def arrive(incarnation: bytes, run_id: str, folder: str, rank: int, world_size: int) -> Run:
    """Return what a pickled run is where it arrives: itself in its own process, and absent in any other."""
    for run in current.runs:
        if run._journal.incarnation == incarnation:  # noqa: SLF001 - the same package
            return run
    return AbsentRun(run_id, folder, rank, world_size)
