"""Messages: they come back as they went, and nothing out of bounds comes through."""

import tracemalloc
from contextlib import suppress
from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.core.records import PREFIX_BYTES
from ddplog.errors import LocalProtocolError, RemoteProtocolError
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec
from ddplog.wire.codec import (
    MAX_DROPS,
    MAX_MESSAGE_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_STACK,
    MAX_WRITERS,
    PROTOCOL_VERSION,
    decode,
    encode_ack,
    encode_batch,
    encode_bye,
    encode_heartbeat,
    encode_hello,
    encode_reject,
    encode_stack,
    encode_stack_request,
    encode_welcome,
    make_progress,
)

INCARNATION = bytes(range(16))
PAYLOAD = b"x" * PREFIX_BYTES
TOO_BIG = 1 << 63

incarnations = st.binary(min_size=16, max_size=16)
seqs = st.integers(0, TOO_BIG - 1)
attempts = st.integers(0, (1 << 32) - 1)
names = st.text(st.characters(categories=["L", "N", "P"]), max_size=255)
cursors = st.lists(st.tuples(incarnations, seqs, attempts), max_size=8)


def writer(**changes):
    fields = {"incarnation": INCARNATION, "rank": 1, "world_size": 2, "host": "h", "boot_id": "b", "is_alive": True}
    return pb.Writer(**{**fields, **changes})


def batch(**changes):
    payload = changes.get("payload", PAYLOAD)
    fields = {"incarnation": INCARNATION, "num_records": 1, "crc32": crc32(payload), "payload": payload}
    return pb.Batch(**{**fields, **changes})


def progress(**changes):
    return pb.Progress(**{"incarnation": INCARNATION, "through_seq": 1, **changes})


def raw(**kind):
    return pb.Envelope(**kind).SerializeToString()


# --- what is encoded comes back ---------------------------------------------------------------------------------


@given(incarnations, st.integers(0, 1 << 62), st.integers(1, 20), st.integers(0, (1 << 32) - 1), st.data())
def test_a_batch_comes_back(incarnation, first_seq, num_records, epoch, data):
    payload = data.draw(st.binary(min_size=num_records * PREFIX_BYTES, max_size=num_records * PREFIX_BYTES + 64))
    message = decode(encode_batch(incarnation, first_seq, num_records, memoryview(payload), epoch))
    assert isinstance(message, pb.Batch)
    assert (message.incarnation, message.first_seq, message.num_records) == (incarnation, first_seq, num_records)
    assert (message.payload, message.epoch, message.crc32) == (payload, epoch, crc32(payload))


@given(names, names, st.lists(st.tuples(incarnations, st.integers(0, 9)), max_size=8))
def test_a_hello_comes_back(run_id, node_id, ranks):
    writers = [writer(incarnation=incarnation, rank=rank, world_size=10) for incarnation, rank in ranks]
    message = decode(encode_hello(run_id, node_id, iter(writers)))
    assert isinstance(message, pb.Hello)
    assert (message.run_id, message.node_id, list(message.writers)) == (run_id, node_id, writers)
    assert message.protocol_version == PROTOCOL_VERSION


@given(incarnations, cursors)
def test_welcome_and_ack_come_back(store_uuid, given_cursors):
    welcome, ack = decode(encode_welcome(store_uuid, given_cursors)), decode(encode_ack(iter(given_cursors)))
    assert isinstance(welcome, pb.Welcome)
    assert isinstance(ack, pb.Ack)
    assert welcome.store_uuid == store_uuid
    for message in (welcome, ack):
        assert [(c.incarnation, c.next_seq, c.attempt) for c in message.cursors] == given_cursors


@given(
    names, incarnations, st.none() | st.integers(-TOO_BIG, TOO_BIG - 1), seqs, st.dictionaries(names, seqs, max_size=4)
)
def test_a_heartbeat_comes_back(node_id, incarnation, step, through_seq, drops):
    message = decode(encode_heartbeat(node_id, [make_progress(incarnation, step, through_seq, drops, 5)]))
    assert isinstance(message, pb.Heartbeat)
    (entry,) = message.progress
    assert (message.node_id, entry.incarnation, entry.through_seq, entry.backlog_bytes) == (
        node_id,
        incarnation,
        through_seq,
        5,
    )
    assert (entry.step if entry.HasField("step") else None) == step, "no step is not step 0"
    assert {drop.reason: drop.count for drop in entry.drops} == drops


