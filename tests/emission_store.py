"""Makes small run stores by SQL, as the aggregator would have written them."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

from ddplog.store.schema import FORMAT_VERSION, SCHEMA

CREATED_NS = 1_700_000_000_000_000_000


class StoreMaker:
    """Writes emissions with rising ids into `<run_dir>/run.db`."""

    def __init__(self, run_dir: Path, uuid: str = "aa" * 16) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self.run_dir = run_dir
        self.next_id = 1
        with self.connect() as db:
            db.execute("PRAGMA journal_mode=WAL")
            db.executescript(SCHEMA)
            run = {"run_id": run_dir.name, "project": "p", "name": None, "tags": ["t"], "config": {"lr": 0.1},
                   "created_unix_ns": CREATED_NS, "sinks": []}  # fmt: skip
            for key, value in {"format": FORMAT_VERSION, "run": run, "store_uuid": uuid}.items():
                self._meta(db, key, value)
            self._commit(db)
        self.set_status("running")

    def connect(self):
        return closing(sqlite3.connect(self.run_dir / "run.db", isolation_level=None))

    def set_status(self, status: str, detail: str = "") -> None:
        with self.connect() as db:
            ended = None if status == "running" else CREATED_NS
            self._meta(db, "status", {"status": status, "detail": detail, "ended_unix_ns": ended})

    def skip_ids(self, count: int) -> None:
        self.next_id += count
        with self.connect() as db:
            self._commit(db)

    def add_points(self, rows, attempt: int = 0) -> None:
        """Rows of (key, step, value); a value of None is NaN. One transaction."""
        with self.connect() as db:
            db.execute("BEGIN")
            keys = {}
            for key, step, value in rows:
                if key not in keys:
                    keys[key] = self._key_id(db, key)
                db.execute(
                    "INSERT INTO points VALUES (?,?,?,?,?,1,1,?,0,?,0,?,0.0,?,0,NULL,0,?)",
                    (self.next_id, keys[key], attempt, step, value, value, value, value, value is None,
                     CREATED_NS + step),
                )  # fmt: skip
                self.next_id += 1
            self._commit(db)
            db.execute("COMMIT")

    def revise(self, key: str, step: int, value: float, attempt: int = 0) -> None:
        """Emit a late change of a point, as the store does: the old row moves to superseded."""
        with self.connect() as db:
            db.execute("BEGIN")
            where = "key_id = ? AND step = ? AND attempt = ?"
            at = (self._key_id(db, key), step, attempt)
            db.execute(f"INSERT INTO superseded SELECT * FROM points WHERE {where}", at)
            db.execute(
                f"UPDATE points SET id = ?, value = ?, revision = revision + 1 WHERE {where}",
                (self.next_id, value, *at),
            )
            self.next_id += 1
            self._commit(db)
            db.execute("COMMIT")

    def add_others(self) -> None:
        """One rank point, text, param and event each."""
        with self.connect() as db:
            db.execute("BEGIN")
            i = self.next_id
            db.execute("INSERT INTO rank_points VALUES (?,?,0,1,3,0.5,7)", (i, self._key_id(db, "gpu")))
            db.execute("INSERT INTO texts VALUES (?,0,1,'note',NULL,'hällo',7)", (i + 1,))
            db.execute("INSERT INTO params VALUES (?,0,0,'lr','0.1',7)", (i + 2,))
            db.execute("INSERT INTO events VALUES (?,0,NULL,5,'alert','warning','hot','{\"t\": 91}',7)", (i + 3,))
            self.next_id += 4
            self._commit(db)
            db.execute("COMMIT")

    def _key_id(self, db, name: str) -> int:
        db.execute("INSERT OR IGNORE INTO keys (name, reduce, replicated) VALUES (?, 'mean', 0)", (name,))
        return db.execute("SELECT key_id FROM keys WHERE name = ?", (name,)).fetchone()[0]

    def _commit(self, db) -> None:
        self._meta(db, "next_id", self.next_id)

    def _meta(self, db, key: str, value) -> None:
        db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, json.dumps(value)))
