"""Specifies the files of a journal folder, `<rank>.<incarnation>/`.

head      4096 bytes, mapped by the rank (writes) and the agent (reads; writes `acked_seq`):
              0  8s  magic "DDPLOGJ1"      8  u32 format version    12  u32 bytes of JSON
             16 16s  incarnation
             64  i64 ambient step (NO_STEP: none)       72  u64 wall time of the last sign of life, ns
             80  u64 1 after a normal finish            88  u64 acked_seq: seqs below it are durable at the aggregator
            128  32 x u64 drops, by the index of the reason in DROP_REASONS
           1024  JSON: the rank's identity
alive     empty; the rank holds a POSIX record lock on it while it lives. Not on a mapped file: closing any descriptor of
          a file drops the process's locks on it, and mmap closes one. Not flock: that lives on in forked children.
NNNNNN.seg  a segment, numbered from 1: 64 header bytes, then frames (core/records.py), then zeros:
              0  8s  magic "DDPLOGS1"      8  u32 format version    12  u32 epoch
             16  16s incarnation          32  u64 seq of its first frame
          It is preallocated (a sparse mapping on a full disk is a SIGBUS), filled under a temporary name and renamed, so
          that a segment that can be seen has its header. When segment N+1 can be seen, N has no further frame.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from typing import Final

FORMAT_VERSION: Final = 1
HEAD_BYTES: Final = 4096
HEAD_MAGIC: Final = b"DDPLOGJ1"
SEGMENT_MAGIC: Final = b"DDPLOGS1"
SEGMENT_HEADER_BYTES: Final = 64

HEAD_PREFIX: Final = struct.Struct("<8sII16s")
SEGMENT_HEADER: Final = struct.Struct("<8sII16sQ")
I64: Final = struct.Struct("<q")
U64: Final = struct.Struct("<Q")

STEP_OFFSET: Final = 64
BEAT_OFFSET: Final = 72
FINISHED_OFFSET: Final = 80
ACKED_OFFSET: Final = 88
DROPS_OFFSET: Final = 128
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
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    return int(_FLOCK.unpack(answer)[0]) != fcntl.F_UNLCK


def segment_name(number: int) -> str:
    """Return the file name of a segment."""
    return f"{number:06d}.seg"


def segment_numbers(folder: str) -> list[int]:
    """Return the numbers of the folder's segments, ascending."""
    return sorted(int(name[:-4]) for name in os.listdir(folder) if name.endswith(".seg") and name[:-4].isdigit())
