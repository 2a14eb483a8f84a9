"""A journal of tiny segments against a list: whatever is appended, synced, read, acknowledged, trimmed, killed, reopened.

The list is the truth: a record is in the journal from the moment append returned until its segment is deleted, which
may happen to acknowledged ones only; and the reader gives each once, in order, or says that it is a hole.
"""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, decode, scan, scan_payload
from ddplog.journal import segment as layout
from ddplog.journal.reader import Hole, JournalReader
from ddplog.journal.writer import JournalFullError, JournalWriter

SEGMENT_BYTES = 5000
SPOOL_BYTES = 40_000
IDENTITY = {"rank": 0, "world_size": 1}


class Reader(JournalReader):
    """A process does not see its own locks: the model says whether its writer lives."""

    lives = True

    @property
    def is_alive(self):
        return self.lives


class Journal(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.base = Path(tempfile.mkdtemp(prefix="ddplog-journal-"))
        self.num_lives = 0
        self.next_life()

    def next_life(self):
        self.num_lives += 1
        self.folder = self.base / f"0.{self.num_lives}"
        self.writer = JournalWriter(
            self.folder, self.num_lives.to_bytes(16, "big"), IDENTITY, segment_bytes=SEGMENT_BYTES,
            spool_bytes=SPOOL_BYTES, check=lambda: None,
        )  # fmt: skip
        self.lives = True
        self.open_reader()
        self.logged = []
        self.refused = self.acked = self.most_acked = 0
        self.position = 0

    def open_reader(self):
        self.reader = Reader(self.folder)
        self.reader.lives = self.lives
        self.reader.seek(0)

    # -- the rank

    @precondition(lambda self: self.lives)
    @rule(count=st.sampled_from((1, 3, 40)), width=st.sampled_from((1, 60)), step=st.integers(-3, 3))
    def log_numbers(self, count, width, step):
        keys = tuple(f"k{i}" for i in range(width))
        for _ in range(count):
            values = (float(len(self.logged)),) * width
            self.append(lambda values=values: self.writer.append_scalars(keys, list(values), step, 1.0), keys, values)

    @precondition(lambda self: self.lives)
    @rule(size=st.sampled_from((0, 10, 900, 6000)))
    def log_text(self, size):
        text = f"{len(self.logged)}:" + "x" * size
        self.append(lambda: self.writer.append_message({"type": "text", "text": text}), None, text)

    def append(self, call, keys, what):
        before = self.writer.next_seq
        assert self.writer.enter()
        try:
            call()
        except JournalFullError as exc:
            self.writer.drop(exc.reason)
            self.refused += 1
            self.logged += [keys] * (self.writer.next_seq - before)  # a declaration may have found the last room
        else:
            self.logged += [keys] * (self.writer.next_seq - before - 1) + [what]
        finally:
            self.writer.leave()

    @precondition(lambda self: self.lives)
    @rule()
    def the_disk_fails_the_segment(self):
        """The rank leaves it at its next look, once a second."""
        layout.put(self.writer._head, layout.SEAL_OFFSET, layout.U64.pack(self.writer._number))
        self.writer._next_check_ns = 0

    @precondition(lambda self: self.lives)
    @rule()
    def a_second_passes(self):
        """After which a full spool is looked at again."""
        self.writer._retry_at_ns = 0

    @precondition(lambda self: self.lives)
    @rule()
    def flush(self):
        self.writer.flush()

    # -- the agent

    @rule()
    def sync(self):
        assert self.reader.sync()

    @rule(max_bytes=st.sampled_from((1, 500, 20_000)))
    def read(self, max_bytes):
        found = self.reader.read(max_bytes)
        if found is None:
            assert self.position == len(self.logged)
        elif isinstance(found, Hole):
            assert found.first_seq == self.position < found.next_seq == self.reader.oldest_seq <= self.most_acked
            self.position = found.next_seq
        else:
            assert found.first_seq == self.position
            self.position += self.check(found)
        assert self.reader.next_seq == self.position

    def check(self, chunk):
        frames = scan_payload(chunk.payload)
        for number, (offset, _) in enumerate(frames):
            record = decode(chunk.payload, offset)
            assert record.seq == chunk.first_seq + number
            wanted = self.logged[record.seq]
            if record.kind == KIND_SCHEMA:
                assert tuple(record.message["keys"]) == wanted
            elif record.kind == KIND_MESSAGE:
                assert record.message["text"] == wanted
            else:
                assert record.kind == KIND_SCALARS
                assert record.values == wanted
        assert len(frames) == chunk.num_records
        return len(frames)

    @rule(data=st.data())
    def seek(self, data):
        self.position = data.draw(st.just(0) | st.integers(0, len(self.logged)))
        self.reader.seek(self.position)
        assert self.reader.next_seq == self.position

    @rule(data=st.data())
    def acknowledge(self, data):
        """A new store may take it back."""
        self.acked = data.draw(st.just(len(self.logged)) | st.integers(0, len(self.logged)))
        self.most_acked = max(self.acked, self.most_acked)
        self.reader.set_acked(self.acked)
        assert self.writer.acked_seq == self.acked

    @rule(keep_bytes=st.sampled_from((0, 12_000)))
    def trim(self, keep_bytes):
        before = self.reader.oldest_seq
        self.reader.trim(self.acked, keep_bytes)
        assert before <= self.reader.oldest_seq <= max(before, self.acked)

    @rule()
    def start_another_agent(self):
        self.reader.close()
        self.open_reader()
        self.reader.seek(self.position)

    # -- the end

    @precondition(lambda self: self.lives)
    @rule(torn=st.integers(0, 200))
    def kill(self, torn):
        """Perhaps amid an append: the record's bytes are there, its length is not."""
        writer = self.writer
        room = writer._view[writer._offset + 8 : writer._offset + 8 + torn]
        room[:] = b"\x30" * len(room)
        writer.close(finished=False)
        self.lives = False
        self.reader.lives = False

    @precondition(lambda self: not self.lives)
    @rule()
    def live_again(self):
        """Another process, another journal."""
        self.check_all()
        self.reader.close()
        self.next_life()

    def check_all(self):
        """What is left is all there, and each segment can be understood without those before it."""
        self.reader.seek(0)
        self.position = 0
        while self.position < len(self.logged):
            before = self.position
            self.read(20_000)
            assert self.position > before
        assert self.reader.read(1) is None
        for path in sorted(self.folder.glob("*.seg")):
            content = memoryview(path.read_bytes())
            epoch, _ = layout.read_header(content, self.writer.incarnation, int(path.stem))
            declared = set()
            for offset, _ in scan(content, layout.SEGMENT_HEADER_BYTES, len(content), epoch):
                record = decode(content, offset)
                if record.kind == KIND_SCHEMA:
                    declared.add(record.message["id"])
                assert record.kind != KIND_SCALARS or record.schema_id in declared

    @invariant()
    def counts_agree(self):
        if hasattr(self, "writer"):
            assert self.writer.next_seq == len(self.logged)
            assert self.reader.drops == ({"spool_full": self.refused} if self.refused else {})

    def teardown(self):
        if hasattr(self, "reader"):
            self.check_all()
            self.reader.close()
            self.writer.close(finished=True)
            shutil.rmtree(self.base)


Journal.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestJournal = Journal.TestCase
