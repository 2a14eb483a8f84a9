"""The journal against a naive model, under re-entrancy, threads, interrupts and full disks."""

import os
import signal
import struct
import subprocess
import sys
import threading

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from ddplog.core.records import KIND_SCALARS, KIND_SCHEMA, WORD, decode, scan_payload
from ddplog.errors import RemoteProtocolError
from ddplog.journal import segment as layout
from ddplog.journal.reader import Hole, JournalReader
from ddplog.journal.writer import NO_WEIGHT, JournalFullError, JournalWriter


def make_writer(folder, **options):
    options = {"segment_bytes": 64 * 1024, "spool_bytes": 1 << 30, "check": lambda: None} | options
    return JournalWriter(folder, b"i" * 16, {"rank": 0, "world_size": 1}, **options)


def append(writer, keys, values, step=0, weight=1.0):
    assert writer.enter()
    try:
        writer.append_scalars(tuple(keys), values, step, weight)
    finally:
        writer.leave()


def read_all(reader):
    records = []
    while (chunk := reader.read(1 << 20)) is not None:
        assert chunk.first_seq == len(records) + reader_start(reader, records)
        records += [decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)]
    return records


def reader_start(reader, records):
    return getattr(reader, "start_seq", 0)


class JournalModel(RuleBasedStateMachine):
    """Whatever is written, cut into segments, read in pieces and sought, comes out as it went in."""

    @initialize()
    def start(self):
        import tempfile
        from pathlib import Path

        self.folder = Path(tempfile.mkdtemp()) / "0.x"
        self.writer = make_writer(self.folder)
        self.reader = JournalReader(self.folder)
        self.written = []
        self.seen = 0

    @rule(count=st.integers(1, 30), width=st.integers(1, 200), step=st.integers(-5, 5))
    def log(self, count, width, step):
        keys = tuple(f"k{i}" for i in range(width))
        for i in range(count):
            values = [float(i * 1000 + j) for j in range(width)]
            before = self.writer.next_seq
            if not self.writer.log_floats(dict(zip(keys, values, strict=True)), step, 2.0):
                append(self.writer, keys, values, step, 2.0)
            if self.writer.next_seq == before + 2:  # the first of its kind in the segment
                self.written.append(("schema", keys))
            self.written.append((step, tuple(values)))

    @rule(size=st.integers(1, 40_000))
    def text(self, size):
        assert self.writer.enter()
        self.writer.append_message({"type": "text", "text": "x" * size})
        self.writer.leave()
        self.written.append(("text", size))

    @rule(max_bytes=st.integers(1, 100_000))
    def read(self, max_bytes):
        chunk = self.reader.read(max_bytes)
        if chunk is None:
            assert self.seen == len(self.written)
            return
        assert chunk.first_seq == self.seen
        for offset, _ in scan_payload(chunk.payload):
            record = decode(chunk.payload, offset)
            assert record.seq == self.seen
            expected = self.written[self.seen]
            if record.kind == KIND_SCALARS:
                assert (record.step, record.values) == expected
            elif record.kind == KIND_SCHEMA:
                assert ("schema", tuple(record.message["keys"])) == expected
            else:
                assert ("text", len(record.message["text"])) == expected
            self.seen += 1

    @rule(data=st.data())
    def seek(self, data):
        self.seen = data.draw(st.integers(0, len(self.written)))
        self.reader.seek(self.seen)
        assert self.reader.next_seq == self.seen or not self.written

    @rule()
    def reopen(self):
        self.reader.close()
        self.reader = JournalReader(self.folder)
        self.seen = 0

    def teardown(self):
        if hasattr(self, "reader"):
            self.reader.close()
            self.writer.close(finished=True)


JournalModel.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestJournalModel = JournalModel.TestCase