@pytest.mark.parametrize("is_over", [True, False])
def test_a_heartbeat_says_whether_the_node_is_over(is_over):
    assert decode(encode_heartbeat("n", [], is_over=is_over)).is_over == is_over


@given(incarnations, seqs, st.booleans())
def test_a_bye_comes_back(incarnation, next_seq, finished):
    message = decode(encode_bye(incarnation, next_seq, finished=finished))
    assert isinstance(message, pb.Bye)
    assert (message.incarnation, message.next_seq, message.finished) == (incarnation, next_seq, finished)


@given(st.sampled_from(pb.Reject.Reason.values()), incarnations | st.just(b""), seqs, st.text(max_size=2000))
def test_a_reject_comes_back_with_a_message_that_can_be_shown(reason, incarnation, next_seq, text):
    message = decode(encode_reject(reason, incarnation, next_seq, text))
    assert isinstance(message, pb.Reject)
    assert (message.reason, message.incarnation, message.next_seq) == (reason, incarnation, next_seq)
    assert message.message.isprintable()
    assert len(message.message) == min(len(text), 1024)


def test_stacks_are_asked_for_and_come_back():
    asked = decode(encode_stack_request([INCARNATION, INCARNATION[::-1]]))
    assert isinstance(asked, pb.StackRequest)
    assert list(asked.incarnations) == [INCARNATION, INCARNATION[::-1]]
    message = decode(encode_stack(INCARNATION, "Thread 1:\n  File\n", "no\x1b" + "x" * 2000))
    assert isinstance(message, pb.Stack)
    assert (message.incarnation, message.text) == (INCARNATION, "Thread 1:\n  File\n")
    assert message.trouble == "no?" + "x" * 1021


