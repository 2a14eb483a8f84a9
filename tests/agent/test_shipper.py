"""What a node sends, message by message, to an aggregator that forgets, loses and refuses. No socket, no clock."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddplog.agent.shipper import BATCH_BYTES, DEATH_CHECK_NS, HEARTBEAT_NS, RESEND_NS, SYNC_NS, WINDOW_BYTES, Shipper
from ddplog.core.dedup import Accept, Gap, admit
from ddplog.core.records import MAX_RECORD_BYTES, scan_payload
from ddplog.errors import RemoteProtocolError
from ddplog.journal.reader import JournalReader
from ddplog.journal.segment import segment_numbers
from ddplog.journal.writer import JournalWriter
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

UUID = bytes(16)
SECOND = 1_000_000_000


def identity(rank, pid=0):
    return {
        "rank": rank, "world_size": 4, "local_rank": rank, "node_rank": 1, "pid": pid, "host": "h", "boot_id": "b",
        "started_unix_ns": 7,
    }  # fmt: skip


class Journal:
    """A rank of this process: it counts as alive until somebody looks, since a process does not see its own locks."""

    def __init__(self, folder, rank, **options):
        options = {"segment_bytes": 64 * 1024, "spool_bytes": 1 << 30, "check": lambda: None} | options
        self.incarnation = bytes([rank + 1]) * 16
        path = folder / f"{rank}.{self.incarnation.hex()}"
        self.writer = JournalWriter(path, self.incarnation, identity(rank), **options)

    def say(self, count=1, size=10):
        for _ in range(count):
            assert self.writer.enter()
            self.writer.append_message({"type": "text", "key": "k", "text": "x" * size})
            self.writer.leave()
        return self

    @property
    def num_records(self):
        return self.writer.next_seq

    @property
    def payload(self):
        reader = JournalReader(self.writer.folder)
        chunks = []
        while (chunk := reader.read(1 << 30)) is not None:
            chunks.append(chunk.payload)
        reader.close()
        return b"".join(chunks)


@pytest.fixture
def node(tmp_path):
    """A shipper on an empty folder, and a way to add ranks to it."""
    node = Node(tmp_path)
    yield node
    node.shipper.close()


class Node:
    def __init__(self, folder, keep_bytes=1 << 30):
        self.folder = folder
        self.shipper = Shipper(folder, "r1", "5", keep_bytes)

    def rank(self, rank=0, **options):
        journal = Journal(self.folder, rank, **options)
        self.shipper.discover()
        return journal

    def out(self, now_ns=0):
        return [codec.decode(data) for data in self.shipper.outgoing(now_ns)]

    def drain(self, now_ns=0):
        """Everything that may be sent now, in as many rounds as it takes."""
        messages = []
        while new := self.out(now_ns):
            messages += new
        return messages

    def welcome(self, *journals, next_seq=0, now_ns=0):
        cursors = [(journal.incarnation, next_seq, 0) for journal in journals]
        self.shipper.receive(codec.encode_welcome(UUID, cursors), now_ns)

    def ack(self, journal, next_seq, now_ns=0):
        self.shipper.receive(codec.encode_ack([(journal.incarnation, next_seq, 0)]), now_ns)

    def reject(self, reason, incarnation=b"", next_seq=0, now_ns=0):
        self.shipper.receive(codec.encode_reject(reason, incarnation, next_seq, "no"), now_ns)

    def bury(self, now_ns=DEATH_CHECK_NS):
        """Look for deaths: every rank of this process is found dead."""
        self.shipper.check_deaths(now_ns)


def kinds(messages):
    return [type(message).__name__ for message in messages]


def batches(messages, journal=None):
    found = [message for message in messages if isinstance(message, pb.Batch)]
    return [batch for batch in found if journal is None or batch.incarnation == journal.incarnation]


def seqs(messages, journal=None):
    return [seq for b in batches(messages, journal) for seq in range(b.first_seq, b.first_seq + b.num_records)]


# -- the beginning


def test_a_node_without_ranks_says_nothing(node):
    (node.folder / "logs").mkdir()
    (node.folder / "job.json").touch()
    node.shipper.discover()
    node.shipper.joined()

    assert node.out() == []
    assert not node.shipper.is_idle
    assert not node.shipper.has_rank_zero


def test_hello_is_first_and_nothing_follows_before_the_welcome(node):
    """Records of an undeclared writer would be refused, one batch after another."""
    one, two = node.rank(0).say(3), node.rank(3).say(3)
    (hello,) = node.out()

    assert (hello.run_id, hello.node_id) == ("r1", "5")
    assert {
        w.incarnation: (w.rank, w.world_size, w.local_rank, w.node_rank, w.host, w.is_alive) for w in hello.writers
    } == {
        one.incarnation: (0, 4, 0, 1, "h", True),
        two.incarnation: (3, 4, 3, 1, "h", True),
    }
    assert node.out(RESEND_NS) == []
    node.welcome(one)
    assert seqs(node.drain(RESEND_NS)) == [0, 1, 2]
    assert node.shipper.has_rank_zero


def test_an_unanswered_hello_is_said_again(node):
    """A Welcome may be lost with a full queue; the journal would never be sent."""
    one, two = node.rank(0).say(1), node.rank(1).say(1)
    node.out()
    node.welcome(one)
    assert kinds(node.drain(RESEND_NS)) == ["Batch"]

    assert "Hello" in kinds(node.out(RESEND_NS + 1))
    node.welcome(one, two)
    node.drain(RESEND_NS + 1)
    node.ack(one, 1)
    node.ack(two, 1)
    assert node.drain(100 * RESEND_NS) == []


@pytest.mark.parametrize("next_seq", range(7))
def test_sending_begins_where_the_welcome_says(node, next_seq):
    journal = node.rank().say(6)
    node.out()
    node.welcome(journal, next_seq=next_seq)

    assert seqs(node.drain()) == list(range(next_seq, 6))


def test_the_journals_own_bytes_arrive_over_segments_and_batches(node):
    journal = node.rank().say(300, size=3000)
    node.out()
    node.welcome(journal)
    sent = batches(node.drain())

    assert len(segment_numbers(str(journal.writer.folder))) > 3
    assert b"".join(batch.payload for batch in sent) == journal.payload
    assert seqs(sent) == list(range(journal.num_records))
    assert all(len(scan_payload(batch.payload)) == batch.num_records for batch in sent)
    assert max(len(batch.payload) for batch in sent) < BATCH_BYTES + MAX_RECORD_BYTES


def test_a_rank_that_comes_later_is_declared_and_the_others_go_on(node):
    one = node.rank(0).say(2)
    node.out()
    node.welcome(one)
    node.drain()
    two = node.rank(1).say(2)
    one.say(1)
    messages = node.drain()

    assert kinds(messages) == ["Hello", "Batch"]
    assert {writer.rank for writer in messages[0].writers} == {0, 1}
    assert seqs(messages, one) == [2]
    node.welcome(two)
    assert seqs(node.drain(), two) == [0, 1]


def test_a_round_gives_every_rank_a_turn(node):
    """One rank with a backlog of hours must not keep the others' newest steps back."""
    ranks = [node.rank(n).say(20, size=60_000) for n in range(3)]
    node.out()
    node.welcome(*ranks)
    messages = node.out()

    assert {batch.incarnation for batch in batches(messages)} == {journal.incarnation for journal in ranks}
    assert len(messages) == 3


