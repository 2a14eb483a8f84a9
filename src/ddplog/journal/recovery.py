"""Decides which of the frames behind a hole in a segment can be believed. Touches no file.

After a power cut any page that had not been synced may be the old one, in any order: more often than not whole frames
lie behind a hole. Nothing says where they begin, since the lengths in front are gone. Every 8 bytes may be a frame;
one counts only if its checksum is right under this segment's epoch, which no other bytes than those of a record of
this segment are, and if its seq is one that a frame at this place can have: every lost one took PREFIX_BYTES at least.
"""

from __future__ import annotations

from typing import Final
from zlib import crc32

from ddplog.core.records import MAX_RECORD_BYTES, PREFIX_BYTES, WORD

_SEQ_OFFSET: Final = 8
_ALIGNMENT: Final = 8
_PAGE_BYTES: Final = 4096
_NOTHING: Final = bytes(_PAGE_BYTES)


def find_frame(buffer: memoryview, start: int, end: int, epoch: int, lost_seq: int) -> tuple[int, int] | None:
    """Find the first whole frame behind one that is not.

    Args:
        buffer: A segment. Owned by the caller, only read.
        start: Offset of the frame that is not whole, bytes.
        end: Offset past which nothing is read, bytes.
        epoch: The segment's checksum seed.
        lost_seq: The seq of the frame that is not whole.

    Returns:
        (offset, seq); None if there is none.
    """
    for page in range(start, end, _PAGE_BYTES):
        stop = min(page + _PAGE_BYTES, end)
        if bytes(buffer[page:stop]) == _NOTHING[: stop - page]:  # what follows the last frame of most segments
            continue
        for offset in range(max(page, start + _ALIGNMENT), min(stop, end - PREFIX_BYTES + 1), _ALIGNMENT):
            seq = _seq_of(buffer, offset, end, epoch)
            if seq is not None and lost_seq < seq <= lost_seq + (offset - start) // PREFIX_BYTES:
                return offset, seq
    return None


def _seq_of(buffer: memoryview, offset: int, end: int, epoch: int) -> int | None:
    """Return the seq of the whole frame at `offset`; None if there is none."""
    (word,) = WORD.unpack_from(buffer, offset)
    length = word & 0xFFFFFFFF
    if not PREFIX_BYTES <= length <= MAX_RECORD_BYTES or length % _ALIGNMENT or offset + length > end:
        return None
    if crc32(buffer[offset + _SEQ_OFFSET : offset + length], epoch) != word >> 32:
        return None
    (seq,) = WORD.unpack_from(buffer, offset + _SEQ_OFFSET)
    return int(seq)
