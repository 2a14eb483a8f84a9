"""Makes run folders through SCHEMA and plain inserts: the reader is tested against the specification of the store,
not against whatever writes it."""

from __future__ import annotations

import json
import math
import os
import sqlite3
from pathlib import Path

from ddplog.store.schema import FORMAT_VERSION, POINT_FIELDS, SCHEMA

T0 = 1_785_000_000_000_000_000
HOSTILE = 'evil\x1b[2J</script><img src=x onerror=alert(1)>"\u202e[red]'


class RunMaker:
    """A run being written, as its aggregator would. `close` ends it."""

    def __init__(self, folder: Path, **run) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.db = sqlite3.connect(self.folder / "run.db", isolation_level=None)
        self.db.execute("PRAGMA journal_mode=WAL")
        self.db.executescript(SCHEMA)
        self.next_id = 1
        self.key_ids: dict[str, int] = {}
        meta = {
            "run_id": self.folder.name, "project": "digits", "name": None, "tags": ["a", "b"],
            "config": {"lr": 0.1}, "created_unix_ns": T0, "sinks": [],
        }  # fmt: skip
        self.meta("format", FORMAT_VERSION)
        self.meta("run", {**meta, **run})
        self.status("running")

    def meta(self, key, value):
        self.db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))

    def status(self, status, detail="", ended_unix_ns=None):
        self.meta("status", {"status": status, "detail": detail, "ended_unix_ns": ended_unix_ns})

    def finish(self, status="finished", detail="", took_s=90.5):
        self.status(status, detail, T0 + int(took_s * 1e9))
        return self.close()

    def close(self):
        self.db.close()
        return self.folder

    def control(self, pid=None):
        text = json.dumps({"socket": str(self.folder / "c.sock"), "pid": os.getpid() if pid is None else pid})
        (self.folder / "control.json").write_text(text)

    def attempt(self, attempt=1, world_size=2, reason="start", opened_unix_ns=None):
        opened = T0 + (attempt - 1) * 10**9 if opened_unix_ns is None else opened_unix_ns
        self.db.execute("INSERT INTO attempts VALUES (?, ?, ?, ?)", (attempt, world_size, opened, reason))

    def writer(self, rank, attempt=1, world_size=2, host="node0", next_seq=100, step=9, state="finished", **more):
        writer_id = self.db.execute("SELECT count(*) FROM writers").fetchone()[0] + 1
        row = {
            "writer_id": writer_id, "incarnation": os.urandom(16), "attempt": attempt, "rank": rank,
            "world_size": world_size, "local_rank": rank, "node_rank": 0, "host": host, "pid": 1000 + rank,
            "boot_id": "b", "started_unix_ns": T0, "next_seq": next_seq, "num_values": next_seq, "step": step, "state": state, **more,
        }  # fmt: skip
        self._insert("writers", row)
        return writer_id

    def key(self, name, reduce="mean", replicated=False):
        if name not in self.key_ids:
            self.key_ids[name] = len(self.key_ids) + 1
            self._insert(
                "keys", {"key_id": self.key_ids[name], "name": name, "reduce": reduce, "replicated": int(replicated)}
            )
        return self.key_ids[name]

    def point(self, key, step, value, attempt=1, table="points", **more):
        bad = isinstance(value, float) and math.isnan(value)
        value = None if bad else value
        row = {
            "id": self._id(), "key_id": self.key(key), "attempt": attempt, "step": step, "value": value, "n": 2,
            "expected": 2, "min": value, "min_rank": None if bad else 0, "max": value,
            "max_rank": None if bad else 1, "mean": value, "std": None if bad else 0.0,
            "nan_count": 2 if bad else 0, "inf_count": 0, "bad_rank": 0 if bad else None, "revision": 0,
            "time_unix_ns": T0 + max(0, step) * 10**8, **more,
        }  # fmt: skip
        self._insert(table, {name: row[name] for name in POINT_FIELDS})
        return row["id"]

    def revise(self, key, step, value, attempt=1):
        """Move the newest emission to superseded and emit another, as a late value does."""
        where = (self.key(key), step, attempt)
        row = self.db.execute("SELECT * FROM points WHERE key_id=? AND step=? AND attempt=?", where).fetchone()
        self._insert("superseded", dict(zip(POINT_FIELDS, row, strict=True)))
        self.db.execute("DELETE FROM points WHERE id=?", (row[0],))
        self.point(key, step, value, attempt, revision=row[POINT_FIELDS.index("revision")] + 1)

    def rank_point(self, key, step, rank, value, attempt=1):
        row = {"id": self._id(), "key_id": self.key(key, "none"), "attempt": attempt, "step": step, "rank": rank}
        self._insert("rank_points", {**row, "value": value, "time_unix_ns": T0})

    def param(self, name, value, rank=0):
        row = {"id": self._id(), "attempt": 1, "rank": rank, "name": name, "value": json.dumps(value)}
        self._insert("params", {**row, "time_unix_ns": T0})

    def text(self, key, text, step=None):
        row = {"id": self._id(), "attempt": 1, "rank": 0, "key": key, "step": step, "text": text, "time_unix_ns": T0}
        self._insert("texts", row)

    def event(self, kind, message, rank=None, step=None, level="warning", data=None, attempt=1):
        row = {"id": self._id(), "attempt": attempt, "rank": rank, "step": step, "kind": kind, "level": level}
        self._insert("events", {**row, "message": message, "data": json.dumps(data or {}), "time_unix_ns": T0})

    def drop(self, writer_id, reason, count):
        self._insert("drops", {"writer_id": writer_id, "reason": reason, "count": count})

    def sink(self, name, state="running", cursor=10, lag=2, detail=""):
        folder = self.folder / "sinks" / name
        folder.mkdir(parents=True)
        row = {"name": name, "state": state, "cursor": cursor, "lag": lag, "detail": detail, "time_unix_ns": T0}
        (folder / "state.json").write_text(json.dumps(row))

    def _id(self):
        self.next_id += 1
        return self.next_id - 1

    def _insert(self, table, row):
        marks = ", ".join("?" * len(row))
        self.db.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({marks})", tuple(row.values()))


