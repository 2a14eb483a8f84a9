"""Encodes and decodes the data plane's messages (proto/ddplog/v1/data.proto). Touches no socket.

What comes from the wire is trusted only after its bounds have been checked here, in this order: the size of the
whole; the number of sub-messages, counted on the raw bytes (16 MiB of empty sub-messages become 1.8 GB of objects
once parsed); the parse; then each field. Every violation is a RemoteProtocolError, and the message is dropped.
Whether a writer belongs to the node that sent it, and whether its seqs follow on, is the aggregator's to decide.

A number that will be stored stays below 2^63, SQLite's integer. A string that will be shown is printable, which
keeps terminal escapes and text-direction marks out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Final, TypeAlias
from zlib import crc32

from google.protobuf.message import DecodeError

from ddplog.core.records import PREFIX_BYTES
from ddplog.core.stacks import MAX_TEXT as MAX_STACK
from ddplog.errors import LocalProtocolError, RemoteProtocolError
from ddplog.v1.data_pb2 import (
    Ack,
    Batch,
    Bye,
    Drop,
    Envelope,
    Heartbeat,
    Hello,
    Loss,
    Progress,
    Reject,
    Stack,
    StackRequest,
    Welcome,
    Writer,
    WriterCursor,
)

PROTOCOL_VERSION: Final = 2
OLDEST_VERSION: Final = 1
"""This ddplog speaks OLDEST_VERSION to PROTOCOL_VERSION. 1 is the first that was released."""
SYSTEM_VERSION: Final = 2
"""The first that knows system writers."""
MAX_MESSAGE_BYTES: Final = 8 * 1024 * 1024
MAX_PAYLOAD_BYTES: Final = 4 * 1024 * 1024
MAX_WRITERS: Final = 8192
"""Of one node, and so of one Hello, Welcome, Ack or Heartbeat: DESIGN's largest job, all on one node, and as many system
writers."""
MAX_DROPS: Final = 16 * 1024
"""Of one Heartbeat, all writers together."""
MAX_WORLD_SIZE: Final = 1 << 20
INCARNATION_BYTES: Final = 16
STORE_UUID_BYTES: Final = 16

_MAX_INTEGER: Final = (1 << 63) - 1
_MAX_NAME: Final = 255
_MAX_TEXT: Final = 1024
_PRESCAN_BYTES: Final = 16 * 1024
"""A smaller message is not counted first: a sub-message takes two bytes at least and 112 once parsed, so that it
cannot grow beyond 1 MiB. Nearly every Ack and Heartbeat is smaller, and counting costs 0.5 us a field."""
_MAX_FIELDS: Final = 128 * 1024
"""Of one message in all, which bounds the count itself (65 ms). The largest Hello has 8192 * 14, the largest Heartbeat
8192 * 6 + 16384 * 3."""

Message: TypeAlias = Hello | Welcome | Batch | Ack | Heartbeat | Bye | Reject | StackRequest | Stack | Loss
Cursor: TypeAlias = tuple[bytes, int, int]
"""(incarnation, next_seq, attempt)."""

# Field number -> the same table of the message it holds. Written out, not read from the descriptors: a field that
# is added without a limit here is caught by a test, not let through.
_Nested: TypeAlias = Mapping[int, "tuple[int, _Nested]"]
_NESTED: Final[_Nested] = {
    1: (1, {4: (MAX_WRITERS, {})}),
    2: (1, {3: (MAX_WRITERS, {})}),
    3: (1, {}),
    4: (1, {1: (MAX_WRITERS, {})}),
    5: (1, {2: (MAX_WRITERS, {4: (MAX_DROPS, {})})}),
    6: (1, {}),
    7: (1, {}),
    8: (1, {}),
    9: (1, {}),
    10: (1, {}),
}


def encode_hello(run_id: str, node_id: str, writers: Iterable[Writer], *, has_more: bool = False) -> bytes:
    """Encode a Hello that declares a node's writers, MAX_WRITERS at most; `has_more`: others follow, once the version is
    agreed.
    """
    hello = Hello(
        protocol_version=PROTOCOL_VERSION,
        oldest_version=OLDEST_VERSION,
        run_id=run_id,
        node_id=node_id,
        writers=writers,
        has_more=has_more,
    )
    return _encode("hello", hello)


def encode_welcome(
    store_uuid: bytes, cursors: Iterable[Cursor], version: int = PROTOCOL_VERSION, created_unix_ns: int = 0
) -> bytes:
    """Encode the answer to a Hello: where each writer resumes, and the version that is spoken from now on."""
    welcome = Welcome(
        protocol_version=version,
        store_uuid=store_uuid,
        cursors=map(_cursor, cursors),
        created_unix_ns=created_unix_ns,
    )
    return _encode("welcome", welcome)


def check_version(message: Hello | Welcome) -> int:
    """Check that the peer speaks a version of the protocol that this ddplog speaks.

    A Hello is not decoded any the less: it is answered with Reject(VERSION).

    Returns:
        The newest version that both speak.

    Raises:
        RemoteProtocolError: If it does not.
    """
    newest = message.protocol_version
    oldest = message.oldest_version or newest if isinstance(message, Hello) else newest
    if max(oldest, OLDEST_VERSION) > min(newest, PROTOCOL_VERSION):
        ours, theirs = _span(OLDEST_VERSION, PROTOCOL_VERSION), _span(oldest, newest)
        raise RemoteProtocolError(f"protocol version {theirs}; this ddplog speaks {ours}")
    return min(newest, PROTOCOL_VERSION)


def _span(oldest: int, newest: int) -> str:
    return str(newest) if oldest == newest else f"{oldest} to {newest}"


def encode_batch(
    incarnation: bytes, first_seq: int, num_records: int, payload: bytes | memoryview, epoch: int
) -> bytes:
    """Encode a batch: the journal's own bytes for a contiguous range of one writer's seq.

    Args:
        incarnation: The writer, 16 bytes.
        first_seq: Seq of the first frame.
        num_records: Number of frames, at least 1.
        payload: Whole frames, MAX_PAYLOAD_BYTES at most. Copied.
        epoch: The segment's epoch, the seed of the frames' checksums.

    Raises:
        LocalProtocolError: If the other side would refuse it.
    """
    if not 1 <= num_records * PREFIX_BYTES <= len(payload) <= MAX_PAYLOAD_BYTES:
        raise LocalProtocolError(f"a batch of {num_records} records in {len(payload)} bytes")
    if len(incarnation) != INCARNATION_BYTES:
        raise LocalProtocolError(f"an incarnation of {len(incarnation)} bytes")
    payload = bytes(payload)
    batch = Batch(
        incarnation=incarnation,
        first_seq=first_seq,
        num_records=num_records,
        crc32=crc32(payload),
        payload=payload,
        epoch=epoch,
    )
    return Envelope(batch=batch).SerializeToString()


def encode_ack(cursors: Iterable[Cursor]) -> bytes:
    """Encode a cumulative acknowledgement: every seq below each next_seq is durable."""
    return _encode("ack", Ack(cursors=map(_cursor, cursors)))


def encode_heartbeat(node_id: str, progress: Iterable[Progress], *, is_over: bool = False) -> bytes:
    """Encode a node's heartbeat with its writers' progress, MAX_WRITERS at most; `is_over`: no writer will follow."""
    return _encode("heartbeat", Heartbeat(node_id=node_id, progress=progress, is_over=is_over))


def encode_bye(incarnation: bytes, next_seq: int, *, finished: bool) -> bytes:
    """Encode a writer's end: seqs below `next_seq` exist, nothing more will come."""
    return _encode("bye", Bye(incarnation=incarnation, next_seq=next_seq, finished=finished))


