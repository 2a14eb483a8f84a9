"""Columns out of frames."""

import pytest

from ddplog.core.batches import Rows, split
from ddplog.core.records import KIND_MESSAGE, KIND_SCHEMA, NO_STEP, Record, encode_message, encode_scalars


def scalars(seq, step, values, schema_id=1, weight=1.0):
    return encode_scalars(schema_id, seq, step, 100 + seq, weight, values, 5)


def test_records_of_one_schema_become_one_run():
    payload = b"".join(scalars(10 + i, i, [i * 1.0, i * 2.0], weight=i + 1) for i in range(5))

    count, (rows,) = split(payload, 10)

    assert count == 5
    assert rows.steps.tolist() == [0, 1, 2, 3, 4]
    assert rows.times.tolist() == [110, 111, 112, 113, 114]
    assert rows.weights.tolist() == [1, 2, 3, 4, 5]
    assert rows.values.tolist() == [[0, 0], [1, 2], [2, 4], [3, 6], [4, 8]]


def test_schemas_and_messages_keep_their_place_between_runs():
    payload = b"".join(
        [
            encode_message(KIND_SCHEMA, 0, NO_STEP, 1, {"id": 1, "keys": ["a"]}, 5),
            scalars(1, 0, [1.0]),
            scalars(2, 1, [2.0]),
            scalars(3, 1, [3.0, 4.0], schema_id=2),
            encode_message(KIND_MESSAGE, 4, NO_STEP, 1, {"type": "text"}, 5),
            scalars(5, 2, [5.0]),
        ]
    )

    count, items = split(payload, 0)

    assert count == 6
    assert [type(item) for item in items] == [Record, Rows, Rows, Record, Rows]
    assert [item.schema_id for item in items if isinstance(item, Rows)] == [1, 2, 1]
    assert [len(item.steps) for item in items if isinstance(item, Rows)] == [2, 1, 1]


@pytest.mark.parametrize("first_seq", [9, 11])
def test_seqs_that_are_not_those_announced_are_refused(first_seq):
    one_run = scalars(10, 0, [1.0]) + scalars(11, 1, [1.0])
    message = encode_message(KIND_MESSAGE, 10, NO_STEP, 1, {"type": "text"}, 5)
    mixed = scalars(10, 0, [1.0]) + scalars(11, 1, [1.0, 2.0], schema_id=2)

    for payload in (one_run, message, mixed):
        with pytest.raises(ValueError, match="belongs"):
            split(payload, first_seq)


def test_a_count_that_contradicts_the_length_is_refused():
    frame = bytearray(scalars(0, 0, [1.0]))
    frame[20] = 7

    with pytest.raises(ValueError, match="do not fill"):
        split(bytes(frame), 0)


def test_columns_and_records_can_be_chosen():
    _, (rows,) = split(b"".join(scalars(i, i, [1.0, 2.0, 3.0]) for i in range(3)), 0)

    assert rows.columns([2, 0]).values.tolist() == [[3.0, 1.0]] * 3
    assert rows.where(rows.steps > 0).steps.tolist() == [1, 2]
