"""Makes the files in data/: one of each format, as this ddplog writes it, always with the same bytes.

    PYTHONPATH=src:tests python -m formats.fixtures

adds what is missing, and overwrites nothing: a file that is there was written by a release, and is read for ever.
"""

import json
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from unittest.mock import patch
from uuid import UUID

from store.store_jobs import TIME_NS, Feed, Rank, Sampler

import ddplog.journal.writer as writer_module
import ddplog.store.run_store as run_store_module
from ddplog.forward.ledger import FORMAT as CURSOR_FORMAT
from ddplog.forward.ledger import Cursor, Ledger
from ddplog.journal import segment
from ddplog.journal.reader import JournalReader
from ddplog.journal.spool import JOB_FORMAT, JobInfo, declare_job
from ddplog.journal.writer import JournalWriter
from ddplog.store import rank_log, schema
from ddplog.store.rank_log import RankLog
from ddplog.store.run_store import RunStore
from ddplog.v1 import data_pb2 as pb
from ddplog.wire import codec

DATA = Path(__file__).parent / "data"
INCARNATION = bytes(range(16))
IDENTITY = {
    "rank": 1, "world_size": 2, "local_rank": 1, "node_rank": 0, "pid": 4711, "host": "node-1", "boot_id": "b",
    "started_unix_ns": TIME_NS,
}  # fmt: skip
NAMES = ("loss", "größe")
JOB = JobInfo(
    run_id="r1", project="p", name="a run", dir="/runs", sinks=("jsonl", "tensorboard"), tags=("t",),
    config={"lr": 0.1}, created_unix_ns=TIME_NS, launcher_pid=1, launcher="torchrun", node_rank=0,
    settings={"grace_s": 10.0, "spool_bytes": 1 << 30},
)  # fmt: skip


class _Epochs:
    """Stands in for `random`: a segment's epoch is its number here."""

    def __init__(self) -> None:
        self.count = 0

    def SystemRandom(self) -> "_Epochs":  # noqa: N802 - the name in `random`
        return self

    def getrandbits(self, _: int) -> int:
        self.count += 1
        return self.count


def make_journal(folder: Path) -> None:
    """A rank that logs numbers, text and parameters over two segments, drops something, and finishes."""
    with patch.object(writer_module, "random", _Epochs()), patch.object(writer_module, "time_ns", lambda: TIME_NS):
        writer = JournalWriter(
            folder, INCARNATION, IDENTITY, segment_bytes=5000, spool_bytes=1 << 20, check=lambda: None
        )
        writer.enter()
        for step in range(12):
            writer.append_scalars(NAMES, [step * 0.5, -float(step)], step, 2.0)
        writer.append_message({"type": "text", "key": "note", "text": "hällo \U0001f600"}, 12)
        writer.append_message({"type": "params", "values": {"lr": 0.1, "name": "x", "none": None}})
        writer.append_scalars(NAMES, [float("nan"), float("inf")], 13, 1.0)
        writer.set_step(13)
        writer.drop("bad_value", 3)
        writer.append_last({"type": "finish", "status": "finished", "detail": ""})
        writer.leave()
        writer.close(finished=True)
    reader = JournalReader(folder)
    reader.set_acked(5)
    reader.close()


def make_rank_log(folder: Path) -> None:
    """Entries of two writers over two files."""
    log = RankLog(folder, file_bytes=300)
    for number in range(4):
        log.append(
            writer_id=number % 2 + 1, attempt=number // 2, rank=number % 2 - 1, incarnation=bytes([number % 2]) * 16,
            first_seq=number * 3, num_records=3, payload=bytes([number]) * 48,
        )  # fmt: skip
    log.close()


