"""Decides what each rank logged of one metric, from the records in the rank log: for metrics that are stored reduced.

Repeated values of a rank at one step fold as the metric's reduction folds them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from ddplog.core.batches import Rows, split
from ddplog.core.records import NO_STEP
from ddplog.core.reduce import fold
from ddplog.store.columns import RankColumns

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ddplog.store.rank_log import Entry


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A writer that logged the metric."""

    rank: int
    attempt: int
    columns: Mapping[int, int]
    """Schema id -> where the metric stands in it."""


class _Part(NamedTuple):
    """Values of one rank or several, as columns of one length."""

    step: NDArray[Any]
    rank: NDArray[Any]
    attempt: NDArray[Any]
    value: NDArray[Any]
    weight: NDArray[Any]
    time_unix_ns: NDArray[Any]

    def take(self, index: NDArray[Any]) -> _Part:
        return _Part(*(column[index] for column in self))


_NOTHING: Final = _Part(*(np.zeros(0, kind) for kind in ("i8", "i8", "i8", "f8", "f8", "i8")))


def collect_rank_values(
    entries: Iterable[Entry], sources: Mapping[int, Source], reduce: str, from_step: int = NO_STEP
) -> RankColumns:
    """Return the values of every rank.

    Args:
        entries: The rank log, read once, in order.
        sources: By writer id.
        reduce: The metric's reduction.
        from_step: Only steps from here on: the memory is that of the values returned.
    """
    parts = [_NOTHING]
    for entry in entries:
        source = sources.get(entry.writer_id)
        if source is None:
            continue
        parts += [
            _part(item, source, from_step)
            for item in split(entry.payload, entry.first_seq)[1]
            if isinstance(item, Rows) and item.schema_id in source.columns
        ]
    return _fold(_Part(*(np.concatenate(column) for column in zip(*parts, strict=True))), reduce)


def _part(rows: Rows, source: Source, from_step: int) -> _Part:
    rows = rows.where(rows.steps >= from_step)
    same = np.full(len(rows.steps), source.rank, np.int64)
    return _Part(
        step=rows.steps,
        rank=same,
        attempt=np.full(len(rows.steps), source.attempt, np.int64),
        value=rows.values[:, source.columns[rows.schema_id]],
        weight=rows.weights,
        time_unix_ns=rows.times,
    )


def _fold(found: _Part, reduce: str) -> RankColumns:
    order = np.lexsort((found.attempt, found.rank, found.step))  # stable: a rank's own order stays
    found = found.take(order)
    place = np.stack([found.step, found.rank, found.attempt])
    is_first = np.ones(place.shape[1], np.bool_)
    is_first[1:] = (place[:, 1:] != place[:, :-1]).any(axis=0)
    firsts = np.flatnonzero(is_first)
    value, weight = found.value[firsts].copy(), found.weight[firsts].copy()
    time = np.maximum.reduceat(found.time_unix_ns, firsts) if len(firsts) else found.time_unix_ns
    group = np.cumsum(is_first) - 1
    for at in np.flatnonzero(~is_first).tolist():
        _add(value, weight, int(group[at]), found, at, reduce)
    found = found.take(firsts)
    is_last = np.ones(len(firsts), np.bool_)  # of each step and rank: the highest attempt's
    is_last[:-1] = (np.diff(found.step) != 0) | (np.diff(found.rank) != 0)
    columns: dict[str, Any] = {
        "step": found.step, "rank": found.rank, "value": value, "attempt": found.attempt, "time_unix_ns": time,
    }  # fmt: skip
    return RankColumns(**{name: column[is_last] for name, column in columns.items()})


def _add(
    value: NDArray[np.float64], weight: NDArray[np.float64], group: int, found: _Part, at: int, reduce: str
) -> None:
    """Fold one more value of a rank and step in. What is not finite counts only where nothing else is."""
    new = slice(at, at + 1)
    into = slice(group, group + 1)
    if not np.isfinite(found.value[at]):
        return
    if not np.isfinite(value[group]):
        value[into], weight[into] = found.value[new], found.weight[new]
    else:
        value[into], weight[into] = fold(reduce, value[into], weight[into], found.value[new], found.weight[new])
