"""Decides what a torchmetrics object is when it is logged: this rank's own result, computed without a collective.

Metric.compute() gathers the states of all ranks first: called in log(), it would stop the job wherever a rank does not
log the same metric at the same time. ddplog reduces the ranks' results instead, like every other value, which is exact
for a metric that is a mean or sum over samples (accuracy, mean squared error; with weight=, where ranks have unequal
numbers of them) and for maxima and minima with that reduction. It is not for one that is no mean over samples (F1,
AUROC, a root of a mean): for such, log what metric.compute() gives, called on every rank.

The metric is left as it was: its states, its cache, and that its next compute() gathers. torchmetrics is never imported
here: an object of its can only exist if the user's process has.
"""

from __future__ import annotations

import sys
from typing import Any


def is_metric(value: Any) -> bool:
    """Whether this is a torchmetrics Metric or MetricCollection."""
    torchmetrics = sys.modules.get("torchmetrics")
    return torchmetrics is not None and isinstance(value, (torchmetrics.Metric, torchmetrics.MetricCollection))


def local_result(value: Any) -> Any:
    """Return what a metric's compute() gives from this rank's updates alone: a number, or a dict of a collection's.

    Raises:
        ValueError: If it had no update() since its last reset(): there is nothing to log.
    """
    metrics = [part for part in value.modules() if isinstance(part, sys.modules["torchmetrics"].Metric)]
    if not any(metric.update_called for metric in metrics):
        raise ValueError("had no update() yet")
    before = [(metric, metric._to_sync, metric._computed) for metric in metrics]  # noqa: SLF001 - no public way is as
    try:  # narrow: sync_on_compute counts from the next update() on only
        for metric in metrics:
            metric._to_sync = False  # noqa: SLF001
        return value.compute()
    finally:
        for metric, to_sync, computed in before:
            metric._to_sync, metric._computed = to_sync, computed  # noqa: SLF001
