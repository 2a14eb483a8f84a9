"""Decides what a forwarder sends to its sink next, and what a sink's answer means. Touches nothing.

The process around it performs the effects: it calls `next_action`, writes the batch that `Send` carries, tells the
outcome (`succeeded`, `failed_retryable`, `failed_permanent`), stores `cursor` and `position` once a definite answer
has moved them, and feeds more emissions when it is told `Idle`. Time comes in as `now_ns` (monotonic) and randomness
as a number, so that every history can be replayed.

Rules:

- The cursor is the id of the last emission with a definite answer: taken by the sink, or refused for good.
- A batch whose outcome is unknown is sent again with the same bounds until the answer is definite. A tracker that
  deduplicates by request then sees the same request, and a file sink the same bytes.
- A batch refused for good is halved until single emissions remain; each of those that is refused is dead.
- There is no give-up: the wait between tries grows to 60 s and stays there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

from ddplog.errors import LocalProtocolError

Position = Mapping[str, Any]
"""What a sink wants to know when it is opened again: JSON, stored beside the cursor."""

BACKOFF_BASE_NS: Final = 1_000_000_000
BACKOFF_CAP_NS: Final = 60_000_000_000
RETRY_AFTER_CAP_NS: Final = 3600 * 1_000_000_000
"""A tracker may ask for any pause; an hour bounds the harm of a wrong header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunInfo:
    """What a sink needs to know of the run when it is opened."""

    run_id: str
    project: str = "default"
    name: str | None = None
    tags: tuple[str, ...] = ()
    config: Mapping[str, Any] = field(default_factory=dict)
    created_unix_ns: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """How the run stands."""

    status: str
    """running, finished, failed, killed, preempted or unknown."""
    detail: str = ""

    @property
    def is_ended(self) -> bool:
        """Whether no further emission is expected."""
        return self.status != "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One key at one step, reduced over ranks. A float that is None is NaN, as in the store."""

    id: int
    key: str
    attempt: int
    step: int
    value: float | None
    n: int
    expected: int
    min: float | None
    min_rank: int | None
    max: float | None
    max_rank: int | None
    mean: float | None
    std: float | None
    nan_count: int
    inf_count: int
    bad_rank: int | None
    revision: int
    """0: the first emission of this key, attempt and step; higher: it replaces an earlier one."""
    time_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RankPoint:
    """One key at one step on one rank, of a metric that is kept per rank."""

    id: int
    key: str
    attempt: int
    step: int
    rank: int
    value: float | None
    time_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text that a rank logged."""

    id: int
    attempt: int
    rank: int
    key: str
    step: int | None
    text: str
    time_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Param:
    """A parameter that a rank logged; `value` as the store has it."""

    id: int
    attempt: int
    rank: int
    name: str
    value: str
    time_unix_ns: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something that happened to the run: an alert, a death, a disagreement."""

    id: int
    attempt: int
    rank: int | None
    step: int | None
    kind: str
    level: str
    message: str
    data: Any
    """Decoded JSON."""
    time_unix_ns: int


Emission = Point | RankPoint | Text | Param | Event


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a sink can take."""

    max_items: int = 1000
    """Emissions in one batch."""
    rate_per_s: float | None = None
    """Emissions a second over time; None: no limit. A batch that is sent again counts again."""
    burst_items: int = 0
    """Emissions that may follow each other without a pause after silence; at least `max_items` in effect."""


@dataclass(frozen=True, slots=True)
class Send:
    """Write this batch, then tell the outcome."""

    batch: tuple[Emission, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Do nothing before `until_ns`."""

    until_ns: int


@dataclass(frozen=True, slots=True)
class Idle:
    """Everything fed has its answer; feed more."""


@dataclass(frozen=True, slots=True)
class Dead:
    """Keep this emission with the reason; the sink will never take it."""

    emission: Emission
    reason: str


Action = Send | Wait | Idle


class Backoff:
    """Full-jitter exponential backoff: a wait drawn evenly from 0 to min(60 s, 1 s * 2**failures).

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.
    """

    def __init__(self) -> None:
        self.num_failures = 0
        self.until_ns = 0

    def __repr__(self) -> str:
        return f"Backoff(num_failures={self.num_failures}, until_ns={self.until_ns})"

    def failed(self, now_ns: int, jitter: float, retry_after_s: float | None = None) -> int:
        """Count a failure.

        Args:
            now_ns: Monotonic.
            jitter: A random number in [0, 1].
            retry_after_s: The tracker's wish; waited for in full, up to an hour.

        Returns:
            When to try again.
        """
        # The shift is bounded: after days of outage 2**failures would be a number of thousands of digits.
        ceiling_ns = min(BACKOFF_CAP_NS, BACKOFF_BASE_NS << min(self.num_failures, 6))
        delay_ns = int(ceiling_ns * jitter)
        if retry_after_s is not None and retry_after_s > 0:
            wish_ns = RETRY_AFTER_CAP_NS if retry_after_s >= 3600 else int(retry_after_s * 1e9)
            delay_ns = max(delay_ns, wish_ns)
        self.num_failures += 1
        self.until_ns = now_ns + delay_ns
        return self.until_ns

    def answered(self) -> None:
        """Forget the failures: the tracker gave a definite answer."""
        self.num_failures = 0
        self.until_ns = 0


