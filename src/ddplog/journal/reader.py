"""Owns the reading side of a journal: what the agent, the launcher's last sweep and `ddplog sync` see of a rank.

A frame whose checksum is wrong is "not yet" while the rank lives and the segment is its newest. After that it never
will be whole, and there are two reasons. The rank was killed amid the append: nothing follows, it is a torn tail, and
its log() had not returned. Or the node's power was cut: any page and any name in the folder that had not been synced
may be gone, whatever was written after it. Then the reader goes on behind the hole, with the frames that are provably
this segment's (recovery.py), and with the next segment whose header is left, and says before them which seqs are in no
file any more: a Hole. The shipper declares it (Loss in data.proto), the pipeline counts the records as `lost_records`
and no longer waits for them. What was lost behind the last whole frame and behind the last header cannot be known.

Rejected: to end the journal at its first hole, which loses what can be read (63 % of the trials of a model have whole
records behind a hole); to write a tombstone into the journal, which would be another write on a disk in doubt, while
the hole is found again at every reading.
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

from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, NO_STEP, PREFIX, scan
from ddplog.errors import RemoteProtocolError
from ddplog.journal import segment as layout
from ddplog.journal.durable import Durability
from ddplog.journal.recovery import find_frame


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """Whole frames of consecutive seqs, of one segment."""

    first_seq: int
    num_records: int
    payload: bytes
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """Seqs first_seq .. next_seq - 1 are in no file of the journal any more."""

    first_seq: int
    next_seq: int


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
        if magic != layout.HEAD_MAGIC:
            raise RemoteProtocolError(f"{folder / 'head'}: not the head of a journal")
        if version not in layout.READABLE:
            known = ", ".join(map(str, layout.READABLE))
            raise RemoteProtocolError(f"{folder / 'head'}: a journal of format {version}; this ddplog reads {known}")
        text = self._head[layout.JSON_OFFSET : layout.JSON_OFFSET + min(size, layout.HEAD_BYTES - layout.JSON_OFFSET)]
        self.identity: Mapping[str, Any] = json.loads(text)
        self._alive = _open_lock(folder / "alive")
        self._segment: _Segment | None = None
        self._paths = (folder, folder)
        """Of the segment and of the next one: looked for at every idle round of the agent, for every rank."""
        self._offset = layout.SEGMENT_HEADER_BYTES
        self._at_seq = 0
        """The seq of the frame at the offset."""
        self._searched = (0, 0)
        """(segment, offset) behind which there is no whole frame."""
        self.next_seq = 0
        """The seq of the next frame to read. Below the one at the offset: what is between is a hole."""
        self.last_time_unix_ns = 0
        """When the newest frame read was logged."""
        self._last_num_values = 0
        """How many values the newest frame read or passed holds."""
        self._durability = Durability(folder, self._head, is_agent=True)
        self._synced_seq: int | None = None
        """The next seq when everything had been made durable; None: it is not known to be."""
        self._synced_drops = b""
        self._is_synced_for_good = False

    # -- the head page

    @property
    def is_alive(self) -> bool:
        """Whether the rank's process lives and has not closed its journal."""
        return self._alive >= 0 and layout.is_locked(self._alive)

    @property
    def step(self) -> int | None:
        """The rank's ambient step; None if it has shown none."""
        (step,) = layout.I64.unpack_from(self._head, layout.STEP_OFFSET)
        return None if step == NO_STEP else int(step)

    @property
    def has_finished(self) -> bool:
        return self._finished > 0

    @property
    def is_at_exit(self) -> bool:
        """Whether the process is about to end, or has: it did not close the journal to go on with something else."""
        return self._finished != layout.FINISHED

    @property
    def _finished(self) -> int:
        return int(layout.U64.unpack_from(self._head, layout.FINISHED_OFFSET)[0])

    @property
    def holder(self) -> int:
        """The pid of the rank's process; 0 if it has closed its journal, or is out of sight."""
        return layout.holder(self._alive) if self._alive >= 0 else 0

    @property
    def drops(self) -> dict[str, int]:
        """Reason -> count, of those that are not 0."""
        counts = struct.unpack(f"<{len(layout.DROP_REASONS)}Q", self._drops)
        return {reason: count for reason, count in zip(layout.DROP_REASONS, counts, strict=True) if count}

    @property
    def _drops(self) -> bytes:
        return self._head[layout.DROPS_OFFSET : layout.DROPS_OFFSET + 8 * len(layout.DROP_REASONS)]

    @property
    def num_unarrived(self) -> int:
        """How many values a dead rank had taken that never got into its journal, which has been read to the end.

        They were on their way from a device, or queued behind such ones. The rank counts them down after each append:
        a kill between the two leaves one record, and perhaps the declaration of its keys, that is counted in both.
        """
        (word,) = layout.U64.unpack_from(self._head, layout.PENDING_OFFSET)
        num_values, as_of = int(word & 0xFFFFFFFF), int(word >> 32)
        is_last_counted = (self.next_seq - as_of) & 0xFFFFFFFF in (1, 2)
        return max(0, num_values - self._last_num_values) if is_last_counted else num_values

    @property
    def acked_seq(self) -> int:
        return int(layout.U64.unpack_from(self._head, layout.ACKED_OFFSET)[0])

    def set_acked(self, next_seq: int) -> None:
        """Tell the rank what is durable at the aggregator."""
        layout.put(self._head, layout.ACKED_OFFSET, layout.U64.pack(next_seq))

    # -- frames

    def read(self, max_bytes: int) -> Chunk | Hole | None:
        """Return the next whole frames, at least one and about `max_bytes` of them.

        Returns:
            A Hole where records are gone for good; None if there is nothing yet, or, of a dead rank, nothing more.

        Raises:
            OSError: If a segment cannot be opened now.
        """
        while True:
            if self._segment is not None:
                found = self._take(max_bytes)
                if found is not None:
                    return found
                if not self._is_final:
                    return None
                found = self._take(max_bytes)  # what came between the two looks
                if found is not None:
                    return found
                if self._pass_hole():
                    continue
            if not self._open_following():
                return None

    def _take(self, max_bytes: int) -> Chunk | Hole | None:
        if self._at_seq > self.next_seq:
            hole = Hole(first_seq=self.next_seq, next_seq=self._at_seq)
            self.next_seq = self._at_seq
            return hole
        assert self._segment is not None
        return self._scan(self._segment, max_bytes)

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
            first_seq=self._at_seq,
            num_records=count,
            payload=bytes(segment.view[start:end]),
            epoch=segment.epoch,
        )
        self._note_last(segment, offset)
        self._offset = end
        self._at_seq += count
        self.next_seq = self._at_seq
        return chunk

    def _note_last(self, segment: _Segment, offset: int) -> None:
        _, _, _, head, aux, _, self.last_time_unix_ns, _ = PREFIX.unpack_from(segment.view, offset)
        kind = head & 0xFF
        self._last_num_values = aux if kind == KIND_SCALARS else int(kind == KIND_MESSAGE)

    @property
    def _is_final(self) -> bool:
        """Whether nothing is appended to the segment any more: there is a later one, be it that this one and the next
        have been deleted.
        """
        this, following = self._paths
        return following.exists() or not this.exists() or not self.is_alive

    def _pass_hole(self) -> bool:
        """Go to the next whole frame of a final segment, behind one that is not; False if there is none."""
        segment = self._segment
        assert segment is not None
        place = segment.number, self._offset
        if place == self._searched:
            return False
        found = find_frame(segment.view, self._offset, segment.size, segment.epoch, self._at_seq)
        if found is None:
            self._searched = place
            return False
        self._offset, self._at_seq = found
        return True

    def _open_following(self) -> bool:
        """Go to the next segment that has a header; False if there is none."""
        current = self._segment.number if self._segment is not None else 0
        for number in layout.segment_numbers(str(self.folder)):
            if number > current:
                segment = self._map(number)
                if segment is not None:
                    self._use(segment)
                    return True
        return False

    def _use(self, segment: _Segment) -> None:
        if self._segment is not None:
            self._segment.close()
        elif not self.next_seq:
            self.next_seq = segment.first_seq  # read without a seek(): from the oldest that is left
        self._segment = segment
        number = segment.number
        self._paths = self.folder / layout.segment_name(number), self.folder / layout.segment_name(number + 1)
        self._offset = layout.SEGMENT_HEADER_BYTES
        self._at_seq = segment.first_seq

    def _map(self, number: int) -> _Segment | None:
        """Map a segment; None if it is gone or nothing is left of its header."""
        path = self.folder / layout.segment_name(number)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        try:
            size = os.fstat(descriptor).st_size
            if size < layout.SEGMENT_HEADER_BYTES:
                return None
            mapping = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
        finally:
            os.close(descriptor)
        header = layout.read_header(mapping, self.incarnation, number)
        if header is None:
            mapping.close()
            return None
        return _Segment(number, mapping, memoryview(mapping), *header, size)

    def seek(self, seq: int) -> None:
        """Move the cursor to `seq`, or behind the last frame if it is further."""
        if seq == self.next_seq == self._at_seq and self._segment is not None:
            return
        self._use_segment_of(seq)
        while self._segment is not None and self._at_seq < seq:
            self._walk(seq)
            if self._at_seq >= seq or not self._is_final:
                break
            self._walk(seq)
            if self._at_seq >= seq or not (self._pass_hole() or self._open_following()):
                break
        self.next_seq = min(seq, self._at_seq)

    def _use_segment_of(self, seq: int) -> None:
        """Go to the segment that may hold `seq`, or to the oldest one."""
        oldest: _Segment | None = None
        for number in reversed(layout.segment_numbers(str(self.folder))):
            segment = self._map(number)
            if segment is None:
                continue
            if oldest is not None:
                oldest.close()
            oldest = segment
            if segment.first_seq <= seq:
                break
        if oldest is not None:
            self._use(oldest)

    def _walk(self, seq: int) -> None:
        """Pass the frames below `seq`, as far as they are whole."""
        segment = self._segment
        assert segment is not None
        if self._at_seq < seq:
            for offset, length in scan(segment.view, self._offset, segment.size, segment.epoch):
                self._offset = offset + length
                self._at_seq += 1
                if self._at_seq >= seq:
                    self._note_last(segment, offset)
                    return

    @property
    def oldest_seq(self) -> int:
        """The seq of the oldest frame that is left."""
        firsts = (self._first_seq(number) for number in layout.segment_numbers(str(self.folder)))
        return next((first for first in firsts if first is not None), 0)

    # -- upkeep

    def sync(self) -> bool:
        """Make everything written so far durable on this node's disk, if something has been.

        Returns:
            Whether it is; if not, call again. What failed is logged, and mended as durable.py says.
        """
        if self._is_synced_for_good:
            return True
        is_over = not self.is_alive
        seq, drops = self.next_seq, self._drops
        if is_over:  # what it left on a device counts from now on
            drops += self._head[layout.PENDING_OFFSET : layout.PENDING_OFFSET + 8]
        is_new = self._has_unread or seq != self._synced_seq
        if not is_new and drops == self._synced_drops:
            return True
        is_durable = self._durability.sync(is_over=is_over, with_head=drops != self._synced_drops)
        self._synced_seq, self._synced_drops = (seq, drops) if is_durable else (None, b"")
        self._is_synced_for_good = is_over and is_durable
        return is_durable

    @property
    def _has_unread(self) -> bool:
        """Whether there may be frames behind the cursor: while nobody takes them, they have to be durable here."""
        segment = self._segment
        if segment is None or self._paths[1].exists():
            return True
        return self._offset + 8 <= segment.size and any(segment.view[self._offset : self._offset + 8])

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
            first_seq = self._first_seq(following)
            if total - sizes[number] < keep_bytes or first_seq is None or first_seq > acked_seq:
                break
            (self.folder / layout.segment_name(number)).unlink()
            total -= sizes[number]
            deleted += 1
        return deleted

    def _first_seq(self, number: int) -> int | None:
        """Return the seq of a segment's first frame; None if nothing is left of its header."""
        path = self.folder / layout.segment_name(number)
        try:
            with path.open("rb") as file:
                ends = file.read(layout.SEGMENT_HEADER_BYTES)
                file.seek(max(0, os.fstat(file.fileno()).st_size - layout.SEGMENT_HEADER_BYTES))
                ends += file.read(layout.SEGMENT_HEADER_BYTES)
        except FileNotFoundError:
            return None
        header = layout.read_header(ends, self.incarnation, number)
        return None if header is None else header[1]

    def close(self) -> None:
        """Close the files; the journal stays."""
        if self._segment is not None:
            self._segment.close()
            self._segment = None
        self._durability.close()
        self._head.close()
        if self._alive >= 0:
            os.close(self._alive)

    def __repr__(self) -> str:
        return f"<JournalReader {self.folder.name} next_seq={self.next_seq} acked={self.acked_seq}>"


def _open_lock(path: Path) -> int:
    """Open what the rank holds a lock on; -1 if a power cut took it, and so the rank."""
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return -1
