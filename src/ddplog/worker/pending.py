"""Owns what log() has taken and the journal does not have yet: values on their way from a device, and what was called
after them.

Guarantees: records and progress enter the journal in the order of the calls, each with the time of its call, whatever
order the device is done in: while anything waits, everything later queues behind it, floats, messages and set_step() too,
and the journal's hot path is held. Nothing waits for the device: sweep(), which every later call makes, asks the oldest
event and goes on. What did not arrive is counted by reason, what it had on the host is stored. The queue is bounded.
The head page always says how many values wait.

Does not guarantee: that what waits survives SIGKILL of the process. It is in its memory and the device's, and the agent
then counts it as dropped, `device_pending`. So is a value of which no later call is made: no thread looks after it.

Every method is called between the journal's enter() and leave(); warnings wait in `said` until it has been left.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ddplog.core.records import KIND_MESSAGE, encode_message
from ddplog.journal.writer import JournalFullError, JournalWriter, check_size
from ddplog.worker.device import Device, Flight, Staging, StagingError
from ddplog.worker.scalars import BadValueError, as_int

MAX_CALLS: Final = 10_000
MAX_BYTES: Final = 16 * 1024 * 1024
"""Of memory for what waits, about. A GPU is a few steps behind at most: its driver lets about 1,000 kernels queue."""
_MAX_KEYS_PER_RECORD: Final = 512
"""So that the record that declares them, 250 bytes a name at most, is well below the limit of a record."""
_TOO_FAR: Final = "the device is too far behind: what is logged meanwhile is dropped"
_LOST: Final = None
_FLOAT: Final = frozenset({float})
_NUMBERS: Final = (float, int)


class _Call:
    """A log() of numbers.

    Args:
        names: Of the values.
        cells: The value of each name, then the weight, then the step: numbers, _LOST, or tensors still to be sent.
    """

    __slots__ = ("cells", "flight", "holes", "names", "num_bytes", "num_values", "time_unix_ns")

    def __init__(self, names: Sequence[str], cells: list[Any]) -> None:
        self.names = names
        self.cells = cells
        self.num_values = len(names)
        """How many are not lost."""
        self.num_bytes = 500 + 64 * len(names)
        self.time_unix_ns: int | None = None
        """None: it is written at once."""
        self.flight: Flight | None = None
        self.holes: Sequence[int] = ()
        """The cell of each tensor of the flight."""

    @property
    def step_cell(self) -> int:
        return len(self.cells) - 1

    def lose(self, cells: Iterable[int]) -> int:
        """Leave cells out, all values if the step is among them; returns how many values are lost by it."""
        lost = set(cells)
        if self.step_cell in lost:
            lost.update(range(len(self.names)))
            self.cells[-1] = 0
        if self.step_cell - 1 in lost:
            self.cells[-2] = 1.0
        count = 0
        for cell in lost:
            if cell < len(self.names) and self.cells[cell] is not _LOST:
                self.cells[cell] = _LOST
                count += 1
        self.num_values -= count
        return count


@dataclass(frozen=True, slots=True, eq=False)
class _Message:
    message: Mapping[str, Any]
    step: int
    time_unix_ns: int
    num_bytes: int
    num_values: int = 1


@dataclass(frozen=True, slots=True, eq=False)
class _Step:
    step: int
    num_bytes: int = 0
    num_values: int = 0


class Pending:
    """The queue between log() and the journal; empty unless something is on a device."""

    def __init__(self, journal: JournalWriter, device: Device) -> None:
        self.staging = Staging(device)
        self._journal = journal
        self.queue: deque[_Call | _Message | _Step] = deque()
        """To be looked at only: whether there is anything."""
        self.num_values = 0
        self._num_bytes = 0
        self.said: list[tuple[str, str]] = []
        """(reason, what to warn of)."""

    # -- what comes in

    def put(
        self, names: Sequence[str], values: list[Any], step: Any, weight: Any, problems: list[BadValueError]
    ) -> None:
        """Take a call: write it, or let it wait. What is lost is counted here, or is among the problems.

        Args:
            names: Of the values.
            values: Floats, and tensors of one element on a device.
            step: An int, or such a tensor.
            weight: A float, or such a tensor.
            problems: Receives what the caller did wrong.
        """
        is_known = type(step) is int and type(weight) is float and set(map(type, values)) <= _FLOAT
        if is_known and not self.queue:
            self._write(names, values, step, weight)
            return
        call = _Call(names, [*values, weight, step])
        if not self._has_room(call.num_bytes):
            self._drop("device_backlog", len(names), _TOO_FAR)
            return
        if not is_known:
            self._send(call, [cell for cell, number in enumerate(call.cells) if type(number) not in _NUMBERS], problems)
        if not self.queue and call.flight is None:
            self._write_call(call)
        elif call.num_values:
            call.time_unix_ns = time.time_ns()
            self._append(call)

    def _send(self, call: _Call, holes: Sequence[int], problems: list[BadValueError]) -> None:
        holds = self.staging.device.holds
        remote = [cell for cell in holes if holds(call.cells[cell])]
        if len(remote) < len(holes):
            self._fetch(call, sorted(set(holes) - set(remote)))
        if not remote:
            return
        if self.is_capturing():
            why = "a value on the device, logged while a CUDA graph is captured, is none yet: log() it after the replay"
            problems.append(BadValueError("graph_capture", why, self._lose(call, remote)))
            return
        try:
            call.flight, call.holes = self.staging.send([call.cells[cell] for cell in remote]), remote
        except StagingError as exc:
            self._drop(exc.reason, self._lose(call, remote), str(exc))
        else:
            for cell in remote:
                call.cells[cell] = 0.0  # their memory is the caller's

    def _fetch(self, call: _Call, cells: Sequence[int]) -> None:
        """Get numbers from a kind of device that is not known to send them, by waiting for it."""
        tensors = [call.cells[cell] for cell in cells]
        where = tensors[0].device
        self.said.append(("slow_device", f"log() waits for values on {where}, which it cannot copy otherwise"))
        self._fill(call, cells, [tensor.item() for tensor in tensors])

    def put_message(self, message: Mapping[str, Any], step: int) -> None:
        """Take a message: write it, or let it wait.

        Raises:
            BadValueError: Too much is waiting.
            JournalFullError: There is no room; nothing was written.
            ValueError: It is larger than MAX_RECORD_BYTES.
        """
        if not self.queue:
            self._journal.append_message(message, step)
            return
        frame = encode_message(KIND_MESSAGE, 0, step, 0, message, 0)
        check_size(frame)
        if not self._has_room(500 + len(frame)):
            raise BadValueError("device_backlog", _TOO_FAR)
        self._append(_Message(message, step, time.time_ns(), 500 + len(frame)))

    def put_step(self, step: int) -> None:
        """Set the ambient step now, and show it as progress once everything before it is in the journal."""
        if not self.queue:
            self._journal.set_step(step)
            return
        self._journal.take_step(step)
        if isinstance(self.queue[-1], _Step):
            self.queue.pop()  # so that they are never more than what else waits
        self.queue.append(_Step(step))

    def _has_room(self, num_bytes: int) -> bool:
        queue = self.queue
        return not queue or (len(queue) < MAX_CALLS and self._num_bytes + num_bytes <= MAX_BYTES)

    def _append(self, waiting: _Call | _Message) -> None:
        if not self.queue:
            self._journal.hold()
        self.queue.append(waiting)
        self._num_bytes += waiting.num_bytes
        self._count(waiting.num_values)

    def _count(self, change: int) -> None:
        self.num_values += change
        self._journal.show_pending(self.num_values)

    # -- what has arrived

    def sweep(self) -> None:
        """Put into the journal what has arrived, and what waited behind it. Asks the device, and does not wait."""
        if not self.queue or self.is_capturing():  # asking an event would spoil the capture
            return
        while self.queue and self._journal.is_open and self._is_ready(self.queue[0]):
            self._pop()
        if not self.queue:
            self._journal.release()

    def is_capturing(self) -> bool:
        """Whether the device must be left alone now."""
        try:
            return self.staging.device.is_capturing()
        except Exception:  # noqa: BLE001 - the device has failed; what is asked or sent next says how
            return False

    def _is_ready(self, first: _Call | _Message | _Step) -> bool:
        if not isinstance(first, _Call) or first.flight is None:
            return True
        try:
            return first.flight.has_landed()
        except Exception as exc:  # noqa: BLE001 - whatever torch and the driver raise
            self._abandon(first, "device_error", f"values on the device are lost: {exc!r}")
            return True

    def _abandon(self, call: _Call, reason: str, why: str) -> None:
        """Wait no longer for what a call has on the device."""
        flight, call.flight = call.flight, None
        num_lost = self._lose(call, call.holes)
        self._drop(reason, num_lost, why)
        self._count(-num_lost)
        if flight is not None:
            self.staging.give_back(flight)

    def give_up(self, why: str) -> None:
        """Wait for nothing any more: count what has not arrived, and put the rest into the journal."""
        for waiting in self.queue:
            if isinstance(waiting, _Call) and not self._is_ready(waiting):
                self._abandon(waiting, "device_pending", why)
        while self.queue:
            self._pop()
        self._journal.release()

    def _pop(self) -> None:
        first = self.queue.popleft()
        num_values = first.num_values
        try:
            if isinstance(first, _Call):
                self._land(first)
                self._write_call(first)
            elif isinstance(first, _Message):
                self._write_message(first)
            else:
                self._journal.show_step(first.step)
        except BaseException:  # a signal handler raised: better counted, though it may be in, than in twice
            self._journal.drop("io_error", first.num_values)
            raise
        finally:
            self._num_bytes -= first.num_bytes
            self._count(-num_values)

    def _land(self, call: _Call) -> None:
        flight, call.flight = call.flight, None
        if flight is not None:
            self._fill(call, call.holes, flight.numbers())
            self.staging.give_back(flight)

    def _fill(self, call: _Call, holes: Sequence[int], numbers: Iterable[float | int]) -> None:
        cells, num_names = call.cells, len(call.names)
        for cell, number in zip(holes, numbers, strict=True):
            if cell < num_names:
                cells[cell] = float(number)
            elif cell < call.step_cell:
                cells[cell] = self._check_weight(float(number))
            else:
                step = cells[cell] = as_int(number)
                if step is None:
                    why = f"step={number!r} must be a whole number of 64 bits"
                    self._drop("bad_step", call.lose([cell]), why)

    def _check_weight(self, weight: float) -> float:
        if 0 <= weight < float("inf"):
            return weight
        self._drop("bad_weight", 1, f"weight={weight!r} must be a finite number, 0 or more; 1 is taken")
        return 1.0

    def _write_call(self, call: _Call) -> None:
        names, values = call.names, call.cells[: len(call.names)]
        if call.num_values < len(names):
            kept = [index for index, value in enumerate(values) if value is not _LOST]
            names, values = [names[index] for index in kept], [values[index] for index in kept]
        weight, step = call.cells[-2:]
        self._write(names, values, step, weight, call.time_unix_ns)

    def _write(
        self, names: Sequence[str], values: list[float], step: int, weight: float, time_unix_ns: int | None = None
    ) -> None:
        num_left = len(names)
        try:
            for start in range(0, len(names), _MAX_KEYS_PER_RECORD):
                part = slice(start, start + _MAX_KEYS_PER_RECORD)
                self._journal.append_scalars(tuple(names[part]), values[part], step, weight, time_unix_ns)
                num_left -= _MAX_KEYS_PER_RECORD
        except JournalFullError as exc:
            self._drop(exc.reason, num_left, "the journal's disk is full: values are dropped")
        except Exception as exc:  # noqa: BLE001 - the edge of the public API: training goes on
            self._drop("io_error", num_left, f"log() failed: {exc!r}")

    def _write_message(self, waiting: _Message) -> None:
        try:
            self._journal.append_message(waiting.message, waiting.step, time_unix_ns=waiting.time_unix_ns)
        except JournalFullError as exc:
            self._drop(exc.reason, 1, "the journal's disk is full: what was logged is dropped")
        except Exception as exc:  # noqa: BLE001 - as in _write()
            self._drop("io_error", 1, f"{waiting.message['type']} is dropped: {exc!r}")

    def _lose(self, call: _Call, cells: Sequence[int]) -> int:
        if call.step_cell - 1 in cells:
            self._drop("bad_weight", 1, "a weight on the device is not known; 1 is taken")
        return call.lose(cells)

    def _drop(self, reason: str, num_values: int, why: str) -> None:
        self._journal.drop(reason, num_values)
        self.said.append((reason, why))

    def __repr__(self) -> str:
        return f"<Pending {len(self.queue)} calls, {self.num_values} values, {self.staging!r}>"
