"""What makes a journal durable: what is synced and when, and what becomes of a segment whose sync has failed."""

import errno
import os

import pytest

from ddplog.agent.shipper import SYNC_NS, Shipper
from ddplog.core.records import decode, scan_payload
from ddplog.journal import segment as layout
from ddplog.journal.reader import Hole, JournalReader
from ddplog.journal.writer import JournalWriter
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

IDENTITY = {
    "rank": 0, "world_size": 1, "local_rank": 0, "node_rank": 0, "pid": 1, "host": "h", "boot_id": "b",
    "started_unix_ns": 7,
}  # fmt: skip


class Disk:
    """Notes what is synced, by name, and fails what it is told to."""

    def __init__(self):
        self.synced = []
        self.failing = {}
        """Name -> how often its sync still fails."""

    def sync(self, descriptor):
        name = os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2]
        self.synced.append(name)
        if self.failing.get(name, 0):
            self.failing[name] -= 1
            raise OSError(errno.EIO, "no")

    def take(self):
        synced, self.synced = self.synced, []
        return synced


@pytest.fixture
def disk(monkeypatch):
    disk = Disk()
    monkeypatch.setattr(os, "fsync", disk.sync)
    monkeypatch.setattr(os, "fdatasync", disk.sync)
    monkeypatch.setattr(JournalReader, "is_alive", property(lambda reader: reader.incarnation != b"d" * 16))
    return disk


@pytest.fixture
def writer(tmp_path, disk):
    return make_writer(tmp_path / "job" / "0.x")


def make_writer(folder, incarnation=b"i" * 16, **options):
    folder.parent.mkdir(exist_ok=True)
    options = {"segment_bytes": 64 * 1024, "spool_bytes": 1 << 30, "check": lambda: None} | options
    return JournalWriter(folder, incarnation, IDENTITY, **options)


def say(writer, count=1, size=10):
    for _ in range(count):
        assert writer.enter()
        writer.append_message({"type": "text", "text": "x" * size})
        writer.leave()


def roll(writer):
    number = writer._number
    while writer._number == number:
        say(writer, size=3000)


def read_all(reader):
    records = []
    while (chunk := reader.read(1 << 20)) is not None:
        assert not isinstance(chunk, Hole)
        records += [decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)]
    return records


# -- what is synced, and when


def test_the_first_sync_makes_the_names_durable_too(writer, disk):
    """A file that cannot be found again is not durable, whatever is in it."""
    reader = JournalReader(writer.folder)

    assert reader.sync()
    assert disk.take() == ["000001.seg", "head", "job", "0.x"]


def test_only_what_is_new_is_synced(writer, disk):
    reader = JournalReader(writer.folder)
    reader.sync()
    read_all(reader)
    reader.sync()
    disk.take()
    assert reader.sync()
    assert disk.take() == []
    say(writer)
    assert reader.sync()
    assert disk.take() == ["000001.seg"]
    read_all(reader)
    reader.sync()
    assert disk.take() == ["000001.seg"]
    writer.drop("bad_value")
    reader.sync()
    assert disk.take() == ["000001.seg", "head"]
    roll(writer)
    reader.sync()
    assert disk.take() == ["000001.seg", "000002.seg", "0.x"]
    reader.sync()
    assert disk.take() == ["000002.seg"]  # what was not read yet


def test_every_segment_is_synced_however_many_came_since(writer, disk):
    reader = JournalReader(writer.folder)
    for _ in range(4):
        roll(writer)
    reader.sync()

    assert set(disk.take()) >= {f"00000{n}.seg" for n in range(1, 6)}


def test_journals_are_durable_while_no_aggregator_takes_anything(tmp_path, disk):
    """An outage is when it matters: nothing has been read, and there is no other copy."""
    writer = make_writer(tmp_path / "0.x")
    shipper = Shipper(tmp_path, "r1", "0", 1 << 30)
    shipper.discover()
    disk.take()
    for number in range(1, 4):
        say(writer, 3)
        shipper.keep_durable(number * SYNC_NS)
        assert disk.take()[:1] == ["000001.seg"]
    shipper.close()


