"""Holds this process's experiment: what get_running_experiment() returns. Imports nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ddplog.comet.experiment import CometExperiment

experiment: CometExperiment | None = None
"""The one made last, ended or not, as in Comet."""