def encode_loss(incarnation: bytes, first_seq: int, next_seq: int) -> bytes:
    """Encode that seqs first_seq to next_seq - 1 of a writer are lost for good."""
    return _encode("loss", Loss(incarnation=incarnation, first_seq=first_seq, next_seq=next_seq))


def encode_reject(reason: Reject.Reason, incarnation: bytes, next_seq: int, message: str) -> bytes:
    """Encode a refusal.

    Args:
        reason: Why.
        incarnation: The writer concerned, 16 bytes; empty where it is the whole node.
        next_seq: Where to resume, for OUT_OF_ORDER.
        message: For people; cut to what the other side takes, and made printable.
    """
    shown = "".join(c if c.isprintable() else "?" for c in message[:_MAX_TEXT])
    reject = Reject(reason=reason, incarnation=incarnation, next_seq=next_seq, message=shown)
    return _encode("reject", reject)


def encode_stack_request(incarnations: Iterable[bytes]) -> bytes:
    """Encode the wish for the stacks of some of a node's ranks."""
    return _encode("stack_request", StackRequest(incarnations=incarnations))


def encode_stack(incarnation: bytes, text: str, trouble: str) -> bytes:
    """Encode a rank's stacks, or why there are none.

    Args:
        incarnation: The writer, 16 bytes.
        text: What core.stacks.cut() has let through.
        trouble: For people; cut to what the other side takes, and made printable.
    """
    shown = "".join(c if c.isprintable() else "?" for c in trouble[:_MAX_TEXT])
    return _encode("stack", Stack(incarnation=incarnation, text=text, trouble=shown))


