"""Named places at which a process of ddplog kills itself, for tests of what it leaves behind.

    DDPLOG_KILL_AT=aggregator.after_commit:0.1,forwarder.after_write:0.5
    DDPLOG_KILL_LOG=/tmp/kills      a line "point pid" is appended to it before each kill

Every process that ddplog starts calls arm() once, when it starts; a process that is started again inherits the
variable. Nothing is armed unless the variable is set. SIGKILL: no handler, no buffer and no `finally` gets a chance.
Must not be used in the hot path of log(), nor draw from the random numbers of the training script.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from typing import Final

from ddplog.errors import ConfigError

KILL_AT: Final = "DDPLOG_KILL_AT"
KILL_LOG: Final = "DDPLOG_KILL_LOG"

POINTS: Final[Mapping[str, str]] = {
    "writer.before_rename": "a new segment is allocated and has its header, under its temporary name",
    "writer.after_rename": "a new segment can be seen and is empty",
    "agent.after_send": "a message is in the socket's queue",
    "agent.before_bye": "a rank is dead and its journal is read to the end, and nobody was told",
    "agent.after_ack": "an acknowledgement has been noted in the journals",
    "aggregator.after_log_append": "records are in the rank log, not on the disk",
    "aggregator.after_log_sync": "records are in the rank log, the store knows nothing of them",
    "aggregator.before_sql_commit": "the transaction is written and open",
    "aggregator.after_commit": "the transaction is durable, nobody has been answered",
    "aggregator.during_replay": "a restart has replayed the rank log, and nobody knows of it",
    "forwarder.after_write": "the sink has the batch, the cursor does not",
    "forwarder.after_cursor": "the cursor has passed the batch",
}
"""Name -> what is true there."""

_armed: Final[dict[str, float]] = {}
_chance: Final = random.SystemRandom()
_log: Final[list[str]] = []


def arm(environ: Mapping[str, str]) -> None:
    """Take the points from the environment, instead of those before; none if the variable is not set.

    Raises:
        ConfigError: There is no such point, or its probability is not a number in [0, 1].
    """
    wanted = dict(_parse(word, environ[KILL_AT]) for word in environ.get(KILL_AT, "").split(",") if word.strip())
    _armed.clear()
    _armed.update(wanted)
    _log[:] = [environ[KILL_LOG]] if environ.get(KILL_LOG) else []


def _parse(word: str, whole: str) -> tuple[str, float]:
    point, _, text = word.strip().partition(":")
    if point not in POINTS:
        raise ConfigError(KILL_AT, whole, f"no kill point {point!r}; there are {', '.join(POINTS)}")
    try:
        probability = float(text)
    except ValueError:
        probability = -1.0
    if not 0 <= probability <= 1:
        raise ConfigError(KILL_AT, whole, f"{point}:{text}: must be point:probability, a number between 0 and 1")
    return point, probability


def reach(point: str) -> None:
    """Die here, if this point is armed and its chance comes up."""
    if _armed and _chance.random() < _armed.get(point, 0.0):
        _die(point)


def _die(point: str) -> None:
    for path in _log:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.write(descriptor, f"{point} {os.getpid()}\n".encode())
        os.close(descriptor)
    os.kill(os.getpid(), signal.SIGKILL)
