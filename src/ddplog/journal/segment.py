"""Specifies the files of a journal folder, `<rank>.<incarnation>/`.

head      4096 bytes, mapped by the rank (writes) and the agent (reads; writes `acked_seq`):
              0  8s  magic "DDPLOGJ1"      8  u32 format version    12  u32 bytes of JSON
             16 16s  incarnation
             64  i64 ambient step (NO_STEP: none)       72  u64 wall time of the last sign of life, ns
             80  u64 1 finished, 2 at its exit            88  u64 acked_seq: seqs below it are durable at the aggregator
             96  u64 number of the segment that the rank is asked to leave (its disk failed); 0: none
            104  u64 the segments that the agent found have to be written anew (durable.py): number of the oldest in the
                 low 32 bits, of the newest in the high ones; 0: none
            112  u64 the same, that the rank found in a flush()
            120  u64 counts the attempts to write this page: a page that could not be written must be dirty again
            128  32 x u64 drops, by the index of the reason in DROP_REASONS
            384  u64 values that log() has taken and that are not in the journal yet, since they, or what was logged
                 before them, are on their way from a device: their number in the low 32 bits, and in the high ones the
                 low bits of the seq that was the next when it held; 0: none. (It came later; before, it was always 0.)
           1024  JSON: the rank's identity
alive     empty; the rank holds a POSIX record lock on it while it lives. Not on a mapped file: closing any descriptor of
          a file drops the process's locks on it, and mmap closes one. Not flock: that lives on in forked children.
NNNNNN.seg  a segment, numbered from 1: 64 header bytes, then frames (core/records.py), then zeros, and in its last 64
          bytes the header again, since without the epoch no frame can be believed:
              0  8s  magic "DDPLOGS1"      8  u32 format version    12  u32 epoch
             16  16s incarnation          32  u64 seq of its first frame    40  u64 its number
          It is preallocated (a sparse mapping on a full disk is a SIGBUS), filled under a temporary name and renamed, so
          that a segment that can be seen has its header. When segment N+1 can be seen, N has no further frame. It is
          never used again for other records. All of this holds while the node is up; what a power cut leaves of it,
          reader.py says.
stacks.N  what signal N makes the rank append: its threads' Python stacks (worker/stacks.py); the agent reads and empties it
NNNNNN.new, NNNNNN.copy  a segment that is being made, or written anew; nobody reads them.

Format 1 is the first that was released; READABLE says what this ddplog reads.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final

FORMAT_VERSION: Final = 1
READABLE: Final = (1,)
"""Formats this ddplog reads; a new one is added in front, and the others stay."""
HEAD_BYTES: Final = 4096
HEAD_MAGIC: Final = b"DDPLOGJ1"
SEGMENT_MAGIC: Final = b"DDPLOGS1"
SEGMENT_HEADER_BYTES: Final = 64

HEAD_PREFIX: Final = struct.Struct("<8sII16s")
SEGMENT_HEADER: Final = struct.Struct("<8sII16sQQ")
I64: Final = struct.Struct("<q")
U64: Final = struct.Struct("<Q")

STEP_OFFSET: Final = 64
BEAT_OFFSET: Final = 72
FINISHED_OFFSET: Final = 80
FINISHED: Final = 1
FINISHED_AT_EXIT: Final = 2
ACKED_OFFSET: Final = 88
SEAL_OFFSET: Final = 96
AGENT_SUSPECT_OFFSET: Final = 104
RANK_SUSPECT_OFFSET: Final = 112
TOUCH_OFFSET: Final = 120
DROPS_OFFSET: Final = 128
PENDING_OFFSET: Final = 384
JSON_OFFSET: Final = 1024

DROP_REASONS: Final = (
    "bad_value",
    "bad_key",
    "bad_step",
    "bad_weight",
    "key_limit",
    "record_too_large",
    "disk_full",
    "spool_full",
    "after_finish",
    "forked_child",
    "reentrant_overflow",
    "io_error",
    "device_backlog",
    "device_error",
    "device_pending",
    "graph_capture",
    "unsupported",
)
"""Why a value or record was not taken. Their order is part of the format: only append."""

_FLOCK: Final = struct.Struct("hhqqi4x")


def put(head: mmap.mmap, offset: int, word: bytes) -> None:
    """Replace 8 aligned bytes of the head page at once. Not by pack_into(), which writes zeros first: the other side
    would read 0 for a step now and then, and a kill between the two would leave it there.
    """
    head[offset : offset + 8] = word


def is_locked(descriptor: int) -> bool:
    """Tell whether another process holds a POSIX write lock on the file; takes none."""
    return _look(descriptor)[0] != fcntl.F_UNLCK


def is_held(path: str | os.PathLike[str]) -> bool:
    """Tell whether another process holds a POSIX write lock on the file; False if there is no such file.

    Not for a file that this process itself has locked: closing a descriptor of it gives the lock up.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return is_locked(descriptor)
    finally:
        os.close(descriptor)


def holder(descriptor: int) -> int:
    """Return the pid, as this process sees pids, of the one that holds the lock; 0: nobody, or none to be seen here."""
    kind, pid = _look(descriptor)
    return pid if kind != fcntl.F_UNLCK else 0


def _look(descriptor: int) -> tuple[int, int]:
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return kind, pid


def read_header(segment: mmap.mmap | bytes, incarnation: bytes, number: int) -> tuple[int, int] | None:
    """Return (epoch, seq of the first frame) of a segment, from either copy of its header; None if neither is left.

    Args:
        segment: Its bytes, or the first and the last SEGMENT_HEADER_BYTES of them.
        incarnation: The journal's.
        number: The segment's: blocks of an older one, that the disk may show instead, are not its own.
    """
    size = len(segment)
    for offset in (0, size - SEGMENT_HEADER_BYTES):
        if 0 <= offset <= size - SEGMENT_HEADER_BYTES:
            magic, version, epoch, whose, first_seq, its = SEGMENT_HEADER.unpack_from(segment, offset)
            if magic == SEGMENT_MAGIC and version in READABLE and (whose, its) == (incarnation, number):
                return epoch, first_seq
    return None


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:06d}.seg"


def segment_numbers(folder: str) -> list[int]:
    """Return the numbers of the folder's segments, ascending."""
    return sorted(int(name[:-4]) for name in os.listdir(folder) if name.endswith(".seg") and name[:-4].isdigit())
