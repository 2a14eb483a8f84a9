"""Decides which points of a metric a chart shows and how they travel in the page. Pure: numpy in, JSON-ready out.

A column travels as {"c": value} where all values are equal, else as {"t": type, "b": base64 of little-endian values}
with type i2, i4, f4 or f8: a quarter of the size of decimal text, and parsed by the browser without a parser.
"""

from __future__ import annotations

import base64
import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ddplog.store.columns import MetricColumns

MAX_POINTS: Final = 2000
"""Points of one series on a page: about 4 per horizontal pixel of a chart."""

MAX_TOTAL: Final = 400_000
"""Points of all series on a page: about 12 MB of HTML, which opens in a second."""

MIN_POINTS: Final = 200


def points_per_series(num_series: int) -> int:
    """Return how many points each of `num_series` may show."""
    return max(MIN_POINTS, min(MAX_POINTS, MAX_TOTAL // max(1, num_series)))


def keep_extremes(rows: Sequence[NDArray[np.float64]], max_points: int) -> NDArray[np.int64]:
    """Choose up to `max_points` positions such that no extreme and no gap of any row disappears from the chart.

    The positions are cut into equal buckets; each keeps where a row is smallest, where it is largest, and its first
    NaN. Averaging would hide the one-step spike that a report is opened for.

    Args:
        rows: Arrays of one length N >= 1 that share an x axis.
        max_points: At least 8 per row.

    Returns:
        Ascending positions; all of them where N <= max_points.
    """
    num = len(rows[0])
    if num <= max_points:
        return np.arange(num)
    has_nan = any(bool(np.isnan(row).any()) for row in rows)
    picks = 2 * len(rows) + has_nan
    num_buckets = max(1, (max_points - 2) // picks)
    width = -(-num // num_buckets)
    chosen = [np.array([0, num - 1])]
    for row in rows:
        padded = np.full(num_buckets * width, np.nan)
        padded[:num] = row
        matrix = padded.reshape(num_buckets, width)
        starts = np.arange(num_buckets) * width
        gap = np.isnan(matrix)
        chosen.append(starts + np.where(gap, np.inf, matrix).argmin(axis=1))
        chosen.append(starts + np.where(gap, -np.inf, matrix).argmax(axis=1))
    if has_nan:
        gaps = np.isnan(rows[0])
        at = np.flatnonzero(gaps)
        chosen.append(at[np.unique(at // width, return_index=True)[1]])
    found = np.unique(np.concatenate(chosen))
    return found[found < num]


def pack(values: NDArray[Any]) -> dict[str, Any]:
    """Encode a column for the page."""
    values = np.asarray(values)
    is_float = values.dtype.kind == "f"
    if not len(values):
        return {"c": None}
    if is_float and bool(np.isnan(values).all()):
        return {"c": None}
    if bool((values == values[0]).all()) and bool(np.isfinite(values[0])):
        return {"c": values[0].item()}
    kind = _float_type(values) if is_float else _int_type(values)
    return {"t": kind, "b": base64.b64encode(values.astype(f"<{kind}").tobytes()).decode("ascii")}


def _float_type(values: NDArray[np.float64]) -> str:
    """Return f4 where its 24 bits draw the same picture: not for small changes of a large value."""
    finite = np.abs(values[np.isfinite(values)])
    finite = finite[finite > 0]
    if not len(finite):
        return "f4"
    span = float(np.ptp(values[np.isfinite(values)]))
    largest = float(finite.max())
    fits = largest < 1e38 and float(finite.min()) > 1e-37
    return "f4" if fits and span > 1e-3 * largest else "f8"


def _int_type(values: NDArray[np.int64]) -> str:
    low, high = int(values.min()), int(values.max())
    if low >= -(1 << 15) and high < 1 << 15:
        return "i2"
    return "i4" if low >= -(1 << 31) and high < 1 << 31 else "f8"


class Extremes:
    """How often each rank held a metric's minimum and its maximum."""

    def __init__(self, key: str, columns: MetricColumns) -> None:
        # Where all ranks agree the first of them would win every tie.
        apart = columns.take((columns.n > 1) & (columns.min < columns.max))
        self.key = key
        self.num_points = len(apart)
        self.min_rank, self.min_share = _top(apart.min_rank)
        self.max_rank, self.max_share = _top(apart.max_rank)
        self.mean_n = float(apart.n.mean()) if len(apart) else 0.0

    def __repr__(self) -> str:
        return (
            f"<Extremes {self.key}: min rank {self.min_rank} {self.min_share:.0%}, "
            f"max rank {self.max_rank} {self.max_share:.0%} of {self.num_points}>"
        )

    @property
    def excess(self) -> float:
        """How many times its fair share the most extreme rank has."""
        return max(self.min_share, self.max_share) * self.mean_n

    @property
    def is_notable(self) -> bool:
        """Whether chance would not explain it: twice the fair share, and 5 standard deviations above it."""
        if self.num_points < 20 or self.mean_n < 2:
            return False
        fair = 1 / self.mean_n
        spread = math.sqrt(fair * (1 - fair) / self.num_points)
        return max(self.min_share, self.max_share) > max(fair + 5 * spread, min(2 * fair, 0.8))


def _top(ranks: NDArray[np.int64]) -> tuple[int, float]:
    ranks = ranks[ranks >= 0]
    if not len(ranks):
        return -1, 0.0
    counts = np.bincount(ranks)
    return int(counts.argmax()), float(counts.max() / len(ranks))
