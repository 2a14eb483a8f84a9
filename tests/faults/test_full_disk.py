"""Every call to the operating system fails in turn, as on a full or broken disk, once and for a while.

Whatever fails: nothing is raised into log(), every value is stored or dropped with a reason and a count, nothing is
acknowledged that is not stored, and once the disk works again, so does everything.
"""

import errno
import os
import sqlite3
from collections import Counter
from contextlib import closing
from typing import ClassVar

import pytest
from emission_store import StoreMaker
from faults.faulty_os import Faults
from faults.test_power_cut import Receiver
from forward.test_process import FakeHost
from store.store_jobs import TIME_NS, Feed, Rank
from store.test_run_store import RUN, dump

from ddplog.agent.shipper import RESEND_NS, Shipper
from ddplog.core.delivery import Limits
from ddplog.core.records import KIND_SCALARS, decode, scan_payload
from ddplog.errors import ConfigError, PermanentSinkError
from ddplog.forward import process as forward_process
from ddplog.forward.process import EXIT_OK, forward
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JobInfo
from ddplog.journal.writer import JournalWriter
from ddplog.sinks.jsonl import JsonlSink
from ddplog.store.run_store import RunStore, StoreError
from ddplog.testing import read_jsonl
from ddplog.worker.identity import Identity
from ddplog.worker.run import Run

pytestmark = pytest.mark.timeout(120)

A_WHILE = 1_000_000
"""Calls: until the disk is mended."""
WAYS = ((errno.ENOSPC, 1), (errno.ENOSPC, A_WHILE), (errno.EDQUOT, 1), (errno.EIO, 1), (errno.EIO, A_WHILE))
INCARNATION = bytes(range(16))
JOB = JobInfo(
    run_id="r1", project="p", name=None, dir="/runs", sinks=(), tags=(), config={}, created_unix_ns=0, launcher_pid=0,
    launcher="python", node_rank=0, settings={},
)  # fmt: skip
WHO = Identity(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, launcher="env")
IDENTITY = {
    "rank": 0, "world_size": 1, "local_rank": 0, "node_rank": 0, "pid": 1, "host": "h", "boot_id": "b",
    "started_unix_ns": 7,
}  # fmt: skip
KEYS = tuple(f"key_{i}" for i in range(40))


def fail_every_call(folder, scenario):
    """Play the scenario once in peace, to count its calls, then with each of them failing; return how many did."""
    peace = Faults(folder / "peace")
    (folder / "peace").mkdir()
    with peace.installed():
        scenario(folder / "peace", peace)
    assert peace.num_calls > 5, peace.seen
    counts = Counter(calls=peace.num_calls)
    for code, length in WAYS:
        for number in range(1, peace.num_calls + 1):
            place = folder / f"{errno.errorcode[code]}.{length}.{number}"
            place.mkdir()
            faults = Faults(place, number, number + length - 1, code)
            try:
                with faults.installed():
                    scenario(place, faults)
            except BaseException as exc:
                exc.add_note(f"{errno.errorcode[code]} at call {number}, {length} times: {faults.failed[:3]}")
                raise
            counts["faults"] += len(faults.failed)
    assert counts["faults"] >= len(WAYS) * counts["calls"] * 0.9  # a loop may end before its last calls
    print(dict(peace.seen), dict(counts))
    return counts


def make_journal(folder, **options):
    options = {"segment_bytes": 6000, "spool_bytes": 1 << 30, "check": lambda: None} | options
    return JournalWriter(folder, INCARNATION, IDENTITY, **options)


def read_all(folder):
    reader = JournalReader(folder)
    records = []
    while (chunk := reader.read(1 << 20)) is not None:
        records += [decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)]
    reader.close()
    return records


# -- the rank


def log_for_a_while(folder, faults):
    """A training loop that logs, and flushes now and then."""
    journal = make_journal(folder / "0.x")
    run = Run(journal, JOB, WHO, strict=False, exit_wait_s=0.0, max_keys=10_000)
    logged = 0
    with faults.armed():
        for step in range(24):
            run.log(dict.fromkeys(KEYS, float(step)), step=step)
            logged += len(KEYS)
            if step % 8 == 5:
                run.log_text("note", "x" * 3000, step)
                logged += 1
                run.flush()
            if step % 6 == 3:
                journal._retry_at_ns = 0  # a full disk is asked again once a second
    journal._retry_at_ns = 0
    for step in range(24, 30):  # there is room again
        run.log(dict.fromkeys(KEYS, float(step)), step=step)
        logged += len(KEYS)
    run.flush()
    run.finish()
    records = read_all(folder / "0.x")
    numbers = [record for record in records if record.kind == KIND_SCALARS]
    for record in numbers:
        assert record.values == (float(record.step),) * len(KEYS)
    steps = [record.step for record in numbers]
    assert steps == sorted(set(steps))
    assert steps[-6:] == list(range(24, 30)), "it does not take anything again"
    texts = [record for record in records if record.message and record.message.get("type") == "text"]
    dropped = run.drops
    assert logged == len(numbers) * len(KEYS) + len(texts) + sum(dropped.values())
    assert set(dropped) <= ({"io_error"} if faults.code == errno.EIO else {"disk_full", "io_error"})
    with closing(JournalReader(folder / "0.x")) as reader:
        assert dropped == reader.drops
    if faults.first is None:
        assert not dropped


