"""Owns the forwarder processes of a run: one per sink, started again when one crashes."""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ddplog.bootstrap import command
from ddplog.journal.segment import is_locked
from ddplog.sinks import parse_spec
from ddplog.store.sink_states import read_sink_state

_logger = logging.getLogger("ddplog.aggregator")

EXIT_FAILED: Final = 3
"""The forwarder cannot work at all (its sink's package is missing): it is not started again. Any other end is final
only if the sink is drained: 0 also means that an earlier aggregator's forwarder still holds the sink."""
_STARTS_AFTER_PROGRESS: Final = 1
"""How many starts count against a forwarder whose sink took something since: it was killed, it is not broken."""
_BACKOFF_NS: Final = (0, 200_000_000, 1_000_000_000, 5_000_000_000, 30_000_000_000)


@dataclass(slots=True)
class _Forwarder:
    sink: str
    folder: str
    process: subprocess.Popen[bytes] | None = None
    has_ended: bool = False
    num_starts: int = 0
    started_ns: int = 0
    cursor: int = 0
    """How far the sink was when the process was started."""


class Forwarders:
    """The forwarders of one run.

    Args:
        run_dir: The run's folder.
        sinks: Their specs.
    """

    def __init__(self, run_dir: Path, sinks: Sequence[str]) -> None:
        self.run_dir = run_dir
        self._forwarders = [_Forwarder(sink=sink, folder=parse_spec(sink).folder_name) for sink in sinks]

    def supervise(self, now_ns: int, last_id: int = 0) -> None:
        """Start what is not running, and what ended before it had delivered `last_id`, the store's newest emission."""
        for forwarder in self._forwarders:
            if forwarder.process is not None:
                code = forwarder.process.poll()
                if code is None:
                    continue
                forwarder.process = None
                if code == EXIT_FAILED or (code == 0 and self._is_drained(forwarder, last_id)):
                    forwarder.has_ended = True
                else:
                    _logger.warning("the forwarder to %s ended with %d", forwarder.sink, code)
                    if self._cursor(forwarder) > forwarder.cursor:
                        forwarder.num_starts = min(forwarder.num_starts, _STARTS_AFTER_PROGRESS)
            backoff = _BACKOFF_NS[min(forwarder.num_starts, len(_BACKOFF_NS) - 1)]
            is_due = not forwarder.has_ended and now_ns - forwarder.started_ns >= backoff
            if is_due and not self._is_taken(forwarder):
                self._start(forwarder, now_ns)

    def _is_taken(self, forwarder: _Forwarder) -> bool:
        """Whether an earlier aggregator's forwarder still has the sink: another one would only end again."""
        try:
            descriptor = os.open(self.run_dir / "sinks" / forwarder.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            return is_locked(descriptor)
        finally:
            os.close(descriptor)

    def _cursor(self, forwarder: _Forwarder) -> int:
        try:
            return int(json.loads((self.run_dir / "sinks" / forwarder.folder / "cursor.json").read_text())["cursor"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0

    def _is_drained(self, forwarder: _Forwarder, last_id: int) -> bool:
        """Whether it has delivered the end: the one there is now, not one after which the run went on."""
        state = read_sink_state(self.run_dir / "sinks" / forwarder.folder / "state.json")
        return state.state == "drained" and state.through >= last_id

    def _start(self, forwarder: _Forwarder, now_ns: int) -> None:
        forwarder.num_starts += 1
        forwarder.started_ns = now_ns
        forwarder.cursor = self._cursor(forwarder)
        logs = self.run_dir / "logs"
        logs.mkdir(exist_ok=True)
        with (logs / f"forward-{forwarder.folder}.log").open("ab") as log:
            arguments = ("--run-dir", str(self.run_dir), "--sink", forwarder.sink, "--parent-pid", str(os.getpid()))
            forwarder.process = subprocess.Popen(
                command("ddplog.forward.__main__", *arguments),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def resume(self) -> None:
        """The run goes on: whoever has delivered its end is needed again."""
        for forwarder in self._forwarders:
            forwarder.has_ended = False
            forwarder.num_starts = 0

    @property
    def have_ended(self) -> bool:
        """Whether every forwarder has delivered the run's end, or cannot."""
        return all(forwarder.has_ended for forwarder in self._forwarders)

    def leave(self) -> None:
        """Let them run on by themselves."""
        for forwarder in self._forwarders:
            if forwarder.process is not None:
                forwarder.process.returncode = 0  # no ResourceWarning: it is meant to outlive us
