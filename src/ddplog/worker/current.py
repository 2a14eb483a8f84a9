"""Holds the runs of this process: the one global state, apart so that reading it imports nothing."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddplog.worker.run import Run

run: Run | None = None
"""That of the last init()."""

runs: list[Run] = []
"""Those of every init() whose journal is open, and of the last one."""


def is_worker() -> bool:
    """Whether multiprocessing started this process: a DataLoader worker, or a rank of torch.multiprocessing.spawn."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and process.parent_process() is not None


def is_main_imported_again() -> bool:
    """Whether such a process runs the main module again, to find what it was given (spawn and forkserver do so)."""
    process = sys.modules.get("multiprocessing.process")
    return process is not None and getattr(process.current_process(), "_inheriting", False)