@pytest.mark.filterwarnings("ignore:ddplog")
def test_no_call_of_a_rank_that_fails_is_felt_by_training(shm_path, suite_table):
    """Reliability case 15: every value is in the journal, or counted with its reason."""
    counts = fail_every_call(shm_path, log_for_a_while)
    suite_table("a disk that fails at every call: the rank", **counts, lost=0, doubled=0, wrong=0)


def begin(folder, faults):
    """init() on a failing disk, and again."""
    with faults.armed():
        try:
            make_journal(folder / "0.a").close(finished=False)
        except OSError:
            assert faults.failed
    shipper = Shipper(folder, "r1", "0", 0)
    shipper.discover()
    shipper.close()
    again = make_journal(folder / "0.b")
    again.close(finished=True)
    again = Shipper(folder, "r1", "0", 0)
    again.discover()
    assert again.tracked
    again.close()


def test_a_journal_that_cannot_be_made_says_so_at_once_and_is_in_nobodys_way(shm_path, suite_table):
    """Reliability case 15: the one place where it may stop training is before it."""
    counts = fail_every_call(shm_path, begin)
    suite_table("a disk that fails at every call: the rank", **counts, lost=0, doubled=0, wrong=0)


# -- the agent


class Syncs:
    """Notes which inodes' syncs failed, and that none of them is synced again."""

    def __init__(self, faults):
        self.faults = faults
        self.failed = set()
        self.real = os.fdatasync

    def fdatasync(self, descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        inode = os.fstat(descriptor).st_ino
        if path.endswith(".seg"):
            assert inode not in self.failed, f"{path} is synced again, after its sync has failed"
        try:
            self.real(descriptor)
        except OSError:
            self.failed.add(inode)
            raise


def ship(folder, faults):
    """A rank that goes on, and an agent that sends, syncs and trims."""
    journal = make_journal(folder / "0.x")
    shipper, receiver = Shipper(folder, "r1", "0", 0), Receiver()
    syncs = Syncs(faults)
    os.fdatasync = syncs.fdatasync

    def exchange(now):
        """As the agent's loop."""
        try:
            shipper.discover()
            for data in shipper.outgoing(now):
                answer = receiver.take(data, now)
                if answer is not None:
                    shipper.receive(answer, now)
            shipper.keep_durable(now)
        except OSError:
            assert faults.failed
            shipper.joined()

    for number in range(1, 6):
        for step in range(4):
            journal.enter()
            journal.append_scalars(KEYS, [float(step)] * len(KEYS), step, 1.0)
            journal.leave()
        with faults.armed():
            exchange(number * (RESEND_NS + 1))
        journal._next_check_ns = 0
    for number in range(6, 26):
        exchange(number * (RESEND_NS + 1))
    (tracked,) = shipper.tracked.values()
    journal._leave_failed()  # its next look at the head page
    assert tracked.reader.sync()
    assert len(receiver.records) == journal.next_seq
    assert receiver.writer.next_seq == tracked.acked_seq == journal.acked_seq
    assert not receiver.events
    shipper.close()
    journal.close(finished=True)


def test_no_call_of_an_agent_that_fails_stops_or_falsifies_what_it_sends(shm_path, monkeypatch, suite_table):
    """Reliability cases 15 and 16."""
    monkeypatch.setattr(JournalReader, "is_alive", property(lambda reader: True))
    counts = fail_every_call(shm_path, ship)
    suite_table("a disk that fails at every call: the agent", **counts, lost=0, doubled=0, wrong=0, stuck=0)


# -- the store


def from_the_end(positions):
    return None


def work():
    """The effects of a small run, in several commits."""
    a, b = Rank(0, 2), Rank(1, 2)
    a.say(type="params", values={"lr": 0.1})
    feed, found = Feed(a, b), []
    for block in range(3):
        for step in range(block * 5, block * 5 + 5):
            a.log(step, loss=step, acc=1.0)
            b.log(step, loss=step + 1.0, acc=0.5)
        b.say(type="text", key="note", text="z" * 2000, step=block)
        feed.send(a, b)
        found.append(feed.effects())
    feed.end(a, b)
    return [*found, feed.effects()]


def open_store(folder):
    store = RunStore(folder / "r1", RUN)
    store.uuid = bytes(16)
    return store


def commit_all(folder, faults):
    """Commits, each repeated until it is done, as the aggregator does."""
    store = open_store(folder)
    with faults.armed():
        for effects in work():
            before = store.rank_log.end, store.last_id, store.num_points
            for attempt in range(8):
                if attempt == 5:
                    faults.is_armed = False  # there is room again
                try:
                    store.commit(effects, from_the_end, TIME_NS)
                except StoreError:
                    assert (store.rank_log.end, store.last_id, store.num_points) == before
                else:
                    break
            else:
                raise AssertionError("it never fits again")
    store.close()
    compare(folder)


def compare(folder):
    again = RunStore(folder / "r1", RUN)
    restored, log = again.restore(), list(again.entries())
    again.close()
    for name, found in (("restored", restored), ("log", log), ("dump", _dump(folder / "r1"))):
        wanted = WANTED.setdefault(name, found)
        assert found == wanted, name


WANTED = {}
"""What an undisturbed store has: the first scenario is in peace."""


def _dump(run_dir):
    return [line for line in dump(run_dir) if '"lives"' not in line and "'lives'" not in line]


def test_a_commit_that_fails_anywhere_is_as_if_it_had_not_been_and_can_be_repeated(shm_path, monkeypatch, suite_table):
    """Reliability cases 11 and 15: nothing of it is acknowledged; what is in memory is written again in full."""
    monkeypatch.setattr(type(open_store(shm_path).rank_log).__init__, "__defaults__", (None, 3000))
    WANTED.clear()
    counts = fail_every_call(shm_path, commit_all)
    suite_table("a disk that fails at every call: the store", **counts, lost=0, doubled=0, wrong=0, stuck=0)


def reopen(folder, faults):
    """A restart of the aggregator while the disk fails, and another one."""
    store = open_store(folder)
    for effects in work():
        store.commit(effects, from_the_end, TIME_NS)
    store.close()
    with faults.armed():
        try:
            RunStore(folder / "r1", RUN).close()
        except (OSError, sqlite3.Error, ConfigError):
            assert faults.failed
    compare(folder)


def test_a_store_whose_opening_fails_anywhere_can_be_opened_again(shm_path, suite_table):
    """Reliability case 15."""
    WANTED.clear()
    counts = fail_every_call(shm_path, reopen)
    suite_table("a disk that fails at every call: the store", **counts, lost=0, doubled=0, wrong=0)


# -- the forwarder


class PickySink(JsonlSink):
    """Refuses two emissions for good."""

    limits = Limits(max_items=4)
    opened: ClassVar = []

    def open(self, *args):
        self.opened.append(self)
        super().open(*args)

    def write(self, batch):
        if {emission.id for emission in batch} & {5, 6}:
            raise PermanentSinkError("no")
        return super().write(batch)


def deliver(folder, faults):
    """A forwarder that is started again until it has delivered everything."""
    store = StoreMaker(folder / "run-1")
    store.add_points([("loss", step, float(step)) for step in range(12)])
    store.set_status("finished")
    with faults.armed():
        for start in range(8):
            if start == 5:
                faults.is_armed = False
            try:
                if forward(store.run_dir, "jsonl", FakeHost(), once=True) == EXIT_OK:
                    break
            except (OSError, sqlite3.Error):
                assert faults.failed
            finally:  # as the end of the process does
                while PickySink.opened:
                    PickySink.opened.pop().close(None)
        else:
            raise AssertionError("it never ends")
    place = store.run_dir / "sinks" / "jsonl"
    assert [line["id"] for line in read_jsonl(place / "run-1.jsonl")] == [1, 2, 3, 4, 7, 8, 9, 10, 11, 12]
    assert [(line["id"], line["reason"]) for line in read_jsonl(place / "dead.jsonl")] == [(5, "no"), (6, "no")]
    assert sorted(path.name for path in place.iterdir() if not path.name.startswith(".state.json")) == [
        "cursor.json", "dead.jsonl", "lock", "run-1.jsonl", "state.json"
    ]  # fmt: skip


def test_no_call_of_a_forwarder_that_fails_loses_or_doubles_a_line(shm_path, monkeypatch, suite_table, capsys):
    """Reliability cases 11 and 15: the cursor moves after the sink, and a torn line is cut off."""
    monkeypatch.setattr(forward_process, "make_sink", lambda spec: PickySink())
    counts = fail_every_call(shm_path, deliver)
    suite_table("a disk that fails at every call: a forwarder", **counts, lost=0, doubled=0, wrong=0, stuck=0)
