"""Decides how long each rank took for its steps, from the records in the rank log. Touches no file itself.

A rank's time at a step is the wall clock of its first SCALARS record at that step. A step time is the difference
between two of its steps' times divided by the difference of the steps, so it needs no record at every step.

The log is read once and never held: of each rank's life at most twice MAX_SAMPLES steps are kept, one in each cell
of `stride` steps, and the stride doubles whenever there are more. A step time is then the mean over about one
stride. Cells, not "every n-th step": ranks that log at different steps all keep a sample.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from ddplog.core.records import KIND_SCALARS, NO_STEP, PREFIX, PREFIX_BYTES, scan_payload

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

MAX_SAMPLES: Final = 2000

_PREFIX_DTYPE: Final = np.dtype(
    [
        ("length", "<u4"),
        ("crc32", "<u4"),
        ("seq", "<u8"),
        ("head", "<u4"),
        ("aux", "<u4"),
        ("step", "<i8"),
        ("time_unix_ns", "<u8"),
        ("weight", "<f8"),
    ]
)
assert _PREFIX_DTYPE.itemsize == PREFIX_BYTES  # an invariant of ours


class Entry(Protocol):
    """What the rank log yields: one batch of one rank."""

    @property
    def attempt(self) -> int: ...
    @property
    def rank(self) -> int: ...
    @property
    def incarnation(self) -> bytes: ...
    @property
    def payload(self) -> bytes: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStepTimes:
    """Seconds per step, by rank and step."""

    ranks: NDArray[np.int64]
    """[R], ascending: those that have at least one step time."""
    steps: NDArray[np.int64]
    """[S], ascending: the step a step time leads up to."""
    seconds: NDArray[np.float64]
    """[R, S]; NaN where the rank has none."""

    def __len__(self) -> int:
        return len(self.steps)


EMPTY: Final = RankStepTimes(
    ranks=np.zeros(0, np.int64), steps=np.zeros(0, np.int64), seconds=np.zeros((0, 0), np.float64)
)


class _Life:
    """The kept samples of one incarnation: the first (step, time) in each cell of `stride` steps."""

    def __init__(self) -> None:
        self.cells: dict[int, tuple[int, int]] = {}
        self.stride = 1

    def add(self, step: int, time_unix_ns: int, max_samples: int) -> None:
        self.cells.setdefault(step // self.stride, (step, time_unix_ns))
        while len(self.cells) > 2 * max_samples:
            self.widen(self.stride * 2)

    def widen(self, stride: int) -> None:
        """Merge cells. `stride` is a multiple of the current one."""
        merged: dict[int, tuple[int, int]] = {}
        for _, (step, time_unix_ns) in sorted(self.cells.items()):
            merged.setdefault(step // stride, (step, time_unix_ns))
        self.cells, self.stride = merged, stride

    def step_times(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Return (cells, steps, seconds), ascending: one shorter than the samples."""
        cells = np.array(sorted(self.cells), dtype=np.int64)
        samples = np.array([self.cells[cell] for cell in cells.tolist()], dtype=np.int64).reshape(-1, 2)
        seconds = np.diff(samples[:, 1]) / 1e9 / np.diff(samples[:, 0])
        return cells[1:], samples[1:, 0], seconds


def collect_step_times(
    entries: Iterable[Entry], attempt: int | None = None, max_samples: int = MAX_SAMPLES
) -> RankStepTimes:
    """Compute step times from the rank log's entries, read once, in order.

    Args:
        entries: The rank log.
        attempt: Only this attempt's entries; None: of several attempts that passed a step, the highest wins.
        max_samples: Steps in the result at most.
    """
    lives: dict[tuple[int, int, bytes], _Life] = {}
    for entry in entries:
        if attempt in (None, entry.attempt):
            life = lives.setdefault((entry.attempt, entry.rank, bytes(entry.incarnation)), _Life())
            _add_payload(life, entry.payload, max_samples)
    stride = max((life.stride for life in lives.values()), default=1)
    while True:
        for life in lives.values():
            life.widen(stride)
        if len({cell for life in lives.values() for cell in life.cells}) <= max_samples:
            return _matrix(lives)
        stride *= 2


def _add_payload(life: _Life, payload: bytes, max_samples: int) -> None:
    prefixes = _prefixes(payload)
    chosen = prefixes[(prefixes["head"] & 0xFF == KIND_SCALARS) & (prefixes["step"] != NO_STEP)]
    _, first = np.unique(chosen["step"] // life.stride, return_index=True)
    chosen = chosen[np.sort(first)]
    for step, time_unix_ns in zip(chosen["step"].tolist(), chosen["time_unix_ns"].tolist(), strict=True):
        life.add(step, time_unix_ns, max_samples)


def _prefixes(payload: bytes) -> NDArray[Any]:
    """Return the prefixes of a payload's frames, without copying where all frames have one length."""
    length = int.from_bytes(payload[:4], sys.byteorder) if len(payload) >= PREFIX_BYTES else 0
    if length >= PREFIX_BYTES and len(payload) % length == 0:
        dtype = np.dtype([("prefix", _PREFIX_DTYPE), ("body", np.void, length - PREFIX_BYTES)])
        whole = np.frombuffer(payload, dtype=dtype)["prefix"]
        # A frame of another length would make one of these words something else than `length`.
        if bool((whole["length"] == length).all()):
            return whole
    rows = [PREFIX.unpack_from(payload, offset) for offset, _ in scan_payload(payload)]
    return np.array(rows, dtype=_PREFIX_DTYPE)


def _matrix(lives: dict[tuple[int, int, bytes], _Life]) -> RankStepTimes:
    found = {identity: life.step_times() for identity, life in sorted(lives.items())}
    labels: dict[int, int] = {}  # cell -> the smallest step seen in it
    for cells, steps, _ in found.values():
        for cell, step in zip(cells.tolist(), steps.tolist(), strict=True):
            labels[cell] = min(step, labels.get(cell, step))
    if not labels:
        return EMPTY
    columns = np.array(sorted(labels), dtype=np.int64)
    ranks = np.array(sorted({rank for (_, rank, _), (cells, _, _) in found.items() if len(cells)}), dtype=np.int64)
    seconds = np.full((len(ranks), len(columns)), np.nan)
    for (_, rank, _), (cells, _, took) in found.items():  # ascending by attempt: the highest stays
        if len(cells):
            seconds[np.searchsorted(ranks, rank), np.searchsorted(columns, cells)] = took
    return RankStepTimes(ranks=ranks, steps=np.array([labels[cell] for cell in columns.tolist()]), seconds=seconds)