def test_what_is_no_journal_does_not_keep_the_others_back(node, caplog):
    broken = node.folder / "7.broken"
    broken.mkdir()
    (broken / "alive").touch()
    (broken / "head").write_bytes(bytes(4096))
    (node.folder / "8.empty").mkdir()
    journal = node.rank()

    assert list(node.shipper.tracked) == [journal.incarnation]
    assert "7.broken" in caplog.text


# -- acknowledgements, the window, going back


def test_what_is_acknowledged_the_rank_sees_and_it_is_not_sent_again(node):
    journal = node.rank().say(5)
    node.out()
    node.welcome(journal)
    node.drain()
    node.ack(journal, 5)

    assert journal.writer.acked_seq == 5
    assert node.drain(100 * RESEND_NS) == []


def test_no_more_than_the_window_is_under_way(node):
    """What is not acknowledged lies in the sockets' queues, in memory, on both sides."""
    journal = node.rank(segment_bytes=4 << 20).say(120, size=200_000)
    node.out()
    node.welcome(journal)
    sent = batches(node.drain())
    num_bytes = sum(len(batch.payload) for batch in sent)

    assert WINDOW_BYTES <= num_bytes < WINDOW_BYTES + BATCH_BYTES + MAX_RECORD_BYTES
    assert node.drain() == []
    first = sent[0]
    node.ack(journal, first.first_seq + first.num_records)
    assert seqs(node.drain())[0] == seqs(sent)[-1] + 1
    node.ack(journal, journal.num_records)
    assert seqs(node.drain())[-1] == journal.num_records - 1


