"""Decides when a step of a group of keys is complete and what its points are. Owns the open windows.

A panel is a group of keys that are logged together (the keys of a schema that no earlier panel had). Its windows,
one per step, are rows of arrays [R, S, K]: ranks that ever logged one of the keys, step slots, keys. A batch of
many steps of one rank is then one array assignment, and closing many steps one reduction.

A window is closed, that is reduced and emitted,
  - when the watermark reaches its step, or
  - `settle_ns` after every expected rank has reported every key of it (not for keys that ranks were seen to log
    repeatedly in a step: those wait for the watermark), in the order of steps, or
  - if it was late when it was opened: when complete, or `late_ns` after it was opened.

Closed windows are kept, the newest `keep_closed` of them: a late value reopens its window, and the point is
emitted again with everything in it. A value for a step whose window is gone is not reduced here: its (key, step)
becomes stale, and the caller derives it again from the rank log, once per deadline.

`expected` per key: every declared rank at first. A rank leaves after passing MISSES_TO_LEAVE steps at which others
logged the key and it did not, or when nothing can be expected of it any more; it joins with its first value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Final

import numpy as np

from ddplog.core.batches import Rows, join
from ddplog.core.reduce import F64, I64, Block, Bool, fold, reduce_block

MISSES_TO_LEAVE: Final = 3
KEEP_CLOSED: Final = 256
FREE, OPEN, CLOSED = 0, 1, 2
_CHUNK_CELLS: Final = 32 * 1024
"""Cells reduced at once: 256 KiB an array, so that the dozen arrays of a reduction stay in a core's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Emission:
    """Points of S steps x K keys; those with n == 0 do not exist. Arrays [S, K] unless said."""

    key_ids: Sequence[int]
    """K."""
    steps: I64
    """[S]"""
    block: Block
    value: F64
    expected: I64
    nan_count: I64
    inf_count: I64
    bad_rank: I64
    """Lowest rank with a NaN or Inf; -1 if none had one."""
    time_unix_ns: I64
    """[S]: of the step's last record."""
    rank_values: Sequence[tuple[int, int, int, float, int]] = ()
    """(key_id, step, rank, value, time_unix_ns) of keys declared reduce="none"."""
    disagreements: Sequence[tuple[int, int]] = ()
    """(key_id, step) of replicated keys whose ranks did not agree."""

    @property
    def num_points(self) -> int:
        """S x K, and what is kept per rank: what it costs on its way into the store."""
        return len(self.steps) * len(self.key_ids) + len(self.rank_values)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStates:
    """How far the W declared ranks are. Arrays [W]."""

    progress: I64
    """The largest step the rank has shown."""
    ended: Bool
    """It will send nothing more, and is not waited for."""
    finished: Bool
    """It ended well: nothing is expected of it beyond its progress. One that died is missed to the end."""
    silent: Bool
    """It has shown no step although its grace is over: nothing is expected of it."""


@dataclass(slots=True)
class _NonFinite:
    """NaN and Inf of one (step, key): kept aside because they are rare."""

    nans: int = 0
    infs: int = 0
    ranks: set[int] = field(default_factory=set)
    signs: set[float] = field(default_factory=set)


