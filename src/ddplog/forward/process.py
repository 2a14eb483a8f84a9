"""The forwarder's loop: pages the store by cursor, performs what `core.delivery` decides, keeps the cursor.

Order of what is durable: the sink's write (or the dead letter), then the cursor. A crash in between repeats the last
batch with the same bounds or others; a sink that owns its file cuts it back first.

Does not decide batching, pauses or what is dead: that is `core.delivery`. Waits only between statements and writes.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from ddplog.core.delivery import Backoff, Delivery, RunStatus, Send, Wait
from ddplog.errors import ConfigError, PermanentSinkError, RetryableSinkError, RunNotFoundError, SinkError
from ddplog.forward.ledger import Cursor, Ledger
from ddplog.forward.rewinds import Rewinds
from ddplog.killpoints import reach
from ddplog.sinks import Sink, SinkSpec, make_sink, parse_spec
from ddplog.store.emissions import EmissionReader
from ddplog.store.sink_states import SinkState

EXIT_OK: Final = 0
EXIT_UNUSABLE: Final = 3
"""The sink can never work as it is configured: do not start it again."""

POLL_S: Final = 0.05
"""Between two looks at the store. A fifth of the budget from log() to a tracker's own clock tick."""
LONGEST_PAUSE_S: Final = 1.0
"""A longer wait is cut into these, so that a vanished run folder or parent is noticed."""
ORPHAN_IDLE_NS: Final = 30 * 1_000_000_000
"""An aggregator that died is replaced, with forwarders of its own, well within this."""
START_WAIT_NS: Final = 30 * 1_000_000_000
STATE_EVERY_NS: Final = 500_000_000
PAGES_AHEAD: Final = 4


class Host(Protocol):
    """What the loop needs of its process; a fake in tests."""

    def now_ns(self) -> int:
        """Return monotonic time."""
        ...

    def time_unix_ns(self) -> int:
        """Return wall time."""
        ...

    def jitter(self) -> float:
        """Return a random number in [0, 1]."""
        ...

    def pause(self, seconds: float) -> bool:
        """Wait, at most so long. True if the process was asked to stop."""
        ...

    def is_orphan(self) -> bool:
        """Whether the process that started this one is gone."""
        ...


