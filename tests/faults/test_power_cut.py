"""A power cut at any moment: what was synced is there, nothing else than what was logged, and every hole is declared.

A real JournalWriter writes real files, a real Shipper sends what it reads and syncs and trims, a model keeps what is on
the disk; then the power goes. What the disk has is put into another folder, whose journal another Shipper sends to the
pipeline, which knows what it had been sent before the cut, or is new itself. The oracle is the list of what was logged.
"""

import contextlib
import random
import shutil
from collections import Counter

import pytest
from faults.disk_model import Disk

from ddplog.agent.shipper import DEATH_CHECK_NS, HEARTBEAT_NS, RESEND_NS, SYNC_NS, Shipper
from ddplog.core.attempt import Options
from ddplog.core.dedup import Gap
from ddplog.core.effects import WriterInfo
from ddplog.core.pipeline import Pipeline
from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, KIND_SCHEMA, decode, scan, scan_payload
from ddplog.journal.reader import JournalReader
from ddplog.journal.segment import SEGMENT_HEADER
from ddplog.journal.segment import SEGMENT_HEADER_BYTES as HEADER_BYTES
from ddplog.journal.writer import JournalFullError, JournalWriter
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

TRIALS = 3000
NIGHTLY_TRIALS = 200_000
INCARNATION = bytes(range(16))
IDENTITY = {
    "rank": 0, "world_size": 1, "local_rank": 0, "node_rank": 0, "pid": 1, "host": "h", "boot_id": "b",
    "started_unix_ns": 7,
}  # fmt: skip
OPTIONS = Options(grace_ns=1 << 60, late_ns=1, settle_ns=1, max_keys=1000)
KEYS = [tuple(f"k{width}_{i}" for i in range(width)) for width in (1, 3, 40)]
MANY = 400
"""Rounds after which an exchange that is not over is taken to be stuck; it takes less than 40."""


class Receiver:
    """An aggregator without sockets and store: what it has taken is durable at once."""

    def __init__(self):
        self.pipeline = Pipeline(OPTIONS)
        self.records = {}
        """seq -> record."""
        self.events = []
        self.status = None

    def take(self, data, now_ns):
        """Take a message; return the answer, if there is one."""
        message = codec.decode(data)
        pipeline = self.pipeline
        if isinstance(message, pb.Hello):
            writers = pipeline.hello([_info(writer) for writer in message.writers], now_ns, 1)
            return codec.encode_welcome(bytes(16), map(_cursor, writers))
        if isinstance(message, (pb.Batch, pb.Loss)):
            if isinstance(message, pb.Batch):
                whose, first, count = message.incarnation, message.first_seq, message.num_records
                outcome = pipeline.batch(whose, first, count, message.payload, now_ns, 1)
            else:
                outcome = pipeline.loss(message.incarnation, message.first_seq, message.next_seq, now_ns, 1)
            if outcome is None:
                return codec.encode_reject(pb.Reject.UNKNOWN_WRITER, message.incarnation, 0, "")
            if isinstance(outcome, Gap):
                return codec.encode_reject(pb.Reject.OUT_OF_ORDER, message.incarnation, outcome.next_seq, "")
            self.commit()
            return codec.encode_ack([_cursor(self.writer)])
        if isinstance(message, pb.Heartbeat):
            pipeline.node(message.node_id, message.is_over, now_ns)
        if isinstance(message, pb.Bye):
            pipeline.bye(message.incarnation, message.next_seq, now_ns, 1)
        return None

    def commit(self):
        effects = self.pipeline.take()
        self.events += effects.events
        self.status = effects.status or self.status
        for entry in effects.log:
            for offset, _ in scan_payload(entry.payload):
                record = decode(entry.payload, offset)
                assert record.seq not in self.records, f"seq {record.seq} was taken twice"
                self.records[record.seq] = record

    @property
    def writer(self):
        return self.pipeline.writers[INCARNATION]


def _info(writer):
    names = ("incarnation", "rank", "world_size", "local_rank", "node_rank", "host", "pid", "boot_id")
    return WriterInfo(
        **{name: getattr(writer, name) for name in names}, started_unix_ns=writer.started_unix_ns, node_id="0",
        is_alive=writer.is_alive, oldest_seq=writer.oldest_seq,
    )  # fmt: skip


