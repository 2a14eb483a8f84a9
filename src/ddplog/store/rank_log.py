"""Owns the rank log, `ranks/NNNNNN.log`: every record the aggregator accepted, as it came.

A file is a sequence of entries, little endian, each 8-byte aligned:

    offset size
    0      4    magic: 0x524C4431 ("1DLR")
    4      4    crc32: zlib.crc32 of bytes 8..end of the entry
    8      4    writer_id
    12     4    attempt
    16     4    rank (signed)
    20     4    number of records
    24     8    seq of the first record
    32     8    bytes of payload
    40     16   incarnation
    56     ...  payload: whole record frames (core/records.py)

An entry is durable once sync() has returned; the store's transaction that acknowledges it comes after. A torn tail,
which was never acknowledged, is cut off when the log is opened for writing. Files are numbered from 1 without a gap;
the oldest may be deleted to bound the size.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

_HEADER: Final = struct.Struct("<IIIIiIQQ16s")
_SUM: Final = struct.Struct("<II")
_REST: Final = struct.Struct("<IIiIQQ16s")
"""The header in two parts: the checksum covers the second."""
_MAGIC: Final = 0x524C4431
_MAX_BUFFERS: Final = 1000
"""Of one writev(); the kernel takes 1024."""
_FILE_BYTES: Final = 64 * 1024 * 1024
assert _HEADER.size == _SUM.size + _REST.size == 56


class Position(NamedTuple):
    """A place in the log: file number and byte offset."""

    file: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """Records of one writer."""

    position: Position
    """Of its first byte."""
    writer_id: int
    attempt: int
    rank: int
    incarnation: bytes
    first_seq: int
    num_records: int
    payload: bytes


class RankLog:
    """The log, opened for appending.

    Args:
        folder: `ranks/`; made if it is not there.
        end: Where the store says the log ends; what lies behind was never acknowledged and is cut off. None:
            keep every whole entry.
        file_bytes: Size at which a new file begins.
    """

    def __init__(self, folder: Path, end: Position | None = None, file_bytes: int = _FILE_BYTES) -> None:
        self.folder = folder
        self._file_bytes = file_bytes
        self._dirty: list[int] = []
        folder.mkdir(mode=0o700, exist_ok=True)
        numbers = file_numbers(folder)
        if end is None:
            end = Position(numbers[-1], _whole_end(_path(folder, numbers[-1]))) if numbers else Position(1, 0)
        for number in numbers:
            if number > end.file:
                _path(folder, number).unlink()
        self._number, self._offset = end
        self._descriptor = self._open()
        os.ftruncate(self._descriptor, self._offset)

    @property
    def end(self) -> Position:
        """Where the next entry goes."""
        return Position(self._number, self._offset)

    def append(
        self,
        *,
        writer_id: int,
        attempt: int,
        rank: int,
        incarnation: bytes,
        first_seq: int,
        num_records: int,
        payload: bytes,
    ) -> Position:
        """Append an entry; not durable before sync().

        Returns:
            Its position.

        Raises:
            OSError: If the disk is full; the log is as it was.
        """
        return self.extend([(writer_id, attempt, rank, incarnation, first_seq, num_records, payload)])[0]

    def extend(self, entries: Iterable[tuple[int, int, int, bytes, int, int, bytes]]) -> list[Position]:
        """Append entries, many with one system call; not durable before sync().

        Args:
            entries: The arguments of append(), in its order.

        Returns:
            Their positions.

        Raises:
            OSError: If the disk is full; the log is as it was.
        """
        start = self.end
        positions: list[Position] = []
        buffers: list[bytes] = []
        try:
            for writer_id, attempt, rank, incarnation, first_seq, num_records, payload in entries:
                rest = _REST.pack(writer_id, attempt, rank, num_records, first_seq, len(payload), incarnation)
                size = _HEADER.size + len(payload)
                is_full = bool(self._offset) and self._offset + size > self._file_bytes
                if is_full or len(buffers) > _MAX_BUFFERS:
                    self._write(buffers)
                    buffers = []
                if is_full:
                    self._roll()
                positions.append(Position(self._number, self._offset))
                buffers += (_SUM.pack(_MAGIC, crc32(payload, crc32(rest))), rest, payload)
                self._offset += size
            self._write(buffers)
        except OSError:
            self.rewind(start)
            raise
        return positions

    def _write(self, buffers: list[bytes]) -> None:
        if buffers and os.writev(self._descriptor, buffers) != sum(map(len, buffers)):
            raise OSError(errno.ENOSPC, "the rank log's disk is full")

    def rewind(self, end: Position) -> None:
        """Take back what was appended after `end`, in the same file or a later one."""
        for number in range(self._number, end.file, -1):
            os.close(self._descriptor)
            _path(self.folder, number).unlink()
            self._number = number - 1
            self._descriptor = self._open()
        self._offset = end.offset
        os.ftruncate(self._descriptor, self._offset)
        os.lseek(self._descriptor, self._offset, os.SEEK_SET)

    def sync(self) -> None:
        """Make every appended entry durable."""
        while self._dirty:
            os.fsync(self._dirty[-1])
            os.close(self._dirty.pop())
        os.fdatasync(self._descriptor)

    def trim(self, max_bytes: int, keep_from: int) -> list[int]:
        """Delete the oldest files while the log is larger than `max_bytes`, none from number `keep_from` on.

        Returns:
            Numbers of the deleted files.
        """
        sizes = [(number, _path(self.folder, number).stat().st_size) for number in file_numbers(self.folder)]
        total = sum(size for _, size in sizes)
        deleted = []
        for number, size in sizes[:-1]:
            if total <= max_bytes or number >= keep_from:
                break
            _path(self.folder, number).unlink()
            total -= size
            deleted.append(number)
        return deleted

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        descriptor = os.open(_path(self.folder, self._number), flags, 0o600)
        os.lseek(descriptor, self._offset, os.SEEK_SET)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
        return descriptor

    def _roll(self) -> None:
        before = self._number, self._offset
        self._number, self._offset = self._number + 1, 0
        try:
            descriptor = self._open()
        except OSError:
            self._number, self._offset = before
            raise
        self._dirty.append(self._descriptor)
        self._descriptor = descriptor

    def __repr__(self) -> str:
        return f"<RankLog {self.folder} end={self._number}:{self._offset}>"


def iter_entries(folder: Path, start: Position | None = None, end: Position | None = None) -> Iterator[Entry]:
    """Read the log from `start` to `end`, streaming.

    Stops quietly at the first torn entry of the last file; a damaged entry in an earlier one ends that file.
    """
    for number in file_numbers(folder):
        if (start is not None and number < start.file) or (end is not None and number > end.file):
            continue
        offset = start.offset if start is not None and number == start.file else 0
        limit = end.offset if end is not None and number == end.file else None
        yield from _iter_file(_path(folder, number), number, offset, limit)


def _iter_file(path: Path, number: int, offset: int, limit: int | None) -> Iterator[Entry]:
    with path.open("rb") as file:
        file.seek(offset)
        while limit is None or offset < limit:
            header = file.read(_HEADER.size)
            if len(header) < _HEADER.size:
                return
            magic, checksum, writer_id, attempt, rank, count, first_seq, size, incarnation = _HEADER.unpack(header)
            if magic != _MAGIC or size > 1 << 30:
                return
            payload = file.read(size)
            if len(payload) < size or crc32(payload, crc32(header[8:])) != checksum:
                return
            yield Entry(
                position=Position(number, offset),
                writer_id=writer_id,
                attempt=attempt,
                rank=rank,
                incarnation=incarnation,
                first_seq=first_seq,
                num_records=count,
                payload=payload,
            )
            offset += len(header) + size


def _whole_end(path: Path) -> int:
    end = 0
    for entry in _iter_file(path, 0, 0, None):
        end = entry.position.offset + _HEADER.size + len(entry.payload)
    return end


def file_numbers(folder: Path) -> list[int]:
    """Return the numbers of the log's files, ascending."""
    names: Iterable[str] = os.listdir(folder) if folder.is_dir() else ()
    return sorted(int(name[:-4]) for name in names if name.endswith(".log") and name[:-4].isdigit())


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"
