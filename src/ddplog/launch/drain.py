"""Talks to a run's aggregator at the end of a job: reports the outcome, and waits until all is delivered.

Waits are bounded, and cut short by a signal. Not here: what is printed (`finale`).
"""

from __future__ import annotations

import json
import signal
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol, TypeVar

from ddplog.errors import ControlUnavailableError
from ddplog.store.sink_states import SinkState, read_sink_states

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from ddplog.journal.spool import JobInfo
    from ddplog.launch.outcome import Outcome
    from ddplog.v1.control_pb2 import FinishReply, FinishRequest, StatusReply

Reply = TypeVar("Reply")

POLL_S: Final = 0.2
REACH_S: Final = 10.0
"""How long a missing aggregator is waited for: the node agent starts a dead one again within seconds."""
SINK_ENDED: Final = frozenset({"drained", "failed"})


class Client(Protocol):
    """What is used of `ddplog.aggregator.control.ControlClient`."""

    def status(self) -> StatusReply: ...
    def finish(self, request: FinishRequest) -> FinishReply: ...
    def close(self) -> None: ...


class Patience:
    """Waits that a signal cuts short: the first says do not wait, the second gives up the end work."""

    def __init__(self) -> None:
        self.is_cut = False

    def __repr__(self) -> str:
        return f"Patience(is_cut={self.is_cut})"

    def now_s(self) -> float:
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep, at most 0.1 s longer than until a signal comes."""
        # No threading.Event: set() in a handler can meet the lock that wait() holds on the same thread.
        end = time.monotonic() + seconds
        while not self.is_cut and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def cut(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - the signal handler's signature
        if self.is_cut:
            raise KeyboardInterrupt
        self.is_cut = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take Ctrl-C, SIGTERM and SIGHUP to mean `cut`; main thread only. torchrun's handlers are replaced."""
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self.cut)
        yield  # Not restored: nothing but this process's exit follows.


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """How far the delivery came."""

    is_stored: bool
    """Every record of every rank is in the store."""
    sinks: tuple[SinkState, ...]

    @property
    def behind(self) -> tuple[SinkState, ...]:
        return tuple(sink for sink in self.sinks if sink.state != "drained")

    @property
    def is_over(self) -> bool:
        return self.is_stored and all(sink.state in SINK_ENDED for sink in self.sinks)


def find_jobs(spool: Path, job: str) -> list[Path]:
    """Return the folders of a job's runs on this node, oldest first."""
    found = [path for path in spool.glob(f"{job}-*") if (path / "job.json").is_file()]
    return sorted(found, key=lambda path: (path / "job.json").stat().st_mtime_ns)


def hosts_aggregator(folder: Path) -> bool:
    """Return whether the run's aggregator is to be found on this node: it lives where rank 0 appeared."""
    return (folder / "aggregator.json").exists() or any(folder.glob("0.*"))


class Aggregator:
    """A run's aggregator, found again when it was restarted.

    Args:
        run_dir: Whose control.json says where it listens.
        is_ended: Whether the store says how the run ended; with no control.json that is the aggregator's goodbye.
        patience: The clock, and the wish to stop.
        connect: Opens the control plane.
        revive: Starts the node's agent unless it lives: the ranks, who did that so far, are gone.
    """

    def __init__(
        self,
        run_dir: Path,
        is_ended: Callable[[], bool],
        patience: Patience,
        connect: Callable[[Path], Client],
        revive: Callable[[], None],
    ) -> None:
        self._control = run_dir / "control.json"
        self._is_ended = is_ended
        self._patience = patience
        self._connect = connect
        self._revive = revive
        self._client: Client | None = None

    def __repr__(self) -> str:
        return f"Aggregator({str(self._control.parent)!r}, {self._client!r})"

    @property
    def is_gone(self) -> bool:
        """Whether it has ended by itself, which it does when everything is stored and delivered."""
        return not self._control.exists() and self.is_ended

    @property
    def is_ended(self) -> bool:
        """Whether the store has the run's end, which it gets after the last record."""
        return self._is_ended()

    def ask(self, question: Callable[[Client], Reply]) -> Reply | None:
        """Ask it something, waiting for one that is being started again.

        Returns:
            None if it has ended by itself, or if nobody answered in time.
        """
        deadline_s = self._patience.now_s() + REACH_S
        while True:
            try:
                if self._client is None:
                    self._client = self._connect(self._read_socket())
                return question(self._client)
            except ControlUnavailableError:
                self.close()
            if self.is_gone or self._patience.is_cut or self._patience.now_s() >= deadline_s:
                return None
            self._revive()
            self._patience.wait(POLL_S)

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _read_socket(self) -> Path:
        try:
            return Path(json.loads(self._control.read_text(encoding="utf-8"))["socket"])
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise ControlUnavailableError(f"{self._control}: {exc}") from exc


def make_request(outcome: Outcome) -> FinishRequest:
    """Return what the aggregator is told."""
    from ddplog.v1.control_pb2 import FinishRequest, RankExit

    exits = [
        RankExit(
            rank=failure.rank,
            pid=failure.pid,
            exit_code=failure.exit_code if failure.signal is None else None,
            signal=failure.signal,
            message=failure.message,
        )
        for failure in outcome.failures
    ]
    return FinishRequest(status=outcome.status, detail=outcome.detail, exits=exits)


def wait_drained(
    aggregator: Aggregator, run_dir: Path, limit_s: float, patience: Patience, show: Callable[[Drain, float], None]
) -> Drain:
    """Wait until every record is stored and every sink has it, or until the time is up.

    Args:
        aggregator: The run's.
        run_dir: Where the sinks leave their state.
        limit_s: How long to wait.
        patience: The clock, and the wish to stop.
        show: Called at every look with how far it is and how long that took, seconds.
    """
    start_s = patience.now_s()
    while True:
        reply = aggregator.ask(lambda client: client.status())
        if reply is None:
            return Drain(is_stored=aggregator.is_ended, sinks=read_sink_states(run_dir))
        drain = read_reply(reply)
        waited_s = patience.now_s() - start_s
        if drain.is_over or patience.is_cut or waited_s >= limit_s:
            return drain
        show(drain, waited_s)
        patience.wait(POLL_S)


def read_reply(reply: StatusReply) -> Drain:
    """Translate the aggregator's word."""
    sinks = tuple(
        SinkState(name=s.name, state=s.state, cursor=s.cursor, lag=s.lag, detail=s.detail) for s in reply.sinks
    )
    return Drain(is_stored=reply.is_drained, sinks=sinks)


def describe_behind(info: JobInfo, drain: Drain) -> list[str]:
    """Return one phrase for each sink that does not have everything yet."""
    phrases = []
    for sink in drain.behind:
        lag = f", {sink.lag:,} behind" if sink.lag else ""
        detail = f" ({sink.detail})" if sink.detail else ""
        phrases.append(f"{sink.name} {sink.state}{lag}{detail}")
    known = {sink.name.partition("://")[0] for sink in drain.sinks}
    phrases += [f"{name} not started" for spec in info.sinks if (name := spec.partition("://")[0]) not in known]
    return phrases