def test_a_journal_cut_at_any_byte_keeps_the_records_before_it(tmp_path):
    """The disk may hold any prefix of what was being written when the rank died."""
    writer = make_writer(tmp_path / "j")
    for step in range(6):
        append(writer, ("a", "b"), [1.0 * step, 2.0 * step], step)
    writer.close(finished=False)
    path = tmp_path / "j" / layout.segment_name(1)
    data = path.read_bytes()
    used = writer._offset
    ends = [layout.SEGMENT_HEADER_BYTES + sum(n for _, n in scan_payload(data[64:used])[:i]) for i in range(1, 8)]
    for cut in range(layout.SEGMENT_HEADER_BYTES, used + 1):
        path.write_bytes(data[:cut] + bytes(len(data) - cut))
        reader = JournalReader(tmp_path / "j")
        chunk = reader.read(1 << 20)
        found = 0 if chunk is None else chunk.num_records
        reader.close()
        assert found == sum(end <= cut or not any(data[cut:end]) for end in ends)


def test_the_hot_path_writes_what_the_slow_path_writes(tmp_path):
    writer = make_writer(tmp_path / "j")
    append(writer, ("a", "b"), [1.0, 2.0], 3, 4.0)
    assert writer.log_floats({"a": 1.0, "b": 2.0}, 3, 4.0)
    payload = JournalReader(tmp_path / "j").read(1 << 20).payload
    _, slow, fast = (decode(payload, offset) for offset, _ in scan_payload(payload))

    assert (slow.step, slow.weight, slow.values, slow.schema_id) == (
        fast.step,
        fast.weight,
        fast.values,
        fast.schema_id,
    )
    assert fast.seq == slow.seq + 1


@pytest.mark.parametrize(
    "data", [{"new": 1.0}, {"a": 1}, {"a": True}, {"a": "x"}, {"a": None}, {}, {"a": {"b": 1.0}}, [("a", 1.0)], None, 5]
)
def test_the_hot_path_refuses_what_is_not_plain_and_leaves_no_trace(tmp_path, data):
    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [1.0])
    before = (writer.next_seq, writer._offset)

    assert not writer.log_floats(data, 0, 1.0)
    assert not writer.log_floats({"a": 1.0}, "x", 1.0)
    assert not writer.log_floats({"a": 1.0}, None, 1.0)
    assert (writer.next_seq, writer._offset) == before
    assert writer.log_floats({"a": 1.0}, 0, 1.0)


def test_a_value_whose_float_is_costly_is_never_asked_for_it(tmp_path):
    """float() of a CUDA tensor waits for the device."""

    class Tensor:
        def __float__(self):
            raise AssertionError

    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [1.0])

    assert not writer.log_floats({"a": Tensor()}, 0, 1.0)


def test_the_ambient_step_is_used_and_shown(tmp_path):
    writer = make_writer(tmp_path / "j")
    reader = JournalReader(tmp_path / "j")
    append(writer, ("a",), [1.0])
    assert reader.step is None
    writer.set_step(41)
    assert writer.log_floats({"a": 2.0}, None, 1.0)

    assert reader.step == 41
    assert read_all(reader)[-1].step == 41
    with pytest.raises(struct.error):
        writer.set_step(1 << 70)


def test_threads_take_turns(tmp_path):
    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [-1.0])

    def log(thread):
        for i in range(2000):
            while not writer.log_floats({"a": thread * 1e6 + i}, 0, 1.0):
                append(writer, ("a",), [thread * 1e6 + i])
                break

    threads = [threading.Thread(target=log, args=(t,)) for t in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    values = [r.values[0] for r in read_all(JournalReader(tmp_path / "j")) if r.kind == KIND_SCALARS][1:]

    assert len(values) == 8000
    for thread in range(4):
        mine = [v for v in values if thread * 1e6 <= v < thread * 1e6 + 1e5]
        assert mine == [thread * 1e6 + i for i in range(2000)]


@pytest.mark.parametrize("stage", ["before", "published", "seq"])
def test_an_exception_of_a_signal_handler_in_the_middle_neither_loses_nor_doubles(tmp_path, stage):
    """KeyboardInterrupt may strike between any two calls."""
    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [0.0])
    seq, offset = writer._seq, writer._offset
    if stage != "before":
        schema = writer._schemas[("a",)]
        schema.pack_into(writer._view, offset + 8, seq, schema.head, schema.aux, 1, 0, 1.0, 1.0)
        from zlib import crc32

        word = crc32(writer._view[offset + 8 : offset + schema.size], writer._epoch) << 32 | schema.size
        WORD.pack_into(writer._view, offset, word)
    if stage == "seq":
        writer._seq += 1
    writer._settle()
    assert writer.log_floats({"a": 2.0}, 2, 1.0)
    values = [r.values[0] for r in read_all(JournalReader(tmp_path / "j")) if r.kind == KIND_SCALARS]

    assert values == ([0.0, 2.0] if stage == "before" else [0.0, 1.0, 2.0])