def make_progress(
    incarnation: bytes,
    step: int | None,
    through_seq: int,
    drops: Mapping[str, int],
    backlog_bytes: int,
    exit_status: int | None = None,
) -> Progress:
    """Build one writer's entry of a Heartbeat."""
    return Progress(
        incarnation=incarnation,
        step=step,
        through_seq=through_seq,
        drops=[Drop(reason=reason, count=count) for reason, count in drops.items()],
        backlog_bytes=backlog_bytes,
        exit_status=exit_status,
    )


def decode(data: bytes) -> Message:
    """Decode one message and check all its bounds.

    Args:
        data: One ZeroMQ message's only part.

    Returns:
        The message inside the envelope. Reading `payload` of a Batch copies it: read it once.

    Raises:
        RemoteProtocolError: If anything about it is out of bounds; the peer's fault.
    """
    size = len(data)
    if size > MAX_MESSAGE_BYTES:
        raise RemoteProtocolError(f"a message of {size} bytes; at most {MAX_MESSAGE_BYTES}")
    if size > _PRESCAN_BYTES:
        _prescan(data, 0, size, _NESTED, _MAX_FIELDS)
    envelope = Envelope()
    try:
        envelope.ParseFromString(data)
    except DecodeError as exc:
        raise RemoteProtocolError(f"{size} bytes that are no Envelope") from exc
    kind = envelope.WhichOneof("kind")
    if kind is None:
        raise RemoteProtocolError("an Envelope of no known kind")
    message: Message = getattr(envelope, kind)
    _CHECKS[kind](message)
    return message


def _encode(kind: str, message: Any) -> bytes:
    """Serialize a message that is not a batch, holding ourselves to what we ask of others."""
    try:
        _CHECKS[kind](message)
    except RemoteProtocolError as exc:
        raise LocalProtocolError(f"we would send {exc}") from exc
    return Envelope(**{kind: message}).SerializeToString()


def _cursor(cursor: Cursor) -> WriterCursor:
    incarnation, next_seq, attempt = cursor
    return WriterCursor(incarnation=incarnation, next_seq=next_seq, attempt=attempt)


def _prescan(data: bytes, start: int, end: int, nested: _Nested, budget: int) -> int:
    """Count the fields and sub-messages in data[start:end] and raise before there are too many.

    Skips payloads without looking at them. Depth is that of `nested`, 4 at most. A group (wire types 3 and 4)
    is not proto3 and is refused. Source: protobuf.dev/programming-guides/encoding.

    Returns:
        What is left of `budget`, the number of fields that may still come.
    """
    counts: dict[int, int] = {}
    offset = start
    while offset < end:
        budget -= 1
        if budget < 0:
            raise RemoteProtocolError(f"more than {_MAX_FIELDS} fields")
        tag, offset = _varint(data, offset, end)
        field, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            _, offset = _varint(data, offset, end)
        elif wire_type == 1:
            offset += 8
        elif wire_type == 5:
            offset += 4
        elif wire_type == 2:
            length, offset = _varint(data, offset, end)
            if field in nested and offset + length <= end:
                limit, inner = nested[field]
                counts[field] = counts.get(field, 0) + 1
                if counts[field] > limit:
                    raise RemoteProtocolError(f"more than {limit} sub-messages in field {field}")
                budget = _prescan(data, offset, offset + length, inner, budget)
            offset += length
        else:
            raise RemoteProtocolError(f"wire type {wire_type}")
    if offset > end:
        raise RemoteProtocolError("a truncated field")
    return budget