class Delivery:
    """The state of one sink's delivery. Not thread-safe, never blocks.

    Guarantees: batches are contiguous, in id order, and every emission fed is in a batch that was taken or is
    returned as Dead before the cursor passes it.

    Does not guarantee: that an emission reaches the sink once; a batch is sent again after an unknown outcome.
    """

    def __init__(
        self, cursor: int, position: Position | None, limits: Limits, *, num_delivered: int = 0, num_dead: int = 0
    ) -> None:
        self.cursor = cursor
        self.position = position
        self.num_delivered = num_delivered
        """Emissions taken up to the cursor, in all lives: with num_dead, all there are up to it."""
        self.num_dead = num_dead
        self._limits = limits
        self._queue: deque[Emission] = deque()
        self._last_id = cursor
        # Sizes of the next batches, the next one last. Not empty: those bounds are settled and must not change.
        self._sizes: list[int] = []
        self._in_flight = False
        self._backoff = Backoff()
        self._bucket_ns = 0  # when the bucket is full again (generic cell rate algorithm, ITU-T I.371)

    def __repr__(self) -> str:
        return (
            f"Delivery(cursor={self.cursor}, queued={len(self._queue)}, sizes={self._sizes}, "
            f"in_flight={self._in_flight}, num_dead={self.num_dead}, {self._backoff})"
        )

    @property
    def last_id(self) -> int:
        """The id of the last emission fed; feed what comes after it."""
        return self._last_id

    @property
    def num_queued(self) -> int:
        """Emissions fed that have no answer yet."""
        return len(self._queue)

    def feed(self, emissions: Sequence[Emission]) -> None:
        """Take over emissions, in id order, all above `last_id`."""
        for emission in emissions:
            if emission.id <= self._last_id:
                raise LocalProtocolError(f"emission {emission.id} fed after {self._last_id}")
            self._last_id = emission.id
            self._queue.append(emission)

    def next_action(self, now_ns: int) -> Action:
        """Return what to do. After Send, tell the outcome before asking again."""
        if self._in_flight:
            raise LocalProtocolError("asked for the next action while a batch has no outcome")
        if not self._queue:
            return Idle()
        if now_ns < self._backoff.until_ns:
            return Wait(self._backoff.until_ns)
        size = self._sizes[-1] if self._sizes else min(self._limits.max_items, len(self._queue))
        allowed_ns = self._allowed_ns(size)
        if now_ns < allowed_ns:
            return Wait(allowed_ns)
        if not self._sizes:
            self._sizes.append(size)
        self._bucket_ns = max(self._bucket_ns, now_ns) + self._cost_ns(size)
        self._in_flight = True
        return Send(tuple(islice(self._queue, size)))

    def succeeded(self, position: Position | None) -> None:
        """The sink has the batch, durably; `position` is what it wants to know at its next start."""
        size = self._answered()
        for _ in range(size):
            self.cursor = self._queue.popleft().id
        self.num_delivered += size
        self.position = position

    def failed_retryable(self, now_ns: int, jitter: float, retry_after_s: float | None = None) -> int:
        """The outcome is unknown, or the tracker wants it later.

        Returns:
            When the same batch is sent again.
        """
        self._end_flight()
        return self._backoff.failed(now_ns, jitter, retry_after_s)

    def failed_permanent(self, reason: str) -> Dead | None:
        """The tracker will never take this batch.

        Returns:
            The dead emission if the batch was a single one, which the cursor has then passed: keep it before the
            cursor is stored. None if the batch is being halved.
        """
        size = self._answered()
        if size > 1:
            self._sizes += [size - size // 2, size // 2]
            return None
        emission = self._queue.popleft()
        self.cursor = emission.id
        self.num_dead += 1
        return Dead(emission, reason)

    def _answered(self) -> int:
        self._end_flight()
        self._backoff.answered()
        return self._sizes.pop()

    def _end_flight(self) -> None:
        if not self._in_flight:
            raise LocalProtocolError("an outcome was told, but no batch is under way")
        self._in_flight = False

    def _cost_ns(self, size: int) -> int:
        return 0 if self._limits.rate_per_s is None else int(size * 1e9 / self._limits.rate_per_s)

    def _allowed_ns(self, size: int) -> int:
        burst = max(self._limits.burst_items, self._limits.max_items)
        return self._bucket_ns + self._cost_ns(size) - self._cost_ns(burst)
