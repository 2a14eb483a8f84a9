"""Specifies the journal's records, and encodes and decodes them. Touches no file.

A record is one frame, little endian, its length a multiple of 8:

    offset size
    0      4    length: of the whole frame in bytes, this word included; 0: no frame here (yet)
    4      4    crc32:  zlib.crc32 of bytes 8..length, seeded with the segment's epoch
    8      8    seq:    0, 1, 2 ... in one incarnation, without a gap
    16     4    head:   kind in the low 8 bits, schema id in the high 24
    20     4    aux:    SCALARS: number of values; MESSAGE and SCHEMA: bytes of JSON before the padding
    24     8    step:   signed; NO_STEP where there is none
    32     8    time_unix_ns
    40     8    weight: float64; 1.0 where the caller gave none
    48     ...  body:   SCALARS: float64 values in the schema's order; else UTF-8 JSON, zero padded

Length and crc32 are one aligned 8-byte store, made last: a reader sees a whole frame or none, and a
frame whose checksum is wrong is "not yet" while its writer lives and torn once it is dead. The epoch is
random per segment, so bytes of an earlier life never pass for a record.

A SCHEMA frame names the keys of the SCALARS frames that carry its id; it precedes them in the same
segment. Everything that is not a scalar is a MESSAGE, a JSON object with a "type":

    params    {"values": {name: value}}
    text      {"key": str, "text": str}
    alert     {"title": str, "text": str, "level": "info" | "warning" | "error"}
    define    {"pattern": str, "reduce": str, "replicated": bool}
    finish    {"status": "finished" | "failed" | "preempted" | ..., "detail": str}

JSON rather than protobuf for these: they are rare, and protobuf in the training process would be a
library that can clash with the user's own pin.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final
from zlib import crc32

NO_STEP: Final = -(1 << 63)
MAX_STEP: Final = (1 << 63) - 1
MAX_RECORD_BYTES: Final = 256 * 1024
"""A larger record is dropped with a count: one rank must not be able to fill the wire with one call."""

SYSTEM_PREFIX: Final = "sys/"
"""Keys of system writers (core/pipeline.py); no rank may log any below it."""

KIND_SCALARS: Final = 1
KIND_SCHEMA: Final = 2
KIND_MESSAGE: Final = 3

WORD = struct.Struct("<Q")
PREFIX = struct.Struct("<IIQIIqQd")
PREFIX_BYTES: Final = PREFIX.size
assert PREFIX_BYTES == 48


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One decoded frame."""

    seq: int
    kind: int
    schema_id: int
    step: int
    """NO_STEP where there is none."""
    time_unix_ns: int
    weight: float
    values: tuple[float, ...] = ()
    """SCALARS only, in the schema's order."""
    message: Mapping[str, Any] | None = None
    """MESSAGE and SCHEMA only."""


def padded(num_bytes: int) -> int:
    """Round up to the frame alignment, 8 bytes."""
    return (num_bytes + 7) & ~7


def encode_message(kind: int, seq: int, step: int, time_unix_ns: int, message: Mapping[str, Any], epoch: int) -> bytes:
    """Encode a SCHEMA or MESSAGE frame.

    Returns:
        The whole frame; its length may exceed MAX_RECORD_BYTES, which the caller checks.
    """
    body = json.dumps(message, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "replace")
    size = PREFIX_BYTES + padded(len(body))
    frame = bytearray(size)
    PREFIX.pack_into(frame, 0, size, 0, seq, kind, len(body), step, time_unix_ns, 1.0)
    frame[PREFIX_BYTES : PREFIX_BYTES + len(body)] = body
    return seal(frame, epoch)


def encode_scalars(
    schema_id: int, seq: int, step: int, time_unix_ns: int, weight: float, values: Sequence[float], epoch: int
) -> bytes:
    """Encode a SCALARS frame. The worker's hot path inlines this; tests hold the two equal."""
    size = PREFIX_BYTES + 8 * len(values)
    frame = bytearray(size)
    head = KIND_SCALARS | schema_id << 8
    PREFIX.pack_into(frame, 0, size, 0, seq, head, len(values), step, time_unix_ns, weight)
    struct.pack_into(f"<{len(values)}d", frame, PREFIX_BYTES, *values)
    return seal(frame, epoch)


def seal(frame: bytearray, epoch: int) -> bytes:
    """Put the checksum into a frame whose other fields are set."""
    WORD.pack_into(frame, 0, crc32(memoryview(frame)[8:], epoch) << 32 | len(frame))
    return bytes(frame)


def scan(buffer: memoryview, start: int, end: int, epoch: int) -> Iterator[tuple[int, int]]:
    """Yield (offset, length) of the whole, valid frames from `start`, up to the first that is not.

    Args:
        buffer: A segment, header included. Owned by the caller, only read.
        start: Offset of a frame boundary, bytes.
        end: Offset past which nothing is read, bytes.
        epoch: The segment's checksum seed.
    """
    offset = start
    unpack = WORD.unpack_from
    while offset + PREFIX_BYTES <= end:
        (word,) = unpack(buffer, offset)
        length = word & 0xFFFFFFFF
        if length < PREFIX_BYTES or length & 7 or offset + length > end:
            return
        if crc32(buffer[offset + 8 : offset + length], epoch) != word >> 32:
            return
        yield offset, length
        offset += length


def decode(payload: memoryview | bytes, offset: int) -> Record:
    """Decode the frame at `offset`, whose bounds and checksum have been checked.

    Raises:
        ValueError: If its kind is unknown or its fields contradict each other.
    """
    length, _, seq, head, aux, step, time_unix_ns, weight = PREFIX.unpack_from(payload, offset)
    kind = head & 0xFF
    if kind == KIND_SCALARS:
        if PREFIX_BYTES + 8 * aux != length:
            raise ValueError(f"record {seq}: {aux} values do not fill {length} bytes")
        values = struct.unpack_from(f"<{aux}d", payload, offset + PREFIX_BYTES)
        return Record(
            seq=seq, kind=kind, schema_id=head >> 8, step=step, time_unix_ns=time_unix_ns, weight=weight, values=values
        )
    if kind not in (KIND_SCHEMA, KIND_MESSAGE):
        raise ValueError(f"record {seq}: unknown kind {kind}")
    if PREFIX_BYTES + padded(aux) != length:
        raise ValueError(f"record {seq}: {aux} bytes of JSON do not fill {length} bytes")
    message = json.loads(bytes(payload[offset + PREFIX_BYTES : offset + PREFIX_BYTES + aux]))
    if not isinstance(message, dict):
        raise ValueError(f"record {seq}: not a JSON object")
    return Record(
        seq=seq,
        kind=kind,
        schema_id=head >> 8,
        step=step,
        time_unix_ns=time_unix_ns,
        weight=weight,
        message=message,
    )


def scan_payload(payload: bytes | memoryview) -> list[tuple[int, int]]:
    """Split a batch's payload into (offset, length) of its frames, without checksums.

    Raises:
        ValueError: If the frames do not fill the payload exactly.
    """
    frames = []
    offset = 0
    total = len(payload)
    while offset < total:
        if total - offset < PREFIX_BYTES:
            raise ValueError(f"{total - offset} bytes left at offset {offset}: less than a frame's prefix")
        (word,) = WORD.unpack_from(payload, offset)
        length = word & 0xFFFFFFFF
        if length < PREFIX_BYTES or length & 7 or offset + length > total:
            raise ValueError(f"frame at offset {offset} claims {length} bytes of {total - offset}")
        frames.append((offset, length))
        offset += length
    return frames