class Panel:
    """The windows of one group of keys.

    Args:
        key_ids: K ids.
        reductions: K names.
        replicated: K flags: the ranks must agree.
        world_size: Declared ranks.
        settle_ns: See the module.
        late_ns: See the module.
        keep_closed: Closed windows kept for late values.
        emitted_to: Largest step an earlier life of the aggregator emitted; values at or below it are stale.
    """

    def __init__(
        self,
        key_ids: Sequence[int],
        reductions: Sequence[str],
        replicated: Sequence[bool],
        *,
        world_size: int,
        settle_ns: int,
        late_ns: int,
        keep_closed: int = KEEP_CLOSED,
        emitted_to: int | None = None,
    ) -> None:
        self.key_ids = tuple(key_ids)
        self.reductions = list(reductions)
        self.replicated = list(replicated)
        self.settle_ns = settle_ns
        self.late_ns = late_ns
        self.keep_closed = keep_closed
        num_keys = len(self.key_ids)
        self.expected: Bool = np.ones((world_size, num_keys), np.bool_)
        self._misses = np.zeros((world_size, num_keys), np.int8)
        self._repeats = False
        self._is_everyone_expected = True
        self._now_ordinal = 0
        self._rows: dict[int, int] = {}
        self._ranks = np.zeros(0, np.int64)
        self._order = np.zeros(0, np.int64)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []
        self._closed: dict[int, None] = {}  # steps, oldest first
        self._evicted_to = emitted_to
        self._emitted_to = emitted_to
        self.is_replaying = False
        """Whether what comes is known: a step that was emitted is then not stale."""
        self.stale_steps: set[int] = set()
        self.stale_since_ns: int | None = None
        self._nonfinite: dict[tuple[int, int], _NonFinite] = {}
        self._open_index: tuple[I64, I64] | None = None
        """(steps, slots) of the open windows, by step; None: to be made again."""
        self._off_rows: list[int] = []
        self._off_payloads: list[bytes] = []
        self._off_entries: list[tuple[int, int]] = []
        """(late_to, ordinal) of each."""
        self._off_ns = 0
        self._allocate(1, 16)

    # -- storage

    def _allocate(self, rows: int, slots: int) -> None:
        keys = len(self.key_ids)
        self._value = np.full((rows, slots, keys), np.nan)
        self._weight = np.zeros((rows, slots, keys))
        self._count = np.zeros((rows, slots, keys), np.int32)
        self._time = np.zeros((rows, slots), np.int64)
        self._state = np.zeros(slots, np.int8)
        self._step = np.zeros(slots, np.int64)
        self._late: Bool = np.zeros(slots, np.bool_)
        self._opened = np.zeros(slots, np.int64)
        self._touched = np.zeros(slots, np.int64)
        self._ordinal = np.zeros(slots, np.int64)
        self._arrived = np.zeros((slots, keys), np.int32)
        self._free = list(range(slots - 1, -1, -1))

    def _grow(self, rows: int, slots: int) -> None:
        old_rows, old_slots, keys = self._value.shape
        if rows <= old_rows and slots <= old_slots:
            return
        new_rows = max(old_rows, rows if rows <= old_rows else max(rows, 2 * old_rows))
        new_slots = max(old_slots, slots if slots <= old_slots else max(slots, 2 * old_slots))
        for name, filler in (("_value", np.nan), ("_weight", 0.0), ("_count", 0)):
            old = getattr(self, name)
            new = np.full((new_rows, new_slots, keys), filler, old.dtype)
            new[:old_rows, :old_slots] = old
            setattr(self, name, new)
        time = np.zeros((new_rows, new_slots), np.int64)
        time[:old_rows, :old_slots] = self._time
        self._time = time
        for name in ("_state", "_step", "_late", "_opened", "_touched", "_ordinal", "_arrived"):
            old = getattr(self, name)
            new = np.zeros((new_slots, *old.shape[1:]), old.dtype)
            new[:old_slots] = old
            setattr(self, name, new)
        self._free = list(range(new_slots - 1, old_slots - 1, -1)) + self._free

    def _row(self, rank: int) -> int:
        row = self._rows.get(rank)
        if row is None:
            row = self._rows[rank] = len(self._rows)
            self._grow(row + 1, 0)
            self._ranks = np.sort(np.fromiter(self._rows, np.int64))
            self._order = np.asarray([self._rows[int(r)] for r in self._ranks], np.int64)
        return row

    def _slot(self, step: int, late_to: int, now_ns: int) -> int:
        """Return the step's slot, opening or reopening its window; -1 if its window is gone for good."""
        slot = self._slots.get(step)
        if slot is not None:
            if self._state[slot] == CLOSED:
                self._open_index = None
                self._state[slot] = OPEN
                self._late[slot] = True
                self._opened[slot] = now_ns
                self._closed.pop(step, None)
            return slot
        if self._evicted_to is not None and step <= self._evicted_to:
            if not self.is_replaying:
                self.stale_steps.add(step)
                if self.stale_since_ns is None:
                    self.stale_since_ns = now_ns
            return -1
        if not self._free:
            self._grow(0, len(self._state) + 1)
        slot = self._free.pop()
        self._open_index = None
        self._slots[step] = slot
        self._state[slot] = OPEN
        self._step[slot] = step
        self._late[slot] = step <= late_to
        self._opened[slot] = now_ns
        self._ordinal[slot] = self._now_ordinal
        return slot

    def _slots_of(self, steps: I64, late_to: int, now_ns: int) -> I64:
        """As _slot for many steps, in one look-up if all their windows are open, as for every rank but the first."""
        if self._open_index is None:
            opened = np.flatnonzero(self._state == OPEN)
            opened = opened[np.argsort(self._step[opened])]
            self._open_index = (self._step[opened], opened)
        known, slots = self._open_index
        if len(known):
            at = np.minimum(np.searchsorted(known, steps), len(known) - 1)
            if (known[at] == steps).all():
                return slots[at]
        return np.asarray([self._slot(step, late_to, now_ns) for step in steps.tolist()], np.int64)

    def _release(self, steps: list[int]) -> None:
        slots = [self._slots.pop(step) for step in steps]
        self._state[slots] = FREE
        self._value[:, slots] = np.nan
        self._weight[:, slots] = 0
        self._count[:, slots] = 0
        self._time[:, slots] = 0
        self._arrived[slots] = 0
        self._free.extend(slots)
        if self._nonfinite:
            for step in steps:
                for key in range(len(self.key_ids)):
                    self._nonfinite.pop((step, key), None)
        self._evicted_to = max(steps) if self._evicted_to is None else max(self._evicted_to, *steps)

    # -- ingest

    def add(
        self, rank: int, rows: Rows, columns: Sequence[int] | None, late_to: int, now_ns: int, ordinal: int = 0
    ) -> None:
        """Take records of one rank.

        Args:
            rank: Whose they are.
            rows: Their values, [M, K'].
            columns: Which key of the panel each of the K' columns is; None: all of them, in order.
            late_to: A window opened at or below this step is late: the watermark, or the step before the rank's own
                progress (epoch-wise values beside step-wise ones).
            now_ns: Monotonic time.
            ordinal: Number of the rank log's entry they are in; `oldest_open` returns the smallest still needed.
        """
        self.flush()
        self._now_ordinal = ordinal
        row = self._row(rank)
        self._add(rank, row, rows, columns, late_to, now_ns)
        if not self._is_everyone_expected:
            seen = slice(None) if columns is None else list(columns)
            self.expected[rank, seen] = True
            self._misses[rank, seen] = 0

    def put_off(self, rank: int, payload: bytes, late_to: int, now_ns: int, ordinal: int) -> None:
        """Take one record of all the panel's keys, to be added by flush() together with those of the other ranks.

        Args:
            rank: Whose it is.
            payload: What batches.single() has accepted.
            late_to: As for add().
            now_ns: As for add().
            ordinal: As for add().
        """
        self._off_rows.append(self._row(rank))
        self._off_payloads.append(payload)
        self._off_entries.append((late_to, ordinal))
        self._off_ns = now_ns

    def flush(self) -> None:
        """Add what was put off. To be called before anything is asked of the panel; add() and close_ready() do."""
        if not self._off_rows:
            return
        rows, cells, entries = join(self._off_payloads), np.asarray(self._off_rows, np.int64), self._off_entries
        self._off_rows, self._off_payloads, self._off_entries = [], [], []
        now_ns = self._off_ns
        found: dict[int, int] = {}
        for step, (late_to, ordinal) in zip(rows.steps.tolist(), entries, strict=True):
            if step not in found:
                self._now_ordinal = ordinal
                found[step] = self._slot(step, late_to, now_ns)
        slots = np.asarray([found[step] for step in rows.steps.tolist()], np.int64)
        if not self._is_everyone_expected:
            seen = np.fromiter(self._rows, np.int64)[cells]  # insertion order is that of the rows
            self.expected[seen] = True
            self._misses[seen] = 0
        keep = slots >= 0
        if not keep.all():
            rows, cells, slots = rows.where(keep), cells[keep], slots[keep]
        self._touched[slots] = now_ns
        self._put_each(rows, cells, slots)

    def _put_each(self, rows: Rows, cells: I64, slots: I64) -> None:
        """Take records of any ranks: at once those that are the first of their rank and step, the others in order."""
        places = cells * len(self._state) + slots
        _, nth, count = np.unique(places, return_inverse=True, return_counts=True)
        plain = (count[nth] == 1) & (self._time[cells, slots] == 0) & np.isfinite(rows.values).all(axis=1)
        rest = np.flatnonzero(~plain)
        if len(rest):
            ranks = list(self._rows)
            for m in rest.tolist():
                one = rows.where(np.asarray([m]))
                self._put(ranks[cells[m]], int(cells[m]), slots[m : m + 1], one, None)
            rows, cells, slots = rows.where(plain), cells[plain], slots[plain]
        self._value[cells, slots] = rows.values
        self._weight[cells, slots] = rows.weights[:, None]
        self._count[cells, slots] = 1
        self._time[cells, slots] = rows.times
        self._arrived += np.bincount(slots, minlength=len(self._state))[:, None].astype(np.int32)

    def _add(self, rank: int, row: int, rows: Rows, columns: Sequence[int] | None, late_to: int, now_ns: int) -> None:
        slots = self._slots_of(rows.steps, late_to, now_ns)
        keep = slots >= 0
        if not keep.all():
            rows = rows.where(keep)
            slots = slots[keep]
            if not len(slots):
                return
        self._touched[slots] = now_ns
        if bool((rows.steps[1:] > rows.steps[:-1]).all()):
            self._put(rank, row, slots, rows, columns)
        else:
            for part in _rounds(slots):
                self._put(rank, row, slots[part], rows.where(part), columns)

    def _put(self, rank: int, row: int, slots: I64, rows: Rows, columns: Sequence[int] | None) -> None:
        """Take records of different steps."""
        finite = np.isfinite(rows.values)
        if columns is None and finite.all() and not self._time[row, slots].any():
            self._value[row, slots] = rows.values
            self._weight[row, slots] = rows.weights[:, None]
            self._count[row, slots] = 1
            self._arrived[slots] += 1
        else:
            self._fold(rank, row, slots, rows, finite, list(range(len(self.key_ids)) if columns is None else columns))
        self._time[row, slots] = rows.times

    def _fold(self, rank: int, row: int, slots: I64, rows: Rows, finite: Bool, columns: list[int]) -> None:
        cells = np.ix_(np.asarray([row]), slots, np.asarray(columns))
        count, value, weight = self._count[cells][0], self._value[cells][0], self._weight[cells][0]
        self._arrived[np.ix_(slots, np.asarray(columns))] += count == 0
        self._repeats |= bool(count.any())
        self._count[cells] = count + 1
        given = np.broadcast_to(rows.weights[:, None], value.shape)
        is_first = finite & np.isnan(value)
        is_again = finite & ~is_first
        if is_again.any():
            for j, k in enumerate(columns):
                again = is_again[:, j]
                if again.any():
                    value[again, j], weight[again, j] = fold(
                        self.reductions[k], value[again, j], weight[again, j], rows.values[again, j], given[again, j]
                    )
        value[is_first], weight[is_first] = rows.values[is_first], given[is_first]
        self._value[cells], self._weight[cells] = value, weight
        for m, j in np.argwhere(~finite).tolist():
            self._note_nonfinite(int(rows.steps[m]), columns[j], rank, float(rows.values[m, j]))

    def _note_nonfinite(self, step: int, key: int, rank: int, value: float) -> None:
        entry = self._nonfinite.setdefault((step, key), _NonFinite())
        entry.ranks.add(rank)
        if np.isnan(value):
            entry.nans += 1
        else:
            entry.infs += 1
            entry.signs.add(value)

    # -- closing

    @property
    def width(self) -> int:
        """Values of one window: ranks that ever logged one of the keys x keys."""
        return len(self._rows) * len(self.key_ids)

    def shrink(self) -> None:
        """Give back the memory of closed windows, if none is open: nothing more is expected, and what comes is stale."""
        if self._closed and not self.num_open and not self._off_rows:
            self._release(list(self._closed))
            self._closed.clear()
            self._allocate(max(1, len(self._rows)), 16)

    @property
    def num_open(self) -> int:
        """Open windows."""
        return len(self._slots) - len(self._closed)

    @property
    def unsettled(self) -> list[int]:
        """Steps that a restart would take for stored though their point is still to come or to change; ascending.

        Late windows, stale steps, and windows below a step that was emitted.
        """
        if not self.num_open:
            return sorted(self.stale_steps)
        is_below = self._step <= self._emitted_to if self._emitted_to is not None else False
        steps = self._step[(self._state == OPEN) & (self._late | is_below)]
        return sorted({*map(int, steps), *self.stale_steps})

    @property
    def oldest_open(self) -> int | None:
        """Smallest rank log entry that an open window was made from; None if none is open."""
        if not self.num_open:
            return None
        return int(self._ordinal[self._state == OPEN].min())

    def close_ready(
        self,
        watermark: int,
        ranks: RankStates,
        now_ns: int,
        *,
        at_once: bool = False,
        max_open: int = 0,
        max_points: int = 0,
    ) -> Emission | None:
        """Close the windows whose time has come.

        Args:
            watermark: Of the attempt.
            ranks: How far each rank is.
            now_ns: Monotonic time.
            at_once: Everything, since nothing more will come.
            max_open: Close the oldest beyond this many, complete or not; 0: no limit.
            max_points: Close at most about so many points now, the oldest, and the others when asked again; 0: no limit.

        Returns:
            The points, in the order of steps; None if no window was ready.
        """
        self.flush()
        if not self.num_open:
            return None
        is_open = self._state == OPEN
        if at_once:
            ready = is_open
        else:
            over = is_open & ~self._late & (self._step <= watermark)
            opened = np.flatnonzero(is_open)
            complete = np.zeros_like(is_open)
            needed = np.maximum(self._needed(self._step[opened], ranks, ranks.ended), 1)
            complete[opened] = (self._arrived[opened] >= needed).all(axis=1)
            settled = complete & (now_ns - self._touched >= self.settle_ns)
            if self._repeats:
                settled &= self._late
            waiting = is_open & ~self._late & ~over & ~settled
            if waiting.any():
                settled &= self._late | (self._step < self._step[waiting].min())
            overdue = is_open & self._late & (now_ns - self._opened >= self.late_ns)
            ready = over | settled | overdue
            excess = self.num_open - int(ready.sum()) - max_open if max_open else 0
            if excess > 0:
                rest = np.flatnonzero(is_open & ~ready)
                ready[rest[np.argsort(self._step[rest])][:excess]] = True
        slots = np.flatnonzero(ready)
        if not len(slots):
            return None
        slots = slots[np.argsort(self._step[slots])]
        return self._close(slots[: max(1, max_points // len(self.key_ids))] if max_points else slots, ranks)

    def _close(self, slots: I64, ranks: RankStates) -> Emission:
        emission = self._emit(slots, ranks)
        self.note_emitted(int(self._step[slots[-1]]))
        for slot in slots.tolist():
            self._closed[int(self._step[slot])] = None
        self._state[slots] = CLOSED
        self._late[slots] = False
        self._open_index = None
        old = list(self._closed)[: max(0, len(self._closed) - self.keep_closed)]
        if old:
            for step in old:
                del self._closed[step]
            self._release(old)
        return emission

    def note_emitted(self, step: int) -> None:
        """A point of these keys at this step goes into the store: a restart takes what is below it for stored too."""
        self._emitted_to = step if self._emitted_to is None else max(step, self._emitted_to)

    def _emit(self, slots: I64, ranks: RankStates) -> Emission:
        grid = np.ix_(self._order, slots)
        present, times = self._count[grid] > 0, self._time[grid]
        steps = self._step[slots].copy()
        expected = self._count_expected(present, slots, ranks)
        block = self._reduce(slots, present, times)
        value = block.value.copy()
        shape = value.shape
        nan_count, inf_count = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        bad_rank = np.full(shape, -1, np.int64)
        if self._nonfinite:
            for s, step in enumerate(steps.tolist()):
                for k in range(shape[1]):
                    entry = self._nonfinite.get((step, k))
                    if entry is None:
                        continue
                    nan_count[s, k], inf_count[s, k], bad_rank[s, k] = entry.nans, entry.infs, min(entry.ranks)
                    if block.num_finite[s, k] == 0 and not entry.nans and len(entry.signs) == 1:
                        value[s, k] = next(iter(entry.signs))
        seen = present.any(axis=2)
        return Emission(
            key_ids=self.key_ids,
            steps=steps,
            block=block,
            value=value,
            expected=expected,
            nan_count=nan_count,
            inf_count=inf_count,
            bad_rank=bad_rank,
            time_unix_ns=np.where(seen, times, 0).max(axis=0),
            rank_values=self._rank_values(self._value[grid], present, times, steps)
            if "none" in self.reductions
            else (),
            disagreements=self._disagreements(block, steps) if any(self.replicated) else (),
        )

    def _reduce(self, slots: I64, present: Bool, times: I64) -> Block:
        """Reduce the windows, some at a time; a point does not depend on which others are reduced with it."""
        size = max(1, _CHUNK_CELLS // present[:, :1].size)
        parts = []
        for start in range(0, len(slots), size):
            part = slice(start, start + size)
            cells = np.ix_(self._order, slots[part])
            parts.append(
                reduce_block(
                    self._value[cells],
                    self._weight[cells],
                    present[:, part],
                    times[:, part],
                    self._ranks,
                    self.reductions,
                )
            )
        if len(parts) == 1:
            return parts[0]
        return Block(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Block)})

    def _needed(self, steps: I64, ranks: RankStates, gone_ranks: Bool) -> I64:
        """Return [S, K]: how many ranks must have logged the key at the step, if `gone_ranks` [W] go no further."""
        here = self.expected & ~(ranks.silent | gone_ranks)[:, None]
        gone = np.flatnonzero(gone_ranks & ~ranks.silent)
        was_there = (ranks.progress[gone, None] >= steps[None, :]).T.astype(np.int64)
        return np.asarray(here.sum(axis=0) + was_there @ self.expected[gone].astype(np.int64))

    def _count_expected(self, present: Bool, slots: I64, ranks: RankStates) -> I64:
        """Return [S, K], and let ranks leave that passed the key too often.

        Whoever logged a key is expected to, so that equal counts mean that all expected ranks did.
        """
        steps = self._step[slots]
        result = self._needed(steps, ranks, ranks.finished)
        if not (result - present.sum(axis=0)).any():
            self._misses[:] = 0
            self._is_everyone_expected = bool(self.expected.all())
            return result
        self._is_everyone_expected = False
        full = np.zeros_like(self.expected)
        for s in range(len(slots)):
            full[:] = False
            full[self._ranks] = present[:, s]
            self.expected |= full
            result[s] = self._needed(steps[s : s + 1], ranks, ranks.finished)[0]
            if self._late[slots[s]]:
                continue
            missed = self.expected & ~full & (ranks.progress > steps[s])[:, None] & full.any(axis=0)
            self._misses[missed] += 1
            self._misses[full] = 0
            self.expected &= self._misses < MISSES_TO_LEAVE
        return result

    def _rank_values(
        self, values: F64, present: Bool, times: I64, steps: I64
    ) -> list[tuple[int, int, int, float, int]]:
        return [
            (self.key_ids[k], step, int(self._ranks[r]), float(values[r, s, k]), int(times[r, s]))
            for k, name in enumerate(self.reductions)
            if name == "none"
            for s, step in enumerate(steps.tolist())
            for r in np.flatnonzero(present[:, s, k]).tolist()
        ]

    def _disagreements(self, block: Block, steps: I64) -> list[tuple[int, int]]:
        differs = (block.min != block.max) & (block.num_finite > 1)
        return [
            (self.key_ids[k], int(steps[s])) for s, k in zip(*np.nonzero(differs), strict=True) if self.replicated[k]
        ]

    def __repr__(self) -> str:
        return (
            f"<Panel keys={len(self.key_ids)} ranks={len(self._rows)} open={self.num_open} "
            f"closed={len(self._closed)} stale={len(self.stale_steps)}>"
        )


def _rounds(slots: I64) -> list[I64]:
    """Split indices so that no slot comes twice in a part, the order within each slot kept."""
    nth = np.zeros(len(slots), np.int64)
    seen: dict[int, int] = {}
    for index, slot in enumerate(slots.tolist()):
        nth[index] = seen[slot] = seen.get(slot, -1) + 1
    return [np.flatnonzero(nth == number) for number in range(int(nth.max()) + 1)]