def test_the_window_is_the_nodes_not_each_ranks(node):
    ranks = [node.rank(n, segment_bytes=4 << 20).say(60, size=200_000) for n in range(3)]
    node.out()
    node.welcome(*ranks)
    num_bytes = sum(len(batch.payload) for batch in batches(node.drain()))

    assert WINDOW_BYTES <= num_bytes < WINDOW_BYTES + 3 * (BATCH_BYTES + MAX_RECORD_BYTES)


def test_what_stays_unanswered_is_sent_again_from_the_last_acknowledgement(node):
    journal = node.rank().say(6)
    node.out()
    node.welcome(journal)
    node.drain()
    node.ack(journal, 4)

    assert node.drain(RESEND_NS) == []
    assert seqs(node.out(RESEND_NS + 1)) == [4, 5]
    assert node.drain(2 * RESEND_NS) == []
    assert seqs(node.out(2 * RESEND_NS + 2)) == [4, 5]


def test_an_answer_of_any_kind_puts_the_repetition_off(node):
    """A slow aggregator is not helped by getting everything twice."""
    journal = node.rank().say(6)
    node.out()
    node.welcome(journal)
    node.drain()
    node.ack(journal, 1, now_ns=RESEND_NS)

    assert node.drain(RESEND_NS + 1) == []
    assert seqs(node.drain(2 * RESEND_NS + 1)) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("next_seq", range(6))
def test_a_gap_is_mended_by_going_back(node, next_seq):
    journal = node.rank().say(6)
    node.out()
    node.welcome(journal)
    node.drain()
    node.reject(pb.Reject.OUT_OF_ORDER, journal.incarnation, next_seq)

    assert seqs(node.drain()) == list(range(next_seq, 6))


def test_an_aggregator_that_does_not_know_a_writer_is_told(node):
    """It was replaced by one that has not heard our Hello."""
    journal = node.rank().say(4)
    node.out()
    node.welcome(journal)
    node.drain()
    journal.say(2)
    node.reject(pb.Reject.UNKNOWN_WRITER, journal.incarnation)

    assert kinds(node.drain()) == ["Hello"]
    node.welcome(journal, next_seq=3)
    assert seqs(node.drain()) == [3, 4, 5]


def test_a_new_connection_begins_with_hello(node):
    journal = node.rank().say(4)
    node.out()
    node.welcome(journal)
    node.drain()
    node.shipper.joined()

    assert kinds(node.drain(RESEND_NS)) == ["Hello"]
    node.ack(journal, 4)  # of the connection before: whether this one's store has them, its Welcome says
    assert node.drain() == []
    node.welcome(journal, next_seq=2)
    assert seqs(node.drain()) == [2, 3]


@pytest.mark.parametrize("reason", [pb.Reject.WRONG_RUN, pb.Reject.VERSION])
def test_a_refusal_of_the_node_moves_no_cursor(node, reason):
    journal = node.rank().say(4)
    node.out()
    node.welcome(journal)
    node.drain()
    node.reject(reason)

    assert node.drain() == []
    assert journal.writer.acked_seq == 0


def test_what_is_said_of_strangers_is_ignored(node):
    node.rank()
    for message in (
        codec.encode_ack([(b"?" * 16, 9, 0)]),
        codec.encode_welcome(UUID, [(b"?" * 16, 9, 0)]),
        codec.encode_reject(pb.Reject.OUT_OF_ORDER, b"?" * 16, 9, ""),
    ):
        node.shipper.receive(message, 0)

    assert kinds(node.drain()) == ["Hello"]


def test_what_is_no_message_is_the_peers_fault(node):
    with pytest.raises(RemoteProtocolError):
        node.shipper.receive(b"\xff\xff", 0)


# -- ends