def _varint(data: bytes, offset: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while offset < end and shift < 70:
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
        shift += 7
    raise RemoteProtocolError("a broken varint")


def _check_hello(hello: Hello) -> None:
    _check_text("run_id", hello.run_id, _MAX_NAME)
    _check_text("node_id", hello.node_id, _MAX_NAME)
    _check_count("writers", len(hello.writers), MAX_WRITERS)
    for writer in hello.writers:
        _check_incarnation(writer.incarnation)
        if not 1 <= writer.world_size <= MAX_WORLD_SIZE or not 0 <= writer.rank < writer.world_size:
            raise RemoteProtocolError(f"rank {writer.rank} of {writer.world_size}")
        _check_text("host", writer.host, _MAX_NAME)
        _check_text("boot_id", writer.boot_id, _MAX_NAME)
        _check_integer("started_unix_ns", writer.started_unix_ns)
        _check_integer("oldest_seq", writer.oldest_seq)
        if writer.role == Writer.SYSTEM:
            _check_incarnation(writer.belongs_to)
        elif writer.role != Writer.RANK or writer.belongs_to:
            raise RemoteProtocolError(f"a writer of role {writer.role} that belongs to another")


def _check_welcome(welcome: Welcome) -> None:
    check_version(welcome)
    if len(welcome.store_uuid) != STORE_UUID_BYTES:
        raise RemoteProtocolError(f"a store uuid of {len(welcome.store_uuid)} bytes")
    _check_integer("created_unix_ns", welcome.created_unix_ns)
    _check_cursors(welcome.cursors)


def _check_batch(batch: Batch) -> None:
    num_records = batch.num_records
    payload = batch.payload
    size = len(payload)
    if len(batch.incarnation) != INCARNATION_BYTES:
        _check_incarnation(batch.incarnation)
    if not 1 <= num_records * PREFIX_BYTES <= size <= MAX_PAYLOAD_BYTES:
        raise RemoteProtocolError(f"a batch of {num_records} records in {size} bytes")
    if batch.first_seq > _MAX_INTEGER - num_records:
        raise RemoteProtocolError(f"a batch from seq {batch.first_seq}")
    if crc32(payload) != batch.crc32:
        raise RemoteProtocolError("a batch whose checksum is wrong")


def _check_ack(ack: Ack) -> None:
    _check_cursors(ack.cursors)


def _check_heartbeat(heartbeat: Heartbeat) -> None:
    _check_text("node_id", heartbeat.node_id, _MAX_NAME)
    _check_count("progress", len(heartbeat.progress), MAX_WRITERS)
    num_drops = 0
    for progress in heartbeat.progress:
        _check_incarnation(progress.incarnation)
        _check_integer("through_seq", progress.through_seq)
        _check_integer("backlog_bytes", progress.backlog_bytes)
        num_drops += len(progress.drops)
        _check_count("drops", num_drops, MAX_DROPS)
        for drop in progress.drops:
            _check_text("reason", drop.reason, _MAX_NAME)
            _check_integer("count", drop.count)


def _check_bye(bye: Bye) -> None:
    _check_incarnation(bye.incarnation)
    _check_integer("next_seq", bye.next_seq)


def _check_loss(loss: Loss) -> None:
    _check_incarnation(loss.incarnation)
    _check_integer("next_seq", loss.next_seq)
    if loss.first_seq >= loss.next_seq:
        raise RemoteProtocolError(f"a loss of seqs {loss.first_seq} to {loss.next_seq}")


def _check_reject(reject: Reject) -> None:
    if reject.incarnation:
        _check_incarnation(reject.incarnation)
    _check_integer("next_seq", reject.next_seq)
    _check_text("message", reject.message, _MAX_TEXT)


def _check_stack_request(request: StackRequest) -> None:
    _check_count("incarnations", len(request.incarnations), MAX_WRITERS)
    for incarnation in request.incarnations:
        _check_incarnation(incarnation)


def _check_stack(stack: Stack) -> None:
    _check_incarnation(stack.incarnation)
    if len(stack.text) > MAX_STACK or not stack.text.replace("\n", "").isprintable():
        raise RemoteProtocolError(f"a stack of {len(stack.text)} characters, or one that is not printable")
    _check_text("trouble", stack.trouble, _MAX_TEXT)


def _check_cursors(cursors: Sequence[WriterCursor]) -> None:
    _check_count("cursors", len(cursors), MAX_WRITERS)
    for cursor in cursors:
        _check_incarnation(cursor.incarnation)
        _check_integer("next_seq", cursor.next_seq)


def _check_incarnation(incarnation: bytes) -> None:
    if len(incarnation) != INCARNATION_BYTES:
        raise RemoteProtocolError(f"an incarnation of {len(incarnation)} bytes")


def _check_count(name: str, count: int, limit: int) -> None:
    if count > limit:
        raise RemoteProtocolError(f"{count} {name}; at most {limit}")


def _check_integer(name: str, value: int) -> None:
    if value > _MAX_INTEGER:
        raise RemoteProtocolError(f"{name}={value}")


def _check_text(name: str, text: str, limit: int) -> None:
    if len(text) > limit or not text.isprintable():
        raise RemoteProtocolError(f"{name}: {len(text)} characters, or one that is not printable")


_CHECKS: Final[Mapping[str, Callable[[Any], None]]] = {
    "hello": _check_hello,
    "welcome": _check_welcome,
    "batch": _check_batch,
    "ack": _check_ack,
    "heartbeat": _check_heartbeat,
    "bye": _check_bye,
    "reject": _check_reject,
    "stack_request": _check_stack_request,
    "stack": _check_stack,
    "loss": _check_loss,
}