def test_a_full_spool_refuses_and_takes_again_when_there_is_room(tmp_path, monkeypatch):
    writer = make_writer(tmp_path / "j", spool_bytes=2 * 64 * 1024)
    with pytest.raises(JournalFullError) as caught:  # noqa: PT012 - which of them is the first is not the point
        for _ in range(10_000):
            append(writer, ("a",) * 1, [1.0])
    assert caught.value.reason == "spool_full"
    written = writer.next_seq
    (tmp_path / "j" / layout.segment_name(1)).unlink()
    with pytest.raises(JournalFullError):  # not asked again within a second: the disk is not hammered
        append(writer, ("a",), [1.0])
    writer._retry_at_ns = 0
    append(writer, ("a",), [7.0])
    assert writer.next_seq == written + 2  # the new segment declares its keys


def test_drops_are_counted_where_the_agent_sees_them(tmp_path):
    writer = make_writer(tmp_path / "j")
    writer.drop("bad_value", 3)
    writer.drop("disk_full")
    writer.drop("bad_value")

    assert writer.drops == JournalReader(tmp_path / "j").drops == {"bad_value": 4, "disk_full": 1}


def unarrived(folder, seq=0):
    """What an agent counts that reads a dead rank's journal from `seq` to its end."""
    reader = JournalReader(folder)
    reader.seek(seq)
    while reader.read(1 << 20) is not None:
        pass
    num_values = reader.num_unarrived
    reader.close()
    return num_values


def test_what_waits_is_counted_where_the_agent_sees_it(tmp_path):
    """And a kill right after an append, before the count of it, counts that record once."""
    writer = make_writer(tmp_path / "j")
    append(writer, ("z",), [0.0])
    assert unarrived(tmp_path / "j") == 0
    writer.show_pending(5)
    assert unarrived(tmp_path / "j") == 5
    append(writer, ("a", "b"), [1.0, 2.0])  # with the declaration of its keys
    for seq in range(4):
        assert unarrived(tmp_path / "j", seq) == 3
    writer.show_pending(3)
    assert unarrived(tmp_path / "j") == 3
    append(writer, ("a", "b"), [1.0, 2.0])
    assert unarrived(tmp_path / "j") == 1
    writer.show_pending(1)
    assert writer.enter()
    writer.append_message({"type": "text", "key": "k", "text": "x"})
    writer.leave()
    assert unarrived(tmp_path / "j") == 0
    writer.show_pending(0)
    assert unarrived(tmp_path / "j") == 0


def test_a_declaration_without_its_record_is_no_value_that_arrived(tmp_path):
    writer = make_writer(tmp_path / "j")
    writer.show_pending(2)
    assert writer.enter()
    writer._declare(("a", "b"))
    writer.leave()

    assert unarrived(tmp_path / "j") == 2


def test_what_a_death_left_is_made_durable_with_it(tmp_path):
    """The agent tells it from the head page, and may have to again after a power cut."""

    def num_syncs():
        return layout.U64.unpack_from(writer._head, layout.TOUCH_OFFSET)[0]

    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [1.0])

    class Reader(JournalReader):
        is_alive = True  # a process does not see its own locks

    reader = Reader(tmp_path / "j")
    reader.read(1 << 20)
    assert reader.sync()
    before = num_syncs()
    writer.show_pending(5)
    assert reader.sync()
    assert num_syncs() == before, "while it lives, the count changes with every call"
    reader.is_alive = False
    assert reader.sync()
    assert num_syncs() == before + 1