def test_a_journal_is_durable_before_anybody_hears_of_it(tmp_path, disk):
    """Else a power cut could take one that an aggregator waits for."""
    make_writer(tmp_path / "0.x")
    shipper = Shipper(tmp_path, "r1", "0", 1 << 30)
    shipper.discover()

    assert disk.take() == ["000001.seg", "head", tmp_path.name, "0.x"]
    (hello,) = map(codec.decode, shipper.outgoing(0))
    assert isinstance(hello, pb.Hello)
    shipper.close()


def test_a_dead_rank_is_synced_to_its_end_and_then_left(tmp_path, disk):
    writer = make_writer(tmp_path / "0.d", b"d" * 16)
    say(writer, 3)
    reader = JournalReader(tmp_path / "0.d")
    reader.sync()
    disk.take()

    assert reader.sync()
    assert disk.take() == []


def test_what_is_acknowledged_is_deleted_although_nothing_new_comes(tmp_path, disk):
    """A rank that waits for room logs nothing, and would wait for ever."""
    writer = make_writer(tmp_path / "0.x", spool_bytes=3 * 64 * 1024)
    roll(writer)
    roll(writer)
    writer.drop("spool_full")
    shipper = Shipper(tmp_path, "r1", "0", 1 << 30)
    shipper.discover()
    list(shipper.outgoing(0))
    shipper.receive(codec.encode_welcome(bytes(16), [(writer.incarnation, 0, 0)]), 0)
    while list(shipper.outgoing(0)):
        pass
    shipper.keep_durable(SYNC_NS)
    assert len(layout.segment_numbers(str(writer.folder))) == 3
    shipper.receive(codec.encode_ack([(writer.incarnation, writer.next_seq, 0)]), 0)
    shipper.keep_durable(2 * SYNC_NS)

    assert layout.segment_numbers(str(writer.folder)) == [3]
    shipper.close()


def test_a_reader_whose_segment_and_the_next_are_deleted_goes_on(writer):
    """The next one had no record: nothing in it was still to be read."""
    reader = JournalReader(writer.folder)
    read_all(reader)
    writer._roll()
    writer._roll()
    say(writer, 2)
    assert reader.trim(0, 0) == 2

    assert len(read_all(reader)) == 2
    reader.close()


# -- what cannot be synced


def test_a_segment_that_failed_is_written_anew_once_the_rank_has_left_it(writer, disk):
    """Reliability case 16: a second fdatasync would succeed, and the pages would be on no disk."""
    reader = JournalReader(writer.folder)
    reader.sync()
    say(writer, 5)
    inode = (writer.folder / "000001.seg").stat().st_ino
    disk.failing = {"000001.seg": 1}
    assert not reader.sync()
    disk.take()
    say(writer, 2)
    assert not reader.sync()
    assert "000001.seg" not in disk.take()
    assert (writer.folder / "000001.seg").stat().st_ino == inode
    writer._next_check_ns = 0  # a second later
    say(writer, 3)
    assert writer._number == 2
    say(writer, 4)
    assert reader.sync()
    assert disk.take() == ["000001.copy", "000002.seg", "head", "0.x"]

    assert (writer.folder / "000001.seg").stat().st_ino != inode
    assert len(read_all(reader)) == 14
    again = JournalReader(writer.folder)
    assert len(read_all(again)) == 14
    assert sorted(path.name for path in writer.folder.iterdir()) == ["000001.seg", "000002.seg", "alive", "head"]
    assert layout.U64.unpack_from(writer._head, layout.SEAL_OFFSET) == (0,)
    assert layout.U64.unpack_from(writer._head, layout.AGENT_SUSPECT_OFFSET) == (0,)


def test_a_segment_that_failed_is_known_to_the_agent_that_follows(writer, disk):
    reader = JournalReader(writer.folder)
    disk.failing = {"000001.seg": 1}
    assert not reader.sync()
    reader.close()
    disk.take()
    reader = JournalReader(writer.folder)

    assert not reader.sync()
    assert "000001.seg" not in disk.take()
    roll(writer)
    assert reader.sync()
    assert "000001.copy" in disk.take()