def make_run_store(folder: Path) -> None:
    """A finished run of two ranks with something of everything."""
    run = {"run_id": "r1", "project": "p", "name": "a run", "tags": ["t"], "config": {"lr": 0.1},
           "created_unix_ns": TIME_NS, "sinks": ["jsonl"]}  # fmt: skip
    a, b = Rank(0, 2), Rank(1, 2)
    a.say(type="define", pattern="each", reduce="none", replicated=False)
    a.say(type="params", values={"lr": 0.1, "name": "x"})
    for step in range(3):
        a.log(step, loss=step, each=10.0)
        b.log(step, weight=3.0, loss=step + 4.0, each=float("nan"))
    b.say(type="text", key="note", text="hällo\x00 \U0001f600", step=1)
    b.say(type="alert", title="hot", text="95", level="error")
    a.say(type="finish", status="finished", detail="")
    samples = Sampler(a).log(5, **{"sys/gpu/util_pct": 50.0})
    feed = Feed(a, b, samples)
    feed.pipeline.progress(b.incarnation, 2, 0, {"bad_value": 3}, 77, 0)
    feed.end(a, b, samples)
    feed.pipeline.node("0", True, 0)
    with patch.object(run_store_module, "uuid4", lambda: UUID(int=7)):
        store = RunStore(folder, run)
    store.commit(feed.effects(), lambda positions: None, TIME_NS)
    store.close()
    (folder / "writer.lock").unlink()
    with closing(sqlite3.connect(folder / "run.db")) as db:  # small, and one file
        db.execute("PRAGMA journal_mode=DELETE")
        db.execute("PRAGMA page_size=512")
        db.execute("VACUUM")


def make_cursor(folder: Path) -> None:
    ledger = Ledger(folder / "sinks" / "jsonl")
    ledger.write_cursor(Cursor(cursor=41, position={"num_bytes": 1234}, store_uuid="aa" * 16))


def make_job(folder: Path) -> None:
    declare_job(folder / "k-r1", JOB)
    for path in [*folder.glob("k-r1/secret"), *folder.glob("k-r1/job.lock"), *folder.glob("*.secret")]:
        path.unlink()
    for path in folder.glob("k-r1/logs"):
        path.rmdir()


def messages() -> dict[str, bytes]:
    """One of each kind."""
    writer = pb.Writer(
        incarnation=INCARNATION, rank=1, world_size=2, local_rank=1, node_rank=0, pid=4711, host="node-1", boot_id="b",
        started_unix_ns=TIME_NS, is_alive=True, oldest_seq=3,
    )  # fmt: skip
    sampler = pb.Writer()
    sampler.CopyFrom(writer)
    sampler.incarnation, sampler.role, sampler.belongs_to = bytes(range(16, 32)), pb.Writer.SYSTEM, INCARNATION
    progress = codec.make_progress(INCARNATION, -3, 17, {"bad_value": 2}, 4096)
    cursors = [(INCARNATION, 17, 1), (bytes(16), 0, 0)]
    return {
        "hello": codec.encode_hello("r1", "0", [writer, sampler]),
        "welcome": codec.encode_welcome(bytes(range(16)), cursors, created_unix_ns=TIME_NS),
        "batch": codec.encode_batch(INCARNATION, 17, 2, bytes(range(112)), 0xDEADBEEF),
        "loss": codec.encode_loss(INCARNATION, 17, 20),
        "ack": codec.encode_ack(cursors),
        "heartbeat": codec.encode_heartbeat("0", [progress], is_over=True),
        "bye": codec.encode_bye(INCARNATION, 19, finished=True),
        "reject": codec.encode_reject(pb.Reject.OUT_OF_ORDER, INCARNATION, 17, "records are missing"),
        "stack_request": codec.encode_stack_request([INCARNATION]),
        "stack": codec.encode_stack(INCARNATION, "Thread 1\n  File x", ""),
    }


def make_messages(folder: Path) -> None:
    folder.mkdir()
    for kind, data in messages().items():
        (folder / f"{kind}.bin").write_bytes(data)


MAKERS: dict[str, tuple[int, Callable[[Path], None]]] = {
    "journal": (segment.FORMAT_VERSION, make_journal),
    "rank_log": (rank_log.FORMAT_VERSION, make_rank_log),
    "run_store": (schema.FORMAT_VERSION, make_run_store),
    "wire": (codec.PROTOCOL_VERSION, make_messages),
    "cursor": (CURSOR_FORMAT, make_cursor),
    "job": (JOB_FORMAT, make_job),
}
"""Name -> (the version that is written now, how)."""


def main() -> None:
    """Add what is missing."""
    DATA.mkdir(exist_ok=True)
    for name, (version, make) in MAKERS.items():
        place = DATA / f"{name}-{version}"
        if place.exists():
            continue
        with tempfile.TemporaryDirectory() as base:
            made = Path(base) / "made"
            if name in ("cursor", "job"):
                made.mkdir(mode=0o700)
            make(made)
            shutil.copytree(made, place)
        print(place, json.dumps({str(p.relative_to(place)): p.stat().st_size for p in place.rglob("*") if p.is_file()}))


if __name__ == "__main__":
    main()
