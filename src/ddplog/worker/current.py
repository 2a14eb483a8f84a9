"""Holds the run of the last init() of this process: the one global, apart so that reading it imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddplog.worker.run import Run

run: Run | None = None
