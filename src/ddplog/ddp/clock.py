"""Owns how time between two marks is measured: on the host at once, on a GPU when the device has got there.

The seam between what is measured and with what: a recorder marks moments and names the spans between them, and a
clock adds a span's seconds to the step it belongs to. Never waits for a device: an event is asked whether it is done,
and its time is read only then.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

Sums = dict[str, float]
"""Seconds by metric name, of one step."""


class Clock(Protocol):
    """What a recorder needs of a clock. `span` and `then` take effect in the order of the calls."""

    def mark(self) -> Any:
        """Return this moment: on the host, or in the current stream."""

    def span(self, sums: Sums, key: str, start: Any, end: Any) -> None:
        """Add the seconds between two marks to sums[key], as soon as they are known."""

    def then(self, action: Callable[[], None]) -> None:
        """Call the action once every span before it is in its sums."""

    def sweep(self) -> None:
        """Take what became known since; never waits."""

    def close(self) -> None:
        """Take what is known, and call the actions that are left without the spans that are not."""


class HostClock:
    """perf_counter: everything is known at once."""

    mark = staticmethod(time.perf_counter)

    def span(self, sums: Sums, key: str, start: float, end: float) -> None:
        sums[key] = sums.get(key, 0.0) + end - start

    def then(self, action: Callable[[], None]) -> None:
        action()

    def sweep(self) -> None:
        """Do nothing: nothing is left open."""

    close = sweep


class Event(Protocol):
    """The part of torch.cuda.Event that is used."""

    def record(self, stream: Any) -> None: ...
    def query(self) -> bool: ...
    def elapsed_time(self, end: Any) -> float: ...


@dataclass(slots=True)
class Mark:
    """A moment in a stream, and how many spans still need it; its event goes back to the pool after the last."""

    event: Event
    num_spans: int = 0


@dataclass(frozen=True, slots=True)
class _Span:
    sums: Sums
    key: str
    start: Mark
    end: Mark


class EventClock:
    """Events in the stream of the moment, from a pool.

    Args:
        new_event: Makes an event that keeps time.
        current_stream: Returns the stream that works for the calling thread.
    """

    def __init__(self, new_event: Callable[[], Event], current_stream: Callable[[], Any]) -> None:
        self._new_event = new_event
        self._current_stream = current_stream
        self._pool: Final[list[Event]] = []
        self._queue: deque[_Span | Callable[[], None]] = deque()
        self.num_events = 0
        """Events made in all: what the pool did not have."""

    def mark(self) -> Mark:
        if self._pool:
            event = self._pool.pop()
        else:
            event = self._new_event()
            self.num_events += 1
        event.record(self._current_stream())
        return Mark(event)

    def span(self, sums: Sums, key: str, start: Mark, end: Mark) -> None:
        start.num_spans += 1
        end.num_spans += 1
        self._queue.append(_Span(sums, key, start, end))

    def then(self, action: Callable[[], None]) -> None:
        self._queue.append(action)
        self.sweep()

    def sweep(self) -> None:
        while self._queue:
            first = self._queue[0]
            if isinstance(first, _Span):
                if not (first.end.event.query() and first.start.event.query()):
                    return
                self._queue.popleft()
                self._add(first)
            else:
                self._queue.popleft()
                first()

    def close(self) -> None:
        self.sweep()
        left, self._queue = self._queue, deque()
        for item in left:
            if not isinstance(item, _Span):
                item()

    def __repr__(self) -> str:
        return f"<EventClock {len(self._queue)} waiting, {len(self._pool)} of {self.num_events} events free>"

    def _add(self, span: _Span) -> None:
        seconds = span.start.event.elapsed_time(span.end.event) / 1e3
        span.sums[span.key] = span.sums.get(span.key, 0.0) + seconds
        for mark in (span.start, span.end):
            mark.num_spans -= 1
            if not mark.num_spans:
                self._pool.append(mark.event)
