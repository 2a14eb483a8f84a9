"""Owns one attempt: the ranks that train together, their watermark, and the panels that reduce what they log.

Which writer belongs to which attempt is the pipeline's decision. Reductions never mix attempts, so each has panels of
its own; the keys and their reductions are the run's. The system writers of an attempt have an Attempt of their own, with
the same number: another lane, whose steps are seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from ddplog.core.batches import Rows, split
from ddplog.core.effects import KeyRow, Stale, Writer
from ddplog.core.hang import Hang
from ddplog.core.key_table import KeyTable
from ddplog.core.panel import KEEP_CLOSED, Emission, Panel, RankStates
from ddplog.core.watermark import NOTHING_YET, Watermark


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Settings that decide when a point is emitted and a run is over; see config.Settings."""

    grace_ns: int
    late_ns: int
    settle_ns: int
    max_keys: int
    hang_ns: int = 0
    """0: no attempt is taken for hung."""
    sample_ns: int = 0
    """Time between two samples of a system writer."""
    max_open: int = 65_536
    """Open windows per panel beyond which the oldest close incomplete: a rank far ahead must not fill the memory."""
    max_cells: int = 16 * 1024 * 1024
    """Values (ranks x windows x keys, about 20 bytes each) in the open windows of an attempt, likewise: 64 ranks with 100
    keys may be 2,600 steps apart. As many again may be kept of closed ones, for late values."""
    max_points: int = 128 * 1024
    """Points that are emitted at once, about 600 bytes each on their way into the store; what is ready beyond them comes
    with the next commit. Four times what SQLite takes in the 50 ms between two commits."""


_MAX_STALE: Final = 1_000_000
"""Stale steps of a panel that are derived without waiting for more: a set of them takes about 100 MB."""
_MIN_OPEN: Final = 8
"""Windows that a panel may have in any case: ranks are a step or two apart, and their batches some more."""
_MAX_LAYOUTS: Final = 4096
"""Sets of names whose place is remembered; a script that logs other names every time finds them anew every time."""


class _Piece(NamedTuple):
    """Part of a schema that lies in one panel."""

    panel: Panel
    columns: tuple[int, ...] | None
    """Of the panel; None: all of them in order."""
    sources: tuple[int, ...] | None
    """Of the schema; None: all of them in order."""


class _Layout(NamedTuple):
    """Where the values of a schema go."""

    pieces: tuple[_Piece, ...]
    num_refused: int
    """Names beyond `max_keys`: their values are dropped, and counted."""


