"""Keeps the node's sampler (sampler.py): starts it, kills it when it is silent, ends it with the last rank.

A call to a driver can hang, even so that SIGKILL does not end the process. So nobody waits for a sampler: a silent one is
killed by its pid and forgotten, another one takes its place, and after MAX_STRIKES of them none calls a driver any more.
Imports neither pynvml nor psutil: the agent has no use for them.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from ddplog.bootstrap import command

_logger = logging.getLogger("ddplog.agent")

MAX_STRIKES: Final = 3
_WARM_UP_NS: Final = 1_000_000_000
"""A job that is over sooner is spared a further process."""
_PATIENCE_S: Final = (3.0, 10.0)
"""A sampler that is silent for two samples hangs; within these bounds. A driver without persistence takes seconds to start."""
_BACKOFF_NS: Final = (0, 1_000_000_000, 5_000_000_000, 30_000_000_000)
_GOOD_NS: Final = 60_000_000_000
"""A sampler that lived for so long is started again at once."""
_END_NS: Final = 1_000_000_000
"""How long one that is asked to end may take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the agent wants of a sampler."""

    created_unix_ns: int
    """When the run was begun, as its store says: on every node the same."""
    sample_s: float
    with_gpus: bool = True
    notice: str = ""
    """What the run is to be told: why the sampler before this one was killed."""
    notice_level: str = "warning"

    def encode(self) -> str:
        """Return it as a command line's word."""
        return json.dumps(asdict(self))


class Keeper:
    """The sampler of one node and run.

    Args:
        folder: The job's.
        sample_s: Of the settings; 0: there is none.
        abandon: Called once a sampler writes no more, whatever became of its process.
    """

    def __init__(self, folder: Path, sample_s: float, abandon: Callable[[], None]) -> None:
        self._folder = folder
        self._sample_s = sample_s
        self._abandon = abandon
        self._patience_ns = int(min(max(2 * sample_s, _PATIENCE_S[0]), _PATIENCE_S[1]) * 1e9)
        self._process: subprocess.Popen[bytes] | None = None
        self._doomed: list[subprocess.Popen[bytes]] = []
        """Killed, and not yet gone."""
        self._wanted_ns: int | None = None
        """Since when there has been somebody to sample."""
        self._started_ns = 0
        self._heard_ns = 0
        self._asked_ns: int | None = None
        self._num_failures = 0
        self._notice = ("", "warning")
        """What the next one tells the run, and how loud."""
        self.num_strikes = 0

    @property
    def pid(self) -> int:
        """Of the sampler; 0: there is none."""
        return self._process.pid if self._process is not None else 0

    def look(self, created_unix_ns: int, now_ns: int) -> None:
        """See to it that there is a sampler; called while ranks live.

        Args:
            created_unix_ns: When the run was begun; 0: it is not known yet, or the aggregator knows no samplers.
            now_ns: Monotonic time.
        """
        self._asked_ns = None
        self._bury()
        if not self._sample_s:
            return
        self._wanted_ns = now_ns if self._wanted_ns is None else self._wanted_ns
        if self._process is None:
            wait_ns = _BACKOFF_NS[min(self._num_failures, len(_BACKOFF_NS) - 1)]
            if created_unix_ns and now_ns >= max(self._wanted_ns + _WARM_UP_NS, self._started_ns + wait_ns):
                self._start(created_unix_ns, now_ns)
        elif self._process.poll() is not None:
            _logger.warning("the sampler ended with %d", self._process.returncode)
            self._num_failures = 1 if now_ns - self._started_ns > _GOOD_NS else self._num_failures + 1
            self._forget()
        elif self._is_silent(self._process, now_ns):
            self._strike(self._process)

    def _start(self, created_unix_ns: int, now_ns: int) -> None:
        notice, level = self._notice
        plan = Plan(
            created_unix_ns=created_unix_ns,
            sample_s=self._sample_s,
            with_gpus=self.num_strikes < MAX_STRIKES,
            notice=notice,
            notice_level=level,
        )
        self._started_ns = self._heard_ns = now_ns
        try:
            with (self._folder / "logs" / "sampler.log").open("ab") as log:
                self._process = subprocess.Popen(
                    command("ddplog.agent.sampler", str(self._folder), plan.encode()),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    start_new_session=True,
                )
        except OSError as exc:  # no memory, or too many processes: a later time
            _logger.error("cannot start the sampler: %s", exc)
            self._num_failures += 1
            return
        self._notice = ("", "warning")
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)

    def _is_silent(self, process: subprocess.Popen[bytes], now_ns: int) -> bool:
        assert process.stdout is not None
        if process.stdout.read():
            self._heard_ns = now_ns
        return now_ns - self._heard_ns > self._patience_ns

    def _strike(self, process: subprocess.Popen[bytes]) -> None:
        self.num_strikes += 1
        self._num_failures = 0
        for_s = self._patience_ns / 1e9
        text = f"a call to the driver did not return within {for_s:g} s: the sampler was killed"
        if self.num_strikes < MAX_STRIKES:
            self._notice = f"{text}, and another one started ({self.num_strikes} of {MAX_STRIKES})", "warning"
        elif self.num_strikes == MAX_STRIKES:
            self._notice = f"{text} for the {MAX_STRIKES}rd time: GPUs are not sampled any more in this job", "error"
        else:  # it did not even call one
            self._sample_s = 0.0
        _logger.error("%s; strike %d", text, self.num_strikes)
        self._kill(process)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        self._doomed.append(process)
        self._forget()

    def _forget(self) -> None:
        if self._process is not None and self._process.stdout is not None:
            self._process.stdout.close()
        self._process = None
        self._abandon()

    def _bury(self) -> None:
        self._doomed = [process for process in self._doomed if process.poll() is None]

    def end(self, now_ns: int) -> bool:
        """End the sampler; called until it returns whether there is none any more."""
        self._bury()
        self._wanted_ns = None
        process = self._process
        if process is None:
            return True
        if self._asked_ns is None:
            self._asked_ns = now_ns
            process.terminate()
        if process.poll() is not None:
            self._forget()
        elif now_ns - self._asked_ns > _END_NS:
            self._kill(process)
        return self._process is None

    def __repr__(self) -> str:
        return f"<Keeper pid={self.pid} strikes={self.num_strikes} failures={self._num_failures}>"
