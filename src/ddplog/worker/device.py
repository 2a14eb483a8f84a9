"""Brings numbers from a device to the host without ever waiting for it.

The tensors of a call are stacked, one stack for each type and device, copied into a slot of one pinned buffer, and an
event is recorded behind the copies: three things put on the current stream, and nothing waited for. When the event has
happened the slot holds the numbers, in their own type, so that none is rounded through another.

What the caller does with its tensors afterwards does not matter. The stream does things in order: a kernel that writes to
a tensor later, or to its memory once it is freed, which the allocator gives only to work behind on the same stream, finds
it copied. A tensor that another stream still computes or frees is the caller's to synchronize, as for any torch operation:
the caller's current stream counts.

Must not: synchronize, call .item() on a device, touch the device while a CUDA graph is captured, or read a slot before its
event. The order of the records is none of its business; see pending.py.

Everything that is CUDA's alone is behind Device, so that the tests run all the rest on a CPU with events of their own.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from typing import Any, Final, Protocol

RING_BYTES: Final = 1 << 20
"""Of pinned memory, allocated once, at the first tensor: allocating it may synchronize. Room for 131,072 numbers."""
_ALIGN: Final = 8


class Event(Protocol):
    """Something that a stream comes to."""

    def query(self) -> bool:
        """Whether it has happened. Does not wait. Raises what has gone wrong on the device."""


class Device(Protocol):
    """What the staging needs of a kind of device."""

    def holds(self, tensor: Any, /) -> bool:
        """Whether a tensor is on such a device."""

    def is_capturing(self) -> bool:
        """Whether what is put on the current stream would become part of a graph, and events may not be asked for."""

    def allocate(self, num_bytes: int) -> Any:
        """Return host memory that the device can write to: a uint8 tensor."""

    def copy(self, to: Any, stacked: Any) -> None:
        """Put a copy to the host on the current stream of the tensor's device."""

    def record(self, stacked: Any) -> Event:
        """Put an event on the current stream of the tensor's device."""


class Cuda:
    """CUDA, and HIP under its name."""

    holds = operator.attrgetter("is_cuda")

    def is_capturing(self) -> bool:
        """Whether a CUDA graph is being captured on this thread's current stream."""
        return bool(sys.modules["torch"].cuda.is_current_stream_capturing())

    def allocate(self, num_bytes: int) -> Any:
        """Return pinned memory."""
        torch = sys.modules["torch"]
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy(self, to: Any, stacked: Any) -> None:
        """Put a copy on the stream."""
        to.copy_(stacked, non_blocking=True)

    def record(self, stacked: Any) -> Event:
        """Put an event on the stream."""
        cuda = sys.modules["torch"].cuda
        event: Event = cuda.Event()
        event.record(cuda.current_stream(stacked.device))  # type: ignore[attr-defined]
        return event


class StagingError(Exception):
    """Tensors that could not be sent; `reason` is one of journal.segment.DROP_REASONS."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Flight:
    """Tensors of one call, on their way: (their indices, the slot) of each type and device."""

    __slots__ = ("_events", "_parts", "num_bytes")

    def __init__(self, parts: Sequence[tuple[list[int], Any]], events: list[Event], num_bytes: int) -> None:
        self._parts = parts
        self._events = events
        self.num_bytes = num_bytes
        """Of the ring, to be given back."""

    def has_landed(self) -> bool:
        """Whether all of them are here.

        Raises:
            RuntimeError: The device has failed: they will never be.
        """
        while self._events:
            if not self._events[-1].query():
                return False
            self._events.pop()
        return True

    def numbers(self) -> list[float | int]:
        """Return the number of each tensor; only once they have landed."""
        if len(self._parts) == 1:
            found: list[float | int] = self._parts[0][1].tolist()
            return found
        placed = {i: number for indices, slot in self._parts for i, number in zip(indices, slot.tolist(), strict=True)}
        return [placed[index] for index in range(len(placed))]


class Staging:
    """The pinned buffer, used as a ring: flights are given back in the order in which they began."""

    def __init__(self, device: Device, ring_bytes: int = RING_BYTES) -> None:
        self.device = device
        self._ring_bytes = ring_bytes
        self._ring: Any = None
        self._at = 0
        self._used = 0

    def send(self, tensors: Sequence[Any]) -> Flight:
        """Put tensors of one element each on their way.

        Raises:
            StagingError: None of them is.
        """
        torch = sys.modules["torch"]
        groups: dict[tuple[Any, int], list[int]] = {}
        for index, tensor in enumerate(tensors):
            kind = tensor.dtype, tensor.get_device()
            if kind in groups:
                groups[kind].append(index)
            else:
                groups[kind] = [index]
        try:
            with torch.no_grad():  # cheaper than a detach() of each
                stacks = [_stack(torch, [tensors[index] for index in indices]) for indices in groups.values()]
                slots, num_bytes = self._take(torch, stacks)
                for slot, stacked in zip(slots, stacks, strict=True):
                    self.device.copy(slot, stacked)
            last = {stacked.device: stacked for stacked in stacks}
            events = [self.device.record(stacked) for stacked in last.values()]
        except StagingError:
            raise
        except Exception as exc:  # whatever torch and the driver raise
            raise StagingError("device_error", f"values on {tensors[0].device} cannot be fetched: {exc!r}") from exc
        return Flight(list(zip(groups.values(), slots, strict=True)), events, num_bytes)

    def _take(self, torch: Any, stacks: Sequence[Any]) -> tuple[list[Any], int]:
        """Return a slot for each stack, and how many bytes of the ring they take with what they skip."""
        if self._ring is None:
            self._ring = self._allocate(torch)
        slots, at, used = [], self._at, self._used
        for stacked in stacks:
            num_bytes = stacked.numel() * stacked.element_size()
            size = -(-num_bytes // _ALIGN) * _ALIGN
            if at + size > self._ring_bytes:
                at, used = 0, used + self._ring_bytes - at
            slots.append(self._ring[at : at + num_bytes].view(stacked.dtype))
            at, used = at + size, used + size
            if used > self._ring_bytes:
                raise StagingError("device_backlog", "the device is too far behind: further values on it are dropped")
        taken = used - self._used
        self._at, self._used = at, used
        return slots, taken

    def _allocate(self, torch: Any) -> Any:
        with torch.inference_mode(mode=False):  # what is made in inference mode can be written to in it only
            ring = self.device.allocate(self._ring_bytes)
        if type(ring) is not torch.Tensor:
            raise StagingError("device_error", f"values on a device cannot be fetched where memory is a {type(ring)}")
        return ring

    def give_back(self, flight: Flight) -> None:
        """Let the slots of the oldest flight be used again: its events have happened, or never will."""
        self._used -= flight.num_bytes

    def __repr__(self) -> str:
        return f"<Staging {self._used} of {self._ring_bytes} bytes>"


def _stack(torch: Any, tensors: list[Any]) -> Any:
    return torch.stack([tensor if tensor.ndim == 0 else tensor.reshape(()) for tensor in tensors])
