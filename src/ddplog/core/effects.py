"""The concepts the pipeline decides about, and Effects: what it decided. Only data; nothing here decides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ddplog.core.panel import Emission
from ddplog.core.records import MAX_STEP, NO_STEP

UNKNOWN_DEATH: Final = "died, code unknown"
ENDED: Final = ("finished", "failed", "killed", "preempted", "died")
"""States of a writer that is gone."""
RANK: Final = "rank"
SYSTEM: Final = "system"
"""Roles of writers: a rank's process, or the sampler of its node, which writes what the GPU and the host of one life of a
rank did."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriterInfo:
    """What a Hello says of a writer."""

    incarnation: bytes
    rank: int
    world_size: int
    local_rank: int
    node_rank: int
    node_id: str
    host: str
    pid: int
    boot_id: str
    started_unix_ns: int
    is_alive: bool
    oldest_seq: int = 0
    """What is left of its journal begins here."""
    role: str = RANK
    belongs_to: bytes = b""
    """SYSTEM: the incarnation of the rank whose samples these are."""


@dataclass(slots=True)
class Writer:
    """A writer as the pipeline knows it."""

    writer_id: int
    info: WriterInfo
    attempt: int
    is_reduced: bool = True
    next_seq: int = 0
    refill_to: int = 0
    """Records below it are stored already, and come again because the rank log has lost them."""
    last_seq: int | None = None
    """Seqs below this exist, known from its Bye."""
    state: str = "running"
    said_finish: bool = False
    finish_status: str = ""
    detail: str = ""
    exit_code: int | None = None
    signal: int | None = None
    ended_unix_ns: int | None = None
    step: int = NO_STEP
    pending_step: tuple[int, int] | None = None
    """(step, through_seq) shown by the agent, not yet reached."""
    last_seen_ns: int = 0
    last_moved_ns: int = 0
    watched_ns: int = 0
    """Since when it has been seen without a gap; see core/hang.py."""
    first_step: int = MAX_STEP
    longest_pause_ns: int = 0
    """Between two moves; until the second step the start-up, which is then forgotten."""
    num_rises: int = 0
    """How often its step was seen to rise."""
    backlog_bytes: int = 0
    schemas: dict[int, tuple[str, ...]] = field(default_factory=dict)
    drops: dict[str, int] = field(default_factory=dict)
    num_lost: int = 0
    """Records that were in no journal any more when the store asked for them."""
    num_refused: int = 0
    """Values under names beyond those that the run may have."""
    num_values: int = 0
    """Numbers and messages taken from it: what its drops are counted in, too."""

    def move(self, old_step: int, now_ns: int) -> None:
        """It sent records or showed a step; `old_step` was the last one before."""
        has_risen = self.step > old_step
        self.num_rises += has_risen
        pause_ns = now_ns - self.last_moved_ns
        if pause_ns > self.longest_pause_ns or (has_risen and self.num_rises == 2):
            self.longest_pause_ns = pause_ns
        self.last_moved_ns = now_ns

    @property
    def is_system(self) -> bool:
        return self.info.role == SYSTEM

    @property
    def has_ended(self) -> bool:
        """Nothing more will come, and all of it is here."""
        return self.last_seq is not None and self.next_seq >= self.last_seq


class LogEntry(NamedTuple):
    """Records to append to the rank log."""

    writer_id: int
    attempt: int
    rank: int
    incarnation: bytes
    first_seq: int
    num_records: int
    payload: bytes


class KeyRow(NamedTuple):
    key_id: int
    name: str
    reduce: str
    replicated: bool


class EventRow(NamedTuple):
    attempt: int
    rank: int | None
    step: int | None
    kind: str
    level: str
    message: str
    data: str
    time_unix_ns: int


class TextRow(NamedTuple):
    attempt: int
    rank: int
    key: str
    step: int | None
    text: str
    time_unix_ns: int


class ParamRow(NamedTuple):
    attempt: int
    rank: int
    name: str
    value: str
    time_unix_ns: int


class AttemptRow(NamedTuple):
    attempt: int
    world_size: int
    opened_unix_ns: int
    reason: str


class Stale(NamedTuple):
    """Points to derive again from the rank log."""

    attempt: int
    key_ids: tuple[int, ...]
    steps: frozenset[int] | None
    """None: every step."""


@dataclass(slots=True)
class Effects:
    """What is to be made durable, then answered."""

    log: list[LogEntry] = field(default_factory=list)
    emissions: list[tuple[int, Emission]] = field(default_factory=list)
    keys: list[KeyRow] = field(default_factory=list)
    events: list[EventRow] = field(default_factory=list)
    texts: list[TextRow] = field(default_factory=list)
    params: list[ParamRow] = field(default_factory=list)
    attempts: list[AttemptRow] = field(default_factory=list)
    schemas: list[tuple[int, int, tuple[str, ...]]] = field(default_factory=list)
    writers: dict[int, Writer] = field(default_factory=dict)
    """Writers whose row changed."""
    status: tuple[str, str] | None = None
    """(status, detail) of the run, when it changed."""
    verdict: tuple[str, str] | None = None
    """What the launcher said, to be remembered; ("", "") forgets it."""
    unsettled: list[Stale] = field(default_factory=list)
    """Points that may be stored and are still to change: what a restart could not see from its replay."""
    stacks: list[bytes] = field(default_factory=list)
    """Incarnations whose stacks are wanted, since their attempt hangs."""
    num_values: int = 0

    def __bool__(self) -> bool:
        return bool(
            self.log
            or self.emissions
            or self.keys
            or self.events
            or self.texts
            or self.params
            or self.attempts
            or self.schemas
            or self.writers
            or self.status
            or self.verdict
        )


class Restored(NamedTuple):
    """What the store remembers of an earlier life of the aggregator."""

    writers: Sequence[Writer]
    attempts: Sequence[AttemptRow]
    keys: Sequence[KeyRow]
    params: Mapping[str, str]
    emitted_to: Mapping[tuple[int, int], int]
    """(attempt, key_id) -> largest step emitted."""
    definitions: Sequence[tuple[str, str, bool]]
    verdict: tuple[str, str] | None
    """(status, detail) that the launcher gave."""
    is_closed: bool
    """Whether the run had ended; that stands until a new writer comes."""
    unsettled: Sequence[Stale]
    """Points that were about to change; they are derived again."""
    hangs: Mapping[int, str] = {}
    """attempt -> the data of its last `hang` event, if no `hang_over` followed."""
