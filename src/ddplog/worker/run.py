"""Owns a run inside a training process: the public Run object.

After init() nothing here raises into the training loop unless `strict` is set, and nothing blocks: a value that
cannot be logged is counted by reason in the journal's head page and warned about once per reason. A value on a device is
not waited for: it enters the journal, in its place, when a later call finds it arrived (pending.py).
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from ddplog.core.records import NO_STEP, SYSTEM_PREFIX
from ddplog.errors import UsageError
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import NO_WEIGHT, JournalFullError, JournalWriter
from ddplog.worker.device import Cuda, Device
from ddplog.worker.identity import Identity
from ddplog.worker.pending import Pending
from ddplog.worker.scalars import (
    BadValueError,
    as_int,
    as_number,
    exempt_from_tracing,
    flatten,
    is_remote,
    shown,
)

if TYPE_CHECKING:
    from types import FrameType

    from typing_extensions import Self

_logger = logging.getLogger("ddplog")
_LEVELS: Final = ("info", "warning", "error")
_MAX_LATER: Final = 1000
_POLL_S: Final = 0.0005
_STATUSES: Final = ("finished", "failed", "killed", "preempted")
_LEAST_WAIT_S: Final = 1.0
"""How long flush() and the end wait for a device even with exit_wait_s=0: its last kernels take milliseconds."""
_PERCENTILE: Final = re.compile(r"p([0-9]{1,2}(\.[0-9]+)?|100)")  # as core/reduce.py has it, which imports numpy
_REDUCTIONS: Final = ("mean", "sum", "min", "max", "last", "std", "median", "rss", "none")


class Run:
    """One rank's handle on the run. Every method may be called on any rank, from any thread, at any time.

    Guarantees: what was accepted (the call returned) survives SIGKILL of the process, values on a device excepted: they,
    and what is logged after them, do once a later call, flush(), finish() or the exit finds them arrived. Those that a
    SIGKILL takes are counted as dropped, `device_pending`.
    Does not guarantee: that it has reached the aggregator; see flush() and finish().
    """

    def __init__(
        self,
        journal: JournalWriter,
        job: JobInfo,
        identity: Identity,
        *,
        strict: bool,
        exit_wait_s: float,
        max_keys: int,
        device: Device | None = None,
    ) -> None:
        self._journal = journal
        self._pending = Pending(journal, device or Cuda())
        self._is_exempt = False
        self._fast = journal.log_floats
        self._deferred = journal.deferred
        self._job = job
        self._identity = identity
        self._strict = strict
        self._exit_wait_s = exit_wait_s
        self._max_keys = max_keys
        self._keys: set[str] = set()
        self._calls: dict[frozenset[str], int] = {}
        self._warned: set[str] = set()
        self._pid = os.getpid()
        self._is_finished = False
        self._later: deque[Callable[[], None]] = deque()

    @property
    def run_id(self) -> str:
        """The run's id, and its folder's name."""
        return self._job.run_id

    @property
    def dir(self) -> str:
        """The run's folder."""
        return str(self._job.run_dir)

    @property
    def rank(self) -> int:
        """This process's global rank."""
        return self._identity.rank

    @property
    def world_size(self) -> int:
        return self._identity.world_size

    @property
    def step(self) -> int | None:
        """The ambient step, which set_step() sets; None without one."""
        step = self._journal.ambient_step
        return None if step == NO_STEP else step

    @property
    def drops(self) -> Mapping[str, int]:
        """Values of this rank that were not taken: reason -> count."""
        return self._journal.drops

    def log(self, data: Mapping[str, Any], step: int | None = None, weight: float = NO_WEIGHT) -> None:
        """Log numbers of one step.

        Args:
            data: Names to numbers: Python, numpy or torch (one element), on a GPU too: it is not waited for, and what
                is done with the tensor afterwards does not matter. Nested dicts are joined by "/".
            step: The optimizer step. If not given: that of set_step(), else how often this set of names was logged
                before by this rank.
            weight: What the values count for in weighted reductions, usually len(batch); finite, not negative.

        Raises:
            UsageError: Under strict=True only, for a value that is not a number or a name that is not a string.
        """
        if not self._fast(data, step, weight):
            self._log_slowly(data, step, weight)
        if self._deferred:
            self._drain()

    def _log_slowly(self, data: Mapping[str, Any], step: int | None, weight: float) -> None:
        journal = self._journal
        self._is_exempt = self._is_exempt or exempt_from_tracing()
        if not journal.is_open:
            self._refuse_closed(_size(data))
            return
        if not journal.enter():
            journal.defer(data, step, weight)
            return
        problems: list[BadValueError] = []
        try:
            if self._pending.queue:
                self._pending.sweep()
            self._append(data, step, weight, problems)
        except Exception as exc:  # noqa: BLE001 - the edge of the public API: training goes on
            journal.drop("io_error", _size(data))
            self._warn("io_error", f"log() failed: {exc!r}")
        finally:
            journal.leave()
        if self._pending.said:
            self._say()
        for problem in problems:
            journal.drop(problem.reason, problem.num_values)
            self._warn(problem.reason, str(problem))
        if problems and self._strict:
            raise UsageError("; ".join(map(str, problems[:5])))

    def _append(self, data: Mapping[str, Any], step: Any, weight: Any, problems: list[BadValueError]) -> None:
        if not isinstance(data, Mapping):
            what = type(data).__name__
            problems.append(BadValueError("bad_value", f"log() takes a dict of names to numbers, not {what}"))
            return
        numbers = self._known_numbers(data)
        if numbers is None:
            pairs = list(self._numbers(data, problems))
            numbers = dict(pairs)
            if len(numbers) < len(pairs):
                why = "a nested name and a flat one are the same: the last value counts"
                problems.append(BadValueError("bad_key", why, len(pairs) - len(numbers)))
        names = tuple(numbers)
        step_or_tensor = self._step(names, step, problems) if names else None
        if step_or_tensor is not None:
            factor = self._weight(weight, problems)
            self._pending.put(names, list(numbers.values()), step_or_tensor, factor, problems)

    def _say(self) -> None:
        """Warn of what went wrong inside, now that the journal has been left: a warning may run the user's code."""
        said, self._pending.said = self._pending.said, []
        for reason, why in said:
            self._warn(reason, why)

    def _known_numbers(self, data: Mapping[str, Any]) -> dict[str, Any] | None:
        """Take a flat dict of names that were all taken before, of which only the values have to be looked at.

        Returns:
            Floats, and tensors on a device. None if it is anything else, or a value is no number: _numbers() then says
            what is wrong.
        """
        if not self._keys.issuperset(data):
            return None
        try:
            return {key: value if type(value) is float else as_number(key, value) for key, value in data.items()}
        except Exception:  # noqa: BLE001 - float() of a user's object may raise anything
            return None

    def _numbers(self, data: Mapping[str, Any], problems: list[BadValueError]) -> Iterator[tuple[str, Any]]:
        for key, value, problem in flatten(data):
            if problem is not None:
                problems.append(problem)
                continue
            try:
                number = as_number(key, value)
                self._admit_key(key)
            except BadValueError as exc:
                problems.append(exc)
            except Exception as exc:  # noqa: BLE001 - float() of a user's object may raise anything
                problems.append(BadValueError("bad_value", f"{key}: {exc!r}"))
            else:
                yield key, number

    @staticmethod
    def _weight(weight: Any, problems: list[BadValueError]) -> Any:
        try:
            factor = as_number("weight", weight)
        except BadValueError:
            factor = -1.0
        if type(factor) is not float or 0 <= factor < float("inf"):
            return factor
        why = f"weight={shown(weight)} must be a finite number, 0 or more; 1 is taken"
        problems.append(BadValueError("bad_weight", why))
        return 1.0

    def _admit_key(self, key: str) -> None:
        if key in self._keys:
            return
        if key.startswith(SYSTEM_PREFIX):
            raise BadValueError("bad_key", f"{key}: names below {SYSTEM_PREFIX} are those of GPU and host metrics")
        if len(self._keys) >= self._max_keys:
            raise BadValueError("key_limit", f"{key}: this rank has logged {self._max_keys} names already (max_keys)")
        self._keys.add(key)

    def _step(self, names: tuple[str, ...], step: Any, problems: list[BadValueError]) -> Any:
        if step is not None:
            try:
                number = as_number("step", step) if is_remote(step) else as_int(step)
            except BadValueError:
                number = None
            if number is None:
                why = f"step={shown(step)} must be a whole number of 64 bits"
                problems.append(BadValueError("bad_step", why, len(names)))
            return number
        if self._journal.ambient_step != NO_STEP:
            return self._journal.ambient_step
        known = frozenset(names)
        count = self._calls.get(known, 0)
        if not count and len(self._calls) >= self._max_keys:
            why = f"this rank has logged {self._max_keys} different sets of names without a step (max_keys)"
            problems.append(BadValueError("key_limit", why, len(names)))
            return None
        self._calls[known] = count + 1
        return count

    def _refuse_closed(self, num_values: int) -> None:
        if os.getpid() != self._pid:
            self._warn("forked_child", "log() in a forked process is ignored: log in the rank's own process")
            return
        self._journal.drop("after_finish", num_values)
        self._warn("after_finish", "log() after finish() is ignored (counted)")

    def _put_aside(self, call: Callable[[], None]) -> None:
        """Keep a signal handler's call for the call it interrupted, which looks for deferred log() calls only."""
        if len(self._later) < _MAX_LATER:
            self._later.append(call)
            self._journal.defer({}, None, NO_WEIGHT)
        else:
            self._journal.drop("reentrant_overflow")

    def _drain(self) -> None:
        """Write what signal handlers put aside; a handler's own call leaves that to the call it interrupted."""
        while self._deferred and self._journal.enter():
            self._journal.leave()
            try:
                call = self._deferred.popleft()
            except IndexError:
                return  # another thread took it
            if not self._fast(*call):
                self._log_slowly(*call)
        while self._later and self._journal.enter():
            self._journal.leave()
            self._later.popleft()()

    def _message(self, message: Mapping[str, Any], step: int = NO_STEP, *, is_last: bool = False) -> None:
        journal = self._journal
        if not journal.is_open:
            self._refuse_closed(1)
            return
        if not journal.enter():
            self._put_aside(partial(self._message, message, step, is_last=is_last))
            return
        try:
            reason, why = self._write_message(message, step, is_last=is_last)
        finally:
            journal.leave()
        self._say()
        if reason:
            journal.drop(reason)
            self._warn(reason, why)
            if self._strict and reason == "record_too_large":
                raise UsageError(why)
        if self._deferred:
            self._drain()

    def _write_message(self, message: Mapping[str, Any], step: int, *, is_last: bool) -> tuple[str, str]:
        """Return why it could not be taken, as a reason and for people; "" if it was."""
        try:
            self._pending.sweep()
            if is_last:
                self._pending.give_up("values on the device have not arrived at the end: they are dropped")
                self._journal.append_last(message)
            else:
                self._pending.put_message(message, step)
        except BadValueError as exc:
            return exc.reason, str(exc)
        except JournalFullError as exc:
            return exc.reason, "the journal's disk is full: it is dropped (counted)"
        except ValueError as exc:
            return "record_too_large", f"{message['type']} is dropped (counted): {exc}"
        except Exception as exc:  # noqa: BLE001 - the edge of the public API: training goes on
            return "io_error", f"{message['type']} is dropped (counted): {exc!r}"
        return "", ""

    def set_step(self, step: int) -> None:
        """Set the step of calls that give none, and show it as this rank's progress.

        Raises:
            UsageError: Under strict=True only, if it is not a whole number.
        """
        is_elsewhere = is_remote(step)
        number = None if is_elsewhere else as_int(step)
        if number is None:
            why = f"set_step({shown(step)}): must be a whole number of 64 bits"
            if is_elsewhere:
                why += " that the host knows: nothing waits for a device here"
            if self._journal.is_open:
                self._journal.drop("bad_step")
            self._warn("bad_step", why)
            if self._strict:
                raise UsageError(why)
        elif self._journal.is_open:
            if self._pending.queue or self._journal.is_busy:
                self._put_step(number)
            else:
                self._journal.set_step(number)

    def _put_step(self, step: int) -> None:
        """Set the step while something else is under way."""
        journal = self._journal
        if not journal.enter():  # a signal handler's: its progress must not overtake the call that it interrupted
            journal.take_step(step)
            self._put_aside(partial(self._put_step, step))
            return
        try:
            if journal.is_open:
                self._pending.sweep()
                self._pending.put_step(step)
        finally:
            journal.leave()
        self._say()
        if self._deferred:
            self._drain()

    def define_metric(self, pattern: str, reduce: str = "mean", *, replicated: bool = False) -> None:
        """Declare how ranks' values of matching names become one.

        Args:
            pattern: A name, or a glob pattern; the first definition that matches a name counts.
            reduce: mean (weighted), sum, min, max, last, std, median, p0 to p100, rss, or none (kept per rank).
            replicated: The ranks must agree; where they do not, the run gets an event that names the step.

        Raises:
            UsageError: If the reduction is unknown: a mistake in the program, best seen at once.
        """
        is_percentile = isinstance(reduce, str) and _PERCENTILE.fullmatch(reduce)
        if reduce not in _REDUCTIONS and not is_percentile:
            raise UsageError(f"reduce={reduce!r}: must be one of {', '.join(_REDUCTIONS)}, or a percentile such as p90")
        self._message({"type": "define", "pattern": str(pattern), "reduce": reduce, "replicated": bool(replicated)})

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Log hyperparameters, from one rank or all; ranks that disagree are named in an event."""
        values = {}
        for key, value, problem in flatten(params):
            if problem is None:
                values[key] = value if isinstance(value, (bool, int, float, str, type(None))) else str(value)
        if values:
            self._message({"type": "params", "values": values})

    def log_text(self, key: str, text: str, step: int | None = None) -> None:
        """Log a piece of text, at most 256 KiB."""
        number = as_int(step) if step is not None else self._journal.ambient_step
        self._message({"type": "text", "key": str(key), "text": str(text)}, NO_STEP if number is None else number)

    def alert(self, title: str, text: str = "", level: str = "warning") -> None:
        """Put an event on the run: `level` is info, warning or error."""
        if level not in _LEVELS:
            raise UsageError(f"level={level!r}: must be one of {', '.join(_LEVELS)}")
        self._message(
            {"type": "alert", "title": str(title), "text": str(text), "level": level}, self._journal.ambient_step
        )

    def skip(self, what: str, why: str) -> None:
        """Count a value that a framework's hook was given and cannot hand on, and warn once per `what`."""
        if self._journal.is_open:
            self._journal.drop("unsupported")
        self._warn(f"unsupported {what}", f"{what}: {why}")

    def flush(self) -> None:
        """Make everything logged so far durable on this node's disk. Blocks for one fdatasync, usually.

        Waits for values on a device, at most exit_wait_s; does not while a CUDA graph is captured. If the disk refuses, a
        warning says so: the records stay in memory, and the node's agent goes on trying.
        """
        if os.getpid() == self._pid:
            if not self._wait_landed(self._device_deadline_s()):
                self._warn("flush", f"flush(): {self._pending.num_values} values are not here yet, but on a device")
            try:
                self._journal.flush()
            except OSError as exc:
                self._warn("flush", f"flush() failed, what was logged is not on this node's disk yet: {exc}")

    def finish(self, status: str = "finished", detail: str = "") -> None:
        """Say that this rank is done; waits, at most exit_wait_s, until the aggregator has stored everything.

        And before, at most as long, for values on a device; those that have not arrived then are dropped and counted.

        Optional: a process that just ends loses nothing. Calls after the first do nothing.

        Args:
            status: finished, failed, killed or preempted.
            detail: Why.

        Raises:
            UsageError: If the status is unknown.
        """
        if status not in _STATUSES:
            raise UsageError(f"status={status!r}: must be one of {', '.join(_STATUSES)}")
        if self._end_here(status, detail, self._device_deadline_s()):
            self._wait_stored(time.monotonic())

    def _device_deadline_s(self) -> float:
        return time.monotonic() + max(self._exit_wait_s, _LEAST_WAIT_S)

    def _wait_landed(self, deadline_s: float) -> bool:
        """Wait until nothing is on a device; False if something still is. The journal is left in between."""
        journal = self._journal
        while self._pending.queue and journal.is_open:
            if not journal.enter():
                return False  # a signal handler's: the call it interrupted cannot go on
            try:
                self._pending.sweep()
                may_wait = not self._pending.is_capturing()
            finally:
                journal.leave()
            self._say()
            if not self._pending.queue or not may_wait or time.monotonic() >= deadline_s:
                break
            time.sleep(_POLL_S)
        return not self._pending.queue

    def _end_here(self, status: str, detail: str, deadline_s: float, *, is_at_exit: bool = False) -> bool:
        """Write the last record, and close the journal. False if that was done, is put aside, or is not ours to do.

        Until the deadline it waits for values on a device.
        """
        if os.getpid() != self._pid:
            return False
        if not self._journal.enter():  # a signal handler during log(): that call finishes, or the exit
            self._put_aside(partial(self.finish, status, detail))
            return False
        self._journal.leave()
        self._drain()
        if self._is_finished:
            return False
        self._wait_landed(deadline_s)
        self._is_finished = True
        try:
            self._message({"type": "finish", "status": status, "detail": detail[:2000]}, is_last=True)
        except BaseException:  # Ctrl-C just here: the exit says it again
            self._is_finished = False
            raise
        self._journal.close(finished=True, is_at_exit=is_at_exit)
        return True

    def _wait_stored(self, since_s: float) -> None:
        """Wait until the agent says that the store holds the last seq: a cgroup may kill the helpers with us."""
        deadline = since_s + self._exit_wait_s
        while self._journal.acked_seq < self._journal.next_seq and time.monotonic() < deadline:
            time.sleep(0.002)
            self._journal.look_after_agent()
        if self._journal.acked_seq < self._journal.next_seq and self._exit_wait_s:
            _logger.warning(
                "ddplog: after %.0f s the store does not hold the last records of rank %d yet; they are safe in %s, and "
                "on their way unless the job's end kills the helpers too: `ddplog sync %s` stores them (why: %s)",
                self._exit_wait_s,
                self.rank,
                self._journal.folder,
                self._job.run_dir,
                self._journal.folder.parent / "logs",
            )

    def _warn(self, reason: str, message: str) -> None:
        if reason in self._warned:
            return
        self._warned.add(reason)
        try:
            warnings.warn(f"ddplog: {message} (further ones are only counted)", RuntimeWarning, _depth_of_caller())
        except RuntimeWarning:  # the user runs with -W error; a warning must not stop training
            _logger.warning("ddplog: %s", message)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: object) -> None:
        if kind is None or (isinstance(error, SystemExit) and error.code in (None, 0)):
            self.finish()
        elif isinstance(error, SystemExit):
            self.finish("failed", f"exit code {error.code}" if isinstance(error.code, int) else str(error.code))
        elif issubclass(kind, KeyboardInterrupt):
            self.finish("killed", "KeyboardInterrupt")
        else:
            self.finish("failed", describe(kind, error))

    def __reduce__(self) -> Any:
        from ddplog.worker.absent import arrive

        return arrive, (self._journal.incarnation, self.run_id, self.dir, self.rank, self.world_size)

    def __repr__(self) -> str:
        return f"<ddplog.Run {self.run_id} rank={self.rank}/{self.world_size} {self._journal!r}>"