def test_the_end_is_told_after_the_last_record_and_the_last_drops(node):
    """The run may be closed on the Bye: what comes later would be too late."""
    journal = node.rank().say(300, size=3000)
    node.out()
    node.welcome(journal)
    journal.writer.drop("bad_value", 4)
    node.bury()
    messages = node.drain()

    assert kinds(messages)[0] == "Hello"
    assert not messages[0].writers[0].is_alive
    assert kinds(messages)[-2:] == ["Heartbeat", "Bye"]
    assert set(kinds(messages)[1:-2]) == {"Batch"}
    assert seqs(messages) == list(range(journal.num_records))
    (progress,) = messages[-2].progress
    assert [(drop.reason, drop.count) for drop in progress.drops] == [("bad_value", 4)]
    bye = messages[-1]
    assert (bye.incarnation, bye.next_seq, bye.finished) == (journal.incarnation, journal.num_records, False)
    assert not node.shipper.is_idle
    node.ack(journal, journal.num_records)
    assert node.shipper.is_idle
    assert "Bye" not in kinds(node.drain(100 * SECOND))


def test_what_a_death_left_on_the_device_is_told_as_a_drop(node):
    """The rank can no longer say it; while it lives, the values may still arrive, and are no drop."""
    journal = node.rank().say(3)
    node.out()
    node.welcome(journal)
    journal.writer.drop("device_pending", 1)  # those of an earlier end, in the same process
    journal.writer.show_pending(5)
    node.drain()
    assert {drop.reason: drop.count for drop in heartbeat(node, journal, 10 * SECOND).drops} == {"device_pending": 1}
    node.bury(11 * SECOND)
    messages = node.drain(11 * SECOND)

    assert kinds(messages)[-2:] == ["Heartbeat", "Bye"]
    for progress in (*messages[-2].progress, heartbeat(node, journal, 20 * SECOND)):
        assert {drop.reason: drop.count for drop in progress.drops} == {"device_pending": 6}
    node.shipper.joined()  # another aggregator
    node.out()
    node.welcome(journal)
    assert {drop.reason: drop.count for drop in heartbeat(node, journal, 30 * SECOND).drops} == {"device_pending": 6}


def test_a_rank_that_is_found_dead_and_stored_is_asked_what_it_left(node):
    """Its agent died with it, and the store has its records already: there is nothing to read, and still this to tell."""
    journal = node.rank().say(3)
    journal.writer.show_pending(4)
    node.bury()
    node.out()
    node.welcome(journal, next_seq=journal.num_records)
    messages = node.drain()

    assert kinds(messages) == ["Heartbeat", "Bye"]
    assert {drop.reason: drop.count for drop in messages[0].progress[0].drops} == {"device_pending": 4}


def heartbeat(node, journal, now_ns):
    message = codec.decode(node.shipper.heartbeat(now_ns, is_over=False))
    (progress,) = (p for p in message.progress if p.incarnation == journal.incarnation)
    return progress


def test_no_end_is_told_while_records_wait_for_the_window(node):
    journal = node.rank(segment_bytes=4 << 20).say(120, size=200_000)
    node.out()
    node.welcome(journal)
    node.bury()
    messages = node.drain()
    assert "Bye" not in kinds(messages)
    node.ack(journal, seqs(messages)[-1] + 1)

    assert kinds(node.drain())[-1] == "Bye"


def test_a_rank_that_said_goodbye_has_finished(node):
    journal = node.rank().say(2)
    journal.writer.close(finished=True)
    node.out()
    node.welcome(journal)
    node.bury()

    assert node.drain()[-1].finished


def test_a_rank_that_died_before_its_first_record_ends_too(node):
    journal = node.rank()
    node.bury()
    node.out()
    node.welcome(journal)

    assert [(m.next_seq, m.finished) for m in node.drain() if isinstance(m, pb.Bye)] == [(0, False)]
    assert node.shipper.is_idle


def test_ends_are_told_in_the_order_of_the_deaths(node):
    """The run names the first rank that died; torchrun ends the others a moment later."""
    first, second = node.rank(0).say(40, size=60_000), None
    node.out()
    node.bury(1 * SECOND)
    second = node.rank(1).say(1)
    node.out()
    node.bury(2 * SECOND)
    node.welcome(first, second)
    told = [message.incarnation for message in node.drain() if isinstance(message, pb.Bye)]

    assert told == [first.incarnation, second.incarnation]


