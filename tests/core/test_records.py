"""The frame format: what is written is read, and nothing else is."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddplog.core import records
from ddplog.core.records import (
    KIND_MESSAGE,
    KIND_SCALARS,
    NO_STEP,
    PREFIX_BYTES,
    WORD,
    decode,
    encode_message,
    encode_scalars,
    scan,
    scan_payload,
)

EPOCH = 0x1234ABCD


def frames(epoch=EPOCH):
    return [
        encode_message(records.KIND_SCHEMA, 0, NO_STEP, 5, {"id": 1, "keys": ["a", "b"]}, epoch),
        encode_scalars(1, 1, 7, 6, 2.0, [1.5, float("nan")], epoch),
        encode_message(KIND_MESSAGE, 2, NO_STEP, 7, {"type": "text", "key": "k", "text": "grüße \u2028"}, epoch),
        encode_scalars(1, 3, -8, 8, 1.0, [0.0, -0.0], epoch),
    ]


def test_what_is_encoded_is_decoded():
    schema, first, text, second = (decode(frame, 0) for frame in frames())

    assert schema.message == {"id": 1, "keys": ["a", "b"]}
    assert (first.kind, first.schema_id, first.seq, first.step, first.time_unix_ns, first.weight) == (
        KIND_SCALARS, 1, 1, 7, 6, 2.0,
    )  # fmt: skip
    assert first.values[0] == 1.5
    assert first.values[1] != first.values[1]
    assert text.message["text"] == "grüße \u2028"
    assert (second.step, second.values) == (-8, (0.0, 0.0))


def test_a_cut_at_any_byte_leaves_the_whole_frames_before_it():
    whole = frames()
    data = b"".join(whole)
    ends = [sum(len(frame) for frame in whole[:i]) for i in range(1, len(whole) + 1)]
    for cut in range(len(data) + 1):
        segment = memoryview(data[:cut] + bytes(len(data) - cut + 64))
        found = list(scan(segment, 0, len(segment), EPOCH))
        kept = sum(end <= cut or not any(data[cut:end]) for end in ends)
        assert len(found) == kept


def test_a_flipped_bit_anywhere_ends_the_scan_before_its_frame():
    whole = frames()
    data = b"".join(whole)
    chooser = random.Random(1)
    for _ in range(400):
        bit = chooser.randrange(len(data) * 8)
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        found = list(scan(memoryview(bytes(broken)), 0, len(broken), EPOCH))
        position = 0
        for index, frame in enumerate(whole):
            if position <= bit // 8 < position + len(frame):
                assert len(found) == index
            position += len(frame)


def test_records_of_another_epoch_are_no_records():
    """Bytes of an earlier life of the disk must never pass for a record."""
    data = b"".join(frames(epoch=EPOCH + 1))

    assert list(scan(memoryview(data), 0, len(data), EPOCH)) == []


def test_scan_payload_refuses_what_does_not_fill_it():
    data = b"".join(frames())

    assert len(scan_payload(data)) == 4
    for cut in (1, 47, 60, len(data) - 8):
        with pytest.raises(ValueError, match="bytes"):
            scan_payload(data[:cut])


@pytest.mark.parametrize("kind", [0, 9, 255])
def test_an_unknown_kind_is_refused(kind):
    frame = bytearray(encode_scalars(1, 0, 0, 0, 1.0, [1.0], EPOCH))
    frame[16] = kind

    with pytest.raises(ValueError, match="unknown kind"):
        decode(bytes(frame), 0)


def test_counts_that_contradict_the_length_are_refused():
    scalars = bytearray(encode_scalars(1, 0, 0, 0, 1.0, [1.0], EPOCH))
    scalars[20] = 3
    message = bytearray(encode_message(KIND_MESSAGE, 0, 0, 0, {"type": "x"}, EPOCH))
    message[20] = 200

    for frame in (scalars, message):
        with pytest.raises(ValueError, match="do not fill"):
            decode(bytes(frame), 0)


def test_json_that_is_no_object_is_refused():
    frame = encode_message(KIND_MESSAGE, 0, 0, 0, [1, 2], EPOCH)

    with pytest.raises(ValueError, match="not a JSON object"):
        decode(frame, 0)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_refused_or_split_exactly(data):
    try:
        found = scan_payload(data)
    except ValueError:
        return
    assert sum(length for _, length in found) == len(data)
    assert all(length >= PREFIX_BYTES for _, length in found)


def test_lengths_are_multiples_of_eight():
    for frame in frames():
        (word,) = WORD.unpack_from(frame, 0)
        assert word & 0xFFFFFFFF == len(frame)
        assert len(frame) % 8 == 0
