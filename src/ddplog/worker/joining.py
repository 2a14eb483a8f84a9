"""Decides which run a framework's hook logs to: the current one, or one that it starts, late enough to know the rank.

A hook is made where a script begins; the process learns its rank when the framework starts to train. So hooks ask here
at their first use, never in their constructor, and every rank asks at the same point of the job.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

from ddplog.errors import ConfigError
from ddplog.worker import contexts, current, identity
from ddplog.worker.absent import AbsentRun, NullRun
from ddplog.worker.lifecycle import init
from ddplog.worker.run import Run


def join(settings: Mapping[str, Any]) -> Run:
    """Return the current run if there is one that takes values, else init(**settings).

    In a process that serves a rank (a DataLoader worker has its rank's variables, too) there is nothing to start.

    Raises:
        ConfigError: If a setting cannot work, or the current run was started when nobody knew that there are other ranks.
    """
    run = current.run
    if run is None or not is_open(run):
        return AbsentRun() if _is_helper() else init(**settings)
    who = identity.detect(os.environ, contexts.initialised(sys.modules))
    if not isinstance(run, NullRun) and (who.rank, who.world_size) != (run.rank, run.world_size):
        what = (
            f"ddplog.init() was called before the ranks were known; this is rank {who.rank} of {who.world_size}, and "
        )
        raise ConfigError("world_size", run.world_size, what + identity.WHERE_TO_START)
    return run


def is_open(run: Run) -> bool:
    """Whether a run takes values: not one that was finished or forked, nor what a worker process has instead."""
    if isinstance(run, NullRun):
        return not isinstance(run, AbsentRun)  # mode=off is a wish
    return run._journal.is_open  # noqa: SLF001 - the same package


def _is_helper() -> bool:
    """Whether multiprocessing started this process, and not as a rank."""
    data = sys.modules.get("torch.utils.data")
    if data is not None and data.get_worker_info() is not None:
        return True
    return current.is_worker() and not contexts.initialised(sys.modules)
