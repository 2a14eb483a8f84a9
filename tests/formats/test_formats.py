"""Files and messages of every released format are read for ever; those of a newer one are refused by name.

data/<what>-<version>/ was written by the release that wrote that version, and is never written again (fixtures.py adds
new ones). Format 1 of everything is the first that was released: there is no earlier one to read. Format 2 of the store
and version 2 of the wire know system writers.
"""

import json
import shutil
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from formats.fixtures import DATA, IDENTITY, INCARNATION, JOB, MAKERS, NAMES, messages
from forward.test_process import FakeHost
from store.store_jobs import TIME_NS, Feed, Rank, Sampler

from ddplog.agent.shipper import Shipper
from ddplog.aggregator.process import Aggregator
from ddplog.core.records import KIND_MESSAGE, KIND_SCALARS, decode, scan_payload
from ddplog.errors import ConfigError, PermanentSinkError, RemoteProtocolError, RunNotFoundError
from ddplog.forward.ledger import Cursor, Ledger
from ddplog.forward.process import EXIT_UNUSABLE, forward
from ddplog.journal import segment
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import read_job
from ddplog.store.rank_log import RankLog, iter_entries
from ddplog.store.reader import open_run
from ddplog.store.run_store import RunStore
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec


@pytest.fixture
def of(tmp_path):
    """Return a copy of a fixture that may be written to."""

    def copy(name):
        place = tmp_path / name
        shutil.copytree(DATA / name, place)
        for path in place.rglob("*"):  # git keeps no modes
            path.chmod(0o700 if path.is_dir() else 0o600)
        return place

    return copy


def versions(what):
    return sorted(int(path.name.rpartition("-")[2]) for path in DATA.glob(f"{what}-*"))


@pytest.mark.parametrize("what", MAKERS)
def test_every_version_up_to_the_one_written_now_has_its_fixture(what):
    """Whoever raises a version adds a fixture, and keeps the old ones: they are what the tests below read."""
    written, _ = MAKERS[what]

    assert versions(what) == list(range(1, written + 1))


def test_the_versions_that_are_read_are_those_that_have_fixtures():
    assert sorted(segment.READABLE) == versions("journal")
    assert list(range(codec.OLDEST_VERSION, codec.PROTOCOL_VERSION + 1)) == versions("wire")


# -- what is read for ever


def read_journal(folder):
    reader = JournalReader(folder)
    records = []
    while (chunk := reader.read(1 << 20)) is not None:
        records += [decode(chunk.payload, offset) for offset, _ in scan_payload(chunk.payload)]
    return reader, records


@pytest.mark.parametrize("version", versions("journal"))
def test_a_journal_of_every_version_is_read(of, version):
    """Reliability case 27: a journal may be found long after ddplog was updated."""
    reader, records = read_journal(of(f"journal-{version}"))

    assert (reader.identity, reader.incarnation) == (IDENTITY, INCARNATION)
    assert (reader.step, reader.drops, reader.acked_seq, reader.has_finished) == (13, {"bad_value": 3}, 5, True)
    assert [record.seq for record in records] == list(range(len(records)))
    schemas = {r.message["id"]: tuple(r.message["keys"]) for r in records if r.message and "keys" in r.message}
    numbers = [(r.step, r.weight, schemas[r.schema_id], r.values) for r in records if r.kind == KIND_SCALARS]
    assert numbers[:12] == [(step, 2.0, NAMES, (step * 0.5, -float(step))) for step in range(12)]
    (step, _, _, (nan, inf)) = numbers[12]
    assert (step, str(nan), inf) == (13, "nan", float("inf"))
    assert [(r.step, r.message) for r in records if r.kind == KIND_MESSAGE] == [
        (12, {"type": "text", "key": "note", "text": "hällo \U0001f600"}),
        (-(1 << 63), {"type": "params", "values": {"lr": 0.1, "name": "x", "none": None}}),
        (-(1 << 63), {"type": "finish", "status": "finished", "detail": ""}),
    ]
    assert {record.time_unix_ns for record in records} == {TIME_NS}
    assert len(segment.segment_numbers(str(reader.folder))) == 2
    reader.close()


