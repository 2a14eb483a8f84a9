"""Owns the reading side of a journal: what the agent, the launcher's last sweep and `ddplog sync` see of a rank.

A frame whose checksum is wrong is "not yet" while the rank lives. Once it is dead, what follows the last whole frame
of its last segment is a torn tail: never accepted, since its log() had not returned.
"""

from __future__ import annotations

import itertools
import json
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ddplog.core.records import NO_STEP, PREFIX, scan
from ddplog.errors import RemoteProtocolError
from ddplog.journal import segment as layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Whole frames of consecutive seqs, of one segment."""

    first_seq: int
    num_records: int
    payload: bytes
    epoch: int


@dataclass(slots=True)
class _Segment:
    number: int
    mapping: mmap.mmap
    view: memoryview
    epoch: int
    first_seq: int
    size: int

    def close(self) -> None:
        self.view.release()
        self.mapping.close()


class JournalReader:
    """A journal folder, read from a cursor that seek() may move back.

    Args:
        folder: `<rank>.<incarnation>/`.

    Raises:
        RemoteProtocolError: If it is not a journal, or of a format that is not ours.
        OSError: If it cannot be opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        descriptor = os.open(folder / "head", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            self._head = mmap.mmap(descriptor, layout.HEAD_BYTES)
        finally:
            os.close(descriptor)
        magic, version, size, self.incarnation = layout.HEAD_PREFIX.unpack_from(self._head, 0)
        if magic != layout.HEAD_MAGIC or version != layout.FORMAT_VERSION:
            raise RemoteProtocolError(f"{folder}: not a journal of format {layout.FORMAT_VERSION}")
        text = self._head[layout.JSON_OFFSET : layout.JSON_OFFSET + min(size, layout.HEAD_BYTES - layout.JSON_OFFSET)]
        self.identity: Mapping[str, Any] = json.loads(text)
        self._alive = os.open(folder / "alive", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        self._segment: _Segment | None = None
        self._offset = layout.SEGMENT_HEADER_BYTES
        self.next_seq = 0
        """The seq of the next frame to read."""
        self.last_time_unix_ns = 0
        """When the newest frame read was written."""

    # -- the head page

    @property
    def is_alive(self) -> bool:
        """Whether the rank's process lives and has not closed its journal."""
        return layout.is_locked(self._alive)

    @property
    def step(self) -> int | None:
        """The rank's ambient step; None if it has shown none."""
        (step,) = layout.I64.unpack_from(self._head, layout.STEP_OFFSET)
        return None if step == NO_STEP else int(step)

    @property
    def has_finished(self) -> bool:
        return bool(layout.U64.unpack_from(self._head, layout.FINISHED_OFFSET)[0])

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> count, of those that are not 0."""
        counts = struct.unpack_from(f"<{len(layout.DROP_REASONS)}Q", self._head, layout.DROPS_OFFSET)
        return {reason: count for reason, count in zip(layout.DROP_REASONS, counts, strict=True) if count}

    @property
    def acked_seq(self) -> int:
        return int(layout.U64.unpack_from(self._head, layout.ACKED_OFFSET)[0])

    def set_acked(self, next_seq: int) -> None:
        """Tell the rank what is durable at the aggregator."""
        layout.put(self._head, layout.ACKED_OFFSET, layout.U64.pack(next_seq))

    # -- frames

    def read(self, max_bytes: int) -> Chunk | None:
        """Return the next whole frames, at least one and about `max_bytes` of them; None if there is none yet."""
        while True:
            if self._segment is None and not self._open_next():
                return None
            segment = self._segment
            assert segment is not None
            chunk = self._scan(segment, max_bytes)
            if chunk is not None:
                return chunk
            following = self.folder / layout.segment_name(segment.number + 1)
            if not following.exists():
                return None
            chunk = self._scan(segment, max_bytes)  # what came between the scan and the look at the next segment
            if chunk is not None:
                return chunk
            if not self._open_next():
                return None

    def _scan(self, segment: _Segment, max_bytes: int) -> Chunk | None:
        start = self._offset
        count = 0
        end = start
        for offset, length in scan(segment.view, start, segment.size, segment.epoch):
            count += 1
            end = offset + length
            if end - start >= max_bytes:
                break
        if not count:
            return None
        chunk = Chunk(
            first_seq=self.next_seq,
            num_records=count,
            payload=bytes(segment.view[start:end]),
            epoch=segment.epoch,
        )
        self.last_time_unix_ns = PREFIX.unpack_from(segment.view, offset)[6]
        self._offset = end
        self.next_seq += count
        return chunk

    def _open_next(self) -> bool:
        number = self._segment.number + 1 if self._segment is not None else 1
        numbers = layout.segment_numbers(str(self.folder))
        if self._segment is None and numbers:
            number = numbers[0]
        if number not in numbers:
            return False
        self._use(self._map(number))
        return True

    def _use(self, segment: _Segment) -> None:
        if self._segment is not None:
            self._segment.close()
        self._segment = segment
        self._offset = layout.SEGMENT_HEADER_BYTES
        self.next_seq = segment.first_seq

    def _map(self, number: int) -> _Segment:
        path = self.folder / layout.segment_name(number)
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            size = os.fstat(descriptor).st_size
            mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        magic, version, epoch, incarnation, first_seq = layout.SEGMENT_HEADER.unpack_from(mapping, 0)
        if (magic, version, incarnation) != (layout.SEGMENT_MAGIC, layout.FORMAT_VERSION, self.incarnation):
            mapping.close()
            raise RemoteProtocolError(f"{path}: not a segment of this journal")
        return _Segment(number, mapping, memoryview(mapping), epoch, first_seq, size)

    def seek(self, seq: int) -> None:
        """Move the cursor to `seq`, or to the oldest frame there is if it is gone."""
        if seq == self.next_seq and self._segment is not None:
            return
        for number in reversed(layout.segment_numbers(str(self.folder))):
            found = self._map(number)
            if found.first_seq <= seq or number == layout.segment_numbers(str(self.folder))[0]:
                self._use(found)
                break
            found.close()
        segment = self._segment
        if segment is None:
            return
        if self.next_seq >= seq:
            return
        for offset, length in scan(segment.view, self._offset, segment.size, segment.epoch):
            self._offset = offset + length
            self.next_seq += 1
            if self.next_seq >= seq:
                return

    @property
    def oldest_seq(self) -> int:
        """The seq of the oldest frame that is left."""
        numbers = layout.segment_numbers(str(self.folder))
        return self._first_seq(numbers[0]) if numbers else 0

    def sync(self) -> None:
        """Make the newest segments durable on this node's disk."""
        for number in layout.segment_numbers(str(self.folder))[-2:]:
            descriptor = os.open(self.folder / layout.segment_name(number), os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fdatasync(descriptor)
            finally:
                os.close(descriptor)

    def trim(self, acked_seq: int, keep_bytes: int) -> int:
        """Delete the oldest segments that are wholly acknowledged while `keep_bytes` of journal remain.

        Returns:
            Number of deleted segments.
        """
        numbers = layout.segment_numbers(str(self.folder))
        sizes = {number: (self.folder / layout.segment_name(number)).stat().st_size for number in numbers}
        total = sum(sizes.values())
        deleted = 0
        for number, following in itertools.pairwise(numbers):
            if total - sizes[number] < keep_bytes or self._first_seq(following) > acked_seq:
                break
            (self.folder / layout.segment_name(number)).unlink()
            total -= sizes[number]
            deleted += 1
        return deleted

    def _first_seq(self, number: int) -> int:
        with (self.folder / layout.segment_name(number)).open("rb") as file:
            return int(layout.SEGMENT_HEADER.unpack(file.read(layout.SEGMENT_HEADER.size))[4])

    def close(self) -> None:
        """Close the files; the journal stays."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._head.close()
        os.close(self._alive)

    def __repr__(self) -> str:
        return f"<JournalReader {self.folder.name} next_seq={self.next_seq} acked={self.acked_seq}>"
