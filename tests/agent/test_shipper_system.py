"""What a node tells of its samplers' journals, and to whom."""

import json

import pytest
from agent.test_shipper import UUID, Journal, Node, batches, identity, kinds
from store.store_jobs import TIME_NS

from ddplog.agent.shipper import DEATH_CHECK_NS, RESEND_NS
from ddplog.journal.writer import JournalWriter
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec


class Samples(Journal):
    """A sampler's journal about a rank."""

    def __init__(self, folder, rank):
        self.incarnation = bytes([100 + rank.writer.incarnation[0]]) * 16
        its = {**identity(0), "role": "system", "belongs_to": rank.incarnation.hex()}
        self.writer = JournalWriter(
            folder / f"system-0.{self.incarnation.hex()}", self.incarnation, its,
            segment_bytes=64 * 1024, spool_bytes=1 << 30, check=lambda: None,
        )  # fmt: skip


@pytest.fixture
def node(tmp_path):
    node = Node(tmp_path)
    yield node
    node.shipper.close()


def welcome(node, *journals, version, next_seq=0):
    cursors = [(journal.incarnation, next_seq, 0) for journal in journals]
    node.shipper.receive(codec.encode_welcome(UUID, cursors, version, TIME_NS), 0)


def declared(messages):
    return [(w.incarnation, w.role, w.belongs_to) for m in messages if isinstance(m, pb.Hello) for w in m.writers]


def test_a_sampler_is_declared_with_the_rank_it_belongs_to_once_the_aggregator_knows_of_samplers(node):
    rank = node.rank().say(2)
    samples = Samples(node.folder, rank).say(3)
    node.shipper.discover()

    assert declared(node.out()) == [(rank.incarnation, pb.Writer.RANK, b"")]
    welcome(node, rank, version=2)
    (hello, batch) = node.out()
    assert declared([hello])[1] == (samples.incarnation, pb.Writer.SYSTEM, rank.incarnation)
    assert batch.incarnation == rank.incarnation
    welcome(node, rank, samples, version=2)
    assert kinds(batches(node.drain(), samples)) == ["Batch"]
    assert node.shipper.created_unix_ns == TIME_NS


def test_an_older_aggregator_never_hears_of_a_sampler(node):
    """It would take it for a second process that says it is the rank."""
    rank = node.rank().say(2)
    samples = Samples(node.folder, rank).say(3)
    node.shipper.discover()
    node.out()
    welcome(node, rank, version=1)
    messages = node.drain() + node.drain(RESEND_NS + 1)
    beat = codec.decode(node.shipper.heartbeat(RESEND_NS, is_over=False))

    assert samples.incarnation not in {getattr(m, "incarnation", b"") for m in messages}
    assert all(incarnation != samples.incarnation for incarnation, _, _ in declared(messages))
    assert [p.incarnation for p in beat.progress] == [rank.incarnation]

    node.bury()
    node.drain()
    node.ack(rank, rank.num_records)
    assert node.shipper.is_idle, "and nobody waits for what cannot be sent"


def test_another_aggregator_is_asked_anew_whether_it_knows_of_samplers(node):
    rank = node.rank().say()
    samples = Samples(node.folder, rank).say()
    node.shipper.discover()
    node.out()
    welcome(node, rank, version=2)
    node.out()
    welcome(node, rank, samples, version=2)
    node.shipper.joined()

    assert [incarnation for incarnation, _, _ in declared(node.out())] == [rank.incarnation]


def test_samples_wait_for_the_journal_of_their_rank(node):
    """The folder may be read in any order; a rank's journal that is gone leaves its samples undeclared."""
    rank = Journal(node.folder, 0)
    samples = Samples(node.folder, rank)
    head = (rank.writer.folder / "head").rename(node.folder / "away")
    node.shipper.discover()
    assert node.shipper.tracked == {}
    head.rename(rank.writer.folder / "head")
    node.shipper.discover()
    assert list(node.shipper.tracked) == [rank.incarnation, samples.incarnation]


def test_a_sampler_is_no_rank_zero_and_its_process_tells_no_exit_status(node):
    rank = node.rank(3)
    Samples(node.folder, rank)
    node.shipper.discover()
    assert not node.shipper.has_rank_zero
    node.bury()
    assert not node.shipper.may_learn(DEATH_CHECK_NS)


def test_the_end_of_a_rank_is_told_whatever_its_sampler_has_left_to_send(node):
    rank = node.rank().say()
    samples = Samples(node.folder, rank).say()
    node.shipper.discover()
    node.out()
    welcome(node, rank, version=2)
    node.bury()
    byes = [m for m in node.drain() if isinstance(m, pb.Bye)]
    assert [bye.incarnation for bye in byes] == [rank.incarnation]
    assert not node.shipper.is_idle
    welcome(node, rank, samples, version=2, next_seq=samples.num_records)
    assert [m.incarnation for m in node.drain() if isinstance(m, pb.Bye)] == [samples.incarnation]


def test_what_was_sampled_up_to_a_ranks_end_is_declared_before_that_is_told(node):
    """Once it is told the run may close."""
    rank = node.rank().say()
    node.out()
    welcome(node, rank, version=2)
    node.drain()
    samples = Samples(node.folder, rank).say()
    node.bury()
    messages = node.out()
    assert kinds(messages)[0] == "Hello"
    assert samples.incarnation in [incarnation for incarnation, _, _ in declared(messages)]


def test_an_abandoned_sampler_counts_as_dead(node, monkeypatch):
    """It was killed inside a driver call that never returns: the kernel keeps it, and the lock on its journal."""
    rank = node.rank().say()
    samples = Samples(node.folder, rank).say()
    node.shipper.discover()
    tracked = node.shipper.tracked
    reader = type(tracked[samples.incarnation].reader)
    monkeypatch.setattr(reader, "is_alive", property(lambda self: self.incarnation == samples.incarnation))
    node.bury()
    assert [t.is_alive for t in tracked.values()] == [False, True]
    node.shipper.abandon()
    node.bury(3 * DEATH_CHECK_NS)
    assert [t.is_alive for t in tracked.values()] == [False, False]


def test_the_head_of_a_samplers_journal_names_its_rank(tmp_path):
    rank = Journal(tmp_path, 0)
    samples = Samples(tmp_path, rank)
    text = (samples.writer.folder / "head").read_bytes()[1024:].rstrip(b"\0")
    assert json.loads(text)["belongs_to"] == rank.incarnation.hex()


def test_the_first_hello_says_that_others_follow(node):
    """An aggregator of a run that had ended would else leave again before it hears of them: for ever."""
    rank = node.rank().say()
    (hello,) = node.out()
    assert not hello.has_more
    node.shipper.joined()
    Samples(node.folder, rank).say()
    node.shipper.discover()
    (hello,) = node.out()
    assert hello.has_more
    welcome(node, rank, version=2)
    assert not next(m for m in node.out() if isinstance(m, pb.Hello)).has_more


def test_a_node_is_over_only_once_everything_is_declared(node):
    """Over: no further writer will come."""

    def is_over(now_ns):
        return codec.decode(node.shipper.heartbeat(now_ns, is_over=True)).is_over

    rank = node.rank()
    samples = Samples(node.folder, rank)
    node.bury()
    node.out()
    assert not is_over(RESEND_NS)
    welcome(node, rank, version=2)
    node.out()
    assert not is_over(2 * RESEND_NS)
    welcome(node, rank, samples, version=2)
    assert is_over(3 * RESEND_NS)
    node.shipper.joined()
    welcome(node, rank, version=1)
    assert is_over(4 * RESEND_NS), "an older aggregator is told of no others"
