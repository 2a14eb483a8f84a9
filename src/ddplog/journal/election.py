"""Owns starting the node's agent from a training process: whoever is first, again when it has died.

The agent becomes nobody's child (a shell starts it in the background and ends) and has no stream of the job, so
that neither the user's wait() nor `torchrun ... | tee` ever sees it.
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from ddplog.bootstrap import command
from ddplog.journal.segment import is_held

_PATIENCE_S: Final = 5.0
"""How long a started agent has to take its lock before another one is started."""


def has_agent(folder: Path) -> bool:
    """Tell whether the job's agent lives."""
    return is_held(folder / "agent.lock")


def ensure_agent(folder: Path) -> None:
    """Start the job's agent unless it lives or was started a moment ago. Takes about 2 ms when it starts one."""
    if has_agent(folder):
        return
    descriptor = os.open(folder / "spawn.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return  # another rank is at it
        started = os.pread(descriptor, 32, 0)
        now = time.clock_gettime(time.CLOCK_BOOTTIME)
        if started and 0 <= now - float(started) < _PATIENCE_S:
            return
        if has_agent(folder):
            return
        os.pwrite(descriptor, f"{now:<32.3f}".encode(), 0)
        _spawn(folder)
    finally:
        os.close(descriptor)


def _spawn(folder: Path) -> None:
    log = folder / "logs" / "agent.log"
    script = 'exec 0</dev/null 1>>"$1" 2>&1; shift; "$@" &'
    arguments = ["/bin/sh", "-c", script, "ddplog", str(log), *command("ddplog.agent.process", str(folder))]
    pid = os.posix_spawn("/bin/sh", arguments, os.environ, setsid=True)  # torchrun kills its ranks' process groups
    with suppress(ChildProcessError):  # the user's SIGCHLD handler was faster
        os.waitpid(pid, 0)