def test_the_ends_are_repeated_for_an_aggregator_that_missed_them(node):
    journal = node.rank().say(2)
    node.out()
    assert list(node.shipper.byes()) == []
    node.welcome(journal)
    node.bury()
    node.drain()
    (bye,) = map(codec.decode, node.shipper.byes())

    assert (bye.incarnation, bye.next_seq) == (journal.incarnation, 2)
    node.shipper.joined()
    assert list(node.shipper.byes()) == []  # not before it has been declared anew


def test_a_lost_store_is_filled_again(node):
    """Another aggregator, with an empty store, has taken over: what was acknowledged is not durable any more."""
    journal = node.rank().say(50, size=3000)
    node.out()
    node.welcome(journal)
    node.bury()
    node.drain()
    node.ack(journal, 50)
    assert node.shipper.is_idle
    node.shipper.joined()
    assert kinds(node.drain()) == ["Hello"]
    node.welcome(journal, next_seq=0)

    assert not node.shipper.is_idle
    assert journal.writer.acked_seq == 0
    assert seqs(node.drain()) == list(range(50))
    assert [codec.decode(bye).next_seq for bye in node.shipper.byes()] == [50]
    node.ack(journal, 50)
    assert node.shipper.is_idle


RANK = """
import sys
from pathlib import Path
from ddplog.journal.writer import JournalWriter
sys.path.insert(0, sys.argv[2])
from agent.test_shipper import identity
import os
folder = Path(sys.argv[1])
writer = JournalWriter(folder / "0.x", b"r" * 16, identity(0, os.getpid()), segment_bytes=65536, spool_bytes=1 << 30,
                       check=lambda: None)
writer.enter()
for step in range(100):
    writer.append_scalars(("loss",), [float(step)], step, 1.0)
writer.leave()
writer.set_step(99)
print("up", flush=True)
sys.stdin.read()
"""


@pytest.mark.system
@pytest.mark.parametrize("way", ["SIGKILL", "exit"])
def test_a_real_rank_is_alive_until_its_process_is_gone(node, way):
    """Known from its record lock, which the kernel releases whatever kills it; a pid may be another's by now."""
    root = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", RANK, str(node.folder), str(root / "tests")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(root / "src")},
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == b"up\n"
        node.shipper.discover()
        node.shipper.check_deaths(SECOND)
        (hello,) = node.out()
        assert [(w.pid, w.is_alive) for w in hello.writers] == [(process.pid, True)]
        node.shipper.receive(codec.encode_welcome(UUID, [(b"r" * 16, 0, 0)]), 0)
        messages = node.drain()
        assert seqs(messages) == list(range(101))
        assert "Bye" not in kinds(messages)
        if way == "SIGKILL":
            process.send_signal(signal.SIGKILL)
        process.stdin.close()
        process.wait(30)
        assert node.drain() == []  # it has not been looked for yet
        node.shipper.check_deaths(SECOND + DEATH_CHECK_NS - 1)
        assert node.drain() == []  # nor is it, more often than every so often
        node.shipper.check_deaths(SECOND + DEATH_CHECK_NS)
        messages = node.drain()

    assert kinds(messages) == ["Hello", "Heartbeat", "Bye"]
    assert not messages[0].writers[0].is_alive
    assert (messages[2].next_seq, messages[2].finished) == (101, False)


# -- heartbeats and upkeep


def test_heartbeats_come_at_their_interval_and_show_progress(node):
    journal = node.rank().say(3)
    node.out()
    node.welcome(journal)
    assert node.shipper.heartbeat(HEARTBEAT_NS - 1, is_over=False) is None
    beat = codec.decode(node.shipper.heartbeat(HEARTBEAT_NS, is_over=False))
    assert (beat.node_id, beat.is_over) == ("5", False)
    (progress,) = beat.progress
    assert not progress.HasField("step")
    assert progress.through_seq == 0  # nothing has been read yet

    journal.writer.set_step(41)
    node.drain()
    assert node.shipper.heartbeat(2 * HEARTBEAT_NS - 1, is_over=False) is None
    beat = codec.decode(node.shipper.heartbeat(2 * HEARTBEAT_NS, is_over=True))
    assert beat.is_over
    (progress,) = beat.progress
    assert (progress.incarnation, progress.step, progress.through_seq) == (journal.incarnation, 41, 3)
    assert progress.backlog_bytes == len(journal.payload)


