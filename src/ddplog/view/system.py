"""Decides how what the nodes' samplers measured looks on a terminal: a table of the last values and who has the extremes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ddplog.core.records import SYSTEM_PREFIX
from ddplog.view.text import count, number, seconds, size, words

if TYPE_CHECKING:
    from rich.console import RenderableType

    from ddplog.store.columns import Drop, Metric

_FLAGS: Final = SYSTEM_PREFIX + "gpu/throttle"
"""Metrics that are 0 most of the time, and shown only where they are not."""


def is_system(key: str) -> bool:
    """Whether a sampler measured it, not the training script."""
    return key.startswith(SYSTEM_PREFIX)


def parted(metrics: Iterable[Metric]) -> tuple[list[Metric], list[Metric]]:
    """Return (the script's metrics, the samplers')."""
    own: list[Metric] = []
    system: list[Metric] = []
    for metric in metrics:
        (system if is_system(metric.key) else own).append(metric)
    return own, system


def system_table(metrics: Sequence[Metric], drops: Iterable[Drop]) -> RenderableType:
    """Return the last value of each metric over the ranks that have it.

    Args:
        metrics: The samplers'.
        drops: What the samplers could not write.
    """
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for name in ("sampled", ">at", ">mean", ">min", ">max", ">ranks"):
        table.add_column(name.removeprefix(">"), justify="right" if name.startswith(">") else "left", no_wrap=True)
    for metric in metrics:
        last = metric.last
        if not len(last) or (metric.key.startswith(_FLAGS) and not last.max[-1]):
            continue
        show = _unit(metric.key)
        is_apart = int(last.n[-1]) > 1
        low, high = (
            f"{show(float(value[-1]))} r{rank[-1]}" if is_apart else ""
            for value, rank in ((last.min, last.min_rank), (last.max, last.max_rank))
        )
        table.add_row(
            words(metric.key.removeprefix(SYSTEM_PREFIX)),
            seconds(int(last.step[-1])),
            show(float(last.mean[-1])),
            low,
            high,
            f"{last.n[-1]}/{last.expected[-1]}",
        )
    lost = sum(drop.count for drop in drops)
    if not lost:
        return table
    return Group(table, Text(f"{count(lost)} sampled values could not be written: the spool's disk is full", "yellow"))


def _unit(key: str) -> Callable[[float], str]:
    """Return how a metric's values are shown: bytes in their unit, everything else as a number."""
    if key.endswith("_bytes"):
        return _bytes
    if key.endswith("_bytes_per_s"):
        return lambda value: f"{_bytes(value)}/s"
    return number


def _bytes(value: float) -> str:
    return "-" if math.isnan(value) else size(value)