def test_the_largest_of_each_comes_back():
    many = [(INCARNATION, TOO_BIG - 1, (1 << 32) - 1)] * MAX_WRITERS
    full = "w" * 255
    decode(encode_ack(many))
    decode(encode_welcome(INCARNATION, many))
    decode(encode_hello(full, full, [writer(host=full, boot_id=full, pid=1, started_unix_ns=1)] * MAX_WRITERS))
    drops = {f"reason {i}": TOO_BIG - 1 for i in range(MAX_DROPS // MAX_WRITERS)}
    entry = make_progress(INCARNATION, -1, TOO_BIG - 1, drops, TOO_BIG - 1)
    decode(encode_heartbeat(full, [entry] * MAX_WRITERS))
    decode(encode_stack_request([INCARNATION] * MAX_WRITERS))
    decode(encode_stack(INCARNATION, "é" * MAX_STACK, full))
    decode(encode_batch(INCARNATION, 0, MAX_PAYLOAD_BYTES // PREFIX_BYTES, bytes(MAX_PAYLOAD_BYTES), 1))


# --- what is out of bounds is refused --------------------------------------------------------------------------

REFUSED = {
    "nothing": b"",
    "no kind": b"\xf8\x07\x01",
    "no protobuf": b"\xff" * 100,
    "truncated": raw(batch=batch())[:-1],
    "batch, short incarnation": raw(batch=batch(incarnation=b"x" * 15)),
    "batch, long incarnation": raw(batch=batch(incarnation=b"x" * 17)),
    "batch, no records": raw(batch=batch(num_records=0)),
    "batch, no payload": raw(batch=batch(payload=b"")),
    "batch, more records than fit": raw(batch=batch(num_records=2)),
    "batch, payload too large": raw(batch=batch(payload=bytes(MAX_PAYLOAD_BYTES + 1))),
    "batch, wrong checksum": raw(batch=batch(crc32=1)),
    "batch, seq beyond the store's": raw(batch=batch(first_seq=TOO_BIG - 1)),
    "hello, a role": raw(hello=pb.Hello(writers=[writer(role=7)])),
    "hello, a rank that belongs to another": raw(hello=pb.Hello(writers=[writer(belongs_to=INCARNATION)])),
    "hello, a sampler of nobody": raw(hello=pb.Hello(writers=[writer(role=pb.Writer.SYSTEM)])),
    "hello, too many writers": raw(hello=pb.Hello(writers=[writer()] * (MAX_WRITERS + 1))),
    "hello, incarnation": raw(hello=pb.Hello(writers=[writer(incarnation=b"")])),
    "hello, rank beyond the world": raw(hello=pb.Hello(writers=[writer(rank=2)])),
    "hello, negative rank": raw(hello=pb.Hello(writers=[writer(rank=-1)])),
    "hello, no world": raw(hello=pb.Hello(writers=[writer(rank=0, world_size=0)])),
    "hello, endless world": raw(hello=pb.Hello(writers=[writer(world_size=(1 << 20) + 1)])),
    "hello, long run": raw(hello=pb.Hello(run_id="r" * 256)),
    "hello, escape in the node": raw(hello=pb.Hello(node_id="\x1b[2J")),
    "hello, direction mark in the host": raw(hello=pb.Hello(writers=[writer(host="a\u202eb")])),
    "hello, boot": raw(hello=pb.Hello(writers=[writer(boot_id="b" * 256)])),
    "hello, start": raw(hello=pb.Hello(writers=[writer(started_unix_ns=TOO_BIG)])),
    "welcome, store": raw(welcome=pb.Welcome(store_uuid=b"x")),
    "welcome, cursors": raw(
        welcome=pb.Welcome(
            store_uuid=INCARNATION, cursors=[pb.WriterCursor(incarnation=INCARNATION)] * (MAX_WRITERS + 1)
        )
    ),
    "ack, incarnation": raw(ack=pb.Ack(cursors=[pb.WriterCursor()])),
    "ack, seq": raw(ack=pb.Ack(cursors=[pb.WriterCursor(incarnation=INCARNATION, next_seq=TOO_BIG)])),
    "heartbeat, progress": raw(heartbeat=pb.Heartbeat(progress=[progress()] * (MAX_WRITERS + 1))),
    "heartbeat, node": raw(heartbeat=pb.Heartbeat(node_id="\0")),
    "heartbeat, incarnation": raw(heartbeat=pb.Heartbeat(progress=[progress(incarnation=b"1")])),
    "heartbeat, seq": raw(heartbeat=pb.Heartbeat(progress=[progress(through_seq=TOO_BIG)])),
    "heartbeat, backlog": raw(heartbeat=pb.Heartbeat(progress=[progress(backlog_bytes=TOO_BIG)])),
    "heartbeat, drops": raw(heartbeat=pb.Heartbeat(progress=[progress(drops=[pb.Drop()] * 9000)] * 2)),
    "heartbeat, reason": raw(heartbeat=pb.Heartbeat(progress=[progress(drops=[pb.Drop(reason="\n")])])),
    "heartbeat, count": raw(heartbeat=pb.Heartbeat(progress=[progress(drops=[pb.Drop(count=TOO_BIG)])])),
    "bye, incarnation": raw(bye=pb.Bye()),
    "bye, seq": raw(bye=pb.Bye(incarnation=INCARNATION, next_seq=TOO_BIG)),
    "reject, incarnation": raw(reject=pb.Reject(incarnation=b"1")),
    "reject, seq": raw(reject=pb.Reject(next_seq=TOO_BIG)),
    "reject, message": raw(reject=pb.Reject(message="x" * 1025)),
    "reject, invisible message": raw(reject=pb.Reject(message="\r")),
    "stack request, incarnation": raw(stack_request=pb.StackRequest(incarnations=[b"1"])),
    "stack request, too many": raw(stack_request=pb.StackRequest(incarnations=[INCARNATION] * (MAX_WRITERS + 1))),
    "stack, incarnation": raw(stack=pb.Stack()),
    "stack, too long": raw(stack=pb.Stack(incarnation=INCARNATION, text="x" * (MAX_STACK + 1))),
    "stack, escape": raw(stack=pb.Stack(incarnation=INCARNATION, text="\n\x1b[2J")),
    "stack, trouble": raw(stack=pb.Stack(incarnation=INCARNATION, trouble="\n")),
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_a_message_out_of_bounds_is_the_peers_fault(data):
    with pytest.raises(RemoteProtocolError):
        decode(data)


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_bytes_from_anywhere_give_a_message_or_the_peers_fault(data):
    with suppress(RemoteProtocolError):
        decode(data)


@settings(max_examples=300)
@given(st.integers(0, 10**9), st.integers(0, 255))
def test_a_message_with_one_byte_changed_gives_a_message_or_the_peers_fault(position, value):
    data = bytearray(encode_heartbeat("n", [make_progress(INCARNATION, 3, 4, {"a": 1}, 5)]))
    data[position % len(data)] = value
    with suppress(RemoteProtocolError):
        decode(bytes(data))


def test_what_would_be_refused_is_not_sent():
    """Otherwise the node would send it for ever."""
    for encode in (
        lambda: encode_batch(INCARNATION, 0, 0, b"", 0),
        lambda: encode_batch(INCARNATION, 0, 2, PAYLOAD, 0),
        lambda: encode_batch(INCARNATION, 0, 1, bytes(MAX_PAYLOAD_BYTES + 1), 0),
        lambda: encode_batch(b"", 0, 1, PAYLOAD, 0),
        lambda: encode_hello("r", "n", [writer()] * (MAX_WRITERS + 1)),
        lambda: encode_hello("r", "\x1b", []),
        lambda: encode_bye(b"", 0, finished=True),
    ):
        with pytest.raises(LocalProtocolError):
            encode()


# --- bombs ------------------------------------------------------------------------------------------------------


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def envelope(field, body):
    return varint(field << 3 | 2) + varint(len(body)) + body


NUM_EMPTY = (MAX_MESSAGE_BYTES - 64) // 2
BOMBS = {
    "writers": envelope(1, b"\x22\x00" * NUM_EMPTY),
    "cursors of a welcome": envelope(2, b"\x1a\x00" * NUM_EMPTY),
    "cursors of an ack": envelope(4, b"\x0a\x00" * NUM_EMPTY),
    "progress": envelope(5, b"\x12\x00" * NUM_EMPTY),
    "drops": envelope(5, envelope(2, b"\x22\x00" * NUM_EMPTY)),
    "kinds": b"\x0a\x00" * NUM_EMPTY,
    "numbers": envelope(1, b"\x08\x01" * NUM_EMPTY),
    "unknown fields": b"\xf8\x07\x01" * (NUM_EMPTY // 2),
    "groups": b"\x0b\x0c" * NUM_EMPTY,
    "a length beyond the end": b"\x0a\xff\xff\xff\x7f" + bytes(20_000),
    "a varint without end": b"\x80" * 20_000,
    "a fixed field beyond the end": envelope(3, b"\x2a" + varint(20_000) + bytes(20_000) + b"\x31\x00"),
    "another fixed field beyond the end": envelope(3, b"\x2a" + varint(20_000) + bytes(20_000) + b"\x35\x00"),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_before_it_is_parsed(data, monkeypatch):
    def parsed(*args):
        raise AssertionError("reached the parser, which would allocate 112 bytes for each 2")

    monkeypatch.setattr(codec, "Envelope", parsed)
    tracemalloc.start()
    try:
        with pytest.raises(RemoteProtocolError):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20


def test_a_message_over_the_limit_is_refused_unseen():
    with pytest.raises(RemoteProtocolError):
        decode(bytes(MAX_MESSAGE_BYTES + 1))


def test_unknown_fields_of_a_later_version_are_let_through():
    payload = bytes(PREFIX_BYTES * 1000)
    later = b"\x79" + bytes(8) + b"\x7d" + bytes(4) + envelope(15, b"later")  # 64 bits, 32 bits, bytes: field 15
    body = batch(payload=payload, num_records=1000).SerializeToString() + later
    message = decode(envelope(3, body))
    assert isinstance(message, pb.Batch)
    assert message.num_records == 1000


def sub_messages(descriptor):
    """Field number -> (is repeated, the same of the message inside), for every field that holds a message."""
    return {
        field.number: (field.is_repeated, sub_messages(field.message_type))
        for field in descriptor.fields
        if field.message_type is not None
    }


def limits(nested):
    return {number: (limit > 1, limits(inner)) for number, (limit, inner) in nested.items()}


def test_every_field_that_holds_a_message_has_a_limit():
    """A field added to the .proto without a limit would open the bomb again."""
    assert limits(codec._NESTED) == sub_messages(pb.Envelope.DESCRIPTOR)


def test_every_kind_has_a_check():
    assert set(codec._CHECKS) == {field.name for field in pb.Envelope.DESCRIPTOR.oneofs_by_name["kind"].fields}
