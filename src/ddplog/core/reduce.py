"""Decides values: how the ranks' values of one step become one point.

Everything is computed for every key whatever its declared reduction, so that min, max, mean and std are always
there; the reduction only chooses which of them is `value`.

Non-finite inputs never poison a point: the statistics are those of the finite values, and nan_count and inf_count
say how many were left out. Where no finite value is left, `value` is NaN, or the infinity all of them agree on.

The result is bit-identical for the same inputs whatever order they arrived in and however they were grouped into
blocks: sums run over the ranks in ascending order, one addition after the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]

NAMED: Final = ("mean", "sum", "min", "max", "last", "std", "median", "rss", "none")
_PERCENTILE: Final = re.compile(r"p(\d{1,2}(?:\.\d+)?|100)")


def is_reduction(name: str) -> bool:
    """Tell whether `name` is a reduction: one of NAMED, or p0 ... p100."""
    return name in NAMED or _PERCENTILE.fullmatch(name) is not None


def allowed_reductions() -> str:
    """Return the reductions as a phrase for error messages."""
    return ", ".join(NAMED) + ", or a percentile such as p90"


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """Statistics of S steps x K keys over R ranks. All arrays have shape [S, K]."""

    value: F64
    mean: F64
    std: F64
    min: F64
    max: F64
    min_rank: I64
    max_rank: I64
    n: I64
    """Ranks that logged the key at the step."""
    num_finite: I64
    """Ranks whose value is finite."""


def reduce_block(values: F64, weights: F64, present: Bool, times: I64, ranks: I64, reductions: Sequence[str]) -> Block:
    """Reduce over the ranks.

    Args:
        values: [R, S, K]; not finite where the rank has no finite value. Rows in ascending order of rank.
        weights: [R, S, K], >= 0; ignored where the value is not finite.
        present: [R, S, K]: whether the rank logged the key at the step.
        times: [R, S]: wall time of the rank's last record at the step, ns; decides `last`.
        ranks: [R], ascending.
        reductions: K names.

    Returns:
        The block; NaN, and rank -1, where no rank has a finite value.

    Source: mean and std are those of the weighted sample (weights as frequencies), two passes over the data;
    std is the population's (ddof 0). Percentiles are unweighted, linear between neighbours (Hyndman and Fan,
    1996, type 7). `rss` is sqrt(sum(x^2)): the norm of a vector whose shards the ranks hold.
    """
    num_ranks, num_steps, num_keys = values.shape
    flat = (num_ranks, num_steps * num_keys)
    shape = (num_steps, num_keys)
    x = np.ascontiguousarray(values).reshape(flat)
    finite = np.isfinite(x)
    w = np.where(finite, np.ascontiguousarray(weights).reshape(flat), 0.0)
    x0 = np.where(finite, x, 0.0)
    num_finite = finite.sum(axis=0)
    has = num_finite > 0
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        total_weight = ordered_sum(w)
        mean = ordered_sum(x0 * w) / total_weight
        deviation = np.where(finite, x - mean, 0.0)
        std = np.sqrt(ordered_sum(w * deviation * deviation) / total_weight)
    low = np.where(finite, x, np.inf)
    high = np.where(finite, x, -np.inf)
    argmin, argmax = low.argmin(axis=0), high.argmax(axis=0)
    columns = np.arange(flat[1])
    minimum = np.where(has, low[argmin, columns], np.nan)
    maximum = np.where(has, high[argmax, columns], np.nan)
    value = mean.copy()
    by_reduction: dict[str, list[int]] = {}
    for index, name in enumerate(reductions):
        by_reduction.setdefault(name, []).append(index)
    for name, keys in by_reduction.items():
        if name in ("mean", "none"):
            continue
        selected = (np.arange(num_steps)[:, None] * num_keys + np.asarray(keys)).ravel()
        if name == "min":
            value[selected] = minimum[selected]
        elif name == "max":
            value[selected] = maximum[selected]
        elif name == "std":
            value[selected] = std[selected]
        elif name == "last":
            value[selected] = _last(x, finite, times, num_keys, selected)
        else:
            value[selected] = _over_ranks(name, x[:, selected], x0[:, selected], finite[:, selected])
    value = np.where(has, value, np.nan)
    return Block(
        value=value.reshape(shape),
        mean=mean.reshape(shape),
        std=std.reshape(shape),
        min=minimum.reshape(shape),
        max=maximum.reshape(shape),
        min_rank=np.where(has, ranks[argmin], -1).reshape(shape),
        max_rank=np.where(has, ranks[argmax], -1).reshape(shape),
        n=present.sum(axis=0).reshape(shape),
        num_finite=num_finite.reshape(shape),
    )


def ordered_sum(x: F64) -> F64:
    """Sum [R, M] over axis 0, one row after the other.

    numpy adds whole rows in order as long as rows are contiguous and have more than one element; otherwise it sums
    columns pairwise, with other rounding, so that a point would depend on how many were reduced together.
    """
    x = np.ascontiguousarray(x)  # x[:, index] is laid out column by column
    total = np.add.accumulate(x, axis=0)[-1] if x.shape[1] == 1 else np.add.reduce(x, axis=0)
    return np.asarray(total + 0.0)  # no -0.0: reduce() begins with 0, accumulate() with the first row


def _last(x: F64, finite: Bool, times: I64, num_keys: int, selected: I64) -> F64:
    """Take the finite value of the latest record; of the highest rank where two have the same time."""
    at = np.where(finite[:, selected], times[:, selected // num_keys], np.iinfo(np.int64).min)
    latest = at.shape[0] - 1 - at[::-1].argmax(axis=0)
    return np.asarray(x[latest, selected])


def _over_ranks(name: str, x: F64, x0: F64, finite: Bool) -> F64:
    if name == "sum":
        return ordered_sum(x0)
    if name == "rss":
        scale = np.abs(x0).max(axis=0)
        unit = np.where(scale > 0, scale, 1.0)  # scaled as in BLAS nrm2, so that 1e200 does not overflow
        return unit * np.sqrt(ordered_sum((x0 / unit) ** 2))
    quantile = 50.0 if name == "median" else float(name[1:])
    result = np.full(x.shape[1], np.nan)
    has = finite.any(axis=0)
    result[has] = np.nanpercentile(np.where(finite, x, np.nan)[:, has], quantile, axis=0)
    return result


def fold(name: str, old: F64, old_weight: F64, new: F64, new_weight: F64) -> tuple[F64, F64]:
    """Fold further values of one rank into what it logged before at the same steps. All arrays [M], all finite.

    Returns:
        The folded values and weights. sum, min, max, last and rss fold with themselves; every other reduction
        describes a distribution over ranks, so a rank's own values become their weighted mean.
    """
    weight = old_weight + new_weight
    if name == "sum":
        return old + new, weight
    if name == "min":
        return np.minimum(old, new), weight
    if name == "max":
        return np.maximum(old, new), weight
    if name in ("last", "none"):
        return new, new_weight
    if name == "rss":
        return np.hypot(old, new), weight
    with np.errstate(divide="ignore", invalid="ignore"):
        mean = (old * old_weight + new * new_weight) / weight
    return np.where(weight > 0, mean, (old + new) / 2), weight