def test_only_what_is_acknowledged_and_not_kept_is_deleted(tmp_path):
    node = Node(tmp_path, keep_bytes=3 * 64 * 1024)
    journal = node.rank().say(100, size=3000)
    folder = str(journal.writer.folder)
    num_segments = len(segment_numbers(folder))
    assert num_segments >= 5
    node.out()
    node.welcome(journal)
    node.drain()
    node.shipper.keep_durable(SYNC_NS)
    assert len(segment_numbers(folder)) == num_segments
    journal.say(1)
    node.drain()
    node.ack(journal, 101)
    node.shipper.keep_durable(2 * SYNC_NS - 1)
    assert len(segment_numbers(folder)) == num_segments
    node.shipper.keep_durable(2 * SYNC_NS)

    assert len(segment_numbers(folder)) == 3
    assert "writers=1" in repr(node.shipper)
    node.shipper.close()


# -- all of it, over a line that loses anything


class LossyAggregator:
    """Takes what comes through, in order or not at all; may be replaced by one with an empty store."""

    def __init__(self):
        self.stored = {}
        self.ended = {}

    def take(self, message):
        if isinstance(message, pb.Hello):
            for writer in message.writers:
                self.stored.setdefault(writer.incarnation, [])
            return codec.encode_welcome(
                UUID, [(w.incarnation, len(self.stored[w.incarnation]), 0) for w in message.writers]
            )
        if isinstance(message, pb.Batch):
            stored = self.stored.get(message.incarnation)
            if stored is None:
                return codec.encode_reject(pb.Reject.UNKNOWN_WRITER, message.incarnation, 0, "")
            decision = admit(len(stored), message.first_seq, message.num_records)
            if isinstance(decision, Gap):
                return codec.encode_reject(pb.Reject.OUT_OF_ORDER, message.incarnation, decision.next_seq, "")
            if isinstance(decision, Accept):
                frames = [message.payload[o : o + n] for o, n in scan_payload(message.payload)]
                stored += frames[decision.skip :]
            return codec.encode_ack([(message.incarnation, len(stored), 0)])
        if isinstance(message, pb.Bye):
            self.ended[message.incarnation] = message.next_seq
        return None


class Line:
    """Between a node and its aggregator: every message meets the next fate, and after the last one all goes well.

    i, o: a message in or out is lost; x: a new connection; n: an aggregator with an empty store; w: a rank logs.
    """

    def __init__(self, node, ranks, fates):
        self.node, self.ranks, self.fates = node, ranks, fates
        self.aggregator = LossyAggregator()

    def exchange(self, now_ns):
        shipper = self.node.shipper
        for data in shipper.outgoing(now_ns):
            happens = self.fates.pop() if self.fates else "."
            if happens == "w" and all(tracked.is_alive for tracked in shipper.tracked.values()):
                self.ranks[now_ns % 2].say(1)
            if happens == "n":
                self.aggregator = LossyAggregator()
            if happens in ("x", "n"):
                shipper.joined()
                return
            answer = self.aggregator.take(codec.decode(data)) if happens != "o" else None
            if answer is not None and happens != "i":
                shipper.receive(answer, now_ns)
        for bye in shipper.byes():
            self.aggregator.take(codec.decode(bye))

    def run(self):
        now_ns = 0
        for number in range(300):
            now_ns += RESEND_NS // 3
            self.exchange(now_ns)
            if not self.fates or number > 30:
                self.node.bury(now_ns)
            if self.node.shipper.is_idle and not self.fates:
                return


@given(
    fates=st.lists(st.sampled_from("...............ioxnw"), max_size=100),
    sizes=st.lists(st.integers(1, 20_000), min_size=1, max_size=15),
)
@settings(max_examples=40, deadline=None)
def test_everything_arrives_once_and_in_order_whatever_is_lost(fates, sizes):
    folder = Path(tempfile.mkdtemp())
    node = Node(folder)
    ranks = [node.rank(n) for n in range(2)]
    for number, size in enumerate(sizes):
        ranks[number % 2].say(1, size)
    line = Line(node, ranks, fates)
    line.run()
    try:
        assert node.shipper.is_idle, repr(node.shipper)
        for journal in ranks:
            assert b"".join(line.aggregator.stored[journal.incarnation]) == journal.payload
            assert journal.writer.acked_seq == journal.num_records
            assert line.aggregator.ended[journal.incarnation] == journal.num_records
    finally:
        node.shipper.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(folder)
