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
the oldest may be deleted to bound the size. The first character of the magic is the format of all of a file's entries;
format 1 is the first that was released.

The log can be shorter than the store says, or damaged, if the disk lied about a sync or somebody cut it: whole_end()
tells, and the store then asks the ranks' journals for what is missing (run_store.py).

What a failed write or sync leaves is cut off, and written again from memory: no sync is ever asked again of the pages
that it failed on.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple
from zlib import crc32

from ddplog.errors import ConfigError

_HEADER: Final = struct.Struct("<IIIIiIQQ16s")
_SUM: Final = struct.Struct("<II")
_REST: Final = struct.Struct("<IIiIQQ16s")
"""The header in two parts: the checksum covers the second."""
_MAGIC: Final = 0x524C4431
FORMAT_VERSION: Final = 1
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
        self._rolled: list[tuple[int, int]] = []
        """(number, descriptor) of files that are full and not yet synced."""
        self._rewind_to: Position | None = None
        """Where the log ends, if the disk has refused so far to cut off what is behind."""
        if not folder.is_dir():
            folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(folder.parent)
        numbers = file_numbers(folder)
        if end is None:
            end = Position(numbers[-1], _whole_end(_path(folder, numbers[-1]))) if numbers else Position(1, 0)
        for number in numbers:
            if number > end.file:
                _path(folder, number).unlink()
        self._number, self._offset = end
        self._descriptor = self._open(self._number)
        os.ftruncate(self._descriptor, self._offset)

    @property
    def end(self) -> Position:
        """Where the next entry goes."""
        return self._rewind_to or Position(self._number, self._offset)

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
        self._cut()
        start = self.end
        positions: list[Position] = []
        buffers: list[bytes] = []
        written = self._offset
        try:
            for writer_id, attempt, rank, incarnation, first_seq, num_records, payload in entries:
                rest = _REST.pack(writer_id, attempt, rank, num_records, first_seq, len(payload), incarnation)
                size = _HEADER.size + len(payload)
                is_full = bool(self._offset) and self._offset + size > self._file_bytes
                if is_full or len(buffers) > _MAX_BUFFERS:
                    self._write(buffers, written)
                    buffers, written = [], self._offset
                if is_full:
                    self._roll()
                    written = 0
                positions.append(Position(self._number, self._offset))
                buffers += (_SUM.pack(_MAGIC, crc32(payload, crc32(rest))), rest, payload)
                self._offset += size
            self._write(buffers, written)
        except OSError:
            self.rewind(start)
            raise
        return positions

    def _write(self, buffers: list[bytes], offset: int) -> None:
        if buffers and os.pwritev(self._descriptor, buffers, offset) != sum(map(len, buffers)):
            raise OSError(errno.ENOSPC, "the rank log's disk is full")

    def rewind(self, end: Position) -> None:
        """Take back what was appended after `end`, in the same file or a later one.

        If the disk refuses even that, the next append begins with it, and raises if it must.
        """
        self._rewind_to = end
        with suppress(OSError):
            self._cut()

    def _cut(self) -> None:
        end = self._rewind_to
        if end is None:
            return
        if self._number != end.file:
            descriptor = self._open(end.file)
            os.close(self._descriptor)
            self._descriptor, self._number = descriptor, end.file
        while self._rolled and self._rolled[-1][0] >= end.file:
            os.close(self._rolled.pop()[1])
        for number in file_numbers(self.folder):
            if number > end.file:
                _path(self.folder, number).unlink()
        os.ftruncate(self._descriptor, end.offset)
        self._offset, self._rewind_to = end.offset, None

    def sync(self) -> None:
        """Make every appended entry durable.

        Raises:
            OSError: If the disk refuses: rewind() and append again, from memory. A second sync() would mean nothing.
        """
        while self._rolled:
            os.fsync(self._rolled[-1][1])
            os.close(self._rolled.pop()[1])
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
        self._cut()
        self.sync()
        os.close(self._descriptor)

    def _open(self, number: int) -> int:
        path = _path(self.folder, number)
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if is_new:
                sync_folder(self.folder)
        except OSError:
            os.close(descriptor)
            path.unlink()  # so that there is something to sync the next time
            raise
        return descriptor

    def _roll(self) -> None:
        descriptor = self._open(self._number + 1)
        self._rolled.append((self._number, self._descriptor))
        self._descriptor = descriptor
        self._number, self._offset = self._number + 1, 0

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
        _check_format(path, file.read(4))
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


def _check_format(path: Path, magic: bytes) -> None:
    """Raise ConfigError if a newer ddplog wrote this file; its entries must not pass for a torn tail."""
    if magic[1:] == b"DLR" and magic[:1].isdigit() and magic != _MAGIC.to_bytes(4, "little"):
        found = magic[:1].decode()
        raise ConfigError(
            "run_id", path.parent.parent.name, f"{path}: format {found}; this ddplog reads {FORMAT_VERSION}"
        )


def whole_end(folder: Path, start: Position, end: Position) -> Position:
    """Return where the log's whole entries end.

    Args:
        folder: `ranks/`.
        start: Of an entry, or `end`; what is before it is looked at only if something is amiss behind it.
        end: Where the store says that the log ends.

    Returns:
        `end`, or an earlier place from which on entries are missing or damaged. A file that is not the last one and was
        cut exactly between two entries passes for whole.
    """
    numbers = file_numbers(folder)
    at = start
    for number in range(start.file, end.file + 1):
        if number not in numbers:
            return at if number > start.file else _end_before(folder, numbers, start)
        size = _path(folder, number).stat().st_size
        limit = end.offset if number == end.file else size
        at = Position(number, start.offset if number == start.file else 0)
        for entry in _iter_file(_path(folder, number), number, at.offset, limit):
            at = Position(number, entry.position.offset + _HEADER.size + len(entry.payload))
        if at.offset < limit or at.offset > size:
            # The damage may begin before `start`; where there is some, the whole file is looked at.
            return at if number > start.file else _end_before(folder, numbers, start)
    return end


def _end_before(folder: Path, numbers: list[int], place: Position) -> Position:
    """Return the end of the newest file that is left up to a place that is not."""
    left = [number for number in numbers if number <= place.file]
    return Position(left[-1], _whole_end(_path(folder, left[-1]))) if left else Position(place.file, 0)


def next_seqs(folder: Path, end: Position) -> dict[int, int]:
    """Return the seq after the last record that the log has of each writer, by writer_id."""
    return {entry.writer_id: entry.first_seq + entry.num_records for entry in iter_entries(folder, None, end)}


def _whole_end(path: Path) -> int:
    end = 0
    for entry in _iter_file(path, 0, 0, None):
        end = entry.position.offset + _HEADER.size + len(entry.payload)
    return end


def file_numbers(folder: Path) -> list[int]:
    """Return the numbers of the log's files, ascending."""
    names: Iterable[str] = os.listdir(folder) if folder.is_dir() else ()
    return sorted(int(name[:-4]) for name in names if name.endswith(".log") and name[:-4].isdigit())


def sync_folder(folder: Path) -> None:
    """Make a folder's entries durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _path(folder: Path, number: int) -> Path:
    return folder / f"{number:06d}.log"
