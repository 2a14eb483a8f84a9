"""Owns the journal of one rank while it is written: the hot path of `log()`.

Guarantees: when an append returns, the record survives SIGKILL of the process; the agent makes it durable on disk
within 500 ms, flush() at once. Nothing here blocks on a network, another process or a lock held across I/O, except
that a new segment is allocated (about 1 ms per 4 MiB) when one is full.
Re-entrant: a call made by a signal handler while the same thread is inside is put aside and written by the outer call.
Threads take turns.
Does not guarantee: anything in a forked child, where every call is refused (the parent owns the files).
"""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
import random
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final
from zlib import crc32

from ddplog.core.records import (
    KIND_MESSAGE,
    KIND_SCALARS,
    KIND_SCHEMA,
    MAX_RECORD_BYTES,
    NO_STEP,
    PREFIX_BYTES,
    WORD,
    encode_message,
    scan,
)
from ddplog.journal import segment as layout
from ddplog.journal.durable import Durability
from ddplog.killpoints import reach

_MAX_DEFERRED: Final = 10_000
_CHECK_NS: Final = 1_000_000_000
_RETRY_NS: Final = 1_000_000_000
_SMALLEST_SEGMENT: Final = 64 * 1024
_LAST_BYTES: Final = 4096
"""Kept free in every segment for the last record."""
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
_ORDER: Final = "@" if sys.byteorder == "little" else "<"
_NUMBERS: Final = (float, int)
_INFINITY: Final = float("inf")
_float_of: Final = float.conjugate

NO_WEIGHT: Final = float(1)
"""The weight of a call that gives none: known by identity on the hot path, so that only others are checked."""


class Schema:
    """The keys of a record and how their values are packed behind the frame's prefix."""

    __slots__ = ("aux", "head", "pack", "pack_into", "size")

    def __init__(self, schema_id: int, num_keys: int) -> None:
        self.head = KIND_SCALARS | schema_id << 8
        self.aux = num_keys
        self.size = PREFIX_BYTES + 8 * num_keys
        # Native where that is the same: struct copies a native double, and assembles any other byte by byte.
        record = struct.Struct(f"{_ORDER}QIIqQd{num_keys}d")
        self.pack, self.pack_into = record.pack, record.pack_into