def typical(folder, **run):
    """A run with two attempts, NaN, a revision, drops, events, a failed rank and hostile words."""
    maker = RunMaker(folder, **run)
    maker.attempt(1, 2, "start")
    maker.attempt(2, 2, "rank 1 came back")
    ids = [maker.writer(rank, attempt) for attempt in (1, 2) for rank in (0, 1)]
    maker.db.execute("UPDATE writers SET state='died', signal=9, host=? WHERE writer_id=?", (HOSTILE, ids[1]))
    for step in range(10):
        maker.point("train/loss", step, 1.0 / (step + 1), min=0.5 / (step + 1), max=2.0 / (step + 1), std=0.1)
        maker.point("tokens", step, 100.0 * step, mean=50.0 * step)
    for step in range(6, 9):
        maker.point("train/loss", step, -float(step), attempt=2)
    maker.db.execute("UPDATE keys SET reduce='sum' WHERE name='tokens'")
    maker.point("val/acc", 4, math.nan)
    maker.point("val/acc", 8, 0.75, n=1)
    maker.revise("val/acc", 8, 0.8)
    maker.point(HOSTILE, 1, 1.0)
    for rank in (0, 1):
        for step in range(5):
            maker.rank_point("per_rank", step, rank, rank + step / 10)
    for step in range(5):  # the store reduces such keys all the same
        maker.point("per_rank", step, 0.5 + step / 10)
    maker.param("lr", 0.1)
    maker.param(HOSTILE, HOSTILE)
    maker.text("note", HOSTILE, 3)
    maker.event("rank_died", f"rank 1 died {HOSTILE}", rank=1, step=6, level="error")
    maker.drop(ids[0], "spool_full", 7)
    maker.sink("tensorboard", "retrying", 20, 5, HOSTILE)
    return maker