class Attempt:
    """One set of ranks, and the reduction of what they log.

    Args:
        number: Of the attempt.
        world_size: Declared ranks.
        opened_unix_ns: When it opened.
        options: See Options.
        table: The run's keys.
        emitted_to: key_id -> largest step that an earlier life of the aggregator emitted.
        now_ns: Monotonic time.
    """

    def __init__(
        self,
        number: int,
        world_size: int,
        opened_unix_ns: int,
        options: Options,
        table: KeyTable,
        emitted_to: Mapping[int, int],
        now_ns: int,
    ) -> None:
        self.number = number
        self.opened_unix_ns = opened_unix_ns
        self.watermark = Watermark(world_size, options.grace_ns, now_ns)
        self.closed_to = NOTHING_YET
        """The watermark of the last tick."""
        self.holders: dict[int, Writer] = {}
        self.members: list[Writer] = []
        self.hang: Hang | None = None
        self.hung_unix_ns = 0
        """Since when, by the wall."""
        self.is_replaying = False
        self._turn = 0
        self._options = options
        self._table = table
        self._emitted_to = dict(emitted_to)
        self.panels: list[Panel] = []
        self._home: dict[int, tuple[Panel, int]] = {}
        """key_id -> (panel, column)"""
        self.layouts: dict[tuple[str, ...], _Layout] = {}

    @property
    def is_over(self) -> bool:
        """Whether every rank has ended, and all it left is here."""
        return all(writer.has_ended for writer in self.members)

    # -- records

    def add(self, writer: Writer, rows: Rows, late_to: int, now_ns: int, ordinal: int) -> int:
        """Reduce a writer's scalars; the arguments are those of Panel.add().

        Returns:
            How many values were refused, since the run has too many names.
        """
        pieces, num_refused = self._layout(writer.schemas[rows.schema_id])
        for piece in pieces:
            part = rows if piece.sources is None else rows.columns(piece.sources)
            piece.panel.add(writer.info.rank, part, piece.columns, late_to, now_ns, ordinal)
        return num_refused * len(rows.steps)

    def whole_panel(self, keys: tuple[str, ...]) -> Panel | None:
        """Return the panel whose keys are exactly these, in this order; None if there is none."""
        pieces = self._layout(keys).pieces
        if len(pieces) != 1 or pieces[0].columns is not None or pieces[0].sources is not None:
            return None
        return pieces[0].panel

    def flush(self) -> None:
        """Reduce what single records had put off."""
        for panel in self.panels:
            panel.flush()

    def end_replay(self) -> None:
        """From now on records are new."""
        self.is_replaying = False
        for panel in self.panels:
            panel.flush()
            panel.is_replaying = False

    def has(self, key_id: int) -> bool:
        """Whether a rank has logged the key."""
        return key_id in self._home

    def redefine(self, row: KeyRow) -> bool:
        """Reduce a key otherwise from now on. False if the attempt does not have it."""
        if not self.has(row.key_id):
            return False
        panel, column = self._home[row.key_id]
        panel.reductions[column], panel.replicated[column] = row.reduce, row.replicated
        return True

    def _layout(self, keys: tuple[str, ...]) -> _Layout:
        layout = self.layouts.get(keys)
        if layout is None:
            if len(self.layouts) >= _MAX_LAYOUTS:
                self.layouts.clear()
            layout = self.layouts[keys] = self._make_layout(keys)
        return layout

    def _make_layout(self, keys: tuple[str, ...]) -> _Layout:
        rows = [self._table.key(name) for name in keys]
        self._make_panels([row for row in rows if row is not None and row.key_id not in self._home])
        by_panel: dict[int, tuple[Panel, list[int], list[int]]] = {}
        for source, row in enumerate(rows):
            if row is None:
                continue
            panel, column = self._home[row.key_id]
            _, columns, sources = by_panel.setdefault(id(panel), (panel, [], []))
            columns.append(column)
            sources.append(source)
        pieces = []
        for panel, columns, sources in by_panel.values():
            is_whole = columns == list(range(len(panel.key_ids)))
            is_all = sources == list(range(len(keys)))
            pieces.append(_Piece(panel, None if is_whole else tuple(columns), None if is_all else tuple(sources)))
        return _Layout(tuple(pieces), rows.count(None))

    def _make_panels(self, fresh: Sequence[KeyRow]) -> None:
        by_emitted: dict[int | None, list[KeyRow]] = {}
        for row in fresh:
            by_emitted.setdefault(self._emitted_to.get(row.key_id), []).append(row)
        for emitted_to, rows in by_emitted.items():  # one replay rule a panel
            panel = self._panel(rows, emitted_to)
            panel.is_replaying = self.is_replaying
            self.panels.append(panel)
            self._home.update({row.key_id: (panel, column) for column, row in enumerate(rows)})

    def _panel(self, rows: Sequence[KeyRow], emitted_to: int | None = None) -> Panel:
        return Panel(
            [row.key_id for row in rows],
            [row.reduce for row in rows],
            [row.replicated for row in rows],
            world_size=self.watermark.world_size,
            settle_ns=self._options.settle_ns,
            late_ns=self._options.late_ns,
            emitted_to=emitted_to,
        )

    # -- points

    def close(self, now_ns: int, *, at_once: bool, is_past: bool) -> list[Emission]:
        """Close what is due.

        Args:
            now_ns: Monotonic time.
            at_once: Everything, since nothing more will come.
            is_past: Another attempt has opened: once all has come, give the memory back.

        Returns:
            The points whose time has come, max_points of them; the others next time: has_open says whether.
        """
        self.closed_to = self.watermark.value(now_ns)
        ranks = RankStates(
            progress=self.watermark.progress,
            ended=self.watermark.ended,
            finished=self.watermark.finished,
            silent=self.watermark.silent(now_ns),
        )
        is_past &= at_once or self.is_over
        max_open, num_left = self._max_open, self._options.max_points
        emissions = []
        self._turn += 1  # whoever comes last may have to wait
        for index in range(len(self.panels)):
            panel = self.panels[(index + self._turn) % len(self.panels)]
            panel.keep_closed = min(KEEP_CLOSED, max_open)
            emission = panel.close_ready(
                self.closed_to, ranks, now_ns, at_once=at_once or is_past, max_open=max_open, max_points=num_left
            )
            if is_past:
                panel.shrink()
            if emission is not None:
                emissions.append(emission)
                num_left -= emission.num_points
                if num_left <= 0:
                    break
        return emissions

    @property
    def has_open(self) -> bool:
        """Whether a window is open."""
        return any(panel.num_open for panel in self.panels)

    @property
    def _max_open(self) -> int:
        """How many windows each panel may have open, so that all of them together stay below max_cells."""
        width = sum(panel.width for panel in self.panels)
        return min(self._options.max_open, max(_MIN_OPEN, self._options.max_cells // max(1, width)))

    @property
    def unsettled(self) -> list[Stale]:
        """Points that may be stored and are still to change."""
        return [
            Stale(self.number, panel.key_ids, frozenset(steps)) for panel in self.panels if (steps := panel.unsettled)
        ]

    @property
    def oldest_open(self) -> int | None:
        """Number of the first rank log entry that an open window was made from; None if none is open."""
        oldest = [panel.oldest_open for panel in self.panels]
        return min((entry for entry in oldest if entry is not None), default=None)

    def take_stale(self, now_ns: int, *, at_once: bool) -> list[Stale]:
        """Return the points whose values changed after their windows were gone, once nothing more is awaited.

        Args:
            now_ns: Monotonic time.
            at_once: All of them, since the run is over; else a part of each panel's, and the rest next time.
        """
        result = []
        for panel in self.panels:
            if panel.stale_since_ns is None:
                continue
            most = max(_MIN_OPEN, self._options.max_cells // max(1, panel.width))  # one derivation's memory
            most = max(1, min(most, self._options.max_points // len(panel.key_ids)))
            is_due = now_ns - panel.stale_since_ns >= self._options.late_ns
            if at_once or is_due or len(panel.stale_steps) >= min(most, _MAX_STALE):
                steps = sorted(panel.stale_steps)
                steps = steps if at_once else steps[:most]  # each part reads the whole rank log: agents wait meanwhile
                parts = (frozenset(steps[i : i + most]) for i in range(0, len(steps), most))
                result += [Stale(self.number, panel.key_ids, part) for part in parts]
                panel.stale_steps.difference_update(steps)
                if not panel.stale_steps:
                    panel.stale_since_ns = None
        return result

    def derive(
        self, stale: Stale, writers: Mapping[int, Writer], entries: Iterable[tuple[int, int, bytes]]
    ) -> Emission | None:
        """Reduce points again from the rank log.

        Args:
            stale: Which points.
            writers: The run's, by id.
            entries: (writer_id, first_seq, payload) of the whole rank log, in any order between writers.

        Returns:
            Their emission; None if the log has no record of them any more.
        """
        wanted = [self._table.by_id(key_id) for key_id in stale.key_ids]
        columns = {row.name: column for column, row in enumerate(wanted)}
        panel = self._panel(wanted)
        for column, row in enumerate(wanted):
            if row.key_id in self._home:
                home, its_column = self._home[row.key_id]
                panel.expected[:, column] = home.expected[:, its_column]
        steps = None if stale.steps is None else np.fromiter(stale.steps, np.int64)
        for writer_id, first_seq, payload in entries:
            writer = writers[writer_id]
            if writer.attempt != self.number or not writer.is_reduced:
                continue
            for item in split(payload, first_seq)[1]:
                if not isinstance(item, Rows):
                    continue
                keys = writer.schemas.get(item.schema_id, ())
                sources = [index for index, name in enumerate(keys) if name in columns]
                part = item if steps is None else item.where(np.isin(item.steps, steps))
                if sources and len(part.steps):
                    places = [columns[keys[index]] for index in sources]
                    panel.add(writer.info.rank, part.columns(sources), places, NOTHING_YET, 0)
        progress = self.watermark.progress
        nobody = np.zeros(len(progress), np.bool_)
        ranks = RankStates(progress=progress, ended=nobody, finished=nobody, silent=nobody)
        emission = panel.close_ready(NOTHING_YET, ranks, 0, at_once=True)
        if emission is not None:
            self._note_emitted(emission)
        return emission

    def _note_emitted(self, emission: Emission) -> None:
        """Remember what was derived as emitted: another restart would take open windows below it for stored."""
        last = int(emission.steps[-1])
        for key_id in emission.key_ids:
            self._emitted_to[key_id] = max(last, self._emitted_to.get(key_id, last))
            if key_id in self._home:
                self._home[key_id][0].note_emitted(last)

    def __repr__(self) -> str:
        return f"<Attempt {self.number} members={len(self.members)} panels={len(self.panels)} {self.watermark!r}>"