class ProcessHost:
    """The real clock, and SIGTERM. SIGINT is ignored: Ctrl-C goes to the whole foreground group, and the aggregator
    decides when its forwarders end.

    A handler that only writes into a pipe: threading.Event.set() in a handler can deadlock with the wait() that it
    interrupts, and a blocked signal mask would be inherited by what a tracker's SDK starts.
    """

    def __init__(self, parent_pid: int) -> None:
        self._parent_pid = parent_pid
        self._is_stopping = False
        self._read_end, self._write_end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def now_ns(self) -> int:
        """Return monotonic time."""
        return time.monotonic_ns()

    def time_unix_ns(self) -> int:
        """Return wall time."""
        return time.time_ns()

    def jitter(self) -> float:
        """Return a random number in [0, 1]."""
        return random.random()  # noqa: S311  # spreads retries, guards nothing

    def pause(self, seconds: float) -> bool:
        """Wait, at most so long, until SIGTERM."""
        if not self._is_stopping:
            select.select([self._read_end], [], [], max(seconds, 0.0))
        return self._is_stopping

    def is_orphan(self) -> bool:
        """Whether the parent is no longer the one that started us."""
        return os.getppid() != self._parent_pid

    def _stop(self, _number: int, _frame: object) -> None:
        self._is_stopping = True
        os.write(self._write_end, b"x")


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What a forwarder works with."""

    spec: SinkSpec
    sink: Sink
    reader: EmissionReader
    ledger: Ledger
    host: Host


class Stopped(Exception):  # noqa: N818  # not an error: how SIGTERM leaves the loop
    """The process was asked to stop."""


class Forwarder:
    """Delivers one run to one sink.

    Guarantees: every emission is given to the sink in id order, or is in dead.jsonl, before the cursor passes it.

    Does not guarantee: an end. While the tracker does not answer it keeps trying, with `once` too.
    """

    def __init__(self, parts: Parts, *, once: bool) -> None:
        self._parts = parts
        self._once = once
        self._host = parts.host
        self._uuid = parts.reader.store_uuid()
        stored = parts.ledger.read_cursor()
        if stored.cursor and stored.store_uuid not in ("", self._uuid):
            stored = Cursor()  # another store: the old ids mean nothing, and its points are all to come again
        self._delivery = Delivery(
            stored.cursor,
            stored.position,
            parts.sink.limits,
            num_delivered=stored.num_delivered,
            num_dead=stored.num_dead,
        )
        self._rewinds = Rewinds(stored.rewinds, parts.reader.last_step)
        self._next_state_ns = 0
        self._state = ""
        self._reason = ""
        self._lag = 0
        self._through = 0
        self._idle_since_ns: int | None = None

    def __repr__(self) -> str:
        return f"Forwarder({self._parts.spec}, {self._state}, {self._delivery})"

    def run(self) -> int:
        """Deliver until the run has ended and all is delivered (`once`: until all is), or until asked to stop.

        Returns:
            The process's exit status.
        """
        reader, sink = self._parts.reader, self._parts.sink
        self._lag = max(0, reader.last_id() - self._delivery.cursor)
        self._show("starting")
        try:
            run, folder, position = reader.run_info(), self._parts.ledger.folder, self._delivery.position
            self._insist(lambda: sink.open(run, folder, position))
            status = self._deliver()
            self._insist(lambda: sink.close(status))
        except Stopped:
            with suppress(SinkError):  # every batch with an answer is durable already
                sink.close(RunStatus(status="running"))
            self._show("running", "stopped")
            return EXIT_OK
        except PermanentSinkError as exc:
            self._show("failed", str(exc))
            return EXIT_UNUSABLE
        if status.is_ended:
            self._show("drained")
        else:
            self._show("running", "stopped; the run has not ended")
        return EXIT_OK

    def _deliver(self) -> RunStatus:
        """Return once there is nothing left to do, with the run's status."""
        while True:
            action = self._delivery.next_action(self._host.now_ns())
            if isinstance(action, Send):
                self._send(action)
            elif isinstance(action, Wait):
                self._pause_until(action.until_ns)
            else:
                status = self._refill()
                if status is not None:
                    return status

    def _refill(self) -> RunStatus | None:
        """Feed what the store has. Return the run's status if there is nothing and nothing will come."""
        reader = self._parts.reader
        # The status before the page: what was stored before the run ended is then in the page.
        status, last_id = reader.status(), reader.last_id()
        limit = PAGES_AHEAD * self._parts.sink.limits.max_items
        page = reader.page(self._delivery.last_id, limit)
        if page:
            self._idle_since_ns = None
            self._delivery.feed(page)
            self._lag = max(last_id, page[-1].id) - self._delivery.cursor
            if len(page) < limit and not (self._once or status.is_ended):
                self._pause(POLL_S)  # let a live run gather a batch: every batch costs the disk its syncs
            return None
        self._lag = 0
        self._through = last_id
        self._show("running", is_urgent=False)
        if status.is_ended or self._once or self._is_abandoned():
            return status
        self._pause(POLL_S)
        return None

    def _is_abandoned(self) -> bool:
        if not self._host.is_orphan():
            self._idle_since_ns = None
            return False
        now_ns = self._host.now_ns()
        if self._idle_since_ns is None:
            self._idle_since_ns = now_ns
        return now_ns - self._idle_since_ns >= ORPHAN_IDLE_NS

    def _send(self, action: Send) -> None:
        delivery, ledger = self._delivery, self._parts.ledger
        before = delivery.cursor
        try:
            delivery.succeeded(self._parts.sink.write(action.batch))
            self._rewinds.note(action.batch)
        except RetryableSinkError as exc:
            delivery.failed_retryable(self._host.now_ns(), self._host.jitter(), exc.retry_after_s)
            self._show("retrying", str(exc))
            return
        except PermanentSinkError as exc:
            dead = delivery.failed_permanent(str(exc))
            if dead is None:
                return
            ledger.bury(dead)
        reach("forwarder.after_write")
        ledger.write_cursor(
            Cursor(
                cursor=delivery.cursor,
                position=delivery.position,
                store_uuid=self._uuid,
                num_delivered=delivery.num_delivered,
                num_dead=delivery.num_dead,
                rewinds=tuple(self._rewinds.known),
            )
        )
        reach("forwarder.after_cursor")
        self._lag = max(0, self._lag - (delivery.cursor - before))
        self._show("running", is_urgent=False)
        self._pause(0)

    def _insist(self, call: Callable[[], None]) -> None:
        """Call until there is a definite answer."""
        backoff = Backoff()
        while True:
            try:
                call()
            except RetryableSinkError as exc:  # a loop over retries
                until_ns = backoff.failed(self._host.now_ns(), self._host.jitter(), exc.retry_after_s)
                self._show("retrying", str(exc))
                while self._host.now_ns() < until_ns:
                    self._pause_until(until_ns)
            else:
                return

    def _pause_until(self, until_ns: int) -> None:
        self._pause(min((until_ns - self._host.now_ns()) / 1e9, LONGEST_PAUSE_S))
        self._parts.reader.status()  # raises if the run's folder is gone
        self._show(self._state, is_urgent=False, keep_detail=True)

    def _pause(self, seconds: float) -> None:
        if self._host.pause(seconds):
            raise Stopped

    def _show(self, state: str, detail: str = "", *, is_urgent: bool = True, keep_detail: bool = False) -> None:
        now_ns = self._host.now_ns()
        if state == self._state and not is_urgent and now_ns < self._next_state_ns:
            return
        self._state = state
        self._next_state_ns = now_ns + STATE_EVERY_NS
        if not keep_detail:
            self._reason = detail
        num_dead = self._delivery.num_dead
        notes = [self._reason, self._parts.sink.detail, f"{num_dead} refused, see dead.jsonl" if num_dead else ""]
        notes.append(self._rewinds.describe(self._parts.sink.capabilities.on_rewind))
        self._parts.ledger.write_state(
            SinkState(
                name=self._parts.spec.folder_name,
                state=state,
                cursor=self._delivery.cursor,
                through=self._through,
                lag=self._lag,
                detail="; ".join(note for note in notes if note),
                num_delivered=self._delivery.num_delivered,
                num_dead=num_dead,
                time_unix_ns=self._host.time_unix_ns(),
            )
        )