def test_a_held_hot_path_refuses_everything_until_it_is_released(tmp_path):
    """In a new segment, too, into which the slow path may have to go meanwhile."""
    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [1.0])
    writer.hold()
    assert not writer.log_floats({"a": 2.0}, 0, 1.0)
    append(writer, ("a",), [3.0])
    assert not writer.log_floats({"a": 2.0}, 0, 1.0)
    number = writer._number
    while writer._number == number:
        append(writer, ("a",), [4.0])
    assert not writer.log_floats({"a": 2.0}, 0, 1.0)
    writer.release()
    assert writer.log_floats({"a": 5.0}, 0, 1.0)

    assert 2.0 not in [r.values[0] for r in read_all(JournalReader(tmp_path / "j")) if r.values]


def test_a_record_may_have_the_time_of_an_earlier_call(tmp_path):
    writer = make_writer(tmp_path / "j")
    assert writer.enter()
    writer.append_scalars(("a",), [1.0], 0, 1.0, 1234)
    writer.append_message({"type": "text", "key": "k", "text": "x"}, time_unix_ns=1235)
    writer.leave()
    _, scalars, text = read_all(JournalReader(tmp_path / "j"))

    assert (scalars.time_unix_ns, text.time_unix_ns) == (1234, 1235)


def test_what_the_agent_acknowledges_the_rank_sees(tmp_path):
    writer = make_writer(tmp_path / "j")
    JournalReader(tmp_path / "j").set_acked(17)

    assert writer.acked_seq == 17


def test_acknowledged_segments_beyond_the_limit_are_deleted_and_no_others(tmp_path):
    writer = make_writer(tmp_path / "j")
    while writer._number < 5:
        append(writer, tuple(f"k{i}" for i in range(100)), [0.0] * 100)
    reader = JournalReader(tmp_path / "j")
    assert reader.trim(0, 0) == 0
    assert reader.trim(writer.next_seq, 3 * 64 * 1024) == 2
    assert layout.segment_numbers(str(tmp_path / "j")) == [3, 4, 5]
    reader.seek(0)
    hole, chunk = reader.read(1), reader.read(1)
    assert hole == Hole(first_seq=0, next_seq=reader.oldest_seq)
    assert chunk.first_seq == reader.oldest_seq > 0
    assert reader.trim(writer.next_seq, 0) == 2


def test_after_close_nothing_is_taken_and_the_agent_sees_the_end(tmp_path):
    writer = make_writer(tmp_path / "j")
    append(writer, ("a",), [1.0])
    reader = JournalReader(tmp_path / "j")
    writer.close(finished=True)
    writer.close(finished=True)

    assert not writer.log_floats({"a": 1.0}, 0, 1.0)
    assert reader.has_finished
    assert not writer.is_open


def test_a_stranger_is_not_a_journal(tmp_path):
    make_writer(tmp_path / "j").close(finished=False)
    head = tmp_path / "j" / "head"
    head.write_bytes(b"x" * 8 + head.read_bytes()[8:])
    with pytest.raises(RemoteProtocolError):
        JournalReader(tmp_path / "j")