def _cursor(writer):
    return writer.info.incarnation, writer.next_seq, writer.attempt


def make_writer(path, incarnation, segment_bytes):
    return JournalWriter(
        path, incarnation, IDENTITY, segment_bytes=segment_bytes, spool_bytes=1 << 30, check=lambda: None
    )


class Trial:
    """One life of a journal, and what comes after it."""

    def __init__(self, seed, root, *, fails=False):
        self.rng = random.Random(seed)
        self.root = root
        self.job = root / "job"
        self.job.mkdir()
        self.path = self.job / f"0.{INCARNATION.hex()}"
        self.disk = Disk(self.rng, self.job, self.path, has_garbage=self.rng.random() < 0.2)
        self.fails = fails
        self.writer = None
        self.receiver = Receiver()
        self.logged = {}
        """The oracle: seq -> (kind, step, what)."""
        self.promised = 0
        """Every seq below it is durable on the node, as sync() or flush() has said."""
        self.trimmed = 0
        """Every seq below it was acknowledged and may be deleted."""
        self.now_ns = 0
        self.value = seed % 1009
        """Where the values begin: another life's are others."""
        self.survivors = set()
        """Seqs whose bytes the cut has left, together with their segment's header."""
        self.counts = Counter()
        self.is_alive = True

    # -- before the cut

    def live(self):
        rng = self.rng
        segment_bytes = rng.choice((9000, 12_288, 20_000))
        if self.disk.has_garbage:
            self._earlier_life(segment_bytes)
        self.writer = make_writer(self.path, INCARNATION, segment_bytes)
        self.disk.look()
        keep_bytes = rng.choice((0, 0, 30_000))
        self.shipper = Shipper(self.job, "r1", "0", keep_bytes)
        is_connected = rng.random() < 0.5
        for _ in range(rng.randint(2, 12)):
            what = rng.random()
            if what < 0.5:
                self._log()
            elif what < 0.65 and is_connected:
                self._exchange(self.shipper, is_lossy=True)
            elif what < 0.77:
                self._sync()
            elif what < 0.82:
                self._flush()
            elif what < 0.97:
                self.disk.write_back()
            else:  # the agent is started again
                self.shipper.close()
                self.shipper = Shipper(self.job, "r1", "0", keep_bytes)
            self.disk.look()
        if rng.random() < 0.7:  # much that no sync has seen yet
            self._log(num_records=35, keys=KEYS[-1])
            self.disk.write_back()
            self._log(num_records=35)

    def _earlier_life(self, segment_bytes):
        """Its journal has the same seqs at the same places, other values, and is deleted; the disk may show its blocks."""
        self.writer, value, self.value = make_writer(self.root / "0.e", b"e" * 16, segment_bytes), self.value, -1
        self._log(num_records=60)
        self._log(num_records=60)
        for path in sorted((self.root / "0.e").glob("*.seg")):
            self.disk.discard(path.read_bytes())
        self.writer.close(finished=True)
        self.logged.clear()
        self.value = value

    def _log(self, num_records=None, keys=None):
        rng, writer = self.rng, self.writer
        keys = keys or KEYS[rng.randrange(len(KEYS))]
        for _ in range(num_records or rng.choice((1, 5, 30))):
            step = len(self.logged)
            first = writer.next_seq
            writer.enter()
            try:
                if rng.random() < 0.05:
                    what = f"{step}:{self.value}:" + "x" * rng.choice((5, 300, 5000))
                    writer.append_message({"type": "text", "key": "k", "text": what}, step)
                    kind = KIND_MESSAGE
                else:
                    what = (keys, (float(step + self.value * 1_000_000),) * len(keys))
                    writer.append_scalars(keys, list(what[1]), step, 1.0)
                    kind = KIND_SCALARS
            except JournalFullError:
                continue
            finally:
                writer.leave()
            for seq in range(first, writer.next_seq - 1):
                self.logged[seq] = (KIND_SCHEMA, None, what[0])
            self.logged[writer.next_seq - 1] = (kind, step, what)

    def _sync(self):
        self._may_fail()
        self.shipper.discover()
        for tracked in self.shipper.tracked.values():
            seq = self.writer.next_seq
            if tracked.reader.sync():
                self.promised = seq
            self.trimmed = max(self.trimmed, tracked.acked_seq)
        self.now_ns += SYNC_NS
        self.shipper.keep_durable(self.now_ns)

    def _flush(self):
        self._may_fail()
        seq = self.writer.next_seq
        with contextlib.suppress(OSError):
            self.writer.flush()
            self.promised = seq

    def _may_fail(self):
        if self.fails and self.rng.random() < 0.4:
            self.disk.fail_in = self.rng.randint(0, 6)
        self.writer._next_check_ns = 0  # the second in which the rank looks at its head page is over

    def _exchange(self, shipper, *, is_lossy=False, is_over=False):
        """One round of messages there and back."""
        rng = self.rng
        self.now_ns += RESEND_NS // 4
        shipper.discover()
        messages = list(shipper.outgoing(self.now_ns))
        messages += filter(None, [shipper.heartbeat(self.now_ns + HEARTBEAT_NS, is_over=is_over)])
        messages += shipper.byes()
        for data in messages:
            if is_lossy and rng.random() < 0.1:
                continue
            answer = self.receiver.take(data, self.now_ns)
            if answer is not None and not (is_lossy and rng.random() < 0.1):
                shipper.receive(answer, self.now_ns)

    # -- the cut and after

    def cut(self):
        after = self.root / "after"
        after.mkdir()
        self.disk.cut(self.path, after / self.path.name)
        self.survivors = self._survivors(after / self.path.name)
        self.shipper.close()
        self.is_alive = False
        if self.rng.random() < 0.25:
            self.receiver = Receiver()  # its disk is lost too
        else:
            self.trimmed = 0  # what was acknowledged, it has
        self.shipper = Shipper(after, "r1", "0", 1 << 30)
        self.shipper.discover()
        return bool(self.shipper.tracked)

    def _survivors(self, after):
        seqs = set()
        for path in self.path.glob("*.seg"):
            whole, left = path.read_bytes(), b""
            if (after / path.name).exists():
                left = (after / path.name).read_bytes().ljust(len(whole), b"\0")
            header = whole[:HEADER_BYTES]
            if header in (left[:HEADER_BYTES], left[-HEADER_BYTES:]):
                _, _, epoch, _, seq, _ = SEGMENT_HEADER.unpack_from(header)
                for offset, length in scan(memoryview(whole), HEADER_BYTES, len(whole), epoch):
                    if whole[offset : offset + length] == left[offset : offset + length]:
                        seqs.add(seq)
                    seq += 1
        return seqs

    def recover(self):
        """Send all there is, over a line that loses some of it; then over one that does not."""
        for number in range(MANY):
            self._exchange(self.shipper, is_lossy=number < 4, is_over=True)
            self.shipper.check_deaths(self.now_ns + DEATH_CHECK_NS * number)
            self.receiver.pipeline.tick(self.now_ns, 1)
            self.receiver.commit()
            if self.shipper.is_idle and self.receiver.status is not None:
                return
        raise AssertionError(f"stuck: {self.shipper} {self.shipper.tracked} {self.receiver.pipeline}")

    def check(self):
        receiver, writer = self.receiver, self.receiver.writer
        schemas, undecipherable = {}, set()
        for seq, record in sorted(receiver.records.items()):
            kind, step, what = self.logged[seq]
            assert record.kind == kind, f"seq {seq}"
            if kind == KIND_SCHEMA:
                assert tuple(record.message["keys"]) == what
                schemas[record.message["id"]] = what
            elif kind == KIND_MESSAGE:
                assert (record.step, record.message["text"]) == (step, what)
            elif record.schema_id in schemas:
                assert (record.step, schemas[record.schema_id], record.values) == (step, *what)
            else:
                undecipherable.add(seq)
        end = writer.next_seq
        assert end <= len(self.logged)
        missing = set(range(end)) - receiver.records.keys()
        assert end >= self.promised, f"{end} is left of {self.promised}"
        kept = set(range(self.trimmed, self.promised))
        assert not missing & kept, f"synced, and lost: {sorted(missing & kept)}"
        if not self.trimmed:
            assert not undecipherable & kept, f"synced, and without their keys: {sorted(undecipherable & kept)}"
        assert self.survivors <= receiver.records.keys() | set(range(self.trimmed))
        lost = missing | undecipherable
        assert writer.drops.get("lost_records", 0) == len(lost), (writer.drops, sorted(lost))
        assert _declared(receiver.events) == lost
        values = sum(self._num_values(seq) for seq in receiver.records if seq not in undecipherable)
        assert receiver.pipeline.num_values == values
        assert writer.has_ended
        self._count(missing, undecipherable)

    def _num_values(self, seq):
        kind, _, what = self.logged[seq]
        return len(what[1]) if kind == KIND_SCALARS else 0

    def _count(self, missing, undecipherable):
        records = self.receiver.records
        self.counts["records"] += len(self.logged)
        self.counts["synced"] += self.promised
        self.counts["declared_lost"] += len(missing) + len(undecipherable)
        self.counts["lost_synced"] += 0
        self.counts["behind_holes"] += len([seq for seq in self.survivors if seq > min(missing, default=seq)])
        self.counts["with_holes"] += bool(missing)
        self.counts["holes_before_records"] += any(max(records, default=-1) > seq for seq in missing)
        self.counts["failed_syncs"] += self.disk.num_failed

    def close(self):
        self.shipper.close()
        self.disk.close()
        if self.writer is not None:
            self.writer.close(finished=False)