def forward(run_dir: Path, sink: str, host: Host, *, once: bool) -> int:
    """Run one forwarder to its end.

    Args:
        run_dir: The run's folder.
        sink: `name` or `name://target`.
        host: The process.
        once: Deliver what is there and end, whether or not the run has ended.

    Returns:
        The exit status: 0, also if another forwarder has this sink or the run's folder vanished; 3 if the sink can
        never work as it is.

    Raises:
        ConfigError: If `sink` is not of that form.
    """
    spec = parse_spec(sink)
    try:
        ledger = Ledger(run_dir / "sinks" / spec.folder_name)
    except FileNotFoundError as exc:
        raise ConfigError("--run-dir", str(run_dir), "no such folder") from exc
    if not ledger.try_lock():
        _say(f"another forwarder delivers {run_dir} to {spec.folder_name}")
        return EXIT_OK
    try:
        return _forward(run_dir, spec, ledger, host, once=once)
    except (RunNotFoundError, FileNotFoundError) as exc:
        if run_dir.exists():
            raise
        _say(f"the run is gone: {exc}")
        return EXIT_OK
    finally:
        ledger.unlock()


def _forward(run_dir: Path, spec: SinkSpec, ledger: Ledger, host: Host, *, once: bool) -> int:
    cursor = Cursor()
    try:
        cursor = ledger.read_cursor()
        sink = make_sink(spec)
        reader = _open_store(run_dir, host)
        if reader is None:
            return EXIT_OK
        with closing(reader):
            parts = Parts(spec=spec, sink=sink, reader=reader, ledger=ledger, host=host)
            return Forwarder(parts, once=once).run()
    except (ConfigError, PermanentSinkError) as exc:
        _fail(spec, ledger, cursor, host, str(exc))
        return EXIT_UNUSABLE
    except Exception as exc:
        # The outermost loop: a bug, in ddplog or a tracker's SDK. Whoever reads the state learns of it, the traceback
        # goes to the log, and the supervisor starts the process again.
        if run_dir.exists():
            _fail(spec, ledger, cursor, host, repr(exc))
        raise


def _open_store(run_dir: Path, host: Host) -> EmissionReader | None:
    """Wait for the store, which the aggregator makes when it starts. None if asked to stop."""
    deadline_ns = host.now_ns() + START_WAIT_NS
    while True:
        try:
            return EmissionReader(run_dir)
        except RunNotFoundError:
            if host.now_ns() >= deadline_ns or not run_dir.exists():
                raise
        if host.pause(POLL_S):
            return None


def _fail(spec: SinkSpec, ledger: Ledger, cursor: Cursor, host: Host, detail: str) -> None:
    _say(detail)
    ledger.write_state(
        SinkState(
            name=spec.folder_name,
            state="failed",
            cursor=cursor.cursor,
            detail=detail,
            num_delivered=cursor.num_delivered,
            num_dead=cursor.num_dead,
            time_unix_ns=host.time_unix_ns(),
        )
    )


def _say(message: str) -> None:
    sys.stderr.write(f"ddplog.forward: {message}\n")