def finish_at_exit(runs: Iterable[Run], status: str, detail: str) -> None:
    """Finish what this process has open, and wait for the store of all of them at once; Ctrl-C ends the wait."""
    deadlines_s = {run: run._device_deadline_s() for run in runs}  # noqa: SLF001 - the same module
    try:
        ended = [run for run in runs if run._end_here(status, detail, deadlines_s[run], is_at_exit=True)]  # noqa: SLF001
        since_s = time.monotonic()
        for run in ended:
            run._wait_stored(since_s)  # noqa: SLF001
    except KeyboardInterrupt:
        for run in runs:
            run._end_here(status, detail, 0.0, is_at_exit=True)  # noqa: SLF001


def _depth_of_caller() -> int:
    """Return the stacklevel of the first frame that is not ddplog's: the user's own line."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - warnings itself has skip_file_prefixes from 3.12 on only
    depth = 1
    while frame is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "ddplog":
        frame, depth = frame.f_back, depth + 1
    return depth


def describe(kind: type[BaseException], error: BaseException | None) -> str:
    """Return an exception as one line: `ValueError: loss is nan`."""
    text = str(error).split("\n", 1)[0][:500]
    return f"{kind.__name__}: {text}" if text else kind.__name__


def _size(data: object) -> int:
    """Return how many values a call has, nested ones too; 1 of what is no dict."""
    if not isinstance(data, Mapping):
        return 1
    try:
        return max(1, sum(_size(value) if isinstance(value, Mapping) else 1 for value in data.values()))
    except Exception:  # noqa: BLE001 - a user's Mapping may raise anything, or hold itself
        return 1
