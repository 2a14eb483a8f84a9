"""Decides what the delivery audit says: of every rank, logged = stored + dropped by reason; of every sink, emitted =
delivered + refused + waiting. Every number comes from another counter, so that a row that does not add up is a loss that
nobody noticed. Prints nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from ddplog.store.columns import Drop, WriterInfo
    from ddplog.store.reader import Run

TAKEN_ALL_THE_SAME: Final = ("bad_weight",)
"""Counted beside the drops, but the values are stored, with the weight 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankAudit:
    """What became of what one life of a rank logged, in values (numbers, params, texts, alerts)."""

    writer_id: int
    rank: int
    """-1: a drop whose writer the store does not know."""
    attempt: int
    stored: int
    dropped: Mapping[str, int]
    """Reason -> count."""

    @property
    def num_dropped(self) -> int:
        return sum(count for reason, count in self.dropped.items() if reason not in TAKEN_ALL_THE_SAME)

    @property
    def logged(self) -> int:
        return self.stored + self.num_dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class SinkAudit:
    """What became of the run's emissions (points and their revisions, texts, params, events) in one sink."""

    name: str
    state: str
    emitted: int
    delivered: int | None
    """None: its forwarder has not counted."""
    refused: int
    """For good: they are in the sink's dead.jsonl."""
    waiting: int
    """Above the sink's cursor."""
    replaced: int
    """Values kept per rank that were replaced, and so may be delivered twice or, replaced early enough, once."""

    @property
    def missing(self) -> int:
        """Emissions that are neither delivered, nor refused, nor waiting, nor replaced: 0, or something is wrong."""
        if self.delivered is None:
            return 0
        accounted = self.delivered + self.refused + self.waiting
        return max(0, self.emitted - self.replaced - accounted) or min(0, self.emitted - accounted)


def rank_audits(writers: Sequence[WriterInfo], drops: Iterable[Drop]) -> tuple[RankAudit, ...]:
    """Return the audit of every life of every rank, by attempt and rank."""
    found = {w.writer_id: (w.attempt, w.rank, w.num_values) for w in writers}
    dropped: dict[int, dict[str, int]] = {}
    for drop in drops:
        by_reason = dropped.setdefault(drop.writer_id, {})
        by_reason[drop.reason] = by_reason.get(drop.reason, 0) + drop.count
        found.setdefault(drop.writer_id, (drop.attempt, -1, 0))
    rows = sorted((attempt, rank, writer_id, stored) for writer_id, (attempt, rank, stored) in found.items())
    return tuple(
        RankAudit(writer_id=writer_id, rank=rank, attempt=attempt, stored=stored, dropped=dropped.get(writer_id, {}))
        for attempt, rank, writer_id, stored in rows
    )


def sink_audits(run: Run) -> tuple[SinkAudit, ...]:
    """Return the audit of every sink that has said how far it is, by name."""
    states = run.sink_states()  # before the counts: what has an id up to a cursor is then in the store
    if not states:
        return ()
    last_id = max(run.last_id, *(state.cursor for state in states))
    in_store, replaced = run.num_emissions(0, last_id), run.num_replaced
    return tuple(
        SinkAudit(
            name=state.name,
            state=state.state,
            emitted=in_store + replaced,
            delivered=state.num_delivered,
            refused=state.num_dead,
            waiting=run.num_emissions(state.cursor, last_id),
            replaced=replaced,
        )
        for state in states
    )
