"""The shapes in which a run is read back: numpy columns of a metric, and one dataclass per kind of row."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddplog.core.delivery import Event, Point, Text
from ddplog.errors import DdplogError
from ddplog.store.sink_states import SinkState

if TYPE_CHECKING:
    from collections.abc import Sequence


__all__ = [
    "Attempt", "Drop", "Event", "Metric", "MetricColumns", "Param", "Point", "RankColumns", "RunSummary", "SinkState",
    "Text", "UnknownMetricError", "WriterInfo", "columns_of", "concatenate", "floats", "import_pandas", "ints",
    "no_rank_columns",
]  # fmt: skip

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


class UnknownMetricError(DdplogError, KeyError):
    """The run has no metric of that name."""

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show the repr


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricColumns:
    """One metric's points as columns of one length, ascending by step. Owned by the caller."""

    step: Ints
    value: Floats
    """The declared reduction. NaN where the ranks' values were not numbers."""
    mean: Floats
    min: Floats
    max: Floats
    std: Floats
    min_rank: Ints
    """-1 where there is none."""
    max_rank: Ints
    """-1 where there is none."""
    n: Ints
    """Ranks that reported."""
    expected: Ints
    """Ranks that were waited for."""
    nan_count: Ints
    inf_count: Ints
    bad_rank: Ints
    """The first rank that had a NaN or Inf; -1 where none had."""
    attempt: Ints
    revision: Ints
    time_unix_ns: Ints

    def __len__(self) -> int:
        return len(self.step)

    def take(self, index: NDArray[Any]) -> MetricColumns:
        """Return the rows of a mask or of positions."""
        return MetricColumns(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to_pandas(self) -> Any:
        """Return a DataFrame indexed by step.

        Raises:
            DdplogError: If pandas is not installed.
        """
        columns = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "step"}
        pandas = import_pandas()
        return pandas.DataFrame(columns, index=pandas.Index(self.step, name="step"))


@dataclass(frozen=True, slots=True, kw_only=True)
class RankColumns:
    """The values of a key with `reduce="none"`, ascending by step, then rank."""

    step: Ints
    rank: Ints
    value: Floats
    attempt: Ints
    time_unix_ns: Ints

    def __len__(self) -> int:
        return len(self.step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One key: how it was declared, and its newest point, if it has one."""

    key: str
    reduce: str
    is_replicated: bool
    num_points: int
    """Points, and for `reduce="none"` the values kept per rank."""
    last: MetricColumns
    """Length 0 or 1: the point of the largest step in the newest attempt that has the key."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One opening of the job: ranks of different attempts are never reduced together."""

    attempt: int
    world_size: int
    opened_unix_ns: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterInfo:
    """One life of one rank."""

    writer_id: int
    incarnation: bytes
    attempt: int
    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    host: str
    pid: int
    boot_id: str
    started_unix_ns: int
    next_seq: int
    """Records stored."""
    num_values: int
    """Numbers and messages (params, texts, alerts) stored: the unit of the drops."""
    step: int | None
    state: str
    exit_code: int | None
    signal: int | None
    detail: str
    ended_unix_ns: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    id: int
    attempt: int
    rank: int
    name: str
    value: Any
    """As logged; text where it was not JSON."""
    time_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Drop:
    """Records of one writer that are not in the store, and why."""

    writer_id: int
    rank: int
    attempt: int
    reason: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """One line of `ddplog ls`. Of an unreadable run only run_id, path, status and detail mean something."""

    run_id: str
    path: Path
    name: str
    project: str
    status: str
    detail: str
    started: datetime | None
    ended: datetime | None
    world_size: int
    num_points: int


def columns_of(rows: Sequence[Sequence[Any]]) -> MetricColumns:
    parts: Sequence[Sequence[Any]] = list(zip(*rows, strict=True)) if rows else ((),) * 16
    return MetricColumns(
        step=ints(parts[0]),
        attempt=ints(parts[1]),
        value=floats(parts[2]),
        mean=floats(parts[3]),
        min=floats(parts[4]),
        max=floats(parts[5]),
        std=floats(parts[6]),
        min_rank=ints(parts[7]),
        max_rank=ints(parts[8]),
        n=ints(parts[9]),
        expected=ints(parts[10]),
        nan_count=ints(parts[11]),
        inf_count=ints(parts[12]),
        bad_rank=ints(parts[13]),
        revision=ints(parts[14]),
        time_unix_ns=ints(parts[15]),
    )


def no_rank_columns() -> RankColumns:
    empty = ints(())
    return RankColumns(step=empty, rank=empty, value=floats(()), attempt=empty, time_unix_ns=empty)


def concatenate(pages: Sequence[MetricColumns]) -> MetricColumns:
    if len(pages) < 2:
        return pages[0] if pages else columns_of([])
    names = [f.name for f in fields(MetricColumns)]
    return MetricColumns(**{name: np.concatenate([getattr(page, name) for page in pages]) for name in names})


def ints(values: Sequence[Any]) -> Ints:
    return np.array([-1 if value is None else value for value in values], dtype=np.int64)


def floats(values: Sequence[Any]) -> Floats:
    return np.array(values, dtype=np.float64)  # None becomes NaN


def import_pandas() -> Any:
    try:
        import pandas as pd
    except ImportError as exc:
        raise DdplogError("to_pandas needs pandas, which is not installed: pip install ddplog[pandas]") from exc
    return pd