class JournalFullError(OSError):
    """No room for a record: the disk or the spool is full."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class JournalWriter:
    """A rank's journal.

    Args:
        folder: `<rank>.<incarnation>/` in the job's folder; made here.
        incarnation: 16 random bytes.
        identity: JSON for the head page.
        segment_bytes: Size of a segment.
        spool_bytes: Size of all segments together beyond which nothing more is taken.
        check: Called about once a second from a logging call: is the agent alive?

    Raises:
        OSError: If the files cannot be made.
    """

    def __init__(
        self,
        folder: Path,
        incarnation: bytes,
        identity: Mapping[str, Any],
        *,
        segment_bytes: int,
        spool_bytes: int,
        check: Callable[[], None],
    ) -> None:
        self.folder = folder
        self.incarnation = incarnation
        self._segment_bytes = segment_bytes
        self._spool_bytes = spool_bytes
        self._check = check
        self._lock = threading.RLock()
        self._flush_lock = threading.RLock()
        self.is_busy = False
        """A call is under way: another thread's, or, in a signal handler, the one that it interrupted."""
        self.deferred: deque[tuple[Mapping[str, Any], int | None, float]] = deque()
        self._declared: dict[tuple[str, ...], Schema] = {}
        """Of this segment."""
        self._schemas = self._declared
        """What the hot path may use: all of them, or nothing while it is held."""
        self._num_schemas = 0
        self._last_keys: tuple[str, ...] | None = None
        self._last_schema: Schema = _NO_SCHEMA
        self._number = 0
        self._sizes: dict[int, int] = {}
        """Bytes of each segment that was there when the newest was made: one that holds a giant record is larger."""
        self._seq = 0
        self._offset = 0
        self._limit = 0
        self._size = 0
        self._epoch = 0
        self._segment: mmap.mmap | None = None
        self._view = memoryview(b"")
        self._ambient = NO_STEP
        self._checked_ns = 0
        self._next_check_ns = 0
        self._retry_at_ns = 0
        self._is_open = True
        folder.mkdir(mode=0o700)
        self._alive = os.open(folder / "alive", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.lockf(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._head = self._make_head(identity)
            self._durability = Durability(folder, self._head, is_agent=False)
            self._roll()
        except BaseException:
            os.close(self._alive)
            raise

    # -- the hot path

    def log_floats(self, data: Mapping[str, Any], step: int | None, weight: float) -> bool:
        """Append the values, if they are all plain floats under keys seen before.

        Returns:
            False if they are not, or if there is something else to do first: the caller takes the slow path. True also
            if they were dropped and counted, since there was no room a moment ago: the slow path has said so then.
        """
        with self._lock:
            if self.is_busy:
                return False
            self.is_busy = True
            try:
                keys = tuple(data)
                if keys == self._last_keys:  # saves a hash of all keys, 60 ns of ten
                    schema = self._last_schema
                else:
                    schema = self._last_schema = self._schemas[keys]
                    self._last_keys = keys
                if step is None:
                    step = self._ambient
                    if step == NO_STEP:
                        return False
                elif type(step) is not int:
                    return False
                if weight is not NO_WEIGHT and not (type(weight) in _NUMBERS and 0 <= weight < _INFINITY):
                    return False
                now = time_ns()
                offset = self._offset
                end = offset + schema.size
                if end > self._limit or not self._checked_ns <= now <= self._next_check_ns:
                    return self._checked_ns <= now <= self._next_check_ns and self._refuse(len(keys))
                # float.conjugate() is a type check at the speed of C: it returns a float itself, and raises TypeError
                # for what is none without calling into it. float() or struct alone would ask a CUDA tensor: a sync.
                body = schema.pack(
                    self._seq, schema.head, schema.aux, step, now, weight, *map(_float_of, data.values())
                )
                view = self._view
                view[offset + 8 : end] = body
                WORD_pack_into(view, offset, crc32(body, self._epoch) << 32 | schema.size)
                self._seq += 1
                self._offset = end
            except (KeyError, TypeError, AttributeError, ValueError, struct.error):
                return False
            except BaseException:  # a signal handler raised: did the record get in?
                self._settle()
                raise
            finally:
                self.is_busy = False
        return True

    def _refuse(self, num_values: int) -> bool:
        """Drop and count values for which there is no room, if that was found out within the last second."""
        if time.monotonic_ns() >= self._retry_at_ns:
            return False
        self.drop(self._full_reason, num_values)
        return True

    def _settle(self) -> None:
        """Bring seq and offset in line with the segment after an interrupted append."""
        # scan() believes a checksum only: behind the last record may lie part of one that was never published.
        for offset, length in scan(self._view, self._offset, self._limit, self._epoch):
            (seq,) = layout.U64.unpack_from(self._view, offset + 8)
            self._seq = seq + 1
            self._offset = offset + length

    # -- everything else

    def enter(self) -> bool:
        """Take the journal for a slow call; False if this thread is inside already (a signal handler's call)."""
        self._lock.acquire()
        if self.is_busy:
            self._lock.release()
            return False
        self.is_busy = True
        return True

    def leave(self) -> None:
        """Give the journal back."""
        self.is_busy = False
        self._lock.release()

    def defer(self, data: Mapping[str, Any], step: int | None, weight: float) -> None:
        """Put a re-entrant call aside."""
        if len(self.deferred) >= _MAX_DEFERRED:
            self.drop("reentrant_overflow", len(data))
        else:
            self.deferred.append((dict(data), step, weight))

    def hold(self) -> None:
        """Let the hot path refuse everything until release(), so that nothing overtakes what the caller has in hand; call
        between enter() and leave(). It knows no keys then, which costs it nothing while it is not held.
        """
        self._schemas, self._last_keys = {}, None

    def release(self) -> None:
        """Open the hot path again; call between enter() and leave()."""
        self._schemas = self._declared

    def append_scalars(
        self, keys: tuple[str, ...], values: list[float], step: int, weight: float, time_unix_ns: int | None = None
    ) -> None:
        """Append a record of any keys; call between enter() and leave().

        Args:
            keys: Names.
            values: One for each name.
            step: Of the call.
            weight: Of the call.
            time_unix_ns: Of the call; now, if not given.

        Raises:
            JournalFullError: There is no room; nothing was written.
        """
        self._tick()
        schema = self._declared.get(keys)
        if schema is None or self._offset + schema.size > self._limit:
            schema = self._declare(keys)
        at = time_ns() if time_unix_ns is None else time_unix_ns
        view, offset = self._view, self._offset
        end = offset + schema.size
        schema.pack_into(view, offset + 8, self._seq, schema.head, schema.aux, step, at, weight, *values)
        WORD.pack_into(view, offset, crc32(view[offset + 8 : end], self._epoch) << 32 | schema.size)
        self._seq += 1
        self._offset = end

    def append_message(
        self,
        message: Mapping[str, Any],
        step: int = NO_STEP,
        kind: int = KIND_MESSAGE,
        time_unix_ns: int | None = None,
    ) -> None:
        """Append anything that is not a scalar; call between enter() and leave(). `time_unix_ns`: of the call, if not now.

        Raises:
            JournalFullError: There is no room; nothing was written.
            ValueError: The record is larger than MAX_RECORD_BYTES.
        """
        self._tick()
        at = time_ns() if time_unix_ns is None else time_unix_ns
        frame = encode_message(kind, self._seq, step, at, message, self._epoch)
        check_size(frame)
        if self._offset + len(frame) > self._limit:
            self._make_room(len(frame))
            frame = encode_message(kind, self._seq, step, at, message, self._epoch)  # another epoch
        offset = self._offset
        self._view[offset + 8 : offset + len(frame)] = frame[8:]
        self._view[offset : offset + 8] = frame[:8]
        self._seq += 1
        self._offset += len(frame)

    def append_last(self, message: Mapping[str, Any]) -> None:
        """Append the record after which nothing comes: every segment keeps room for it, so that a full disk does not
        make a normal end look like a death. Otherwise as append_message().
        """
        self._limit = self._size - layout.SEGMENT_HEADER_BYTES
        self.append_message(message)

    def _declare(self, keys: tuple[str, ...]) -> Schema:
        """Return the schema of a segment that has room for its declaration and a record.

        Every segment declares its own, under new ids: what is left of a journal can be read without its beginning.
        """
        message = {"id": self._num_schemas + 1, "keys": keys}
        schema = Schema(self._num_schemas + 1, len(keys))
        self._make_room(len(encode_message(KIND_SCHEMA, 0, NO_STEP, 0, message, 0)) + schema.size)
        known = self._declared.get(keys)
        if known is not None:
            return known
        self.append_message(message, kind=KIND_SCHEMA)
        self._num_schemas += 1
        self._declared[keys] = schema
        return schema

    def look_after_agent(self) -> None:
        """Check on the agent if that is due; called by whatever waits for it."""
        self._tick()

    def _tick(self) -> None:
        now = time_ns()
        if not self._checked_ns <= now <= self._next_check_ns:  # also after the clock was set back
            self._checked_ns, self._next_check_ns = now, now + _CHECK_NS
            layout.put(self._head, layout.BEAT_OFFSET, layout.U64.pack(now))
            self._leave_failed()
            self._check()

    def _leave_failed(self) -> None:
        """Go on in another segment, if the agent could not make this one durable."""
        (failed,) = layout.U64.unpack_from(self._head, layout.SEAL_OFFSET)
        if self._is_open and failed == self._number:
            with suppress(JournalFullError):
                self._roll()

    # -- segments

    def _make_room(self, size: int) -> None:
        if self._offset + size <= self._limit:
            return
        now = time.monotonic_ns()
        if now < self._retry_at_ns:
            raise JournalFullError(self._full_reason)
        try:
            self._roll(size)
        except JournalFullError as exc:
            self._retry_at_ns = now + _RETRY_NS
            self._full_reason = exc.reason
            raise

    def _roll(self, at_least: int = 0) -> None:
        """Go on in a new segment.

        Raises:
            JournalFullError: There is none; everything is as it was.
        """
        self._check_ours()
        least = layout.SEGMENT_HEADER_BYTES + at_least + _LAST_BYTES
        size = max(self._segment_bytes, least)
        path = self.folder / layout.segment_name(self._number + 1)
        new = path.with_suffix(".new")
        try:
            left = set(layout.segment_numbers(str(self.folder)))
            self._sizes = {number: held for number, held in self._sizes.items() if number in left}
            if self._number and sum(self._sizes.values()) + size > self._spool_bytes:
                raise JournalFullError("spool_full")
            new.unlink(missing_ok=True)  # of an attempt that could not even be cleared away
            mapping = _map_new(new, size, least)
            size = len(mapping)
            epoch = random.SystemRandom().getrandbits(32)
            self._check_ours()
            header = layout.SEGMENT_HEADER.pack(
                layout.SEGMENT_MAGIC, layout.FORMAT_VERSION, epoch, self.incarnation, self._seq, self._number + 1
            )
            for offset in (0, size - layout.SEGMENT_HEADER_BYTES):
                mapping[offset : offset + len(header)] = header
            reach("writer.before_rename")
            self._check_ours()
            new.rename(path)
        except JournalFullError:
            raise
        except OSError as exc:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise JournalFullError("disk_full" if exc.errno in _NO_ROOM else "io_error") from exc
        reach("writer.after_rename")
        self._segment, self._view, self._epoch = mapping, memoryview(mapping), epoch
        self._number += 1
        self._sizes[self._number] = size
        is_held = self._schemas is not self._declared
        self._declared, self._last_keys = {}, None
        if not is_held:
            self._schemas = self._declared
        self._offset, self._limit, self._size = layout.SEGMENT_HEADER_BYTES, size - _LAST_BYTES, size

    def _check_ours(self) -> None:
        """Raise in a child that was forked in the midst of this: the files are the parent's."""
        if not self._is_open:
            raise JournalFullError("forked_child")

    # -- the head page

    def _make_head(self, identity: Mapping[str, Any]) -> mmap.mmap:
        text = json.dumps(identity, default=str).encode()
        head = _map_new(self.folder / "head.new", layout.HEAD_BYTES, layout.HEAD_BYTES)
        layout.HEAD_PREFIX.pack_into(head, 0, layout.HEAD_MAGIC, layout.FORMAT_VERSION, len(text), self.incarnation)
        layout.I64.pack_into(head, layout.STEP_OFFSET, NO_STEP)
        head[layout.JSON_OFFSET : layout.JSON_OFFSET + len(text)] = text
        (self.folder / "head.new").rename(self.folder / "head")
        return head

    def set_step(self, step: int) -> None:
        """Set the ambient step, and show it as progress.

        Raises:
            struct.error: If it is not an int64.
        """
        self.show_step(step)
        self._ambient = step

    def take_step(self, step: int) -> None:
        """Set the ambient step of the calls to come; its progress is shown later, by show_step()."""
        self._ambient = step

    def show_step(self, step: int) -> None:
        """Show progress: whatever was logged before `step` was set is in the journal.

        Raises:
            struct.error: If it is not an int64.
        """
        layout.put(self._head, layout.STEP_OFFSET, layout.I64.pack(step))

    def show_pending(self, num_values: int) -> None:
        """Tell the agent how many values were taken and are not in the journal yet: if this process dies, they are lost."""
        word = (self._seq & 0xFFFFFFFF) << 32 | num_values if num_values else 0
        layout.put(self._head, layout.PENDING_OFFSET, layout.U64.pack(word))

    @property
    def ambient_step(self) -> int:
        return self._ambient

    def drop(self, reason: str, count: int = 1) -> None:
        """Count values that were not taken."""
        offset = layout.DROPS_OFFSET + 8 * layout.DROP_REASONS.index(reason)
        (known,) = layout.U64.unpack_from(self._head, offset)
        layout.put(self._head, offset, layout.U64.pack(known + count))

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> count, of those that are not 0."""
        counts = struct.unpack_from(f"<{len(layout.DROP_REASONS)}Q", self._head, layout.DROPS_OFFSET)
        return {reason: count for reason, count in zip(layout.DROP_REASONS, counts, strict=True) if count}

    @property
    def acked_seq(self) -> int:
        """Seqs below it are durable at the aggregator."""
        return int(layout.U64.unpack_from(self._head, layout.ACKED_OFFSET)[0])

    @property
    def next_seq(self) -> int:
        return self._seq

    def flush(self) -> None:
        """Make every record durable on this node. Blocks for one fdatasync of each segment that is not yet.

        Raises:
            OSError: If the disk refuses; what is logged later goes to another segment, and the agent tries on.
        """
        if not self._is_open:
            return
        with self._flush_lock:
            if self._durability.sync(is_over=False, with_head=True):
                return
            if self.enter():
                try:
                    self._roll()  # what it was in can be written anew once nothing is appended to it
                finally:
                    self.leave()
                if self._durability.sync(is_over=False, with_head=True):
                    return
            raise OSError(errno.EIO, "the disk did not take what was logged", str(self.folder))

    def close(self, *, finished: bool, is_at_exit: bool = False) -> None:
        """Take nothing more, and let the agent know that the writer is gone; `is_at_exit`: and its process soon."""
        if not self._is_open:
            return
        self._is_open = False
        self._schemas = self._declared = {}
        self._last_keys = None
        self._limit = 0
        if finished:
            how = layout.FINISHED_AT_EXIT if is_at_exit else layout.FINISHED
            layout.put(self._head, layout.FINISHED_OFFSET, layout.U64.pack(how))
        self._durability.close()
        os.close(self._alive)

    def abandon(self) -> None:
        """In a forked child: refuse everything, and let go of the parent's files, so that a call that is under way (a
        signal handler forked in its midst, and the child goes on with it) cannot write either.
        """
        self._is_open = False
        self._schemas = self._declared = {}
        self._last_keys = None
        self._offset = self._limit = self._size = 0
        self._view.release()
        self._view, self._segment = memoryview(b""), None
        shown = self._head[:]
        self._head = mmap.mmap(-1, layout.HEAD_BYTES)
        self._head[:] = shown
        try:
            self._lock.release()
            self._lock.acquire()  # the call under way gives it back
        except RuntimeError:  # another thread's, which is not here to give it back; or nobody's
            self._lock = threading.RLock()
            self.is_busy = False

    @property
    def is_open(self) -> bool:
        return self._is_open

    def __repr__(self) -> str:
        return f"<JournalWriter {self.folder.name} seq={self._seq} segment={self._number} offset={self._offset}>"

    _full_reason = "disk_full"


_NO_SCHEMA: Final = Schema(0, 0)
time_ns = time.time_ns
WORD_pack_into = WORD.pack_into


def check_size(frame: bytes) -> None:
    """Raise a ValueError that names both sizes if a frame is too large for a record."""
    if len(frame) > MAX_RECORD_BYTES:
        raise ValueError(f"{len(frame)} bytes; a record holds at most {MAX_RECORD_BYTES}")


def _map_new(path: Path, size: int, least: int) -> mmap.mmap:
    """Make and map a file of `size` bytes with every block allocated; of less, at least `least`, on a full disk."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, size)
                return mmap.mmap(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as exc:
            path.unlink(missing_ok=True)
            smaller = max(size // 4 & ~7, _SMALLEST_SEGMENT, least)
            if exc.errno not in _NO_ROOM or smaller >= size:
                raise
            size = smaller