def _declared(events):
    """The seqs that events name as lost."""
    seqs = set()
    for event in events:
        if event.kind == "loss":
            first, _, last = event.message.partition(" seq ")[2].partition(",")[0].partition(" to ")
            assert not seqs & set(range(int(first), int(last) + 1)), "declared twice"
            seqs.update(range(int(first), int(last) + 1))
    return seqs


def run(seed, folder, monkeypatch, *, fails):
    root = folder / str(seed)
    root.mkdir()
    trial = Trial(seed, root, fails=fails)
    # A process does not see its own locks: the trial says whether its writer lives.
    monkeypatch.setattr(JournalReader, "is_alive", property(lambda reader: trial.is_alive))
    try:
        with trial.disk.watching():
            trial.live()
        if trial.cut():
            trial.recover()
            trial.check()
        else:  # not even its identity was on the disk
            assert not trial.promised, "synced, and gone"
            assert trial.disk.num_failed or not trial.receiver.pipeline.writers, "declared, and gone"
            trial.counts["gone"] += 1
    except BaseException as exc:
        exc.add_note(f"seed {seed}, failing syncs {fails}")
        raise
    finally:
        trial.close()
        shutil.rmtree(root)
    trial.counts["trials"] += 1
    return trial.counts


def run_many(trials, folder, monkeypatch, suite_table):
    first = random.SystemRandom().randrange(1 << 32)
    print(f"seeds from {first}")
    counts = Counter()
    for seed in range(first, first + trials):
        counts += run(seed, folder, monkeypatch, fails=seed % 3 == 0)
    print(dict(counts))
    assert counts["holes_before_records"] > trials // 50, "the model makes no holes"
    assert counts["failed_syncs"] > trials // 50, "no sync fails"
    suite_table(
        "power cuts", trials=counts["trials"], records=counts["records"], synced=counts["synced"],
        failed_syncs=counts["failed_syncs"], holes_before_records=counts["holes_before_records"],
        declared_lost=counts["declared_lost"], lost_synced=0, lost=0, doubled=0, wrong=0, stuck=0,
    )  # fmt: skip


@pytest.mark.timeout(300)
def test_a_power_cut_takes_nothing_synced_and_hides_nothing(shm_path, monkeypatch, suite_table):
    """Reliability cases 16 and 17."""
    run_many(TRIALS, shm_path, monkeypatch, suite_table)


@pytest.mark.nightly
@pytest.mark.timeout(7200)
def test_many_power_cuts_take_nothing_synced_and_hide_nothing(shm_path, monkeypatch, suite_table):
    """Reliability cases 16 and 17."""
    run_many(NIGHTLY_TRIALS, shm_path, monkeypatch, suite_table)