@pytest.mark.parametrize("version", versions("rank_log"))
def test_a_rank_log_of_every_version_is_read(of, version):
    """Reliability case 27."""
    assert [
        (e.writer_id, e.attempt, e.rank, e.incarnation, e.first_seq, e.num_records, e.payload)
        for e in iter_entries(of(f"rank_log-{version}"))
    ] == [(n % 2 + 1, n // 2, n % 2 - 1, bytes([n % 2]) * 16, n * 3, 3, bytes([n]) * 48) for n in range(4)]


@pytest.mark.parametrize("version", versions("run_store"))
def test_a_run_of_every_version_is_read_and_continued(of, version):
    """Reliability case 27."""
    folder = of(f"run_store-{version}")
    with open_run(folder) as run:
        loss, each = run.metric("loss"), run.rank_metric("each")
        assert (run.run_id, run.project, run.name, run.tags, run.config) == ("r1", "p", "a run", ("t",), {"lr": 0.1})
        assert (loss.step.tolist(), loss.value.tolist(), loss.n.tolist()) == ([0, 1, 2], [3.0, 4.0, 5.0], [2, 2, 2])
        assert (loss.min.tolist(), loss.max.tolist()) == ([0.0, 1.0, 2.0], [4.0, 5.0, 6.0])
        assert each.rank.tolist() == [0, 1] * 3
        assert [(text.rank, text.key, text.text) for text in run.texts()] == [(1, "note", "hällo\x00 \U0001f600")]
        assert {param.name: param.value for param in run.params()} == {"lr": 0.1, "name": "x"}
        assert {(drop.reason, drop.count) for drop in run.drops()} == {("bad_value", 3)}
        assert {event.kind for event in run.events()} >= {"alert", "death", "define", "nonfinite"}
        assert [(writer.rank, writer.state) for writer in run.writers()] == [(0, "finished"), (1, "died")]
        assert len(run.writers("system")) == version - 1
    store = RunStore(folder, {})
    restored = store.restore()
    ranks = [writer for writer in restored.writers if not writer.is_system]
    assert [(w.info.rank, w.next_seq, w.num_values) for w in ranks] == [(0, 7, 8), (1, 6, 8)]
    assert len(list(store.entries())) == len(restored.writers) == version + 1
    store.close()


@pytest.mark.parametrize("version", versions("run_store"))
def test_a_store_of_every_version_becomes_one_of_the_newest_and_can_be_written_on(of, version):
    folder = of(f"run_store-{version}")
    a, b = Rank(0, 2, life=1), Rank(1, 2, life=1)
    RunStore(folder, {}).close()
    store = RunStore(folder, {})  # migrated once
    feed = Feed(a, b, samples := Sampler(b), restored=store.restore())
    a.log(3, loss=1.0)
    feed.send(a.log(3, loss=1.0), b.log(3, loss=2.0), samples.log(5, **{"sys/host/cpu_pct": 1.0}))
    feed.end(a, b, samples)
    store.commit(feed.effects(20_000), lambda positions: None, TIME_NS)
    store.close()

    with open_run(folder) as run:
        assert run.metric("loss").step.tolist() == [0, 1, 2, 3]
        assert run.metric("sys/host/cpu_pct").value.tolist() == [1.0]
        assert len(run.writers("system")) == version
        assert len(run.writers()) == 4
    with closing(sqlite3.connect(folder / "run.db")) as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone() == ("2",)
        columns = [row[1] for row in db.execute("PRAGMA table_info(writers)")]
    assert columns[-1] == "role"


@pytest.mark.parametrize("version", versions("wire"))
@pytest.mark.parametrize("kind", messages())
def test_a_message_of_every_version_is_understood(version, kind):
    """Reliability case 27: an agent and an aggregator of different releases meet on the wire."""
    path = DATA / f"wire-{version}" / f"{kind}.bin"
    if not path.exists():
        pytest.skip(f"version {version} has no {kind}")

    expected = codec.decode(messages()[kind])
    if version == 1 and kind == "hello":
        expected.protocol_version = 1
        del expected.writers[1:]
    elif version == 1 and kind == "welcome":
        expected.protocol_version = 1
        expected.created_unix_ns = 0
    assert codec.decode(path.read_bytes()) == expected


@pytest.mark.parametrize("version", versions("cursor"))
def test_a_sinks_cursor_of_every_version_is_read(of, version):
    ledger = Ledger(of(f"cursor-{version}") / "sinks" / "jsonl")

    assert ledger.read_cursor() == Cursor(cursor=41, position={"num_bytes": 1234}, store_uuid="aa" * 16)


@pytest.mark.parametrize("version", versions("job"))
def test_a_job_of_every_version_is_read(of, version):
    assert read_job(of(f"job-{version}") / "k-r1") == JOB


def test_a_job_of_another_release_with_other_fields_is_read(of):
    """A field that came later has its default, one that we do not know is passed over: `ddplog sync` finds old jobs."""
    path = of("job-1") / "k-r1" / "job.json"
    raw = json.loads(path.read_text())
    del raw["launcher_ticks"], raw["format"]
    path.write_text(json.dumps(raw | {"added_later": 1}))

    assert read_job(path.parent) == JOB


# -- what is written now


CHANGED = "the format has changed: raise its version, and add a fixture (until the first release: make this one anew)"


@pytest.mark.parametrize("what", ["journal", "rank_log", "wire"])
def test_what_is_written_is_what_the_version_says_byte_for_byte(tmp_path, what):
    """A change of the format without a new version would be read wrongly by an older ddplog."""
    version, make = MAKERS[what]
    made = tmp_path / "made"
    make(made)
    known = {p.relative_to(DATA / f"{what}-{version}"): p.read_bytes() for p in files(DATA / f"{what}-{version}")}
    found = {p.relative_to(made): p.read_bytes() for p in files(made)}

    assert found == known, CHANGED


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_the_stores_tables_are_what_the_version_says(tmp_path):
    """Its bytes are SQLite's."""
    version, make = MAKERS["run_store"]
    make(tmp_path / "made")

    assert tables(tmp_path / "made") == tables(DATA / f"run_store-{version}"), CHANGED


def tables(folder):
    with closing(sqlite3.connect(f"file:{folder / 'run.db'}?mode=ro&immutable=1", uri=True)) as db:
        return dict(db.execute("SELECT name, sql FROM sqlite_master").fetchall())


def test_reasons_of_drops_keep_their_places():
    """The head page has their counts by place."""
    assert segment.DROP_REASONS[:17] == (
        "bad_value", "bad_key", "bad_step", "bad_weight", "key_limit", "record_too_large", "disk_full", "spool_full",
        "after_finish", "forked_child", "reentrant_overflow", "io_error", "device_backlog", "device_error",
        "device_pending", "graph_capture", "unsupported",
    )  # fmt: skip
    assert segment.DROPS_OFFSET + 8 * len(segment.DROP_REASONS) <= segment.PENDING_OFFSET < segment.JSON_OFFSET


def test_a_journal_that_is_older_than_the_count_of_what_waits_has_none(of):
    """The field came later, into bytes that had always been 0: the same format, for both sides."""
    reader, _ = read_journal(of("journal-1"))

    assert reader.num_unarrived == 0
    reader.close()


# -- what is refused


def test_a_newer_journal_is_refused_and_named(of, tmp_path, caplog):
    folder = of("journal-1")
    head = folder / "head"
    data = bytearray(head.read_bytes())
    data[8] = 2
    head.write_bytes(data)
    with pytest.raises(RemoteProtocolError) as caught:
        JournalReader(folder)
    assert str(caught.value) == f"{head}: a journal of format 2; this ddplog reads 1"

    folder.rename(tmp_path / "1.x")
    shipper = Shipper(tmp_path, "r1", "0", 0)
    shipper.discover()
    shipper.discover()
    assert shipper.tracked == {}
    assert [record.levelname for record in caplog.records if "format 2; this ddplog reads 1" in record.message] == [
        "ERROR"
    ]
    shipper.close()


def test_a_newer_rank_log_is_refused_named_and_left_alone(of):
    folder = of("rank_log-1")
    path = folder / "000002.log"
    path.write_bytes(b"2" + path.read_bytes()[1:])
    before = path.read_bytes()
    for read in (lambda: list(iter_entries(folder)), lambda: RankLog(folder)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert f"{path}: format 2; this ddplog reads 1" in str(caught.value)
    assert path.read_bytes() == before


def test_a_newer_run_store_is_refused_named_and_left_alone(of, capsys):
    folder = of("run_store-2")
    path = folder / "run.db"
    with closing(sqlite3.connect(path)) as db:
        db.execute("UPDATE meta SET value = '3' WHERE key = 'format'")
        db.commit()
    before = path.read_bytes()
    with pytest.raises(ConfigError) as caught:
        RunStore(folder, {})
    assert f"{path}: format 3; this ddplog reads and writes 2" in str(caught.value)
    with pytest.raises(RunNotFoundError, match="format 3, this ddplog reads 2") as unread:
        open_run(folder)
    assert str(folder) in str(unread.value)
    assert forward(folder, "jsonl", FakeHost(), once=True) == EXIT_UNUSABLE
    assert f"{path}: format 3; this ddplog reads 2" in capsys.readouterr().err
    assert path.read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["ranks", "run.db", "sinks", "writer.lock"]


def test_a_newer_cursor_is_refused_and_named(of):
    path = of("cursor-1") / "sinks" / "jsonl" / "cursor.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))

    with pytest.raises(PermanentSinkError, match=r"cursor\.json: format 2; this ddplog knows 1"):
        Ledger(path.parent).read_cursor()


def test_a_newer_job_is_refused_and_named(of):
    path = of("job-1") / "k-r1" / "job.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))

    with pytest.raises(ValueError, match=r"job\.json: format 2; this ddplog reads 1"):
        read_job(path.parent)


# -- the wire's version


class Router:
    """Takes an aggregator's answers."""

    def __init__(self):
        self.sent = []

    def send(self, routing_id, data):
        self.sent.append((routing_id, codec.decode(data)))


def aggregator_that_hears(hello):
    """What becomes of a Hello, in the aggregator's own code."""
    aggregator = Aggregator.__new__(Aggregator)
    aggregator.job, aggregator.nodes, aggregator.router = SimpleNamespace(run_id="r1"), {}, Router()
    aggregator._due_welcome, aggregator._is_heard = {}, False
    aggregator.pipeline = SimpleNamespace(hello=lambda *_: ["welcome"], is_closed=False, writers={})
    aggregator._handle(b"id", "0", pb.Envelope(hello=hello).SerializeToString(), 0, 0)
    return aggregator


@pytest.mark.parametrize(
    ("oldest", "newest", "spoken"), [(1, 1, 1), (0, 1, 1), (1, 2, 2), (0, 2, 2), (2, 3, 2), (1, 99, 2)]
)
def test_an_agent_that_speaks_a_version_of_ours_is_welcome_and_told_the_newest_of_both(oldest, newest, spoken):
    """Reliability case 27: HELLO negotiates. 0: it says nothing of older versions."""
    aggregator = aggregator_that_hears(
        pb.Hello(protocol_version=newest, oldest_version=oldest, run_id="r1", node_id="0")
    )

    assert aggregator.router.sent == []
    assert aggregator._due_welcome == {b"id": (spoken, ["welcome"])}
    assert codec.decode(codec.encode_welcome(bytes(16), [], spoken)).protocol_version == spoken


@pytest.mark.parametrize("has_more", [False, True])
def test_an_aggregator_has_heard_an_agent_once_it_has_declared_everything(has_more):
    """A run that had ended ends again, without waiting for anybody else."""
    hello = pb.Hello(protocol_version=2, oldest_version=1, run_id="r1", node_id="0", has_more=has_more)
    assert aggregator_that_hears(hello)._is_heard is not has_more


@pytest.mark.parametrize(
    ("oldest", "newest", "theirs"), [(3, 3, "3"), (3, 4, "3 to 4"), (0, 3, "3"), (0, 0, "0"), (7, 5, "7 to 5")]
)
def test_an_agent_of_another_version_is_told_so(oldest, newest, theirs, caplog):
    """Reliability case 27: not a dropped message that it sends again for ever, nor a misunderstanding."""
    aggregator = aggregator_that_hears(
        pb.Hello(protocol_version=newest, oldest_version=oldest, run_id="r1", node_id="0")
    )

    ((routing_id, reject),) = aggregator.router.sent
    assert (routing_id, reject.reason) == (b"id", pb.Reject.VERSION)
    assert reject.message == f"you have protocol version {theirs}; this ddplog speaks 1 to 2"
    assert f"cannot talk to node 0: it has protocol version {theirs}; this ddplog speaks 1 to 2" in caplog.text
    assert aggregator._due_welcome == {}
    assert not aggregator._is_heard


@pytest.mark.parametrize("version", [0, 3])
def test_an_aggregator_of_another_version_is_not_believed(version):
    welcome = pb.Welcome(protocol_version=version, store_uuid=bytes(16))
    with pytest.raises(RemoteProtocolError, match=f"protocol version {version}; this ddplog speaks 1 to 2"):
        codec.decode(pb.Envelope(welcome=welcome).SerializeToString())


def test_what_a_newer_peer_adds_to_a_message_is_passed_over():
    """A field that we do not know is no reason to refuse the rest."""
    ack = codec.encode_ack([(INCARNATION, 5, 0)])
    (tag, size, body) = (ack[:1], ack[1], ack[2:])
    unknown = b"\xfa\x01\x03new"  # field 31, three bytes
    message = codec.decode(tag + bytes([size + len(unknown)]) + body + unknown)

    assert [(c.incarnation, c.next_seq) for c in message.cursors] == [(INCARNATION, 5)]