CHILD = """
import os, signal, sys
from pathlib import Path
from ddplog.journal.writer import JournalWriter
w = JournalWriter(Path(sys.argv[1]), b"i" * 16, {"rank": 0}, segment_bytes=65536, spool_bytes=1 << 30, check=lambda: None)
w.enter(); w.append_scalars(("a",), [0.0], 0, 1.0); w.leave()
for i in range(1, int(sys.argv[2])):
    if not w.log_floats({"a": float(i)}, i, 1.0):
        w.enter(); w.append_scalars(("a",), [float(i)], i, 1.0); w.leave()
if sys.argv[3] == "fork" and os.fork() == 0:
    os.close(1)
    signal.pause()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.system
@pytest.mark.parametrize("how", ["alone", "fork"])
def test_death_is_seen_at_once_also_when_a_forked_child_lives_on(tmp_path, how):
    """flock and OFD locks would be held by the child; a POSIX record lock is not."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "j"), "5000", how],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        assert child.stdout.readline() == b"ready\n"
        reader = JournalReader(tmp_path / "j")
        assert reader.is_alive
        child.kill()
        child.wait()
        assert not reader.is_alive
        values = [r.values[0] for r in read_all(reader) if r.kind == KIND_SCALARS]
        assert values == [float(i) for i in range(5000)]
        reader.close()
    finally:
        if how == "fork":
            os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        child.stdout.close()


def test_what_is_left_of_a_journal_can_be_read_without_its_beginning(tmp_path):
    """Acknowledged segments are deleted, and the store that acknowledged them may be lost."""
    writer = make_writer(tmp_path / "j")
    while writer._number < 3:
        append(writer, ("a", "b"), [1.0, 2.0])
    for number in (1, 2):
        (tmp_path / "j" / layout.segment_name(number)).unlink()
    append(writer, ("a", "b"), [3.0, 4.0])
    reader = JournalReader(tmp_path / "j")
    chunk = reader.read(1 << 20)
    first, *rest = (decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload))

    assert chunk.first_seq == reader.oldest_seq == first.seq
    assert first.kind == KIND_SCHEMA
    assert {record.schema_id for record in rest} == {first.message["id"]}


def test_the_spool_is_counted_in_bytes_also_where_segments_hold_a_giant_record(tmp_path):
    """Reliability case 21: a record may be four times a segment; the limit is on the disk, not on a number of files."""
    writer = make_writer(tmp_path / "j", spool_bytes=1024 * 1024)
    with pytest.raises(JournalFullError) as caught:  # noqa: PT012 - which of them is the first is not the point
        for _ in range(100):
            writer.append_message({"type": "text", "key": "k", "text": "x" * 200_000})
    assert caught.value.reason == "spool_full"
    held = sum(path.stat().st_size for path in (tmp_path / "j").glob("*.seg"))
    assert 1024 * 1024 - 300_000 < held <= 1024 * 1024
    for number in layout.segment_numbers(str(tmp_path / "j"))[:-1]:
        (tmp_path / "j" / layout.segment_name(number)).unlink()  # as the agent does with what is stored
    writer._retry_at_ns = 0
    for _ in range(3):
        writer.append_message({"type": "text", "key": "k", "text": "x" * 200_000})


def test_where_there_was_no_room_a_moment_ago_values_are_refused_at_once_and_counted(tmp_path, monkeypatch):
    """A full disk must not make log() slow: 3 us instead of 12."""
    writer = make_writer(tmp_path / "j", spool_bytes=2 * 64 * 1024)
    with pytest.raises(JournalFullError):  # noqa: PT012 - which of them is the first is not the point
        for _ in range(10_000):
            append(writer, ("a", "b"), [1.0, 2.0])
    written = writer.next_seq
    writer._checked_ns, writer._next_check_ns, writer._retry_at_ns = 0, 1 << 62, 1 << 62
    monkeypatch.setattr(JournalWriter, "_roll", lambda *_: pytest.fail("the disk was asked again"))
    for _ in range(5):
        assert writer.log_floats({"a": 1.0, "b": 2.0}, 1, NO_WEIGHT)
    assert (writer.next_seq, writer.drops) == (written, {"spool_full": 10})
    writer._retry_at_ns = 0
    assert not writer.log_floats({"a": 1.0, "b": 2.0}, 1, NO_WEIGHT), "the slow path asks the disk once a second"
    writer._retry_at_ns, writer._next_check_ns = 1 << 62, 0
    assert not writer.log_floats({"a": 1.0, "b": 2.0}, 1, NO_WEIGHT), "and looks at the agent"
    assert writer.drops == {"spool_full": 10}