def test_a_copy_that_fails_is_made_again(writer, disk):
    reader = JournalReader(writer.folder)
    say(writer, 5)
    disk.failing = {"000001.seg": 1, "000001.copy": 2}
    reader.sync()
    roll(writer)
    before = writer.next_seq
    assert [reader.sync() for _ in range(3)] == [False, False, True]

    assert disk.take().count("000001.copy") == 3
    assert len(read_all(JournalReader(writer.folder))) == before
    assert not list(writer.folder.glob("*.copy"))


def test_one_segment_that_cannot_be_mended_does_not_keep_the_others_from_the_disk(writer, disk):
    reader = JournalReader(writer.folder)
    disk.failing = {"000001.seg": 1, "000001.copy": 100}
    reader.sync()
    roll(writer)
    disk.take()
    say(writer)
    reader.sync()

    assert "000002.seg" in disk.take()


def test_a_dead_ranks_segment_is_written_anew_at_once(tmp_path, disk):
    writer = make_writer(tmp_path / "0.d", b"d" * 16)
    say(writer, 3)
    disk.failing = {"000001.seg": 1}
    reader = JournalReader(tmp_path / "0.d")

    assert reader.sync()
    assert len(read_all(reader)) == 3


@pytest.mark.parametrize("name", ["0.x", "job"])
def test_a_folder_that_failed_is_changed_before_it_is_synced_again(writer, disk, name):
    """So that there is something to write: its entries may have been given up."""
    reader = JournalReader(writer.folder)
    disk.failing = {name: 1}
    assert not reader.sync()
    folder = writer.folder if name == "0.x" else writer.folder.parent
    assert (folder / ".sync").exists()
    disk.take()

    assert reader.sync()
    assert name in disk.take()
    assert not (folder / ".sync").exists()


def test_a_head_page_that_failed_is_dirty_before_it_is_synced_again(writer, disk):
    reader = JournalReader(writer.folder)
    disk.failing = {"head": 1}
    assert not reader.sync()
    (before,) = layout.U64.unpack_from(writer._head, layout.TOUCH_OFFSET)

    assert reader.sync()
    assert layout.U64.unpack_from(writer._head, layout.TOUCH_OFFSET) > (before,)


# -- flush()


def test_flush_makes_all_of_it_durable(writer, disk):
    roll(writer)
    writer.flush()
    assert disk.take() == ["000001.seg", "000002.seg", "head", "job", "0.x"]
    say(writer)
    writer.flush()
    assert disk.take() == ["000002.seg", "head"]
    writer.close(finished=True)
    writer.flush()
    assert disk.take() == []


def test_flush_mends_what_failed(writer, disk):
    say(writer, 3)
    disk.failing = {"000001.seg": 1}
    writer.flush()

    assert writer._number == 2
    assert "000001.copy" in disk.take()
    assert len(read_all(JournalReader(writer.folder))) == 3


def test_flush_says_when_nothing_helps(writer, disk):
    disk.failing = {"000001.seg": 1, "000001.copy": 1}
    with pytest.raises(OSError, match="did not take"):
        writer.flush()
    say(writer, 3)
    reader = JournalReader(writer.folder)
    disk.take()
    assert reader.sync()  # the agent knows of it, and mends it
    assert "000001.copy" in disk.take()


def test_no_descriptor_is_left(writer, disk):
    """A process may join one run after another."""
    open_before = len(os.listdir("/proc/self/fd"))
    again = make_writer(writer.folder.parent / "1.x")
    say(again)
    again.flush()
    reader = JournalReader(again.folder)
    reader.sync()
    read_all(reader)
    reader.close()
    again.close(finished=True)
    del again  # its two mappings

    assert len(os.listdir("/proc/self/fd")) == open_before


def test_a_file_system_whose_folders_cannot_be_synced_is_no_trouble(writer, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EINVAL, "a folder")

    monkeypatch.setattr(os, "fsync", refuse)
    reader = JournalReader(writer.folder)

    assert reader.sync()
    assert not list(writer.folder.glob(".sync"))
